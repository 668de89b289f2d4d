"Tokens, texts, chats and batches aligned: equal to the official results, and right on everything that people write."
import copy, itertools, json, math, os, re, shutil, unicodedata
import xml.etree.ElementTree as xml
from functools import cache
from pathlib import Path

import pytest, torch, transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from c2c_nb import align
from c2c_nb.fuser import tokenizer_fingerprint
from c2c_nb.align import C2CProcessor, TokenAligner, load_tokenizer, read_chat, read_text, shared_vocabulary, show_alignment
from conftest import shared_path

transformers.logging.set_verbosity_error()
real = ['qwen3', 'qwen2.5', 'gpt2', 'gpt-neox-20b', 'phi-2', 'phi-3-mini']
made = ['small', 'small-nfc', 'pieces']
borrowed = {'gpt2': 'meta-llama-Llama-3.1-8B-Instruct', 'gpt-neox-20b': 'gemma-3-it', 'phi-2': 'mistralai-Mistral-Nemo-Instruct-2407'}     # real templates for tokenizers that have none
plain = "{%- for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '[assistant] ' }}{%- endif %}"
trimming = "{{ '<<' }}{%- for m in messages %}{{ m.role + ': ' + (m.content | trim) + '\n\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
user = lambda text: [{'role': 'user', 'content': text}]
talk = lambda *texts: [{'role': ('user', 'assistant')[i % 2], 'content': t} for i, t in enumerate(texts)]
nasty = dict(
    plain=user('What is the capital of France?'),
    chinese=user('你好，世界！今天天气怎么样？'),
    emoji=user('👨‍👩‍👧‍👦 family 🏳️‍🌈 🇩🇪 👍🏽 ok'),
    code=user('def f(x):\n\tif x:\n        return "a  b"\n\n\n'),
    decomposed=user(unicodedata.normalize('NFD', 'Việt Nam café naïve Ångström 한국어 ガ')),
    unordered=user('q\u0307\u0323x a\u0302\u0323b \u0301start'),
    empty=talk('', 'x', 'y'),
    system=[{'role': 'system', 'content': 'Be brief.\n'}, *user('Hi')],
    turns=talk('Hi', 'Hello there!', 'Hi', 'Hello', 'user'),
    words=talk('user', 'assistant', '<|im_start|>user\n'),
    newlines=talk('What?\n\n', ' lead \n', '   \t x  \n'),
    blanks=user('   leading'),
    white=user('  \n '),
    think=talk('q', '<think>\nhmm\n</think>\n\nanswer', '<tool_response>\n1\n</tool_response>'))
texts = [m['content'] for chat in nasty.values() for m in chat if m['content']] + ['\u1112\u1161\u11ab글', 'ｶﾞｷﾞ', 'a\u0301\u0301\u0301b', '𝒳𝒴 ﬁn ½', '\u0915\u093c\u0958 क्षि', '\u200d\u200d', 'a\n\u0301b', '\x00\x7f']


@cache
def tokenizer(name:str):
    "A real tokenizer, or one made here; with a chat template."
    if name in made: return make(name)
    if not (folder := shared_path()/'assets'/'tokenizers'/name).is_dir(): pytest.skip('no folder of shared data')
    t = load_tokenizer(folder)
    if name in borrowed: t.chat_template = template(borrowed[name])
    return t


def template(name): return (shared_path()/'assets'/'chat_templates'/f'{name}.jinja').read_text()


def make(name:str):
    "Byte-level BPE with and without NFC, and pieces with byte fallback as SentencePiece makes them."
    corpus = ['the user asked what is a model and the assistant said hello there', 'user assistant Việt café leading world', 'def f(x): return x'] * 3
    if name == 'pieces':
        t = Tokenizer(models.BPE(unk_token='<unk>'))
        t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=140, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False))
        spec = json.loads(t.to_str())
        vocab = spec['model']['vocab']
        for b in range(256): vocab[f'<0x{b:02X}>'] = len(vocab)
        spec['model'].update(byte_fallback=True, fuse_unk=True)
        t = Tokenizer.from_str(json.dumps(spec))
        t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
        return PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>', bos_token='<s>', eos_token='</s>', chat_template=trimming)
    t = Tokenizer(models.BPE())
    if name == 'small-nfc': t.normalizer = normalizers.NFC()
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(corpus[::-1] if name == 'small-nfc' else corpus[:3], trainers.BpeTrainer(vocab_size=300 if name == 'small' else 330, special_tokens=['<|end|>', '<|pad|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|end|>', pad_token='<|pad|>', chat_template=plain)


# what a model has read, byte by byte: worked out from the tokens themselves, without any offsets

visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
letter = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in visible)}     # of byte-level BPE


@cache
def facts(name): return '▁' in tokenizer(name).get_vocab(), frozenset(tokenizer(name).added_tokens_decoder)


@cache
def by_characters(receiver, sharer): return TokenAligner(tokenizer(receiver), tokenizer(sharer), 'offsets')


def have_read(name, ids) -> list:
    "After each number of tokens: the complete characters, decomposed, and whether bytes of one more have been read."
    t, (pieces, added), out, data = tokenizer(name), facts(name), [], b''
    for i in [None, *ids]:
        if i is not None:
            token = t.convert_ids_to_tokens(i)
            if i in added: data += b'' if token in (t.bos_token, t.eos_token) else token.encode()
            elif pieces: data += bytes([int(token[3:5], 16)]) if re.fullmatch('<0x..>', token) else token.replace('▁', ' ').encode()
            else: data += bytes(letter[c] for c in token)
        seen = data[1:] if pieces else data
        chars = seen.decode('utf-8', 'ignore')
        out.append((unicodedata.normalize('NFD', chars), len(chars.encode()) != len(seen)))
    return out


def check_text(receiver, sharer, text):
    "All that `offsets` promises on a plain text. Returns how many positions could have been paired with a later one."
    a, r, s = by_characters(receiver, sharer).align_text(text), tokenizer(receiver), tokenizer(sharer)
    assert a.receiver_ids == r(text).input_ids and a.sharer_ids == s(text).input_ids
    assert len(a.pairing) == len(a.receiver_ids) and a.pairing == sorted(a.pairing) and -1 <= a.pairing[0] and a.pairing[-1] < len(a.sharer_ids)
    read, known, late = have_read(receiver, a.receiver_ids), have_read(sharer, a.sharer_ids), 0
    assert read[-1][0] == known[-1][0] == unicodedata.normalize('NFD', text)
    for i, p in enumerate(a.pairing):
        (mine, mine_partly), (theirs, partly) = read[i+1], known[p+1]
        assert mine.startswith(theirs) and (not partly or len(mine) > len(theirs)), (receiver, sharer, text, i, p, mine, theirs)
        if p + 1 < len(a.sharer_ids):
            more, more_partly = known[p+2]
            late += not more_partly and not mine_partly and more != '' and mine.startswith(more)
    return late


