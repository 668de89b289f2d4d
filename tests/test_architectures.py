"""Every architecture as receiver and as sharer: contracts 1, 2, 6, 7 and 9, and a reference that shares no code with `C2CModel`.

Sliding windows are 6 positions wide; texts are shorter, as long, and longer."""
import copy, functools, inspect, threading

import pytest, torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from c2c_nb.cache import STATE_LOST, KVGeometry, check_reading, clone_cache, keeps_state, make_cache, read_layer, window_of, write_layer
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

from tiny import (alone, assert_rows_are_alone, c2c_of, call, close, config_of, configs, fuser_for, ids_of, lay_out, logits_of, looped, named, one, others, partial, ragged_rows, refused, set_gates, tiny, vocab, window)

proved = ['qwen3', 'qwen2', 'llama', 'gpt2', 'gptneox', *named, *partial]       # with all tests; `others` with some
lengths = window - 2, window, window + 5
roles = pytest.mark.parametrize('role', ['receiver', 'sharer'])
each = pytest.mark.parametrize('name', proved)
noisy = dict(nemotron_h=2e-4, qwen3_next=5e-5, qwen3_5=5e-5, gemma4=2e-5)     # by so much their own single pass and their own decoding differ


@functools.cache
def pair(name, role, **kwargs):
    "A C2C model with this architecture in this role, shared between tests."
    return c2c_of(name, ['qwen3' if name != 'qwen3' else 'llama'], **kwargs) if role == 'receiver' else c2c_of('llama' if name != 'llama' else 'qwen3', [name], **kwargs)


def rows_for(name, seed=0):
    "Rows below, at and above the window: all of it fused, nothing, several sections; gaps in what a sharer reads where the model may have them."
    rows = ragged_rows(1, seed, (lengths[2], lengths[1], lengths[0], lengths[2]-1), gaps=not keeps_state(make_cache(config_of(name))))
    for r in rows: r['sharer_attention_mask0'][-1] = 1
    return rows


# a reference by hand

def fresh(model):
    "The cache that transformers itself would use, but one that keeps all positions."
    config = model.config
    return DynamicCache(config=config) if keeps_state(make_cache(config)) else DynamicCache()


@torch.no_grad()
def by_hand(c2c, ids, theirs, bounds, fused, steps):
    "One text: read a section with each model, project layer by layer, write, go on; then one token after the other. Logits and ids of each step."
    receiver, sharer, fuser = c2c.receiver, c2c.sharers[0], c2c.fusers[0]
    own, other = fresh(receiver), fresh(sharer)
    def read(model, x, cache):                                   # positions are given, because Bamba would begin again at 0
        positions = torch.arange(x.shape[1])[None] + cache.get_seq_length()
        return model(x, past_key_values=cache, **(dict(position_ids=positions) if 'position_ids' in inspect.signature(type(model).forward).parameters else {})).logits[:, -1]
    for a, b, fuse in zip([0, *bounds], bounds, fused):
        read(receiver, ids[:, a:b], own); read(sharer, theirs[:, a:b], other)
        if not fuse: continue
        old, said = ([(cache.layers[i].keys[:, :, a:b], cache.layers[i].values[:, :, a:b]) if i in g.fusable else None for i in range(g.layers)] for cache, g in ((own, fuser.receiver_geometry), (other, fuser.sharer_geometry)))
        for i, new in enumerate(looped(fuser, said, old)):
            if new is None: continue
            layer = own.layers[i]
            layer.keys, layer.values = (torch.cat([x[:, :, :a], y], 2) for x, y in zip((layer.keys, layer.values), new))
    logits, out, x = [], [], ids[:, bounds[-1]:]
    for _ in range(steps):
        logits.append(read(receiver, x, own)); x = logits[-1].argmax(-1, keepdim=True); out.append(x.item())
    return logits, out


