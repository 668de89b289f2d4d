"From samples to batches: what is encoded, what is supervised, what is left out."
import json, math

import pytest, torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings, strategies as st

from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.batch import Batches, StreamBatches, deal, drop_sharers, epoch_batches


def test_official_features(golden):
    "Ids, labels and the place where the last section begins are those of the official data set class."
    tokenizer, made = load_tokenizer(golden/'tokA'), json.loads((golden/'collator.json').read_text())
    processor = C2CProcessor(tokenizer, [tokenizer])
    for chat, feature in zip(made['chats'], made['chat_features']):
        row = processor.encode(chat[:-1], chat[-1]['content'])
        assert row['input_ids'] == feature['input_ids'] and row['labels'] == feature['labels']
        assert [bool(a) for a in row['active']] == [kind == 1 for kind, _ in feature['kv_cache_index']]
        assert torch.tensor(row['sections']).diff().nonzero().tolist() == [[sum(row['active']) - 1]]


@pytest.mark.parametrize('name', ['qwen2.5', 'qwen3', 'phi-3-mini', 'gpt-neox-20b'])
@pytest.mark.parametrize('follow', [False, True])
def test_answers_of_real_tokenizers(assets, name, follow):
    "The prompt's tokens are those it has at inference, and the answer can be read off the labels."
    receiver, sharer = load_tokenizer(assets/'tokenizers'/'qwen3'), load_tokenizer(assets/'tokenizers'/name)
    if not getattr(sharer, 'chat_template', None): sharer.chat_template = receiver.chat_template
    processor, chat, answer = C2CProcessor(receiver, [sharer]), [dict(role='user', content='Où est-ce? 东京 2.5')], ' Là-bas: 東京!\n'
    with_, without = processor.encode(chat, answer, follow=follow), processor.encode(chat)
    n = len(without['input_ids'])
    for k in 'input_ids', 'attention_mask', 'active', 'sections': assert with_[k][:n] == without[k]
    said = [i for i in with_['labels'] if i != -100]
    assert receiver.decode(said) == answer + '<|im_end|>\n' and with_['input_ids'][n:] == said and with_['labels'][:n] == [-100]*n
    if with_['sharer_input_ids'][0] is not None:
        new = len(with_['sharer_input_ids'][0]) - len(without['sharer_input_ids'][0])
        assert new == (len(said) if follow or processor.strategies[0] != 'offsets' else 0)
        if with_['pairing'][0] is not None: assert with_['pairing'][0][n:] == (list(range(len(without['sharer_input_ids'][0]), len(with_['sharer_input_ids'][0]))) if follow else [-1]*len(said))


def test_answer_that_would_change_the_prompt(assets):
    "A plain prompt without a blank at its end: the answer does not melt into its last word."
    t = load_tokenizer(assets/'tokenizers'/'gpt2')
    row = C2CProcessor(t, [t]).encode('The wor', 'ld runs')
    n = len(t('The wor').input_ids)
    assert row['input_ids'][:n] == t('The wor').input_ids and t.decode(row['input_ids'][n:]) == 'ld runs' + t.eos_token
    assert t('The world').input_ids[:n] != t('The wor').input_ids     # or this test would show nothing
    assert C2CProcessor(t, [t]).encode('The wor', ' runs', end=False)['labels'][-1] == t(' runs').input_ids[-1]


def test_bad_answers(golden):
    t = load_tokenizer(golden/'tokA')
    processor, chat = C2CProcessor(t, [t]), [dict(role='user', content='Hi')]
    for bad in '', 5, ['a']:
        with pytest.raises(ValueError, match='an answer must be a text'): processor.encode(chat, bad)
    with pytest.raises(ValueError, match='beginning'): processor.encode([*chat, dict(role='assistant', content='a')], 'b', continue_final_message=True)
    with pytest.raises(ValueError, match='one for each'): processor([chat, chat], answers=['a'])


# ---------------------------------------------------------------- which rows come when

lengths = st.lists(st.tuples(st.integers(2, 60), st.integers(1, 20)), min_size=1, max_size=60)
drawn = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None)


