"`C2CModel.chat`: turns on a cache against the same conversation afresh, what is read, turns that fail, beams, batches and bad input."
import copy

import pytest, torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, Lfm2Config, LogitsProcessor, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.cache import keeps_state
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.plan import common_columns

from tiny import architectures, common, configs, fuser_for, tiny

LETTERS = 'abcdefghijklmnopqrstuvwxyz ?\n'
QUESTIONS = 'who is it?', 'and where\n', ' ', 'the cat sat on the mat', 'why?', 'he he he', 'is that all there is?', 'no', 'then tell me', 'thanks'
PLAIN = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% if shy %}well {% endif %}{% endif %}"
TRIMMING = "<s>{% for m in messages %}<s>{{ m.role }}<e>{{ m.content | trim }}<u>{% endfor %}{% if add_generation_prompt %}<s>assistant<e>{% endif %}"


def letters(merges=(), template=PLAIN):
    "A tokenizer of letters and a few pairs of them, with 60 tokens at most."
    specials = ['<pad>', '<s>', '<e>', '<u>', '<a>']
    vocabulary = {t: i for i, t in enumerate([*specials, *LETTERS, *merges])}
    vocabulary |= {f'<{i}>': i for i in range(len(vocabulary), 60)}                       # never in a text, but a random model may say them
    t = Tokenizer(models.BPE(vocabulary, [(m[0], m[1]) for m in merges], unk_token='<pad>'))
    t.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', additional_special_tokens=specials[1:])
    tokenizer.chat_template = template
    return tokenizer


ours, theirs = letters(['th', 'at', ' t', 's ']), letters(['he', 'is', 'e ', 'er'], TRIMMING)


def made(name):
    "A tiny model that has positions enough for ten turns."
    if name == 'gpt2': config = copy.deepcopy(configs['gpt2']); config.n_positions = 512
    elif name == 'lfm2': config = Lfm2Config(**common, num_hidden_layers=3, num_key_value_heads=2, layer_types=['conv', 'full_attention', 'conv'])
    else: return tiny(name, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).eval()


def talker(receiver='qwen3', sharers=('llama',), strategies=('offsets',), **kwargs):
    "A C2C model that can chat; sharers with the strategy 'shared' have the receiver's tokenizer."
    r, ss = made(receiver), [tiny(s, 6 + j) if s in configs and s != 'gpt2' else made(s) for j, s in enumerate(sharers)]
    processor = C2CProcessor(ours, [ours if s == 'shared' else theirs for s in strategies], list(strategies))
    return C2CModel(r, ss, [fuser_for(r, s, seed=20 + j) for j, s in enumerate(ss)], processor=processor, **kwargs)


class Reads:
    "Counts how many columns each model reads."
    def __init__(self, c2c):
        self.counts, self.models = [0]*(1 + len(c2c.sharers)), [m.base_model for m in (c2c.receiver, *c2c.sharers)]
    def __enter__(self):
        def counting(i):
            def hook(module, args, kwargs): self.counts[i] += (kwargs['input_ids'] if 'input_ids' in kwargs else args[0]).shape[1]
            return hook
        self.handles = [m.register_forward_pre_hook(counting(i), with_kwargs=True) for i, m in enumerate(self.models)]
        return self
    def __exit__(self, *_):
        for h in self.handles: h.remove()


def sharer_columns(batch, j):
    "What sharer j is given, -1 at padding."
    ids, mask = batch['sharer_input_ids'][j], batch['sharer_attention_mask'][j]
    if ids is None: ids, mask = batch['input_ids'], batch['attention_mask']
    return ids.masked_fill(mask == 0, -1)


