"Systems: batches and rows, scores and texts against plain passes of the models, closed gates, T2T, oracles, time and bad input."
import copy, json, threading, time

import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import tiny_train
from c2c_nb.align import C2CProcessor, load_tokenizer, read_chat
from c2c_nb.baseline import (Alone, Answer, C2C, CacheEnrichment, FewShot, FineTuned, Stages, System, T2T, T2TC2C, T2TPrompts, WorldPrompts, kept_columns, make_systems, register_system, system_names, token_cost, with_examples, _makers)
from c2c_nb.cache import make_cache, read_layer
from c2c_nb.model import C2CModel
from c2c_nb.toy import pretrain
from tiny_world import TinyWorld

few = settings(max_examples=4, deadline=None, derandomize=True)
say = lambda *words: dict(role='user', content=' '.join(words))
sys, bot = (lambda s: dict(role='system', content=s)), (lambda s: dict(role='assistant', content=s))
chats = [[say('why? the moon sings')], [sys('no. yes,'), say('a cat'), bot('reads 12'), say('and then')], [say('Où 東京 7.5'), bot('the dog')], [say('sun')]]
texts = ['the moon', 'a cat reads green and then the old dog sings', 'x', 'why? 12 yes, 7.5']
options = [[' a', ' b'], [' the tree', ' the dog sings', ' no.'], ['y', 'yy', 'yyy 12', ' '], [' blue', ' green moon']]
names = ['A', 'B', 'C', 'D']


def model_of(kind):
    "A random model with the tiny tokenizer's words: GPT-2-like, with a sliding window, or with rotary positions."
    more = dict(gpt2=dict(n_embd=32, n_layer=3, n_head=4, n_positions=256), mistral=dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=5))[kind]
    common = {k: v for k, v in tiny_train.common.items() if kind == 'mistral' or k in ('vocab_size', 'initializer_range', 'pad_token_id', 'eos_token_id', 'bos_token_id')}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **more)).eval()


_pairs = {}


def pair(name, golden=None, gate=1., strategy=None, follow=False):
    "A C2C model with its processor."
    key = name, gate, strategy, follow
    if key in _pairs: return _pairs[key]
    if name == 'golden':
        receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', 'sharer1'))
        processor = C2CProcessor(load_tokenizer(golden/'tokA'), [load_tokenizer(golden/'tokB')], strategy)
    elif name == 'world':
        world = TinyWorld()
        receiver, sharer = (pretrain(world, role)[0] for role in ('receiver', 'sharer'))
        processor = C2CProcessor(world.tokenizer, [world.tokenizer])
    else:
        receiver, sharer = model_of(name) if name in ('gpt2', 'mistral') else tiny_train.model('receiver'), tiny_train.model('llama')
        processor = tiny_train.processor(strategy=strategy)
    _pairs[key] = C2CModel(receiver, [sharer], [tiny.fuser_for(receiver, sharer, gate=gate)], follow_response=follow, processor=processor).eval()
    return _pairs[key]


def alone_of(c2c, j=None, **kwargs):
    p = c2c.processor
    return Alone(c2c.receiver, p.receiver_tokenizer, **kwargs) if j is None else Alone(c2c.sharers[j], p.sharer_tokenizers[j], 'sharer', **kwargs)


def kinds_of(c2c, which):
    "A system of each kind around a pair."
    tok, shots = c2c.processor.receiver_tokenizer, [('the sun', 'sings'), ('a dog', 'yes,')]
    return dict(alone=lambda: alone_of(c2c), sharer=lambda: alone_of(c2c, 0), c2c=lambda: C2C(c2c), t2t=lambda: T2T(alone_of(c2c), alone_of(c2c, 0), 5), equal=lambda: T2T(alone_of(c2c), alone_of(c2c, 0), 9, total=2.5e6),
        both=lambda: T2TC2C(c2c, message_tokens=4), fewshot=lambda: FewShot(c2c.receiver, tok, shots), oracle=lambda: CacheEnrichment(c2c.receiver, tok, shots), one_layer=lambda: CacheEnrichment(c2c.receiver, tok, shots, [1]))[which]()