@roles
@pytest.mark.parametrize('name', [*proved, *others])
def test_reference(name, role):
    c2c, atol = pair(name, role), noisy.get(name, 1e-5)
    layouts = dict(plain=lambda n: ([n-1], [True]), mixed=lambda n: ([1, n-2], [True, False]), three=lambda n: ([1, n-2, n-1], [False, True, True]))
    for n, layout in zip((*lengths, lengths[-1], lengths[-1]), ('three', 'mixed', 'plain', 'mixed', 'three')[:3 if name in others else 5]):
        bounds, fused = layouts[layout](n)
        ids, theirs = ids_of(1, n, seed=n), ids_of(1, n, seed=n + 50)
        sections = torch.bucketize(torch.arange(n), torch.tensor(bounds), right=True)[None]
        kw = dict(sharer_input_ids=[theirs], active=torch.tensor([*fused, True])[sections][..., None], sections=sections)
        logits, out = by_hand(c2c, ids, theirs, bounds, fused, 2)
        ours = c2c.generate(ids, **kw, max_new_tokens=2, **logits_of)
        assert ours.sequences[0, n:].tolist() == out
        for a, b in zip(ours.logits, logits): close(a, b, atol)
        if layout != 'plain': continue
        with torch.no_grad(): forward, alone = c2c(ids, **kw).logits[:, -1], c2c.receiver(ids).logits[:, -1]
        close(forward, logits[0], atol)
        assert (alone - logits[0]).abs().max() > 1e-3, 'fusing changed nothing'


# contract 1

@roles
@each
def test_1_closed_gates_change_nothing(name, role):
    c2c, rows = pair(name, role, gate=-1.), [ids_of(n, seed=n) for n in lengths]
    batch, theirs = alone(c2c.receiver, rows, max_new_tokens=3, **logits_of)
    ours = c2c.generate(**batch, max_new_tokens=3, **logits_of)
    assert torch.equal(ours.sequences, theirs.sequences) and all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))
    cache = c2c.prefill(**batch)                                 # read without the last token, as the receiver does
    own, mask = make_cache(c2c.receiver.config), batch['attention_mask']
    with torch.no_grad():
        known = 'position_ids' in inspect.signature(type(c2c.receiver).forward).parameters
        c2c.receiver(batch['input_ids'][:, :-1], attention_mask=mask[:, :-1], past_key_values=own, **(dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1]) if known else {}))
    for i in c2c.fusers[0].receiver_geometry.fusable:
        for a, b in zip(read_layer(cache, i), read_layer(own, i)): assert torch.equal(a, b)


# contract 2

@roles
@each
def test_2_rows_are_independent(name, role):
    assert_rows_are_alone(pair(name, role), rows_for(name), 'left' if role == 'receiver' else 'middle', steps=2, atol=noisy.get(name, 1e-5))


@pytest.mark.parametrize('name', others)
def test_2_rows_are_independent_in_short(name):
    assert_rows_are_alone(pair(name, 'receiver'), rows_for(name)[:2], 'right', steps=1)
    assert_rows_are_alone(pair(name, 'sharer'), rows_for(name)[1:3], 'left', steps=1)


@roles
@each
def test_2_rows_are_independent_with_followed_responses(name, role):
    c2c = pair(name, role)
    assert_rows_are_alone(C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers), follow_response=True), rows_for(name)[:3], 'left', steps=2, atol=noisy.get(name, 1e-5))


# contract 6

@each
def test_6_the_receiver_continues_the_cache(name):
    c2c, batch = pair(name, 'receiver'), call(lay_out(rows_for(name), 'left'))
    expected, cache = c2c.generate(**batch, max_new_tokens=3), c2c.prefill(**batch)
    assert isinstance(cache, DynamicCache) and len(cache) == c2c.fusers[0].receiver_geometry.layers
    plain = dict(attention_mask=batch['attention_mask'], max_new_tokens=3)
    assert torch.equal(c2c.receiver.generate(batch['input_ids'], past_key_values=clone_cache(cache), **plain), expected)
    cache.reorder_cache(torch.arange(4).repeat_interleave(2))
    beams = c2c.receiver.generate(batch['input_ids'], past_key_values=cache, **plain, num_beams=2)
    assert torch.equal(c2c.generate(**batch, max_new_tokens=3, num_beams=2), beams)


# contract 7