def talk(c2c, turns=10, new=3, check_reads=True, **kwargs):
    "Let a conversation go on for some turns, and look at what was read in each: messages, cache, and columns that were read in all. `cache.begun` holds the columns at which turns began to read."
    messages, cache, before, read = [], c2c.new_cache(), None, [0]*(1 + len(c2c.sharers))
    cache.begun, state = [], keeps_state(cache)
    for i in range(turns):
        messages.append(dict(role='user', content=QUESTIONS[i % len(QUESTIONS)]))
        batch = c2c.processor(messages)
        ids, t = batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -1), batch['input_ids'].shape[1]
        same = min(common_columns(ids, cache.ids), t - 1) if cache.ids is not None else 0
        if state and same < cache.get_seq_length(): same = 0
        begun = [c for c in cache.begun if c < same] + [same]
        with Reads(c2c) as reads: messages.append(dict(role='assistant', content=c2c.chat(messages, cache=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs)))
        cache.begun = begun
        read = [a + b for a, b in zip(read, reads.counts)]
        if before is not None and check_reads:                   # all that stood in the last prompt and still stands there is not read again
            assert reads.counts[0] <= t - common_columns(ids, before[0]) + new
            for j, n in enumerate(reads.counts[1:]): assert n <= sharer_columns(batch, j).shape[1] - common_columns(sharer_columns(batch, j), before[1][j][:, :cache_columns[j]])
        before, cache_columns = (ids, [sharer_columns(batch, j) for j in range(len(c2c.sharers))]), [s.get_seq_length() for s in cache.sharers]
    return messages, cache, read


def assert_afresh(c2c, messages, cache, begun=()):
    "A cache is what a prefill of the whole conversation gives, fused where the cache was, and cut where a turn began to read."
    batch = c2c.processor(messages[:-1])
    n = batch['input_ids'].shape[1] - 1
    batch['active'] = F.pad(cache.fused, (0, 0, 0, n + 1 - cache.fused.shape[1]))[:, :n+1]
    assert batch['active'].any()
    cuts = (batch['active'][:, 1:] != batch['active'][:, :-1]).any(-1)
    for c in begun or cache.begun: cuts[:, c-1] |= 0 < c < n
    real = batch['attention_mask'][0, :n].bool()                 # what lies at padding is nobody's business
    cuts[:, -1] = True                                           # the last section is the last token
    afresh = c2c.prefill(**{**batch, 'sections': F.pad(cuts.int().cumsum(1), (1, 0))})
    for i in c2c.fusers[0].receiver_geometry.fusable:
        for a, b in ((cache.layers[i].keys, afresh.layers[i].keys), (cache.layers[i].values, afresh.layers[i].values)):
            torch.testing.assert_close(a[:, :, :n][:, :, real], b[:, :, :n][:, :, real], atol=1e-4, rtol=0)


def contents(messages): return [m['content'] for m in messages]


# ten turns

@pytest.fixture(scope='module')
def golden_talker(golden):
    "Models of the official outputs, with their tokenizers."
    models = {n: AutoModelForCausalLM.from_pretrained(golden/n).eval() for n in ('receiver', 'sharer1', 'sharer2')}
    tokenizers = {n: load_tokenizer(golden/n) for n in models}
    fusers = {n: Fuser.from_published(golden/f'ckpt_s{n[-1]}/final') for n in ('sharer1', 'sharer2')}
    def make(names, strategies, **kwargs):
        return C2CModel(models['receiver'], [models[n] for n in names], [fusers[n] for n in names], processor=C2CProcessor(tokenizers['receiver'], [tokenizers[n] for n in names], strategies), **kwargs)
    return make


@pytest.mark.parametrize('names, strategies, fusion', [
    (['sharer1'], ['offsets'], 'parallel'), (['sharer1'], ['longest'], 'parallel'), (['sharer1'], ['first'], 'parallel'), (['sharer2'], ['shared'], 'parallel'),
    (['sharer2', 'sharer1'], ['shared', 'offsets'], 'parallel'), (['sharer2', 'sharer1'], ['shared', 'offsets'], 'sequential')])