def assert_rows_alone(system, prompts, opts, n=5, questions=None):
    "Every row of a batch is what it is on its own."
    written, scored = system.answer(prompts, max_new_tokens=n, questions=questions), system.answer(prompts, opts, questions=questions)
    for i, p in enumerate(prompts):
        q = questions and [questions[i]]
        one = system.answer([p], max_new_tokens=n, questions=q)[0]
        assert (written[i].text, written[i].tokens_in, written[i].tokens_out, written[i].extra) == (one.text, one.tokens_in, one.tokens_out, one.extra), (i, p)
        assert written[i].flops == pytest.approx(one.flops)
        alone = system.answer([p], [opts[i]], questions=q)[0]
        assert list(scored[i].scores) == list(alone.scores) == opts[i]
        for o in opts[i]: assert abs(scored[i].scores[o] - alone.scores[o]) < 1e-5*max(alone.extra['option_tokens'].values()), (i, o)     # 1e-5 for each logit
        assert sum(torch.tensor(list(alone.scores.values())).exp()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('name, which', [*(('qwen3', w) for w in ('alone', 'c2c', 't2t', 'equal', 'both', 'fewshot', 'oracle', 'one_layer')), *(('gpt2', w) for w in ('alone', 'c2c', 'both', 'oracle')), *(('mistral', w) for w in ('c2c', 'one_layer'))])
@few
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=5), chat=st.booleans())
def test_rows_do_not_know_their_neighbours(name, which, rows, chat):
    system = kinds_of(pair(name), which)
    assert_rows_alone(system, [(chats if chat else texts)[i] for i, _ in rows], [options[j] for _, j in rows], 4)


@pytest.mark.parametrize('which', ['alone', 'sharer', 'c2c', 't2t', 'both', 'oracle'])
def test_rows_of_the_golden_pair(golden, which):
    "Two tokenizers that differ; chats and texts in one batch."
    assert_rows_alone(kinds_of(pair('golden', golden), which), [*chats, *texts] if which not in ('oracle',) else chats, [*options, *options] if which not in ('oracle',) else options, 4)


@pytest.mark.parametrize('strategy', ['first', 'longest', 'offsets'])
def test_rows_with_every_alignment(golden, strategy): assert_rows_alone(C2C(pair('golden', golden, strategy=strategy)), chats, options, 3)


def test_rows_when_the_response_is_followed():
    assert_rows_alone(C2C(pair('qwen3', follow=True)), chats, options, 4)


def test_rows_of_the_embedded_pair():
    c2c, world = pair('world'), TinyWorld()
    prompts = ['item 2 of 1 2 3 4 ? it is', 'sum of 3 4 ? it is', 'sum of 9 9 1 ? it is']
    opts = [[str(d) for d in range(10)], ['7', '7 .', 'the sum is 7'], ['1', '2']]
    words = WorldPrompts(world)
    for system in alone_of(c2c), C2C(c2c), T2T(alone_of(c2c), alone_of(c2c, 0), 8, words), T2TC2C(c2c, message_tokens=8, prompts=words): assert_rows_alone(system, prompts, opts)


@pytest.mark.parametrize('follow', [False, True])
@pytest.mark.parametrize('strategy', [None, 'longest'])
def test_closed_gates_are_the_receiver_to_the_bit(golden, strategy, follow):
    c2c = pair('golden', golden, gate=-1., strategy=strategy, follow=follow)
    for prompts in chats, texts:
        for kwargs in dict(options=options), dict(options=names), dict(max_new_tokens=6):
            ours, theirs = C2C(c2c).answer(prompts, **kwargs), alone_of(c2c).answer(prompts, **kwargs)
            for a, b in zip(ours, theirs):
                assert (a.text, a.tokens_in, a.tokens_out, a.flops) == (b.text, b.tokens_in, b.tokens_out, b.flops)
                if strategy is None: assert (a.scores, a.extra) == (b.scores, b.extra)
                else: assert a.scores == (b.scores and pytest.approx(b.scores, abs=5e-5))     # `longest` leaves room between tokens, so sums are rounded otherwise


def test_open_gates_are_not(golden):
    c2c = pair('golden', golden)
    a, b = C2C(c2c).answer(chats, names), alone_of(c2c).answer(chats, names)
    assert all(x.scores != y.scores and x.flops > y.flops for x, y in zip(a, b))