@roles
@each
def test_7_incremental_equals_at_once(name, role):
    c2c, ids, atol = pair(name, role), ids_of(2, 13), noisy.get(name, 1e-5)
    mask = torch.ones_like(ids); mask[1, :2] = 0
    sections = torch.tensor([[0]*4 + [1]*3 + [2]*5 + [3]]*2)
    active = (sections != 1)[..., None]
    once, answer = c2c.prefill(ids, mask, active=active, sections=sections), c2c.generate(ids, mask, active=active, sections=sections, max_new_tokens=3, **logits_of)
    step = None
    for stop in 5, 8, 13:
        step = c2c.prefill(ids[:, :stop], mask[:, :stop], active=active[:, :stop], sections=sections[:, :stop], cache=step)
        assert step.get_seq_length() == stop - 1
    for i in c2c.fusers[0].receiver_geometry.fusable:
        for a, b in zip(read_layer(step, i), read_layer(once, i)): close(a[0], b[0], atol); close(a[1, :, 2:], b[1, :, 2:], atol)
    again = c2c.generate(ids, mask, active=active, sections=sections, cache=step, max_new_tokens=3, **logits_of)
    assert torch.equal(again.sequences, answer.sequences)
    for a, b in zip(again.logits, answer.logits): close(a, b, atol)


@each
def test_7_a_turn_after_an_answer(name):
    "What was answered stays as it was read, what is new is fused; the sharer reads all of it."
    for role in 'receiver', 'sharer':
        c2c, ids = pair(name, role), ids_of(1, 7)
        cache = c2c.prefill(ids)
        first = c2c.generate(ids, cache=cache, max_new_tokens=4)
        text = torch.cat([first, ids_of(1, 5, seed=1)], 1)
        sections = torch.tensor([[0]*6 + [1]*4 + [2]*5 + [3]])
        kw = dict(sections=sections, active=(sections != 1)[..., None])
        ours, want = (c2c.generate(text, **k, max_new_tokens=3, **logits_of) for k in (dict(cache=cache), kw))
        assert torch.equal(ours.sequences, want.sequences)
        for a, b in zip(ours.logits, want.logits): close(a, b, 10*noisy.get(name, 1e-5))       # the answer was read token by token


@pytest.mark.parametrize('name', ['lfm2', 'qwen3_next', 'gemma4', 'falcon_h1'])
def test_7_a_clone_goes_its_own_way(name):
    "States are written in place: a clone has its own, and an error leaves the caller's cache as it was."
    c2c, start = pair(name, 'receiver'), ids_of(1, 6)
    cache = c2c.prefill(start)
    texts = [torch.cat([start, ids_of(1, 5, seed=s)], 1) for s in (1, 2)]
    expected = [c2c.generate(t, max_new_tokens=3, cache=c2c.prefill(start)) for t in texts]
    assert torch.equal(c2c.generate(texts[0], cache=clone_cache(cache), max_new_tokens=3), expected[0])
    with pytest.raises(AttributeError): c2c.generate(texts[1], cache=cache, max_new_tokens=3, logits_processor='none')      # breaks in decoding
    assert torch.equal(c2c.generate(texts[1], cache=cache, max_new_tokens=3), expected[1])


# contract 9

@each
def test_9_saved_and_loaded_is_the_same(name, tmp_path):
    ids = ids_of(1, 8)
    for role in 'receiver', 'sharer':
        c2c = pair(name, role)
        c2c.fusers[0].save_pretrained(tmp_path/role)
        again = C2CModel(c2c.receiver, list(c2c.sharers), [Fuser.from_pretrained(tmp_path/role)])
        with torch.no_grad(): assert torch.equal(again(ids).logits, c2c(ids).logits)


# without rotation

@each
def test_without_rotation_or_refused(name):
    "Keys are fused without rotation where every layer's can be undone; otherwise the message says which layer's cannot."
    r, s = tiny(name), tiny('llama', 1)
    without = dict(gpt2='gpt2', opt='opt', bloom='bloom', nemotron_h='nemotron_h', falcon_alibi='layer 0', smollm3='layer 1', granitemoehybrid='layer 1')
    make = lambda: C2CModel(r, [s], [fuser_for(r, s, key_space='unrotated')])
    if name not in without: return assert_rows_are_alone(make(), rows_for(name)[:2], 'left', steps=1, atol=5e-5)
    with pytest.raises(ValueError, match=without[name]) as e: make()
    assert "key_space='cache'" in str(e.value)