def test_ten_turns_of_the_golden_models(golden_talker, names, strategies, fusion):
    c2c = golden_talker(names, strategies, fusion=fusion)
    messages, cache, read = talk(c2c)
    assert_afresh(c2c, messages, cache)
    whole = sum(c2c.processor(messages[:i])['input_ids'].shape[1] for i in range(1, 20, 2))
    assert read[0] < whole/2                                     # what reading everything at every turn would have been


@pytest.mark.parametrize('name', architectures)
def test_ten_turns_of_an_architecture(name):
    sharer = architectures[(architectures.index(name) + 1) % len(architectures)]
    c2c = talker(name, [sharer])
    messages, cache, _ = talk(c2c)
    assert_afresh(c2c, messages, cache)


def test_two_sharers_and_a_padded_layout():
    c2c = talker('qwen3', ['llama', 'qwen2'], ['longest', 'shared'], fusion='sequential')
    messages, cache, _ = talk(c2c)
    assert_afresh(c2c, messages, cache)
    assert not torch.equal(cache.fused[..., 0], cache.fused[..., 1])


@pytest.mark.parametrize('receiver, sharer', [('lfm2', 'llama'), ('qwen3', 'lfm2'), ('lfm2', 'lfm2')])
def test_ten_turns_with_a_state(receiver, sharer):
    "Convolution states cannot go back; where the text has changed, reading starts afresh."
    c2c = talker(receiver, [sharer])
    assert keeps_state(c2c.new_cache()) == (receiver == 'lfm2')
    messages, cache, _ = talk(c2c, check_reads=False)
    assert_afresh(c2c, messages, cache)


@pytest.mark.parametrize('kind', ['offsets', 'shared', 'two'])
def test_followed_answers(kind):
    make = lambda: talker('qwen3', ['llama', 'qwen2'] if kind == 'two' else ['llama'], ['offsets', 'shared'] if kind == 'two' else [kind], follow_response=True)
    c2c = make()
    messages, cache, _ = talk(c2c, check_reads=False)
    assert cache.raw.get_seq_length() == cache.get_seq_length() == cache.ids.shape[1] == cache.fused.shape[1]
    for j, s in enumerate(cache.sharers): assert s.get_seq_length() == cache.get_seq_length() + cache.lead[j] == cache.sharer_ids[j].shape[1]
    assert cache.fused[:, -1].all()                              # the answer was fused
    again, cache2, _ = talk(c2c, check_reads=False)
    assert contents(again) == contents(messages)
    for a, b in zip(cache.layers, cache2.layers): assert torch.equal(a.keys, b.keys)