@drawn
@given(lengths, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_row_once_in_an_epoch(rows, size, bucket, epoch):
    "Whatever is sorted by length, and another order in every epoch and for every seed."
    steps = epoch_batches(rows, size, 1, epoch, bucket)
    assert sorted(i for s in steps for i in s) == list(range(len(rows)))
    assert all(0 < len(s) <= size for s in steps) and len(steps) == math.ceil(len(rows)/size)
    assert steps == epoch_batches(rows, size, 1, epoch, bucket)
    if len(rows) > 12 and size > 1: assert steps != epoch_batches(rows, size, 1, epoch + 1, bucket) and steps != epoch_batches(rows, size, 2, epoch, bucket)


@drawn
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_same_micro_batches_for_any_number_of_processes(processes, batch_size, accumulation, data):
    "Every row once, never more than fit, every process as many as the others, and none with nothing at all; as one process would have them, by number."
    size = processes*batch_size*accumulation
    rows = list(range(data.draw(st.integers(processes, size))))
    dealt = deal(rows, batch_size, processes, size)
    assert len(dealt) == processes and len({len(d) for d in dealt}) == 1
    assert all(d[0] and all(len(b) <= batch_size for b in d) and all(d[:-1]) for d in dealt)
    numbered = [dealt[k % processes][k // processes] for k in range(processes*len(dealt[0]))]
    alone, = deal(rows, batch_size, 1, size)
    assert [i for b in numbered for i in b] == rows and [b for b in numbered if b] == alone


@drawn
@given(st.integers(2, 30), st.integers(1, 3), st.integers(1, 2))
def test_steps_of_processes_together(rows, processes, batch_size):
    "What all processes read in a step is what one reads; a stream gives every row too."
    encoded = Dataset.from_dict(dict(length=[3 + i % 7 for i in range(rows)], supervised=[1 + i % 3 for i in range(rows)], row=list(range(rows))))
    make = lambda p, rank: Batches(encoded, batch_size, 2*batch_size*processes, p, rank, 5, 2)
    if rows < processes:
        with pytest.raises(ValueError, match='cannot be shared'): make(processes, 0)
        return
    one, several = make(1, 0), [make(processes, r) for r in range(processes)]
    for n in range(several[0].steps_per_epoch):
        assert sorted(i for s in several for b in s.step(n) for i in b) == sorted(i for b in one.step(n) for i in b)
    streams = [StreamBatches(lambda epoch: iter(encoded), batch_size, 2*batch_size*processes, processes, r, 5, 2) for r in range(processes)]
    steps = rows // (2*batch_size*processes)
    seen = [r['row'] for s in streams for n in range(steps) for b in s.read(n) for r in b]
    assert len(seen) == len(set(seen)) == steps*2*batch_size*processes
    if steps > 1: assert [r['row'] for b in streams[0].read(1) for r in b] == [r['row'] for b in StreamBatches(lambda epoch: iter(encoded), batch_size, 2*batch_size*processes, processes, 0, 5, 2).read(1) for r in b]     # also when it goes back


@drawn
@given(st.integers(1, 3), st.integers(0, 9), st.floats(0, 1), st.data())
def test_sharers_are_left_out_row_by_row(sharers, step, share, data):
    "One that speaks always stays; what is left out depends on the seed, the step and the number of the row alone."
    active = torch.tensor(data.draw(st.lists(st.lists(st.lists(st.booleans(), min_size=sharers, max_size=sharers), min_size=4, max_size=4), min_size=1, max_size=5)))
    numbers = data.draw(st.lists(st.integers(0, 50), min_size=len(active), max_size=len(active)))
    out = drop_sharers(active, numbers, share, 3, step)
    assert out.shape == active.shape and not (out & ~active).any()
    for a, o, n in zip(active, out, numbers):
        assert bool(o.any()) == bool(a.any())
        for j in range(sharers): assert torch.equal(o[:, j], a[:, j]) or not o[:, j].any()
        assert torch.equal(drop_sharers(a[None], [n], share, 3, step)[0], o)
    if share == 0: assert torch.equal(out, active)