# training

@pytest.mark.parametrize('name', ['gemma2', 'gpt_oss', *partial])
def test_gradients_reach_the_fuser(name):
    "Through every kind of layer, and they are those of finite differences."
    c2c, ids = pair(name, 'receiver'), ids_of(2, 9)
    labels = torch.where(torch.arange(9) > 5, ids, -100)
    kw = dict(labels=labels, active=(torch.arange(9) < 5)[None, :, None].expand(2, -1, 1))
    bias = c2c.fusers[0].stacks[0].projector.value_proj_out.bias
    try:
        c2c(ids, **kw).loss.backward()
        grad = bias.grad.clone()
        assert torch.isfinite(grad).all() and grad.norm() > 0
        direction, old = grad/grad.norm(), bias.detach().clone()
        with torch.no_grad():
            bias.copy_(old + 1e-2*direction); up = c2c(ids, **kw).loss
            bias.copy_(old - 1e-2*direction); down = c2c(ids, **kw).loss
        assert abs(float(up - down)/2e-2 - float(grad.norm())) < .05*float(grad.norm())
    finally: c2c.fusers[0].zero_grad()


# what cannot be fused

@pytest.mark.parametrize('name', refused)
def test_refused(name):
    "The message names the model, the layer and the reason, whether the config is given or the model."
    config, says = config_of(name)
    whole, tried = config.is_encoder_decoder, 'in pieces' in says and config.model_type not in STATE_LOST
    if not tried:                                                # that is only found out by trying
        with pytest.raises(ValueError, match=config.model_type) as e: KVGeometry.of(config)
        if name != 'xlnet':
            for text in says: assert text in str(e.value), f'{text!r} is not in: {e.value}'
    if name == 't5': return                                      # AutoModelForCausalLM does not load it
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for run in (lambda: KVGeometry.of(model)), (lambda: Fuser.from_models(model, tiny('llama'))), (lambda: Fuser.from_models(tiny('llama'), model)):
        with pytest.raises(ValueError, match=config.model_type) as e: run()
        for text in ([] if whole else says): assert text in str(e.value), f'{text!r} is not in: {e.value}'


@pytest.mark.parametrize('kind', sorted(STATE_LOST))
def test_families_known_by_name_really_forget(kind):
    "If transformers repairs one of them, this fails: take it off the list."
    with pytest.raises(ValueError, match='in pieces'): check_reading(transformers.AutoModelForCausalLM.from_config(config_of(kind)[0]))


def test_trying_leaves_no_trace():
    model = copy.deepcopy(tiny('gpt2')).train()
    model.transformer.h[1].eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    check_reading(model)
    assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), state)


def test_sick_weights_are_not_taken_for_a_bad_reader():
    model = copy.deepcopy(tiny('llama'))
    with torch.no_grad(): model.model.layers[0].self_attn.v_proj.weight[0, 0] = float('nan')
    assert KVGeometry.of(model) == KVGeometry.of(tiny('llama'))


def test_layers_that_cannot_be_fused_are_left_out():
    "Layer maps go over the layers with keys and values; a map that names another is refused."
    r, s = tiny('lfm2'), tiny('gemma4', 1)
    fuser = fuser_for(r, s)
    assert fuser.layer_map == [None, 2, None, 3] and fuser_for(s, r).layer_map == [1, 1, 1, 3, None, None]
    assert fuser_for(s, r, layer_map='depth_nearest').layer_map == [1, 1, 3, 3, None, None]
    for layer_map, says in (([2, 2, None, 3], 'layer 0 of the receiver'), ([None, 4, None, 3], 'layer 4 of the sharer')):
        with pytest.raises(ValueError, match=says): fuser_for(r, s, layer_map=layer_map)
    c2c, ids = C2CModel(r, [s], [fuser]), ids_of(1, 9)
    cache, own = c2c.prefill(ids), make_cache(r.config)
    with torch.no_grad(): r(ids[:, :-1], past_key_values=own)
    assert torch.equal(cache.layers[0].conv_states[0], own.layers[0].conv_states[0])
    assert not torch.equal(cache.layers[1].keys, own.layers[1].keys)