@pytest.mark.parametrize('name', ['qwen3', 'gpt2'])
def test_scores_are_those_of_a_plain_pass(name):
    "Prompt and option in one reading, without cache or padding."
    c2c = pair(name)
    tok, model = c2c.processor.receiver_tokenizer, c2c.receiver
    for p, row, a in zip(texts, options, alone_of(c2c).answer(texts, options)):
        raw = []
        for o in row:
            ids, n = tok(p + o, return_tensors='pt').input_ids, len(tok(p).input_ids)
            assert ids[0, :n].tolist() == tok(p).input_ids, 'these texts were chosen so that the option does not change the prompt'
            with torch.no_grad(): logp = model(ids).logits[0, n-1:-1].log_softmax(-1)
            raw.append(logp.gather(1, ids[0, n:, None]).sum())
            assert a.extra['logprobs'][o] == pytest.approx(float(raw[-1]), abs=1e-4) and a.extra['option_tokens'][o] == ids.shape[1] - n
        assert list(a.scores.values()) == pytest.approx(torch.stack(raw).log_softmax(0).tolist(), abs=1e-4)
        assert a.choice == row[int(torch.stack(raw).argmax())] and a.text is None and a.tokens_out == 0


@pytest.mark.parametrize('follow', [False, True])
@pytest.mark.parametrize('strategy', ['longest', 'offsets'])
def test_fused_scores_are_those_of_the_loss(golden, strategy, follow):
    "Minus the summed loss that `C2CModel` gives for the option as an answer."
    c2c = pair('golden', golden, strategy=strategy, follow=follow)
    kept = [i for i, p in enumerate(chats) if p[-1]['role'] == 'user']     # there is no answer to a chat whose last message is one
    prompts, rows = [chats[i] for i in kept], [options[i] for i in kept]
    for p, row, a in zip(prompts, rows, C2C(c2c).answer(prompts, rows)):
        for o in row:
            batch = c2c.processor(p, answers=[o], end=False, follow=follow)
            with torch.no_grad(): loss = c2c(**batch).loss*(batch['labels'] != -100).sum()
            assert a.extra['logprobs'][o] == pytest.approx(-float(loss), abs=1e-4)


def test_a_begun_answer_is_continued():
    c2c = pair('qwen3')
    tok, chat = c2c.processor.receiver_tokenizer, [say('sun'), bot('the answer is')]
    ids = tok(tok.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) + 'the answer is', return_tensors='pt').input_ids
    a = alone_of(c2c).answer([chat], [[' A', ' B']])[0]
    with torch.no_grad(): logp = c2c.receiver(ids).logits[0, -1].log_softmax(-1)
    first = [tok(x, add_special_tokens=False).input_ids[0] for x in (' A', ' B')]
    assert a.tokens_in == ids.shape[1] and first[0] == first[1]        # a blank, then the letter: they share a beginning
    assert alone_of(c2c).answer([chat], ['A', 'B'])[0].extra['logprobs']['B'] == pytest.approx(float(logp[tok('B').input_ids[0]]), abs=1e-5)


