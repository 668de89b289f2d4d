"From samples to batches: what is encoded, what is supervised, what is left out."
import json

import pytest, torch

from c2c_nb.align import C2CProcessor, load_tokenizer


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