def test_shared_layers_see_what_is_fused():
    "The last layers of Gemma 4 look into the cache of earlier ones: fusing only there changes what they see."
    r, s = tiny('gemma4'), tiny('llama', 1)
    ids = ids_of(1, 9)
    for i in range(4):
        c2c = C2CModel(r, [s], [fuser_for(r, s, layer_map=[0 if k == i else None for k in range(6)])])
        with torch.no_grad(): hidden, plain = (r(ids[:, -1:], past_key_values=c, output_hidden_states=True).hidden_states for c in (c2c.prefill(ids), c2c.prefill(ids, active=torch.zeros(1, 9, 1).bool())))
        moved = [float((a - b).abs().max()) for a, b in zip(hidden, plain)]
        assert max(moved[:i+1]) == 0 and min(moved[i+1:]) > 1e-5


# bad input: padding between tokens

@pytest.mark.parametrize('name,says', [('lfm2', 'recurrent or convolution layers'), ('qwen3_next', 'recurrent or convolution layers'), ('mistral_6', 'sliding window of 6'), ('gemma3_6', 'sliding window of 6')])
def test_padding_between_tokens_is_refused_where_it_would_count(name, says):
    c2c, ids = pair(name, 'receiver'), ids_of(2, 12)
    mask = torch.ones_like(ids); mask[1, 6:8] = 0
    cache = c2c.prefill(ids[:, :4])
    with pytest.raises(ValueError, match=says) as e: c2c.generate(ids, mask, cache=cache, max_new_tokens=2)
    assert 'row 1' in str(e.value)
    expected = c2c.generate(ids, cache=c2c.prefill(ids[:, :4]), max_new_tokens=2)
    assert torch.equal(c2c.generate(ids, cache=cache, max_new_tokens=2), expected)
    assert_rows_are_alone(c2c, [dict(input_ids=ids_of(n, seed=n)) for n in lengths], 'middle', steps=1)      # anywhere else it is moved to the front


def test_gaps_of_a_sharer_with_states_are_refused():
    c2c, ids = pair('lfm2', 'sharer'), ids_of(1, 8)
    gap = torch.ones_like(ids); gap[:, 2:4] = 0
    with pytest.raises(ValueError, match='sharer 0'): c2c.generate(ids, sharer_attention_mask=[gap], max_new_tokens=2)
    gap[:, :2] = 0
    assert torch.equal(c2c.prefill(ids, sharer_attention_mask=[gap]).layers[0].keys[:, :, :4], c2c.prefill(ids, active=torch.zeros(1, 8, 1).bool()).layers[0].keys[:, :, :4])


# bad input: caches and geometry

def test_caches_that_do_not_fit_are_refused():
    lfm = pair('lfm2', 'receiver')
    ids, plain = ids_of(1, 9), DynamicCache()
    with torch.no_grad(): tiny('qwen3')(ids[:, :4], past_key_values=plain)
    before = plain.get_seq_length()
    with pytest.raises(ValueError, match='another model'): lfm.generate(ids, cache=plain, max_new_tokens=2)
    assert plain.get_seq_length() == before
    own = DynamicCache(config=tiny('lfm2').config)              # its own is continued
    with torch.no_grad(): tiny('lfm2')(ids[:, :4], past_key_values=own)
    sections = torch.tensor([[0]*4 + [1]*4 + [2]])
    expected = lfm.generate(ids, sections=sections, active=(sections == 1)[..., None], max_new_tokens=3)
    assert torch.equal(lfm.generate(ids, cache=own, max_new_tokens=3), expected)
    gemma, own = pair('gemma4', 'receiver'), DynamicCache()     # and so is one without the layers that keep nothing
    with torch.no_grad(): tiny('gemma4')(ids[:, :4], past_key_values=own)
    expected = gemma.generate(ids, sections=sections, active=(sections == 1)[..., None], max_new_tokens=3)
    assert torch.equal(gemma.generate(ids, cache=own, max_new_tokens=3), expected)