@pytest.mark.parametrize('which', ['alone', 'c2c'])
def test_texts_are_those_of_generate(golden, which):
    "Greedy, to the first end token, which is counted and not shown."
    c2c = pair('golden', golden)
    tok, system = c2c.processor.receiver_tokenizer, kinds_of(c2c, which)
    for p in chats[:2]:
        batch = c2c.processor(p)
        kwargs = dict(max_new_tokens=12, do_sample=False, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
        out = (c2c if which == 'c2c' else c2c.receiver).generate(**(batch if which == 'c2c' else {k: batch[k] for k in ('input_ids', 'attention_mask')}), **kwargs)[0, batch['input_ids'].shape[1]:]
        a = system.answer([p], max_new_tokens=12)[0]
        assert a.text == tok.decode(out, skip_special_tokens=True) and a.tokens_in == int(batch['attention_mask'].sum())
        assert system.answer([p], max_new_tokens=3)[0].text == tok.decode(out[:3], skip_special_tokens=True)


def test_ends_and_sampling():
    "A model that would rather sample, and whose third token is an end: greedy, and over there."
    c2c = pair('qwen3')
    model, tok = copy.deepcopy(c2c.receiver), c2c.processor.receiver_tokenizer
    free = Alone(model, tok, generation=dict(eos_token_id=[])).answer(texts[:1], max_new_tokens=6)[0]
    assert free.tokens_out == 6
    ids = model.generate(**tok(texts[0], return_tensors='pt'), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)[0, len(tok(texts[0]).input_ids):].tolist()
    third = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    model.generation_config.update(do_sample=True, temperature=5., top_p=.5, eos_token_id=[ids[third], 0])
    for _ in range(3):
        a = Alone(model, tok).answer(texts[:1], max_new_tokens=6)[0]
        assert a.tokens_out == third + 1 and a.text == tok.decode(ids[:third + 1], skip_special_tokens=True)
    together = Alone(model, tok).answer(texts, max_new_tokens=9)     # rows that end early are not counted to the batch's end
    assert [a.tokens_out for a in together] == [Alone(model, tok).answer([t], max_new_tokens=9)[0].tokens_out for t in texts] and together[0].tokens_out == third + 1 < max(a.tokens_out for a in together)
    model.generation_config.eos_token_id = None
    assert Alone(model, tok).ends() == [tok.eos_token_id]


def test_t2t_is_two_steps(golden):
    "The sharer's chat about the bare question, then three turns for the receiver, the system message first."
    c2c = pair('golden', golden)
    a_tok, b_tok = c2c.processor.receiver_tokenizer, c2c.processor.sharer_tokenizers[0]
    prompt, question, words = [sys('no.'), say('the cat? A. yes B. no')], 'the cat?', T2TPrompts(ask='tell {question}')
    system = T2T(alone_of(c2c), alone_of(c2c, 0), 7, words)
    a = system.answer([prompt], max_new_tokens=8, questions=[question])[0]
    write = lambda model, tok, chat, n: tok.decode(model.generate(**(enc := tok(tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False), add_special_tokens=False, return_tensors='pt')),
        max_new_tokens=n, do_sample=False, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)[0, enc.input_ids.shape[1]:], skip_special_tokens=True)
    message = write(c2c.sharers[0], b_tok, [say('tell the cat?')], 7).strip()
    assert a.extra['message'] == message and 1 <= a.extra['message_tokens'] <= 7
    assert a.text == write(c2c.receiver, a_tok, [sys('no.'), say('tell the cat?'), bot(message), prompt[1]], 8)
    assert system.answer([prompt], max_new_tokens=1)[0].extra['asked_tokens'] > a.extra['asked_tokens']      # without a question: the last user message, options and all
    plain = T2T(alone_of(c2c), alone_of(c2c, 0), 7).answer(['x{message}?'], max_new_tokens=2)[0]
    assert plain.extra['message_tokens'] > 0                     # braces in a question are only text
    assert plain.extra['asked_tokens'] == len(b_tok(T2TPrompts().ask_plain.replace('{question}', 'x{message}?')).input_ids)      # texts are asked as texts


def test_wordings_are_filled_in_once():
    "What a message or a prompt says is not taken for a place to fill in."
    assert T2TPrompts().reading('the prompt', 'in {prompt}s', 'q').count('the prompt') == 1
    assert T2TPrompts(read_plain='{message}|{prompt}').reading('p {message}', 'm', 'q') == 'm|p {message}'


@few
@given(total=st.floats(1e5, 2e7), rows=st.lists(st.integers(0, 3), min_size=1, max_size=3), both=st.booleans())
def test_equal_compute_is_kept_and_used_up(total, rows, both):
    c2c = pair('qwen3')
    reader = C2C(c2c) if both else alone_of(c2c)
    writer = alone_of(c2c, 0)
    system, prompts = T2T(reader, writer, 10_000, total=total), [texts[i] for i in rows]
    asked = [system.prompts.asking(p, False) for p in prompts]
    cost = lambda s, x: s.reading_flops(s.batch([x]))[0]
    for p, q, k in zip(prompts, asked, system.limits(prompts, prompts, asked)):
        spend = lambda k: cost(writer, q) + cost(reader, system.prompts.reading(p, '', p)) + k*(writer.body_cost + writer.head_cost + reader.cost_per_token)
        assert spend(k) <= total < spend(k + 1) or k < 0 and spend(0) > total


def test_without_budget_the_receiver_answers_alone():
    c2c = pair('qwen3')
    system = T2T(alone_of(c2c), alone_of(c2c, 0), total=C2C(c2c))
    for prompts in texts, chats:
        poor, alone = T2T(alone_of(c2c), alone_of(c2c, 0), total=1).answer(prompts, options), alone_of(c2c).answer(prompts, options)
        for a, b in zip(poor, alone): assert (a.scores, a.flops, a.extra['message'], a.extra['message_tokens']) == (b.scores, b.flops, '', 0)
    assert all(k <= 256 for k in system.limits(texts, texts, texts))


def test_few_shot_is_a_longer_chat(golden):
    tok = (c2c := pair('golden', golden)).processor.receiver_tokenizer
    prompt, examples = [sys('no.'), say('cat')], [([sys('other'), say('dog')], 'yes,'), ('sun', 'moon')]
    turns = [sys('no.'), say('dog'), bot('yes,'), say('sun'), bot('moon'), say('cat')]
    assert with_examples(examples, prompt) == turns
    a, b = FewShot(c2c.receiver, tok, examples).answer([prompt], max_new_tokens=5)[0], alone_of(c2c).answer([turns], max_new_tokens=5)[0]
    assert (a.text, a.tokens_in) == (b.text, b.tokens_in)
    with pytest.raises(ValueError, match='examples as texts'): with_examples([([say('x')], 'y')], 'text')