# loading

@pytest.mark.parametrize('name,vectors', dict(zip(['gpt2', 'gpt-neox-20b', 'phi-3-mini', 'qwen2.5', 'qwen3'], ['gpt-2', 'gpt-neox-mpt', 'phi-3', 'qwen2', 'qwen2'])).items())
def test_reference_vectors(assets, name, vectors):
    t, folder = tokenizer(name), assets/'tokenizers'/'_vectors'
    inputs = (folder/'vectors.inp').read_text().split('\n__ggml_vocab_test__\n')
    expected = [[int(i) for i in line.split()] for line in (folder/f'{vectors}.out').read_text().split('\n')]
    assert len(inputs) == len(expected) == 47
    assert [t(x, add_special_tokens=False).input_ids for x in inputs] == expected


@pytest.mark.parametrize('name', real)
def test_loading_keeps_special_tokens_and_template(assets, name):
    t, config = load_tokenizer(assets/'tokenizers'/name), json.loads((assets/'tokenizers'/name/'tokenizer_config.json').read_text())
    text = lambda x: x['content'] if isinstance(x, dict) else x
    for k in ('bos_token', 'eos_token', 'pad_token', 'unk_token'): assert getattr(t, k) == text(config.get(k))
    assert t.chat_template == config.get('chat_template')
    assert json.loads(t.backend_tokenizer.to_str())['model'] == json.loads(Tokenizer.from_file(str(assets/'tokenizers'/name/'tokenizer.json')).to_str())['model']


def test_loading_nothing(tmp_path):
    for name in (tmp_path, tmp_path/'absent'):
        with pytest.raises(FileNotFoundError, match='tokenizer|no folder'): load_tokenizer(name)


def test_gated_repositories(monkeypatch):
    "They are said to be gated, not to be absent; other refusals keep the hub's own words. (With the real client: test_hub.py.)"
    import httpx2
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    answer = httpx2.Response(403, request=httpx2.Request('GET', 'https://huggingface.co'))
    for error, says in (GatedRepoError, 'the repository me/it is gated.*ask for access.*hf auth login'), (RepositoryNotFoundError, 'no folder me/it, and no such repository'), (RevisionNotFoundError, "does not give that repository's tokenizer: why"):
        def refuse(*args, **kwargs): raise error('why', response=answer)
        monkeypatch.setattr(align, 'hf_hub_download', refuse)
        with pytest.raises(FileNotFoundError, match=says): load_tokenizer('me/it')


# the official results

@pytest.mark.parametrize('strategy', ['first', 'longest'])
def test_official_alignment(golden, strategy):
    a, b = (load_tokenizer(golden/t) for t in ('tokA', 'tokB'))
    aligner, processor = TokenAligner(a, b, strategy), C2CProcessor(a, [b], strategy)
    cases = json.loads((golden/'alignment.json').read_text())[strategy]
    assert len(cases) == 10
    for case in cases:
        if 'text' in case:
            assert a(case['text'], add_special_tokens=False).input_ids == case['slm_ids']
            assert aligner.align_sequence(case['slm_ids']) == case['aligned_llm_ids']
            assert aligner.align_sequence(torch.tensor([case['slm_ids']])).tolist() == [case['aligned_llm_ids']]
            continue
        kw = dict(case['kw'])
        kw['continue_final_message'] = kw.pop('remove_last_surfix', False)
        x, expected = aligner.align_chat(case['messages'], **kw), case['result']
        p = x.padded()
        assert [x.receiver.text, x.sharer.text] == [expected['slm_text'], expected['llm_text']]
        assert [p.receiver_ids, p.sharer_ids, p.message_mask] == [expected[k] for k in ('slm_ids_padded', 'llm_ids_padded', 'message_mask')]
        assert [[not m for m in p.receiver_mask], [not m for m in p.sharer_mask]] == [expected['slm_padding_mask'], expected['llm_padding_mask']]
        assert p.sections == [(s['type'], *s['slm_range']) for s in expected['sections']] == [(s['type'], *s['llm_range']) for s in expected['sections']]
        batch = processor(case['messages'], **kw)
        assert batch['input_ids'].tolist() == [p.receiver_ids] and batch['sharer_input_ids'][0].tolist() == [p.sharer_ids]
        assert batch['attention_mask'].bool().tolist() == [p.receiver_mask] and batch['sharer_attention_mask'][0].bool().tolist() == [p.sharer_mask]
        answer = p.sections[-1][1] if kw['continue_final_message'] else len(p.receiver_ids)
        assert batch['active'][0, :, 0].tolist() == [m and i < answer for i, m in enumerate(p.message_mask)]
        assert [int(n) for n in torch.unique_consecutive(batch['sections'][0], return_counts=True)[1]] == [stop - start for _, start, stop in p.sections]


def test_official_training_features(golden):
    a, b = (load_tokenizer(golden/t) for t in ('tokA', 'tokB'))
    for case in json.loads((golden/'collator.json').read_text())['aligned_features']:
        p = TokenAligner(a, b, 'first').align_chat(case['messages'], add_generation_prompt=False).padded()
        assert [p.receiver_ids, p.sharer_ids] == case['input_ids']
        assert [[not m for m in p.receiver_mask], [not m for m in p.sharer_mask]] == case['model_padding_mask']
        start = next(s for kind, s, _ in reversed(p.sections) if kind == 'message')
        assert start == next(i for i, l in enumerate(case['labels']) if l != -100)


def test_official_batch(golden):
    "The inputs of inference case c16 are what the processor makes of its chat."
    a, b = (load_tokenizer(golden/t) for t in ('tokA', 'tokB'))
    with safe_open(golden/'c16_aligned.safetensors', 'pt') as f: case = {k: f.get_tensor(k) for k in f.keys() if 'input_ids' in k or 'attention_mask' in k}
    lengths = [n for n, _ in json.loads((golden/'index.json').read_text())['c16_aligned']['sections']]
    chats = [c['messages'] for c in json.loads((golden/'alignment.json').read_text())['first'] if 'messages' in c and c['kw']['add_generation_prompt']]
    batches = [C2CProcessor(a, [b], s)(chat) for s in ('first', 'longest') for chat in chats]
    same = [x for x in batches if x['input_ids'].tolist() == case['input_ids.0'].tolist() and x['sharer_input_ids'][0].tolist() == case['input_ids.1'].tolist()]
    assert same
    assert torch.unique_consecutive(same[0]['sections'], return_counts=True)[1].tolist() == lengths