@pytest.mark.parametrize('heads,dims,says', [((2, 0), 8, 'layer 1 has 0 KV heads of width 8'), (2, (8, 0), 'layer 1 has 2 KV heads of width 0'), ((2, -1), 8, 'layer 1 has -1'), ((2, 2, 2), 8, '3 entries for 2 layers')])
def test_geometries_that_cannot_be(heads, dims, says):
    with pytest.raises(ValueError, match=says): KVGeometry(2, heads, dims)


def test_layers_without_positions_are_not_read():
    cache = make_cache(tiny('lfm2').config)
    with torch.no_grad(): tiny('lfm2')(ids_of(1, 5), past_key_values=cache)
    x = torch.zeros(1, 2, 1, 8)
    for run in (lambda: read_layer(cache, 0)), (lambda: write_layer(cache, 0, x, x)):
        with pytest.raises(ValueError, match='layer 0 .* keeps no keys and values by position.*fusable'): run()
    shared = make_cache(tiny('gemma4').config)
    with pytest.raises(ValueError, match='layer 5 is a DummyLayer'): read_layer(shared, 5)


def test_windows_and_states():
    assert [window_of(config_of(n)) for n in ('mistral', 'mistral_6', 'llama4', 'qwen3', 'lfm2')] == [3, 6, 6, None, None]
    assert [n for n in (*configs, *named, *partial, *others) if keeps_state(make_cache(config_of(n)))] == [n for n in partial if n not in ('gemma3n', 'gemma4')]


# half precision

@pytest.mark.parametrize('receiver,sharer', [('qwen3', 'gemma2'), ('gpt2', 'qwen2'), ('mistral_6', 'lfm2')])
def test_half_precision(receiver, sharer):
    "Receiver and sharer in any types: it runs, the answer has the receiver's type and is near that of single precision, closed gates change nothing."
    types, ids = (torch.float32, torch.bfloat16, torch.float16), ids_of(2, 9)
    mask = torch.ones_like(ids); mask[1, :3] = 0
    r, s = ({t: copy.deepcopy(m).to(t) for t in types} for m in (tiny(receiver), tiny(sharer, 1)))
    reference = None
    for a in types:
        own = r[a].generate(ids, attention_mask=mask, max_new_tokens=2, **logits_of)
        for b in types:
            c2c = C2CModel(r[a], [s[b]], [fuser_for(r[a], s[b]).to(torch.float32 if a == b else torch.bfloat16)])
            with torch.no_grad(): out = c2c(ids, mask)
            assert out.logits.dtype == a and torch.isfinite(out.logits).all() and out.past_key_values.layers[0].keys.dtype == a
            if reference is None: reference = out.logits
            assert (out.logits.float() - reference).abs().mean() < .05*reference.abs().mean(), (a, b)
            set_gates(c2c.fusers[0], [-1.])
            ours = c2c.generate(ids, mask, max_new_tokens=2, **logits_of)
            assert torch.equal(ours.sequences, own.sequences) and all(torch.equal(x, y) for x, y in zip(ours.logits, own.logits))


# ways to generate: what comes out is what the receiver's own `generate` makes of the fused cache

ways = ['qwen3', 'gemma3_6', 'opt', 'lfm2']


@pytest.fixture(scope='module')
def tokenizer():
    "One word for each id."
    made = Tokenizer(models.WordLevel({f'Ġw{i:02d}': i for i in range(vocab)}, unk_token='Ġw01'))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token='Ġw01', pad_token='Ġw00')