def masked_reading(system, prompts):
    "What the oracle should say: everything is read, nothing is dropped, and the last token does not look at the examples."
    batch = system.batch(prompts)
    full, column, mask = batch['full_mask'], batch['column'], batch['attention_mask']
    seen = torch.zeros_like(full)
    for i in range(len(prompts)): seen[i, column[i][mask[i] > 0]] = 1
    where, cache = (full.cumsum(1) - 1).clamp(min=0), make_cache(system.receiver.config)
    with torch.no_grad():
        system.receiver(input_ids=batch['full_ids'][:, :-1], attention_mask=full[:, :-1], position_ids=where[:, :-1], past_key_values=cache)
        logits = system.receiver(input_ids=batch['full_ids'][:, -1:], attention_mask=seen, position_ids=where[:, -1:], past_key_values=cache).logits[:, -1]
    return logits, cache, batch


@pytest.mark.parametrize('name', ['golden', 'qwen3', 'gpt2'])
@pytest.mark.parametrize('prompts', [chats, texts], ids=['chats', 'texts'])
def test_the_oracle_is_few_shot_with_the_examples_out_of_sight(golden, name, prompts):
    c2c = pair(name, golden)
    tok, examples = c2c.processor.receiver_tokenizer, [('the sun', 'sings'), ('a dog', 'yes,')]
    oracle = CacheEnrichment(c2c.receiver, tok, examples)
    want, _, batch = masked_reading(oracle, prompts)
    first = tok('z', add_special_tokens=False).input_ids[0], tok('q', add_special_tokens=False).input_ids[0]
    got = oracle.answer(prompts, ['z', 'q'])
    for a, row in zip(got, want.log_softmax(-1)): assert [a.extra['logprobs'][o] for o in 'zq'] == pytest.approx(row[list(first)].tolist(), abs=1e-4)
    direct = alone_of(c2c)
    assert [a.tokens_in for a in got] == [a.tokens_in for a in direct.answer(prompts, ['z', 'q'])]      # the same length as without examples
    assert oracle.prefill(batch).cache.get_seq_length() == direct.prefill(direct.batch(prompts)).cache.get_seq_length()
    assert torch.equal(batch['input_ids'], direct.batch(prompts)['input_ids'])
    assert all(torch.equal(full[c[m > 0]], ids[m > 0]) for full, c, m, ids in zip(batch['full_ids'], batch['column'], batch['attention_mask'], batch['input_ids']))
    step = oracle.answer(prompts, max_new_tokens=1)
    assert [tok.decode(x, skip_special_tokens=True) for x in want.argmax(-1)[:, None]] == [a.text for a in step]


def test_the_oracle_goes_on_from_the_right_positions():
    "Its second and third token too are those of the long reading with the examples out of sight."
    c2c = pair('qwen3')
    oracle = CacheEnrichment(c2c.receiver, c2c.processor.receiver_tokenizer, [('the sun', 'sings')])
    prefix, batch = oracle.prefill(oracle.batch(chats[:1])), oracle.batch(chats[:1])
    n, f = int(batch['attention_mask'].sum()), int(batch['full_mask'].sum())
    assert prefix.position_ids[0].tolist() == list(range(f - n, f))      # no system message here: all of it stands behind the examples
    seen, ids, cache = torch.zeros(1, f, dtype=torch.long), batch['full_ids'], make_cache(c2c.receiver.config)
    seen[:, f-n:] = 1
    with torch.no_grad():
        c2c.receiver(input_ids=ids[:, :-1], past_key_values=cache)
        said, last = [], ids[:, -1:]
        for k in range(5):
            last = c2c.receiver(input_ids=last, attention_mask=torch.cat([seen, torch.ones(1, k, dtype=torch.long)], 1), position_ids=torch.tensor([[f - 1 + k]]), past_key_values=cache).logits[:, -1:].argmax(-1)
            said.append(int(last))
    assert oracle.generate(batch, 5)[0].tolist()[:5] == said