def test_official_answer(golden):
    "From messages to generated ids: c16, with the positions counted as the official code counts them, padding included."
    from c2c_nb.fuser import Fuser
    from c2c_nb.model import C2CModel
    a, b = (load_tokenizer(golden/t) for t in ('tokA', 'tokB'))
    receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', 'sharer1'))
    c2c = C2CModel(receiver, [sharer], [Fuser.from_published(golden/'ckpt_s1'/'final').eval()])
    case = load_file(golden/'c16_aligned.safetensors')
    chat = next(c['messages'] for c in json.loads((golden/'alignment.json').read_text())['first'] if len(c.get('messages', ())) == 3 and c['kw']['add_generation_prompt'])
    batch = {k: v for k, v in C2CProcessor(a, [b], 'first')(chat).items() if k != 'pairing'}     # there is none
    out = c2c.generate(**batch, position_ids=torch.arange(batch['input_ids'].shape[1])[None], max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert out[0, -16:].tolist() == case['sequences_pad_masked'][0, -16:].tolist()


def test_token_map_is_what_one_token_at_a_time_gives():
    for r, s in itertools.permutations(made, 2):
        r, s = tokenizer(r), tokenizer(s)
        for strategy in ('first', 'longest'):
            table = TokenAligner(r, s, strategy).token_map
            assert len(table) == max(r.get_vocab().values()) + 1
            for i in range(0, len(table), 3):
                roles = {getattr(r, f'{k}_token_id'): getattr(s, f'{k}_token_id') for k in ('pad', 'eos', 'bos', 'unk') if getattr(r, f'{k}_token_id') is not None and getattr(s, f'{k}_token_id') is not None}
                if i in roles: assert table[i] == roles[i]; continue
                if i in r.all_special_ids: continue
                got = s(r.decode([i]), add_special_tokens=False).input_ids
                best = got[:1] if strategy == 'first' else [c for c in got if len(s.decode([c])) == max(len(s.decode([d])) for d in got)]
                assert int(table[i]) == (best[0] if got else s.unk_token_id or 0)


# plain texts, in all pairs

@pytest.mark.parametrize('receiver,sharer', list(itertools.product(made, made)) + list(itertools.product(real, real)))
def test_texts_by_characters(receiver, sharer):
    late = {t: check_text(receiver, sharer, t) for t in texts}
    ordinary = [t for t in texts if unicodedata.is_normalized('NFKC', t) and unicodedata.is_normalized('NFC', t)]
    assert len(ordinary) > 15 and sum(late[t] for t in ordinary) == 0, {t: late[t] for t in ordinary if late[t]}     # and the nearest one it is


characters = st.one_of(st.sampled_from('ab \n\tA.,é你🚀'), st.sampled_from('\u0301\u0302\u0323\u1100\u1161\u11a8\u200d\ufe0f\u0915\u093c\u094d\uff76\uff9e\u0130ﬁ'), st.characters(exclude_categories=['Cs', 'Cn'], exclude_characters='\ufffd▁'))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(text=st.text(characters, min_size=1, max_size=40), pair=st.tuples(st.sampled_from(made), st.sampled_from(made)))
def test_any_text_by_characters(text, pair): check_text(*pair, text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(text=st.text(characters, min_size=1, max_size=40), pair=st.tuples(st.sampled_from(real), st.sampled_from(real)))
def test_any_text_by_characters_real(assets, text, pair):
    if '<' in text or '[' in text: return
    check_text(*pair, text)


@pytest.mark.parametrize('normalizer,text,lower,upper', [
    (normalizers.NFC(), 'e\u0301x', [0, 2, 3], [2, 2, 3]),        # e and accent are one letter of two bytes
    (normalizers.Replace('ab', 'x'), 'zabc', [1, 3, 4], [2, 3, 4]),     # whether a was read with z or with b the offsets do not tell
    (normalizers.Strip(), ' a\t', [2], [2]),
    (normalizers.Lowercase(), 'AB', [1, 2], [1, 2]),
    (normalizers.NFKC(), '\ufb01x', [0, 1, 2], [1, 1, 2])])      # the ligature fi becomes two letters
def test_other_normalisation(normalizer, text, lower, upper):
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer, backend.decoder, backend.normalizer = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), normalizer
    t = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [x.tolist() for x in align._reach(read_text(t, text), align._recomposes(t))] == [lower, upper]


# chats, in all pairs

def check_chat(aligner, chat, **kw):
    "What holds for every strategy and every chat."
    a = aligner.align_chat(chat, **kw)
    r, s, readings = aligner.receiver_tokenizer, aligner.sharer_tokenizer, (a.receiver, a.sharer)
    for t, reading in zip((r, s), readings):                      # what each model would read alone
        assert reading.text == t.apply_chat_template(chat, tokenize=False, enable_thinking=False, **(dict(add_generation_prompt=True) | kw))
        assert reading.ids == t(reading.text, add_special_tokens=False).input_ids
        for m, span in zip(chat, reading.spans):
            if span: assert reading.text[span[0]:span[1]] == m['content'][span[2]:span[2] + span[1] - span[0]] != ''
    at = [0, 0]
    for section in a.sections:                                   # every position once, in order
        for k, (start, stop) in enumerate((section.receiver, section.sharer)):
            assert start == at[k] <= stop
            at[k] = stop
    assert at == [len(a.receiver_ids), len(a.sharer_ids)] and len(a.pairing) == len(a.receiver_ids)
    messages = [x for x in a.sections if x.kind == 'message']
    for x in messages: assert x.receiver[0] < x.receiver[1] and x.sharer[0] < x.sharer[1]
    if aligner.strategy != 'offsets':
        for x in messages: assert a.sharer_ids[slice(*x.sharer)] == aligner.align_sequence(a.receiver_ids[slice(*x.receiver)])
        p = a.padded()
        assert len({len(v) for v in (p.receiver_ids, p.sharer_ids, p.receiver_mask, p.sharer_mask, p.message_mask)}) == 1
        assert [i for i, m in zip(p.receiver_ids, p.receiver_mask) if m] == a.receiver_ids and [i for i, m in zip(p.sharer_ids, p.sharer_mask) if m] == a.sharer_ids
        return a
    assert a.sharer_ids == a.sharer.ids and a.pairing == sorted(a.pairing)
    for x in messages:
        assert all(x.sharer[0] - 1 <= p < x.sharer[1] for p in a.pairing[slice(*x.receiver)])
        (mine, _, mine_skip), (theirs, _, their_skip) = a.receiver.spans[x.message], a.sharer.spans[x.message]
        for i, p in zip(range(*x.receiver), a.pairing[slice(*x.receiver)]):
            if p < x.sharer[0]: continue
            begins, follows = int(a.sharer.offsets[p, 0]) - theirs + their_skip, a.receiver.offsets[i+1:, 0]
            read = (int(follows.min()) if len(follows) else len(a.receiver.text)) - mine + mine_skip
            assert begins <= read, (aligner, chat, i, p)          # no later than what the receiver has read
    return a


@pytest.mark.parametrize('receiver', made + real)
def test_chats_in_all_pairs(receiver):
    for sharer in (made if receiver in made else real):
        for strategy in ('first', 'longest', 'offsets'):
            aligner = TokenAligner(tokenizer(receiver), tokenizer(sharer), strategy)
            if receiver in real and strategy != 'offsets': aligner.token_map = torch.arange(200_000) % 100     # its own tests check the map
            for name, chat in nasty.items():
                if name == 'system' and 'mistral' in borrowed.get(sharer, '') + borrowed.get(receiver, ''): continue     # moved: its own test
                a = check_chat(aligner, chat)
                found = [s.message for s in a.sections if s.kind == 'message']
                assert found == [i for i, m in enumerate(chat) if a.receiver.spans[i] and a.sharer.spans[i]], (aligner, name)
                assert all(a.receiver.spans[i] and a.sharer.spans[i] for i, m in enumerate(chat) if m['content'].strip() and not name == 'think'), (aligner, name)


def every_template(): return sorted(p.stem for p in (shared_path()/'assets'/'chat_templates').glob('*.jinja'))


def with_template(name, source):
    t = copy.copy(tokenizer(name))
    t.chat_template = source
    return t


@pytest.mark.parametrize('name', every_template() or [pytest.param('', marks=pytest.mark.skip('no folder of shared data'))])
def test_every_template(assets, name):
    for chat in nasty.values():
        for pair in ((with_template('gpt2', template(name)), tokenizer('qwen3')), (tokenizer('phi-3-mini'), with_template('gpt2', template(name)))):
            try: pair[0].apply_chat_template(chat, tokenize=False), pair[1].apply_chat_template(chat, tokenize=False)
            except Exception:
                with pytest.raises(ValueError, match='chat template of .* refuses these messages'): TokenAligner(*pair, 'offsets').align_chat(chat)
                continue
            a = check_chat(TokenAligner(*pair, 'offsets'), chat)
            for m, r, s in zip(chat, a.receiver.spans, a.sharer.spans):
                if m['content'].strip() and '<think>' not in m['content']: assert r and s, (name, chat)


def test_refused_system_message(assets):
    t = with_template('gpt2', template('google-gemma-2-2b-it'))
    with pytest.raises(ValueError, match=r'gpt2 refuses these messages \(roles system, user\): System role not supported'): TokenAligner(tokenizer('qwen3'), t).align_chat(nasty['system'])


def test_templates_that_drop_move_repeat_or_look():
    t = tokenizer('small')
    def spans(source, chat):
        r = read_chat(with_template('small', source), chat)
        return [None if s is None else r.text[s[0]:s[1]] for s in r.spans]
    each = lambda body: "{%- for m in messages %}" + body + "{%- endfor %}"
    assert spans(each("{% if m.role != 'system' %}{{ m.content }}|{% endif %}"), nasty['system']) == [None, 'Hi']
    assert spans(each("{{ m.content }}|{{ m.content }}\n"), user('twice')) == [None]
    assert spans(each("{{ m.content | upper }}|"), talk('shout', 'loud')) == [None, None]
    assert spans(each("{{ m.content.split('</think>')[-1] }}|"), talk('q', '<think>x</think>answer', 'r')) == ['q', 'answer', 'r']
    assert spans(each("{% if 'tool' in m.content %}[tool]{% endif %}{{ m.content }}|"), talk('a tool\n', 'b')) == ['a tool', 'b']
    assert spans(each("{{ m.role }}{{ m.content }}"), talk('user', 'user', 'user')) == ['user']*3
    assert spans(each("{{ m.content | trim }}\n"), talk('a\n', '\n', '\nb')) == ['a', None, 'b']
    assert spans(each("{{ m.content }}"), [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'tool_calls': []}, {'role': 'tool', 'content': 'a'}]) == ['a', None, 'a']
    moved = "{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    a = TokenAligner(t, with_template('small', moved)).align_chat([{'role': 'system', 'content': 'short'}, *user('a longer text')])
    assert [s.message for s in a.sections if s.kind == 'message'] == [1]      # the two models read them in different orders: the longer one is aligned
    check = check_chat(TokenAligner(t, with_template('small', moved)), [{'role': 'system', 'content': 'short'}, *user('a longer text')])
    assert check.pairing == sorted(check.pairing)