def test_a_cache_gives_the_answers_that_none_gives():
    "Where no text changes, a conversation on a cache is the one that is read anew at every turn."
    c2c = talker('qwen3', ['llama'], ['shared'])
    messages, cache = [], c2c.new_cache()
    c2c.processor.receiver_tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    try:
        for q in QUESTIONS[:5]:
            messages.append(dict(role='user', content=q))
            batch = c2c.processor(messages)
            n = batch['input_ids'].shape[1]
            answer = c2c.chat(messages, cache=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
            batch['active'] = F.pad(cache.fused, (0, 0, 0, max(n - cache.fused.shape[1], 0)))[:, :n]
            out = c2c.generate(**{**batch, 'sections': None}, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert answer == c2c.processor.decode(out[0], n)
            messages.append(dict(role='assistant', content=answer))
    finally: c2c.processor.receiver_tokenizer.chat_template = PLAIN


# turns that fail

class Breaks(LogitsProcessor, BaseStreamer):
    def __init__(self, error): self.left, self.error = 3, error
    def count(self):
        self.left -= 1
        if not self.left: raise self.error
    def __call__(self, ids, scores): self.count(); return scores
    def put(self, value): self.count()
    def end(self): pass


def state_of(cache):
    return [[getattr(l, a, None) for l in c.layers for a in ('keys', 'values')] for c in (cache, *cache.sharers, *([cache.raw] if cache.raw else []))] + [cache.ids, cache.fused, *cache.sharer_ids, cache.lead, cache.pending]


def same_state(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list): return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.mark.parametrize('follow', [False, True])
@pytest.mark.parametrize('where', ['streamer', 'logits_processor'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_turn_that_fails(where, error, follow):
    c2c = talker('qwen3', ['llama', 'lfm2'], ['offsets', 'shared'], follow_response=follow)
    messages, cache, _ = talk(c2c, turns=2, check_reads=False)
    _, twin, _ = talk(c2c, turns=2, check_reads=False)
    before, messages = state_of(cache), messages + [dict(role='user', content='what now?')]
    hooks = {n: len(m._forward_pre_hooks) for n, m in c2c.named_modules()}
    with pytest.raises(error): c2c.chat(messages, cache=cache, max_new_tokens=5, pad_token_id=0, **{where: Breaks(error) if where == 'streamer' else [Breaks(error)]})
    assert same_state(state_of(cache), before) and same_state(before, state_of(cache))
    assert hooks == {n: len(m._forward_pre_hooks) for n, m in c2c.named_modules()}
    go_on = lambda cache: c2c.chat(messages, cache=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert go_on(cache) == go_on(twin)
    assert same_state(state_of(cache), state_of(twin))


def test_bad_input_leaves_the_cache_alone():
    c2c = talker()
    messages, cache, _ = talk(c2c, turns=2)
    before = state_of(cache)
    for bad in (messages + [dict(role='user')], messages + ['no'], []):
        with pytest.raises(ValueError): c2c.chat(bad, cache=cache)
    assert same_state(state_of(cache), before)


# beams, several answers, several chats

def hello(text='who is it?'): return [dict(role='user', content=text)]


def test_beams():
    c2c = talker('qwen3', ['llama', 'qwen2'], ['offsets', 'shared'])
    kwargs = dict(max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    batch, cache = c2c.processor(hello()), c2c.new_cache()
    out = c2c.generate(**batch, **kwargs)
    text = c2c.chat(hello(), cache=cache, **kwargs)
    assert text == c2c.processor.decode(out[0], batch['input_ids'].shape[1])
    assert cache.layers[0].keys.shape[0] == 1 and cache.get_seq_length() <= batch['input_ids'].shape[1]
    messages = hello() + [dict(role='assistant', content=text), *hello('and then')]
    fresh = c2c.new_cache()
    c2c.chat(hello(), cache=fresh, max_new_tokens=1, do_sample=False, pad_token_id=0)
    fresh_begun = common_columns(c2c.processor(messages)['input_ids'], cache.ids)
    greedy = lambda cache: c2c.chat(messages, cache=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert greedy(cache) == greedy(fresh)
    assert_afresh(c2c, messages + [None], cache, [fresh_begun])


def test_several_answers():
    c2c = talker()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        texts = c2c.chat(hello(), max_new_tokens=6, num_return_sequences=4, do_sample=True, pad_token_id=0)
        torch.manual_seed(0)
        batch = c2c.processor(hello())
        out = c2c.generate(**batch, max_new_tokens=6, num_return_sequences=4, do_sample=True, pad_token_id=0)
    assert len(texts) == 4 and len(set(texts)) > 1
    assert texts == c2c.processor.batch_decode(out, batch['input_ids'].shape[1])
    cache = c2c.new_cache()
    assert len(c2c.chat(hello(), cache=cache, max_new_tokens=3, num_return_sequences=2, do_sample=True, pad_token_id=0)) == 2
    assert cache.layers[0].keys.shape[0] == 1                    # the prompt is kept, none of the answers


@pytest.mark.parametrize('strategies', [['offsets', 'shared'], ['longest', 'first']])
def test_several_chats(strategies):
    c2c = talker('qwen3', ['llama', 'qwen2'], strategies)
    chats = [hello(), hello('no') + [dict(role='assistant', content='he said so'), *hello('the cat sat on the mat')], [dict(role='system', content='be that'), *hello('why?')]]
    kwargs = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    texts = c2c.chat(chats, **kwargs)
    assert texts == [c2c.chat(chat, **kwargs) for chat in chats]
    assert c2c.chat(chats[:1], **kwargs) == texts[:1]            # a list of one chat gives a list of one answer
    with pytest.raises(ValueError, match='several chats'): c2c.chat(chats, cache=c2c.new_cache())


def test_dictionary_outputs_and_defaults():
    c2c = talker()
    a = c2c.chat(hello(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert a == c2c.chat(hello(), max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    n, seen = c2c.processor(hello())['input_ids'].shape[1], []
    class Counts(BaseStreamer):
        def put(self, value): seen.append(value.numel())
        def end(self): pass
    c2c.chat(hello(), max_length=n + 3, do_sample=False, pad_token_id=0, streamer=Counts())
    assert sum(seen[1:]) == 3


def test_template_kwargs():
    c2c, texts = talker(), {}
    kwargs = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for shy in (False, True):
        batch = c2c.processor(hello(), shy=shy)
        out = c2c.generate(**batch, **kwargs)
        texts[shy] = c2c.chat(hello(), template_kwargs=dict(shy=shy), **kwargs)
        assert texts[shy] == c2c.processor.decode(out[0], batch['input_ids'].shape[1])
    assert texts[False] == c2c.chat(hello(), **kwargs) != texts[True]


def test_enable_thinking(golden_talker):
    c2c = golden_talker(['sharer2'], ['shared'])
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    caches = [c2c.new_cache() for _ in range(2)]
    for cache, thinks in zip(caches, (False, True)): c2c.chat(hello(), cache=cache, template_kwargs=dict(enable_thinking=thinks), **kwargs)
    assert caches[0].get_seq_length() > caches[1].get_seq_length()     # the empty thought is part of the prompt


# bad input

@pytest.mark.parametrize('bad, says', [('hello', 'list of messages'), (['hello'], 'list of messages'), (None, 'list of messages'), (dict(role='user', content='x'), 'list of messages'), ([], 'empty'), ([[]], 'list of messages'),
    ([dict(content='x')], 'role'), ([dict(role='user')], 'content'), ([dict(role='user', content=3)], 'content'), ([hello(), 'x'], 'list of messages'), (3, 'list of messages')])
def test_what_is_no_chat(bad, says):
    with pytest.raises(ValueError, match=says): talker().chat(bad)


def test_without_a_processor():
    c2c = talker()
    with pytest.raises(ValueError, match='processor=C2CProcessor'): C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers)).chat(hello())


def test_without_a_template():
    c2c = talker()
    bare = C2CProcessor(letters(template=None), [letters(template=None)])
    with pytest.raises(ValueError, match='no chat template'): C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers), processor=bare).chat(hello())


def test_cache_of_another_model():
    c2c, two = talker(), talker('qwen3', ['llama', 'qwen2'], ['offsets', 'shared'])
    cache = two.new_cache()
    two.chat(hello(), cache=cache, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match='2 sharers'): c2c.chat(hello(), cache=cache, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError): c2c.chat(hello(), cache='talk', max_new_tokens=2)


def test_too_long_a_conversation():
    c2c = talker(sharers=['llama'])
    config = c2c.receiver.config
    old, config.max_position_embeddings = config.max_position_embeddings, 30
    try:
        cache = c2c.new_cache()
        c2c.chat(hello(), cache=cache, max_new_tokens=2, pad_token_id=0)
        before = state_of(cache)
        with pytest.raises(ValueError, match='max_position_embeddings'): c2c.chat(hello('no '*20), cache=cache, max_new_tokens=2, pad_token_id=0)
        assert same_state(state_of(cache), before)
    finally: config.max_position_embeddings = old