def both_ways(name, copies=1, rows=1, **kw):
    "The answer of `c2c.generate` and of the receiver's `generate` over `c2c.prefill`, from the same random state."
    c2c, ids = pair(name, 'receiver'), ids_of(rows, 9)
    mask = torch.ones_like(ids)
    if rows > 1: mask[1, :3] = 0
    torch.manual_seed(1); ours = c2c.generate(ids, mask, **(dict(max_new_tokens=5) | kw))
    cache = c2c.prefill(ids, mask)
    if copies > 1: cache.reorder_cache(torch.arange(rows).repeat_interleave(copies))
    torch.manual_seed(1); theirs = c2c.receiver.generate(ids, attention_mask=mask, past_key_values=cache, **(dict(max_new_tokens=5) | kw))
    return ours, theirs


class Ban(LogitsProcessor):
    "Never the word that would be best."
    def __call__(self, input_ids, scores): return scores.scatter(1, scores.argmax(1, keepdim=True), -float('inf'))


@pytest.mark.parametrize('name', ways)
@pytest.mark.parametrize('kw', [dict(do_sample=True, top_p=.9, temperature=1.5), dict(num_beams=3), dict(num_beams=3, num_return_sequences=2, length_penalty=.5), dict(do_sample=True, num_return_sequences=3),
    dict(num_beams=2, do_sample=True), dict(repetition_penalty=1.5, no_repeat_ngram_size=2), dict(logits_processor=LogitsProcessorList([Ban()])), dict(min_new_tokens=4, eos_token_id=7, max_new_tokens=8)], ids=lambda kw: ' '.join(kw))
def test_ways_to_generate(name, kw):
    copies = max(kw.get('num_beams', 1), kw.get('num_return_sequences', 1))
    for rows in 1, 2:
        ours, theirs = both_ways(name, copies, rows, **kw)
        assert torch.equal(ours, theirs)
    if 'logits_processor' in kw: assert not torch.equal(ours, both_ways(name, 1, 2)[0])


@pytest.mark.parametrize('name', ways)
def test_streams(name, tokenizer, capsys):
    c2c, ids = pair(name, 'receiver'), ids_of(1, 9)
    answer = c2c.generate(ids, max_new_tokens=5)
    text = tokenizer.decode(answer[0, 9:]).strip()
    assert torch.equal(c2c.generate(ids, max_new_tokens=5, streamer=TextStreamer(tokenizer, skip_prompt=True)), answer)
    assert capsys.readouterr().out.strip() == text
    both = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60), TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    for streamer, run in zip(both, (lambda s: c2c.generate(ids, max_new_tokens=5, streamer=s), lambda s: c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=c2c.prefill(ids), max_new_tokens=5, streamer=s))):
        thread = threading.Thread(target=run, args=(streamer,)); thread.start()
        pieces = list(streamer); thread.join()
        assert ''.join(pieces).strip() == text and len([p for p in pieces if p]) > 1, 'it did not come piece by piece'


@pytest.mark.parametrize('name', ways)
def test_stop_strings(name, tokenizer):
    full = tokenizer.decode(pair(name, 'receiver').generate(ids_of(1, 9), max_new_tokens=8)[0, 9:]).split()
    word = full[3]
    ours, theirs = both_ways(name, stop_strings=[word], tokenizer=tokenizer, max_new_tokens=8)
    assert torch.equal(ours, theirs) and ours.shape[1] == 9 + full.index(word) + 1


@pytest.mark.parametrize('name', ['qwen3', 'gemma3_6', 'opt', 'gpt_oss', 'gemma4'])
def test_assistants(name):
    "Assisted decoding gives the greedy answer over the fused cache."
    c2c, ids = pair(name, 'receiver'), ids_of(1, 9)
    greedy = c2c.generate(ids, max_new_tokens=7)
    assert torch.equal(c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=c2c.prefill(ids), max_new_tokens=7), greedy)
    for kw in dict(prompt_lookup_num_tokens=3), dict(assistant_model=tiny(name, 5)):
        assert torch.equal(c2c.generate(ids, max_new_tokens=7, **kw), greedy)


@pytest.mark.parametrize('name', ['qwen3_next', 'bamba', 'lfm2'])
def test_assistants_are_refused_by_models_with_states(name):
    with pytest.raises(ValueError, match='keeps states of recurrent or convolution layers'): pair(name, 'receiver').generate(ids_of(1, 9), max_new_tokens=4, prompt_lookup_num_tokens=3)