@pytest.mark.parametrize('answers', [1, 2])
def test_a_long_chat_with_an_odd_answer_is_rendered_few_times(answers):
    "One message that the template changes must not cost a rendering for each of the others."
    render = lambda counts: lambda ms: counts.append(1) or ''.join(f"[{m['content'].split('</think>')[-1]}]" for m in ms)
    times = {}
    for n in 64, 512:
        odd = [n//3, n - 5][:answers]
        chat = talk(*(f'<think>so</think>answer {i}' if i in odd else f'message {i}' for i in range(n)))
        text, counts = render([])(chat), []
        spans = align._locate(render(counts), chat, text)
        assert [text[a:b] for a, b, _ in spans] == [m['content'].split('</think>')[-1] for m in chat]
        times[n] = len(counts)
        assert len(counts) <= answers*(2*math.log2(n) + 3), times
    assert times[512] - times[64] <= answers*2*3 + 2, times       # three more halvings


def test_a_long_chat_with_thoughts(assets):
    "The same with Qwen3's template, which cuts old thoughts out."
    t, calls = copy.copy(tokenizer('qwen3')), []
    t.apply_chat_template = lambda *args, **kwargs: calls.append(1) or tokenizer('qwen3').apply_chat_template(*args, **kwargs)
    chat = talk(*(f'<think>\nhmm\n</think>\n\nanswer {i}' if i == 41 else f'message {i}' for i in range(129)))
    r = read_chat(t, chat)
    assert len(calls) < 25 and [r.text[a:b] for a, b, _ in r.spans] == [f'answer {i}' if i == 41 else f'message {i}' for i in range(129)]


def in_parts(chat, k=2):
    "Contents cut into parts of text."
    return [{**m, 'content': [dict(type='text', text=m['content'][i*len(m['content'])//k:(i+1)*len(m['content'])//k]) for i in range(k)]} for m in chat]


@pytest.mark.parametrize('pair', [('small', 'pieces'), ('qwen3', 'phi-3-mini'), ('gpt2', 'gpt-neox-20b')], ids=str)
def test_contents_in_parts(pair):
    "Parts of text are read as the whole text, so that messages are found; with templates that know parts, and those that do not."
    pair = [tokenizer(p) for p in pair]
    for name, chat in nasty.items():
        if name == 'system' and pair[0] is tokenizer('gpt2'): continue
        a = TokenAligner(*pair).align_chat(chat)
        for k in 1, 2, 3:
            b = TokenAligner(*pair).align_chat(in_parts(chat, k))
            assert (a.receiver.text, a.receiver.spans, a.sharer.spans, a.pairing) == (b.receiver.text, b.receiver.spans, b.sharer.spans, b.pairing), (name, k)
    processor = C2CProcessor(pair[0], pair[1:])
    for kw in dict(), dict(continue_final_message=True):
        chat = talk('Hi there', 'Hello')[:1 + len(kw)]
        for x, y in zip(processor(chat, **kw).values(), processor(in_parts(chat), **kw).values()): assert str(x) == str(y)


@pytest.mark.parametrize('part,says', [(dict(type='image', url='cat.png'), 'image'), (dict(type='image_url', image_url=dict(url='x')), 'image_url'), (dict(type='text'), 'text'), (dict(type='text', text=5), 'text'), (dict(text='x'), 'text'), ('Hi', 'str'), (None, 'NoneType'), (dict(), '')], ids=str)
def test_parts_that_are_no_text(part, says):
    chat = talk('Hi', 'Hello', 'See?')
    chat[2]['content'] = [dict(type='text', text='See?'), part]
    small = tokenizer('small')
    for read in lambda: read_chat(small, chat), lambda: TokenAligner(small, small).align_chat(chat), lambda: C2CProcessor(small, [small])(chat), lambda: C2CProcessor(small, [tokenizer('pieces')])([talk('x'), chat]):
        with pytest.raises(ValueError, match='the content of message 2 has a part that is no text') as e: read()
        assert f'({says})' in str(e.value) and 'Leave the others out' in str(e.value)


def test_advice_to_what_a_template_refuses():
    "Messages of tools, contents that are None."
    with pytest.raises(ValueError, match=r'refuses these messages \(roles user, assistant\).*a text into every content that is None'): read_chat(tokenizer('small'), [*user('x'), dict(role='assistant', content=None, tool_calls=[])])
    picky = with_template('small', "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match='no tools.*what a tool has said into a user message'): read_chat(picky, [*user('x'), dict(role='tool', content='1')])


@pytest.mark.parametrize('half', ['\ud83d', '\udc1f', 'ok \ud83d then', '\udc1f\ud83d'], ids=ascii)
def test_half_characters(half):
    "Said to be what they are, wherever they stand."
    small, pieces = tokenizer('small'), tokenizer('pieces')
    p = C2CProcessor(small, [pieces])
    for read in lambda: read_text(small, half), lambda: read_chat(small, talk('Hi', half, 'x')), lambda: p(half), lambda: p([user('x'), user(half)]), lambda: p(talk('Hi', half), continue_final_message=True), lambda: p('Hi', answers=half), lambda: TokenAligner(small, pieces).align_text(half):
        with pytest.raises(ValueError, match=r"lone surrogate \('.ud") as e: read()
        assert not isinstance(e.value, UnicodeError)
    whole = half.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')     # as the message advises
    assert p(whole)['input_ids'].numel() and p('\U0001f41f')['input_ids'].numel()


def test_a_picture_of_control_characters():
    "It stays XML."
    aligner = TokenAligner(tokenizer('small'), tokenizer('pieces'))
    text = ''.join(map(chr, range(1, 32))) + '\x00\x7f\x80\x9f\ufffe\uffff\U0001fffe a<&>"'
    for x in text, user(text):
        labels = [e.text for e in xml.fromstring(show_alignment(aligner, x).svg).iter('{http://www.w3.org/2000/svg}text')]
        assert {'␀', '␁', '␛', '␟', '␡', '⏎', '⇥', '<', '&'} <= set(labels)
        assert all(c.isprintable() for label in labels for c in label)


def test_markers_do_not_meet_the_text():
    r = read_chat(tokenizer('small'), talk('c2cmarkx0end', 'c2cmarkxx1end c2cmarkx'))
    assert [r.text[a:b] for a, b, _ in r.spans] == ['c2cmarkx0end', 'c2cmarkxx1end c2cmarkx']


# what follows a message's beginning

def test_answer_to_continue():
    chat = talk('Hi', 'Hello th')
    for strategy in ('first', 'offsets'):
        p = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small')], [strategy, 'shared'])
        batch = p(chat, continue_final_message=True)
        ids, last = batch['input_ids'][0], int(batch['sections'][0, -1])
        assert tokenizer('small').decode(ids[batch['sections'][0] == last]) == 'Hello th'
        assert not batch['active'][0][batch['sections'][0] == last].any() and batch['active'][0, :, 1].sum() == (batch['attention_mask'][0].bool() & (batch['sections'][0] < last)).sum()
    for wrong in (user('Hi'), talk('Hi', 'x')[1:]):
        with pytest.raises(ValueError, match='continue'): p(wrong, continue_final_message=True)


# batches

def single_in_batch(processor, items, **kw):
    "Every row of a batch is what its item gives alone."
    batch = processor(items, **kw)
    n = len(processor.sharer_tokenizers)
    assert set(batch) == {'input_ids', 'attention_mask', 'sharer_input_ids', 'sharer_attention_mask', 'active', 'sections', 'pairing'}
    b, t = batch['input_ids'].shape
    assert batch['attention_mask'].shape == batch['sections'].shape == (b, t) and batch['active'].shape == (b, t, n) and batch['active'].dtype == torch.bool
    assert (batch['sections'][:, 1:] >= batch['sections'][:, :-1]).all()
    for i, item in enumerate(items):
        one = processor(item, **kw)
        w = one['input_ids'].shape[1]
        for k in ('input_ids', 'attention_mask', 'active', 'sections'): assert torch.equal(batch[k][i, t-w:], one[k][0]), k
        assert not batch['attention_mask'][i, :t-w].any() and not batch['active'][i, :t-w].any() and not batch['sections'][i, :t-w].any()
        real = batch['attention_mask'][i].bool()
        last = int(real.nonzero()[-1])
        assert not batch['active'][i, last:].any() and not batch['active'][i][~real].any()
        for j, strategy in enumerate(processor.strategies):
            ids, mask, pairs = batch['sharer_input_ids'][j], batch['sharer_attention_mask'][j], batch['pairing'][j]
            assert (ids is None) == (mask is None) == (strategy == 'shared' and not processor.changed[j]) and (pairs is None) == (strategy != 'offsets')
            if ids is None: continue
            v = one['sharer_input_ids'][j].shape[1]
            assert torch.equal(ids[i, ids.shape[1]-v:], one['sharer_input_ids'][j][0]) and torch.equal(mask[i, ids.shape[1]-v:], one['sharer_attention_mask'][j][0]) and not mask[i, :ids.shape[1]-v].any()
            if pairs is None: assert ids.shape == (b, t) and not (batch['active'][i, :, j] & (mask[i] == 0)).any(); continue
            alone = one['pairing'][j][0]
            assert torch.equal(pairs[i, t-w:], torch.where(alone < 0, alone, alone + ids.shape[1] - v)) and (pairs[i, :t-w] == -1).all()
            used = pairs[i][batch['active'][i, :, j]]
            assert (used >= 0).all() and mask[i][used].all()
    return batch


@pytest.mark.parametrize('kind', ['made', 'real'])
def test_batches(kind):
    receiver, *sharers = made if kind == 'made' else ('qwen3', 'phi-3-mini', 'gpt-neox-20b')
    sharers = [tokenizer(s) for s in (*sharers, receiver)]
    chats = [nasty[k] for k in ('chinese', 'turns', 'newlines', 'white', 'empty', 'decomposed')]
    for strategy in (['first', 'longest', 'shared'], ['offsets', 'first', None], 'offsets', None, 'longest'):
        processor = C2CProcessor(tokenizer(receiver), sharers, strategy)
        if kind == 'real' and strategy in ('longest', ['first', 'longest', 'shared']): continue
        single_in_batch(processor, chats)
        single_in_batch(processor, chats, add_generation_prompt=False)
        single_in_batch(processor, texts[:9])


def test_layout_of_several_sharers():
    "Where two sharers see other templates, all tokens of all of them stand in order, and messages one for one; a row ends with the receiver's last token."
    wide = with_template('small', "{{ 'a very long beginning that needs room ' }}" + plain + "{{ 'and an end' }}")
    dropping = with_template('pieces', "{% for m in messages if m.role != 'assistant' %}{{ m.role + '=' + m.content }}{% endfor %}{{ 'so: what is it then' }}")
    p = C2CProcessor(tokenizer('small'), [wide, dropping, tokenizer('small-nfc')], ['first', 'longest', 'offsets'])
    chat = talk('Hi there', 'Hello', 'What is a model?')
    batch = p(chat)
    assert batch['input_ids'][0][batch['attention_mask'][0].bool()].tolist() == read_chat(tokenizer('small'), chat).ids
    for j in (0, 1):
        alone = p.aligners[j].align_chat(chat)
        heard = batch['sharer_input_ids'][j][0][batch['sharer_attention_mask'][j][0].bool()].tolist()
        assert heard == alone.sharer_ids[:len(heard)] and len(heard) >= alone.sections[-1].sharer[0] and batch['attention_mask'][0, -1]
        columns = batch['attention_mask'][0].nonzero()[:, 0]
        for s in alone.sections:
            if s.kind == 'message': assert batch['sharer_input_ids'][j][0][columns[slice(*s.receiver)]].tolist() == alone.sharer_ids[slice(*s.sharer)]
    assert batch['active'].any(0).any(0).all() and [s.message for s in p.aligners[1].align_chat(chat).sections if s.kind == 'message'] == [0, 2]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chats=st.lists(st.lists(st.text(characters, max_size=12), min_size=1, max_size=4), min_size=1, max_size=3), pair=st.permutations(made), strategy=st.sampled_from(['first', 'longest', 'offsets', None]))
def test_any_batch(chats, pair, strategy):
    receiver, *sharers = map(tokenizer, pair)
    single_in_batch(C2CProcessor(receiver, sharers, strategy), [talk(*c) for c in chats])
    for c in chats: check_chat(TokenAligner(receiver, sharers[0], strategy or 'offsets'), talk(*c))


def test_one_vocabulary(assets):
    q3, q25 = tokenizer('qwen3'), tokenizer('qwen2.5')
    processor = C2CProcessor(q3, [q25, q3])
    assert processor.strategies == ['shared', 'shared'] and C2CProcessor(q3, [tokenizer('gpt2')]).strategies == ['offsets']
    batch = processor([user('Hi'), talk('Why?', 'x', 'y')])
    assert batch['sharer_input_ids'][1] is None and batch['sharer_attention_mask'][1] is None
    ids, theirs = batch['input_ids'], batch['sharer_input_ids'][0]
    added = {q3.convert_tokens_to_ids(t) for t in ('<tool_response>', '</tool_response>', '<think>', '</think>')}
    assert set(processor.changed[0]) == added and any(int(i) in added for i in ids.flatten())     # Qwen3's generation prompt has <think>
    differ = ids != theirs
    assert {int(i) for i in ids[differ]} <= added and not any(int(i) in added for i in theirs.flatten())
    assert int(theirs.max()) < len(q25)
    table = processor.token_maps()
    assert table[1] is None and (table[0] != torch.arange(len(q3))).nonzero()[:, 0].tolist() == sorted(added)
    assert batch['active'][..., 0].sum(1).tolist() == (batch['attention_mask'].sum(1) - 1).tolist()
    assert '<think>' not in q3.decode(processor(user('Hi'), enable_thinking=True)['input_ids'][0])
    back = C2CProcessor(q25, [q3])
    assert back.strategies == ['shared'] and back.changed == [{}]  # all that Qwen2.5 has, Qwen3 has too
    with pytest.raises(ValueError, match="sharer 0 cannot read the receiver's ids.*vocabularies differ"): C2CProcessor(q3, [tokenizer('gpt2')], 'shared')


def renamed_added_tokens(name, ids):
    "A real tokenizer whose added tokens with these ids have other names."
    spec = json.loads(tokenizer(name).backend_tokenizer.to_str())
    for t in spec['added_tokens']:
        if t['id'] in ids: t['content'] = f"<|other_{t['id']}|>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), chat_template=plain)


def test_added_tokens_that_clash(assets):
    "The same ids for other tokens: such tokenizers share no ids, whichever is the receiver's."
    q25, other = tokenizer('qwen2.5'), renamed_added_tokens('qwen2.5', range(151643, 151650))
    assert q25.convert_tokens_to_ids('<|im_start|>') == other.convert_tokens_to_ids('<|other_151644|>') == 151644
    wrong, changed = shared_vocabulary(other, q25)
    assert changed == {} and 'added tokens differ' in wrong[0] and '151643 is <|other_151643|> and <|endoftext|>' in wrong[0] and wrong[0].count(' is ') == 3
    assert C2CProcessor(q25, [other]).strategies == ['offsets']
    with pytest.raises(ValueError, match="sharer 0 cannot read the receiver's ids.*added tokens differ"): C2CProcessor(q25, [other], 'shared')


def test_added_tokens_of_small_tokenizers():
    "Clashing: no shared ids. Missing in the sharer: mapped. The same in another order of adding: shared."
    def with_added(*names):
        t = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer('small').backend_tokenizer.to_str()))
        t.add_tokens(list(names))
        return t
    a, b, c, none = with_added('<x>', '<y>'), with_added('<y>', '<x>'), with_added('<x>'), with_added()
    assert shared_vocabulary(a, b)[0] and shared_vocabulary(b, a)[0] and shared_vocabulary(b, c)[0]
    assert shared_vocabulary(c, a) == ([], {}) and shared_vocabulary(none, a) == ([], {})
    n = len(none)
    wrong, changed = shared_vocabulary(a, c)
    assert not wrong and set(changed) == {n + 1}
    assert [C2CProcessor(r, [s]).strategies for r, s in ((a, b), (a, c), (c, b))] == [['offsets'], ['shared'], ['offsets']]


def test_tokens_generated(assets):
    maps = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small')]).token_maps()
    assert maps[1] is None and maps[0].tolist() == TokenAligner(tokenizer('small'), tokenizer('pieces'), 'longest').token_map.tolist()


def test_nothing_grows():
    "A million chats take no more memory than one: no attribute of the processor or its aligners gets longer."
    p = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small-nfc')], ['first', 'offsets'])
    def size(x): return len(x) if hasattr(x, '__len__') else 1
    def sizes(): return {(i, k): size(v) for i, o in enumerate((p, *p.aligners)) for k, v in vars(o).items()} | {k: len(v) for k, v in vars(align).items() if isinstance(v, (list, dict, set))}
    p(user('warm up')); p.token_maps()
    before = sizes()
    for i in range(50): p([user(f'chat number {i} é\u0301'), user(str(i*i))])
    assert sizes() == before
    assert align._joining.cache_info().currsize == 1


def test_decoding():
    p = C2CProcessor(tokenizer('small'), [tokenizer('pieces')])
    batch = p(['Hi', 'Hello'])
    answers = torch.tensor([tokenizer('small')('ok').input_ids[:2] + [tokenizer('small').eos_token_id]]*2)
    out = torch.cat([batch['input_ids'], answers], 1)
    assert p.batch_decode(out, batch['input_ids'].shape[1]) == ['ok', 'ok'] and p.decode(out[0], batch['input_ids'].shape[1]) == 'ok'


def test_to_device():
    batch = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small')])('Hi', device='meta')
    assert {x.device.type for k in batch for x in (batch[k] if isinstance(batch[k], list) else [batch[k]]) if x is not None} == {'meta'} and batch['sharer_input_ids'][1] is None
    assert batch.input_ids is batch['input_ids']


# saved

def test_saved_and_loaded(tmp_path):
    (tmp_path/'config.json').write_text('{}'); (tmp_path/'model.safetensors').write_bytes(b'x')
    p = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small'), tokenizer('small-nfc')], ['first', None, 'offsets'])
    for _ in range(2): p.save_pretrained(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ['config.json', 'model.safetensors', 'processor_config.json', 'receiver_tokenizer', 'sharer_tokenizers']
    assert (tmp_path/'model.safetensors').read_bytes() == b'x' and sorted(x.name for x in (tmp_path/'sharer_tokenizers').iterdir()) == ['0', '1', '2']
    again = C2CProcessor.from_pretrained(tmp_path)
    assert again.strategies == p.strategies == ['first', 'shared', 'offsets']
    for a, b in zip(p(list(nasty.values())).values(), again(list(nasty.values())).values()):
        for x, y in zip(a, b) if isinstance(a, list) else [(a, b)]: assert x is y is None or torch.equal(x, y)
    C2CProcessor(tokenizer('small'), [tokenizer('pieces')]).save_pretrained(tmp_path)
    assert [x.name for x in (tmp_path/'sharer_tokenizers').iterdir()] == ['0'] and C2CProcessor.from_pretrained(tmp_path.parent, subfolder=tmp_path.name).strategies == ['offsets']


@pytest.mark.parametrize('name', ['qwen3', 'gpt-neox-20b', 'phi-2', 'phi-3-mini'])
def test_real_ones_saved_and_loaded(assets, tmp_path, name):
    "Saved and loaded they are the same, and the fingerprint is that of the original."
    p = C2CProcessor(tokenizer(name), [tokenizer(name)])
    p.receiver_tokenizer(['a', 'longer text'], padding=p.receiver_tokenizer.pad_token is not None)     # leaves padding in the tokenizer's state
    p.save_pretrained(tmp_path)
    again = C2CProcessor.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again.receiver_tokenizer) == tokenizer_fingerprint(tokenizer(name)) == json.loads((tmp_path/'processor_config.json').read_text())['receiver_tokenizer']
    assert again.receiver_tokenizer.chat_template == tokenizer(name).chat_template
    for text in texts: assert again.receiver_tokenizer(text).input_ids == tokenizer(name)(text).input_ids


def test_damaged_processor(tmp_path):
    load = lambda: C2CProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='no processor_config.json'): load()
    with pytest.raises(FileNotFoundError, match='no folder'): C2CProcessor.from_pretrained(tmp_path/'absent')
    p = C2CProcessor(tokenizer('small'), [tokenizer('pieces')])
    p.save_pretrained(tmp_path)
    file = tmp_path/'processor_config.json'
    good = file.read_text()
    for text, message in (('{', 'not valid JSON'), ('[]', 'not the config'), (good.replace('"format_version": 1', '"format_version": 9'), 'format version 9'), (good.replace('"offsets"', '"best"'), "strategy='best'")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message): load()
    file.write_text(good); load()
    vocabulary = tmp_path/'receiver_tokenizer'/'tokenizer.json'
    whole = vocabulary.read_text()
    vocabulary.write_text(whole.replace('"NFC"', '"NFD"').replace('"dropout":null', '"dropout":0.1').replace('"dropout": null', '"dropout": 0.1'))
    with pytest.raises(ValueError, match='receiver_tokenizer has .* says'): load()
    vocabulary.write_text(whole); shutil.rmtree(tmp_path/'sharer_tokenizers'/'0')
    with pytest.raises(FileNotFoundError, match='sharer_tokenizers'): load()
    (tmp_path/'file').write_text('x')
    with pytest.raises(FileExistsError, match='is a file'): p.save_pretrained(tmp_path/'file')


def test_processor_without_a_folder_that_it_speaks_of(tmp_path):
    "Named, before any tokenizer is loaded; also where there is a file instead."
    p = C2CProcessor(tokenizer('small'), [tokenizer('pieces'), tokenizer('small-nfc')])
    for part in 'receiver_tokenizer', 'sharer_tokenizers/0', 'sharer_tokenizers/1':
        for instead in None, 'a file':
            folder = tmp_path/part.replace('/', '-')/str(instead)
            p.save_pretrained(folder)
            shutil.rmtree(folder/part)
            if instead: (folder/part).write_text(instead)
            with pytest.raises(FileNotFoundError, match=re.escape(f'there is no folder {folder/part}, which processor_config.json speaks of')): C2CProcessor.from_pretrained(folder)


damaged = dict(empty=b'', half=None, list=b'[]', null=b'null', deep=b'['*100_000, bytes=b'\xff\x00\x01', number=b'5')


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json', 'processor_config.json'])
@pytest.mark.parametrize('how', damaged)
def test_damaged_tokenizer_files(tmp_path, name, how):
    "A message that names folder or file; never an error of the JSON or Rust below."
    C2CProcessor(tokenizer('small'), [tokenizer('pieces')]).save_pretrained(tmp_path)
    file = tmp_path/name if name.startswith('processor') else tmp_path/'sharer_tokenizers'/'0'/name
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole)//2] if damaged[how] is None else damaged[how])
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(tmp_path))) as e: C2CProcessor.from_pretrained(tmp_path)
    assert e.type in (FileNotFoundError, ValueError) and ('no tokenizer could be loaded from' in str(e.value) or 'processor_config.json' in str(e.value))