def test_chosen_layers_are_enriched_and_no_others():
    c2c = pair('qwen3')
    tok, examples = c2c.processor.receiver_tokenizer, [('the sun', 'sings')]
    make = lambda layers: CacheEnrichment(c2c.receiver, tok, examples, layers)
    caches = {name: make(layers).prefill(make(layers).batch(chats)) for name, layers in dict(all=None, none=[], some=[0, 2]).items()}
    mask = make(None).batch(chats)['attention_mask'][:, None, :-1, None].bool()
    for i in range(3):
        kvs = {k: read_layer(p.cache, i) for k, p in caches.items()}
        same = lambda a, b: all(torch.equal(x.where(mask, torch.tensor(0.)), y.where(mask, torch.tensor(0.))) for x, y in zip(kvs[a], kvs[b]))
        assert same('some', 'all' if i in (0, 2) else 'none') and (i == 0 or not same('all', 'none'))
    alone, none = alone_of(c2c).answer(chats[:1], names)[0], make([]).answer(chats[:1], names)[0]
    assert list(alone.scores.values()) == pytest.approx(list(none.scores.values()), abs=1e-4)      # rotary positions are relative, and here nothing stands before the examples
    with pytest.raises(ValueError, match=r'layers has \[7\]'): make([7])


def test_what_the_oracle_cannot_do():
    with pytest.raises(ValueError, match='keep a state'): CacheEnrichment(tiny.tiny('lfm2'), tiny_train.tokenizer(), [('a', 'b')])
    with pytest.raises(ValueError, match='another way'): kept_columns([5, 6, 7], [5, 9, 9, 6])
    assert kept_columns([1, 2, 3, 4], [1, 2, 9, 1, 2, 3, 4], 2) == 2       # a system message stays, though the end looks like it
    assert kept_columns([1, 2, 3, 4], [1, 2, 9, 1, 2, 3, 4]) == 0
    with pytest.raises(ValueError, match='another way'): kept_columns([1, 7, 8], [5, 6, 7, 8])


def test_a_system_message_stays_in_place(golden):
    c2c = pair('golden', golden)
    oracle = CacheEnrichment(c2c.receiver, c2c.processor.receiver_tokenizer, [('the sun', 'sings'), ('a dog', 'yes,')])
    row, prompt = oracle.encode(chats[1]), chats[1]
    text = read_chat(oracle.tokenizer, prompt)
    assert row['before'] >= int((text.offsets[:, 1] <= text.spans[0][1]).sum()) > 3
    assert row['full'][:row['before']] == row['input_ids'][:row['before']]


@pytest.mark.parametrize('method', ['full', 'lora'])
def test_the_fine_tuned_receiver_is_read_back(tmp_path, method):
    from c2c_nb.finetune import FinetuneTask
    from c2c_nb.recipe import recipe_from_dict
    tok, base = tiny_train.tokenizer(), tiny_train.model('receiver')
    base.save_pretrained(tmp_path/'base'); tok.save_pretrained(tmp_path/'base')
    recipe = recipe_from_dict(dict(finetune=dict(model=str(tmp_path/'base'), method=method), data=dict(type='TinyChats'), training=dict(steps=1), output=dict(folder=str(tmp_path/'run'))))
    task = FinetuneTask(recipe); task.load('cpu')
    with torch.no_grad():
        for g in task.groups():
            for p in g['params']: p.add_(.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    (tmp_path/'run').mkdir(exist_ok=True)
    task.save(tmp_path/'run', dict(steps=1))
    system = FineTuned(tmp_path/'run')
    want = torch.stack([task.next_tokens([c]).log_softmax(-1)[0, tok.convert_tokens_to_ids(names)] for c in chats[:1]])
    assert [[a.extra['logprobs'][o] for o in names] for a in system.answer(chats[:1], names)] == [pytest.approx(w.tolist(), abs=1e-5) for w in want]
    assert system.describe()['training']['steps'] == 1 and system.answer(chats[:1], names)[0].scores != Alone(base, tok).answer(chats[:1], names)[0].scores
    with pytest.raises(FileNotFoundError, match='there is no model'): FineTuned(tmp_path)


def test_stages_add_up_and_hooks_are_gone():
    c2c = pair('qwen3')
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in c2c.modules()]
    before, system = hooks(), T2TC2C(c2c, message_tokens=4)
    begin = time.perf_counter()
    answers = system.answer(chats, max_new_tokens=4)
    total = time.perf_counter() - begin
    assert set(answers[0].seconds) == {'rest', 'message', 'sharer', 'receiver', 'fusion', 'decode'} and min(answers[0].seconds.values()) > 0
    assert .5*total < sum(v for a in answers for v in a.seconds.values()) <= total
    assert set(alone_of(c2c).answer(chats, names)[0].seconds) == {'rest', 'receiver'} and hooks() == before
    broken = copy.deepcopy(c2c)
    def fail(*_): raise RuntimeError('stop')
    broken.receiver.base_model.layers[1].register_forward_pre_hook(fail)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in broken.modules()]
    with pytest.raises(RuntimeError, match='stop'): C2C(broken).answer(chats)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in broken.modules()] == before