@pytest.mark.parametrize('change', [dict(vocab=5), dict(vocab={'a': -1}), dict(vocab={'a': 10**11}), dict(vocab={'a': 'b'}), dict(merges=[['zz', 'qq']]), dict(merges=5), dict(type='Moon'), dict(vocab={}, merges=[])], ids=str)
def test_tokenizers_that_make_no_sense(tmp_path, change):
    C2CProcessor(tokenizer('small'), [tokenizer('pieces')]).save_pretrained(tmp_path)
    file = tmp_path/'receiver_tokenizer'/'tokenizer.json'
    spec = json.loads(file.read_text())
    spec['model'].update(change)
    file.write_text(json.dumps(spec))
    with pytest.raises(FileNotFoundError, match='no tokenizer'): load_tokenizer(file.parent)
    with pytest.raises(FileNotFoundError, match='no tokenizer'): C2CProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize('change', [dict(strategies=5), dict(strategies=[5]), dict(strategies=[['first']]), dict(strategies=[]), dict(receiver_tokenizer=5), dict(sharer_tokenizers=5), dict(sharer_tokenizers=[{}]), dict(format_version=[1]), dict(format_version='1')], ids=str)
def test_processor_fields_of_a_wrong_kind(tmp_path, change):
    C2CProcessor(tokenizer('small'), [tokenizer('pieces')]).save_pretrained(tmp_path)
    file = tmp_path/'processor_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match='processor|strategy'): C2CProcessor.from_pretrained(tmp_path)