def test_a_stage_is_where_the_time_is():
    "A slow sharer, receiver or fuser is found in its own stage; another thread's calls in none."
    c2c = copy.deepcopy(pair('qwen3'))
    for module, stage in ((c2c.sharers[0].base_model, 'sharer'), (c2c.fusers[0], 'fusion'), (c2c.receiver.base_model, 'receiver')):
        handle = module.register_forward_hook(lambda *_: time.sleep(.3))
        took = C2C(c2c).answer(texts[:1], max_new_tokens=1)[0].seconds
        handle.remove()
        assert took[stage] > .3 and all(v < .3 for k, v in took.items() if k != stage), (stage, took)
    handle = c2c.receiver.register_forward_hook(lambda *_: time.sleep(.2))
    took = Alone(c2c.receiver, tiny_train.tokenizer(), generation=dict(eos_token_id=[])).answer(texts[:1], max_new_tokens=4)[0].seconds
    handle.remove()
    assert .2 < took['receiver'] < .4 and took['decode'] > .6      # one pass is reading, three are decoding
    stages, layer = Stages(), torch.nn.Linear(2, 2)
    with stages.watch({layer: 'receiver'}, layer):
        t = threading.Thread(target=lambda: layer(torch.ones(2))); t.start(); t.join()
    stages.mark()
    assert set(stages.seconds) == {'rest'}


def test_threads_do_not_disturb_answers():
    c2c, found = pair('qwen3'), {}
    system = C2C(c2c)
    want = [(a.scores, b.text) for a, b in zip(system.answer(chats, options), system.answer(chats, max_new_tokens=5))]
    def work(i): found[i] = [(a.scores, b.text) for a, b in zip(system.answer(chats, options), system.answer(chats, max_new_tokens=5))]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [found[i] for i in range(3)] == [want]*3


def test_flops_are_counted_by_hand():
    c2c = pair('qwen3')
    body, head = token_cost(c2c.receiver)
    layers = [p for n, p in c2c.receiver.named_parameters() if 'proj' in n]
    assert body == 2*sum(p.numel() for p in layers) and head == 2*340*32
    a = alone_of(c2c).answer(texts[:1], max_new_tokens=3)[0]
    assert a.flops == body*(a.tokens_in + a.tokens_out - 1) + head*a.tokens_out
    n, s = a.tokens_in, token_cost(c2c.sharers[0])[0]
    from c2c_nb.baseline import fuser_cost
    b = C2C(c2c).answer(texts[:1], max_new_tokens=3)[0]
    theirs = len(c2c.processor.sharer_tokenizers[0](texts[0]).input_ids)
    assert b.flops - body*(n + b.tokens_out - 1) - head*b.tokens_out == pytest.approx(s*theirs + fuser_cost(c2c.fusers[0])*(n - 1))
    half = tiny.fuser_for(c2c.receiver, c2c.sharers[0], gate=[1., -1.])
    assert fuser_cost(half) == pytest.approx(fuser_cost(c2c.fusers[0])/2, rel=.01) and fuser_cost(pair('qwen3', gate=-1.).fusers[0]) == 0
    assert token_cost(model_of('gpt2'))[0] == 2*sum(p.numel() for n, p in model_of('gpt2').named_parameters() if p.dim() == 2 and 'wte' not in n and 'wpe' not in n)


@pytest.mark.parametrize('kwargs, words', [(dict(prompts='text'), 'write \\[prompt\\]'), (dict(prompts=[say('x')]), 'one chat'), (dict(prompts=[]), 'at least one'), (dict(prompts=['']), 'not empty'), (dict(prompts=[[dict(role='user')]]), 'role and content'),
    (dict(prompts=['x'], max_new_tokens=0), 'at least 1'), (dict(prompts=['x'], max_new_tokens=True), 'at least 1'), (dict(prompts=['x'], options=['a']), 'at least two'), (dict(prompts=['x'], options=['a', 'a']), 'different'), (dict(prompts=['x'], options=['a', '']), 'not empty'),
    (dict(prompts=['x'], options='ab'), 'list of texts'), (dict(prompts=['x', 'y'], options=[['a', 'b']]), 'one for each'), (dict(prompts=['x'], questions=['q', 'r']), 'one text for each'), (dict(prompts=['x'], questions='q'), 'one text for each')])
def test_bad_calls(kwargs, words):
    with pytest.raises(ValueError, match=words): alone_of(pair('qwen3')).answer(**kwargs)


def test_bad_systems():
    c2c = pair('qwen3')
    bare = C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers))
    with pytest.raises(ValueError, match='no processor'): C2C(bare)
    with pytest.raises(ValueError, match='training mode'): C2C(copy.deepcopy(c2c).train())
    with pytest.raises(ValueError, match='training mode'): Alone(copy.deepcopy(c2c.receiver).train(), tiny_train.tokenizer())
    with pytest.raises(ValueError, match='decode greedily'): alone_of(c2c, generation=dict(do_sample=True))
    with pytest.raises(ValueError, match='message_tokens=0'): T2T(alone_of(c2c), alone_of(c2c, 0), 0)
    with pytest.raises(ValueError, match='total must be'): T2T(alone_of(c2c), alone_of(c2c, 0), total='C2C')
    with pytest.raises(ValueError, match='such as Alone'): T2T(c2c.receiver, c2c.sharers[0])
    with pytest.raises(ValueError, match='at least one'): FewShot(c2c.receiver, tiny_train.tokenizer(), [('x', '')])
    with pytest.raises(ValueError, match='has 1100 positions|has \\d+ positions'): alone_of(c2c).answer(['the ' * 600])
    with pytest.raises(ValueError, match='same tokens'): Alone(pair('world').receiver, TinyWorld().tokenizer).answer(['sum of 1 2 ? it is'], [['blah', 'blub']])


def test_systems_by_name():
    c2c = pair('qwen3')
    made = make_systems(c2c, ['receiver', 'sharer', 'T2T', 'T2T at equal compute', 'C2C', 'T2T+C2C'], message_tokens=3)
    assert [s.name for s in made.values()] == list(made) and made['T2T'].message_tokens == 3 and made['T2T at equal compute'].total.name == 'C2C'
    for s in made.values(): json.dumps(s.describe()); assert len(s.answer(texts, max_new_tokens=2)) == 4
    two = tiny_two(c2c)
    assert list(make_systems(two, ['sharer', 'C2C'])) == ['sharer 0', 'sharer 1', 'C2C'] and list(make_systems(two, ['sharer'], sharer=1)) == ['sharer']
    assert list(make_systems(c2c, 'C2C')) == ['C2C']
    @register_system('my own')
    def mine(c2c, processor, name='my own'): return System()
    try: assert 'my own' in system_names() and type(make_systems(c2c, ['my own'])['my own']) is System
    finally: del _makers['my own']
    for bad, words in ((dict(names=['T2']), "did you mean 'T2T'"), (dict(names=[]), 'no systems'), (dict(names=['C2C'], shot='x'), 'none of these systems'), (dict(names={'T2T': dict(mesage_tokens=1)}), "did you mean 'message_tokens'"), (dict(names=['few-shot']), 'at least one'), (dict(names=['fine-tuned']), 'folder=')):
        with pytest.raises(ValueError, match=words): make_systems(c2c, **bad)


def tiny_two(c2c):
    sharers = [c2c.sharers[0], tiny_train.model('qwen2')]
    return C2CModel(c2c.receiver, sharers, [tiny.fuser_for(c2c.receiver, s) for s in sharers], processor=tiny_train.processor(2)).eval()


def test_two_sharers_and_what_decides_an_answer():
    c2c = tiny_two(pair('qwen3'))
    assert_rows_alone(C2C(c2c), chats, options, 3)
    a, b = C2C(c2c).describe(), C2C(pair('qwen3')).describe()
    assert a != b and a['receiver'] == b['receiver'] and len(a['fusers']) == 2 and json.dumps(a) == json.dumps(C2C(c2c).describe())
    assert alone_of(c2c).describe() != alone_of(c2c, generation=dict(repetition_penalty=1.2)).describe()
    t2t = lambda **kw: T2T(alone_of(c2c), alone_of(c2c, 0), **kw).describe()
    assert t2t() != t2t(message_tokens=9) != t2t(prompts=T2TPrompts(ask='{question}')) and t2t(total=C2C(c2c)) != t2t()