def test_killed_while_saving(tmp_path, monkeypatch):
    "However far saving got, what lies there either loads as one of the two or is refused."
    old, new = C2CProcessor(tokenizer('small'), [tokenizer('pieces')]), C2CProcessor(tokenizer('small-nfc'), [tokenizer('small')])
    replace, outcomes = os.replace, set()
    for stop in range(6):
        shutil.rmtree(tmp_path, ignore_errors=True); old.save_pretrained(tmp_path)
        calls = itertools.count()
        def failing(a, b):
            if next(calls) == stop: raise KeyboardInterrupt
            return replace(a, b)
        monkeypatch.setattr(os, 'replace', failing)
        try: new.save_pretrained(tmp_path)
        except KeyboardInterrupt: pass
        monkeypatch.setattr(os, 'replace', replace)
        try: got = tokenizer_fingerprint(C2CProcessor.from_pretrained(tmp_path).receiver_tokenizer)
        except (ValueError, FileNotFoundError): outcomes.add('refused'); continue
        outcomes.add({tokenizer_fingerprint(old.receiver_tokenizer): 'old', tokenizer_fingerprint(new.receiver_tokenizer): 'new'}[got])
    assert outcomes == {'old', 'refused', 'new'}
    assert not [x for x in tmp_path.iterdir() if x.name.startswith('.processor')]


def test_merged():
    small, nfc, pieces = map(tokenizer, made)
    p = C2CProcessor.merge([C2CProcessor(small, [pieces], 'first'), C2CProcessor(copy.copy(small), [small]), C2CProcessor(small, [nfc])])
    assert p.strategies == ['first', 'shared', 'offsets'] and p.sharer_tokenizers == [pieces, small, nfc]
    with pytest.raises(ValueError, match='(?s)different receiver tokenizers.*processor 1 has'): C2CProcessor.merge([C2CProcessor(small, [pieces]), C2CProcessor(nfc, [pieces])])
    with pytest.raises(ValueError, match='another chat template'): C2CProcessor.merge([C2CProcessor(small, [pieces]), C2CProcessor(with_template('small', trimming), [pieces])])
    with pytest.raises(ValueError, match='at least one'): C2CProcessor.merge([])


# bad input

def test_bad_input():
    small, pieces = tokenizer('small'), tokenizer('pieces')
    p, bare = C2CProcessor(small, [pieces]), copy.copy(pieces)
    bare.chat_template = None
    refused = lambda message: pytest.raises(ValueError, match=message)
    for x, message in ((
        ('', 'is empty'), (['a', ''], 'text 1 is empty'), ([], 'empty list'), ([[]], 'a chat is a list'), (3, 'int was given'), (None, 'NoneType'), ([3], 'item 0'), (['a', user('b')], 'either'),
        ([user('b'), 'a'], 'either'), ([{'content': 'x'}], "no 'role'"), ([{'role': 'user'}], "no 'content'"), ([{'role': 'user', 'content': 3}], 'must be a text, int'), ([[{'role': 'user', 'content': 'x'}, 'y']], 'a chat is a list'))):
        with refused(message): p(x)
    with refused('enable_thinking is for chats'): p('Hi', enable_thinking=True)
    with refused('has no chat template'): C2CProcessor(small, [bare])(user('Hi'))
    with refused('has no chat template'): C2CProcessor(bare, [small])(user('Hi'))
    assert C2CProcessor(bare, [small])('Hi')['input_ids'].numel()
    for args, message in (((small, pieces), 'must be a list'), ((small, []), 'at least one'), ((small, [pieces], ['first', 'first']), '2 strategies'), ((small, [pieces], 'prefix'), "strategy='prefix'"),
        ((None, [pieces]), 'NoneType was given'), ((small, ['gpt2']), 'str was given'), ((small, [pieces], 'shared'), 'cannot read')):
        with refused(message): C2CProcessor(*args)
    with refused("strategy='prefix'"): TokenAligner(small, pieces, 'prefix')
    with refused('ids go from'): TokenAligner(small, pieces, 'first').align_sequence([10**6])
    with refused('ids go from'): TokenAligner(small, pieces, 'first').align_sequence([-1])
    with refused('no layout one for one'): TokenAligner(small, pieces, 'offsets').align_text('Hi').padded()
    with refused('a text is needed'): TokenAligner(small, pieces).align_text('')
    assert TokenAligner(small, pieces, 'first').align_sequence([]) == []
