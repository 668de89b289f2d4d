"Contracts 1 to 3 and 5 to 9, each on several architectures (4 is test_parity.py; 10 comes with training)."
import copy, gc, json, sys, threading, warnings

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, GenerationConfig

from c2c_nb.cache import clone_cache
from c2c_nb.fuser import Fuser, StackedProjector
from c2c_nb.model import C2CModel
from c2c_nb.projector import C2CProjector, Projector, register_projector, unflatten_heads, flatten_heads

from tiny import (alone, architectures, assert_rows_are_alone, c2c_of, call, close, fuser_for, ids_of, kv_for, lay_out, logits_of, looped, one, ragged_rows, set_gates, tiny)

both_fusions = pytest.mark.parametrize('fusion', ['parallel', 'sequential'])
other_sharer = dict(qwen3='llama', qwen2='mistral', llama='qwen2', mistral='qwen3', gemma3='gpt2', gpt2='gemma3', gptneox='qwen2')


# 1: closed gates change nothing

@pytest.mark.parametrize('receiver', architectures)
def test_1_closed_gates_change_nothing(receiver):
    c2c, rows = c2c_of(receiver, [other_sharer[receiver]], gate=0.), [ids_of(n, seed=n) for n in (6, 9, 4)]
    for chosen, kw in ((rows, dict(max_new_tokens=4)), (rows[:1], dict(max_new_tokens=4)), (rows, dict(max_new_tokens=3, num_beams=2))):
        batch, theirs = alone(c2c.receiver, chosen, **kw, **logits_of)
        ours = c2c.generate(**batch, **kw, **logits_of)
        assert torch.equal(ours.sequences, theirs.sequences), 'ids are not bit-identical to the receiver alone'
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits)), 'logits are not bit-identical to the receiver alone'
    with torch.no_grad(): assert torch.equal(c2c(rows[0][None]).logits, c2c.receiver(rows[0][None], logits_to_keep=1).logits)


@both_fusions
def test_1_closed_gates_of_several_sharers(fusion):
    c2c, ids = c2c_of('qwen3', ['llama', 'gpt2'], fusion, gate=-1.), ids_of(2, 8)
    sections, active = torch.tensor([[0]*3 + [1]*4 + [2]]*2), torch.ones(2, 8, 2, dtype=torch.bool)
    ours = c2c.generate(ids, active=active, sections=sections, max_new_tokens=4, **logits_of)
    theirs = c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **logits_of)
    assert torch.equal(ours.sequences, theirs.sequences) and all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))


def test_1_a_closed_half_keeps_its_bits():
    "Closed gates beside open ones: there the receiver's cache is what it read, to the bit."
    c2c = c2c_of('qwen3', ['llama'], gate=[1., -1., -1.])         # keys of layer 0, values of layer 2
    ids = ids_of(1, 8)
    cache, own = c2c.prefill(ids), DynamicCache()
    with torch.no_grad(): c2c.receiver.model(ids[:, :-1], past_key_values=own)
    same = [(torch.equal(a.keys, b.keys), torch.equal(a.values, b.values)) for a, b in zip(cache.layers, own.layers)]
    assert same == [(False, True), (True, True), (True, False)]


def test_1_an_inactive_sharer_changes_nothing():
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 7)
    ours = c2c.generate(ids, active=torch.zeros(2, 7, 1, dtype=torch.bool), max_new_tokens=4, **logits_of)
    theirs = c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **logits_of)
    assert torch.equal(ours.sequences, theirs.sequences) and all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))


# 2: a row does not know its neighbours

@pytest.mark.parametrize('receiver', architectures)
@pytest.mark.parametrize('where', ['left', 'right', 'middle'])
def test_2_rows_are_independent(receiver, where):
    assert_rows_are_alone(c2c_of(receiver, [other_sharer[receiver]]), ragged_rows(1), where, steps=3)


@pytest.mark.parametrize('sharer', architectures)
def test_2_rows_are_independent_of_any_sharer(sharer):
    assert_rows_are_alone(c2c_of('qwen3', [sharer]), ragged_rows(1, seed=1), 'right', steps=2)


@both_fusions
@pytest.mark.parametrize('where', ['left', 'both', 'middle'])
def test_2_rows_are_independent_with_several_sharers(fusion, where):
    assert_rows_are_alone(c2c_of('qwen2', ['llama', 'gptneox', 'mistral'], fusion, gate=[1., -1., .5]), ragged_rows(3, seed=2), where, steps=3)


@pytest.mark.parametrize('receiver', ['qwen3', 'mistral', 'gemma3', 'gptneox'])
def test_2_rows_are_independent_without_rotation(receiver):
    c2c = c2c_of(receiver, ['llama'], key_space='unrotated')
    for where in 'left', 'middle': assert_rows_are_alone(c2c, ragged_rows(1, seed=3), where, steps=2, atol=2e-5)


def test_2_rows_are_independent_by_default():
    "Without `active` and `sections`."
    rows = [{k: v for k, v in r.items() if k == 'input_ids'} for r in ragged_rows(1)]
    for where in 'left', 'right', 'both', 'middle': assert_rows_are_alone(c2c_of('llama', ['qwen3']), rows, where, steps=2)


def test_2_rows_of_one_token_are_answered():
    rows = [dict(input_ids=ids_of(n, seed=n)) for n in (1, 5, 2)]
    assert_rows_are_alone(c2c_of(), rows, 'left')


def test_2_beams_and_samples_of_a_row():
    "Beam search in a ragged batch; as many answers as asked for, in the order of the rows."
    c2c, rows = c2c_of('qwen3', ['llama']), [{k: v for k, v in r.items() if not k.startswith('sharer')} for r in ragged_rows(1)]
    kw = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2)
    together = c2c.generate(**call(lay_out(rows, 'right')), **kw)
    single = torch.cat([c2c.generate(**one(r), **kw)[:, -4:] for r in rows])
    assert torch.equal(together[:, -4:], single)


def test_2_given_positions():
    "Explicit position ids: every row its own, in prefill, forward and decoding."
    c2c, rows = c2c_of('qwen3', ['llama']), [{k: v for k, v in r.items() if not k.startswith('sharer')} for r in ragged_rows(1)]
    for i, r in enumerate(rows): r['position_ids'] = torch.arange(len(r['input_ids']))*(i+1) + 2*i
    assert_rows_are_alone(c2c, rows, 'left')
    row = rows[0]                                                # and by hand: prefill, then one token after the other
    cache, x, p, ids = c2c.prefill(**one(row)), row['input_ids'][-1:], row['position_ids'][-1:], []
    for _ in range(4):
        with torch.no_grad(): x = c2c.receiver(x[None], position_ids=p[None], past_key_values=cache).logits[0, -1:].argmax(-1)
        ids.append(x.item()); p = p + 1
    assert c2c.generate(**one(row), max_new_tokens=4)[0, -4:].tolist() == ids


def test_2_a_sharer_may_read_other_positions():
    "Where a sharer has no token the receiver's is kept; tokens of a sharer after the receiver's last one are not read."
    c2c, n = c2c_of('qwen3', ['llama']), 7
    ids, mask = ids_of(1, 10), torch.tensor([[1]*n + [0]*3])
    with torch.no_grad():
        close(c2c(ids, mask, sharer_attention_mask=[torch.ones(1, 10).long()]).logits, c2c(ids[:, :n]).logits)
        gap = torch.ones(1, n).long(); gap[:, 2:4] = 0
        ours = c2c.prefill(ids[:, :n], sharer_attention_mask=[gap])
        want = c2c.prefill(ids[:, :n], sharer_attention_mask=[gap], active=torch.tensor([[1, 1, 0, 0, 1, 1, 0]]).bool()[..., None], sections=torch.tensor([[0]*6 + [1]]))
    for a, b in zip(ours.layers, want.layers): assert torch.equal(a.keys, b.keys)
    other = ids[:, :n].clone(); other[:, 2:4] = 1
    for a, b in zip(ours.layers, c2c.prefill(ids[:, :n], sharer_input_ids=[other], sharer_attention_mask=[gap]).layers): close(a.keys, b.keys)


# 3: batched equals looped

@register_projector
class ShapedProjector(Projector):
    "A linear map, for any shape: the simplest projector of one's own."
    def __init__(self, *shape, bias=True, **kwargs):
        super().__init__(*shape, **kwargs)
        self.key, self.value = (nn.Linear(self.sharer_heads*self.sharer_dim, self.receiver_heads*self.receiver_dim, bias=bias) for _ in range(2))
    def delta(self, sk, sv, rk, rv, keys=True, values=True):
        return unflatten_heads(self.key(flatten_heads(sk)), rk, self.receiver_heads), unflatten_heads(self.value(flatten_heads(sv)), rv, self.receiver_heads)


@torch.no_grad()
@pytest.mark.parametrize('kwargs', [dict(), dict(layer_map='depth_nearest'), dict(layer_map=[None, 0, 1]), dict(num_layers=2), dict(num_layers=5), dict(projector='ShapedProjector', bias=False),
    *C2CProjector.ablations.values()], ids=str)
def test_3_batched_equals_looped(kwargs):
    r, s = tiny('qwen3'), tiny('llama')
    size = {} if 'projector' in kwargs else dict(hidden_dim=16, intermediate_dim=12)
    torch.manual_seed(0)
    fuser = Fuser.from_models(r, s, **size, **kwargs).eval()
    if fuser.stacks[0].projector.gate: set_gates(fuser, [1., -1., .5])
    s_kv, r_kv = kv_for(fuser.sharer_geometry, 2, 5, 0), kv_for(fuser.receiver_geometry, 2, 5, 1)
    changed = 0
    for fast, slow, own in zip(fuser(s_kv, r_kv), looped(fuser, s_kv, r_kv), r_kv):
        for f, x, o in zip(fast, slow, own): close(o if f is None else f, x); changed += f is not None
    assert changed


@torch.no_grad()
def test_3_layers_of_different_shapes():
    "Layers that differ in heads or width go into stacks of their own."
    from c2c_nb.fuser import FuserConfig
    torch.manual_seed(0)
    fuser = Fuser(FuserConfig('C2CProjector', [0, 1, 2, 2], dict(layers=4, kv_heads=(2, 2, 1, 2), head_dim=(8, 8, 4, 8)), dict(layers=3, kv_heads=(1, 4, 4), head_dim=6),
        dict(hidden_dim=16, intermediate_dim=12, gate_init=1.))).eval()
    assert len(fuser.stacks) == 3
    s_kv, r_kv = kv_for(fuser.sharer_geometry, 2, 5, 0), kv_for(fuser.receiver_geometry, 2, 5, 1)
    for fast, slow in zip(fuser(s_kv, r_kv), looped(fuser, s_kv, r_kv)):
        for f, x in zip(fast, slow): close(f, x)


# 5: frozen is frozen

@both_fusions
def test_5_only_fusers_are_trained(fusion):
    r, ss = (copy.deepcopy(tiny('qwen3')), [copy.deepcopy(tiny(n, 1)) for n in ('llama', 'gpt2')])
    for m in (r, *ss): m.requires_grad_(True)
    c2c = C2CModel(r, ss, [fuser_for(r, s, dropout=0., gate=.5) for s in ss], fusion).train()
    before = {n: p.detach().clone() for n, p in c2c.named_parameters()}
    optimizer = torch.optim.AdamW(c2c.parameters(), lr=.1, weight_decay=.1)
    ids = ids_of(2, 8)
    labels = ids.clone(); labels[:, :5] = -100
    for _ in range(2):
        optimizer.zero_grad()
        c2c(ids, labels=labels, active=(torch.arange(8) < 4)[None, :, None].expand(2, -1, 2)).loss.backward()
        assert all(p.grad is None for m in (r, *ss) for p in m.parameters()), 'a frozen model received a gradient'
        optimizer.step()
    for n, p in c2c.named_parameters():
        if n.startswith('fusers.'): assert p.requires_grad and p.grad is not None and p.grad.norm() > 0 and not torch.equal(p, before[n]), f'{n} did not learn'
        else: assert not p.requires_grad and torch.equal(p, before[n]), f'{n} changed'


def test_5_train_and_eval_leave_the_models_alone():
    c2c = c2c_of('gpt2', ['llama'])
    for mode in True, False:
        c2c.train(mode)
        assert all(f.training is mode for f in c2c.fusers) and not c2c.receiver.training and not any(s.training for s in c2c.sharers)


# 6: the cache is plain

@pytest.mark.parametrize('receiver', architectures)
def test_6_the_receiver_continues_the_cache(receiver):
    c2c, rows = c2c_of(receiver, ['llama']), ragged_rows(1)
    batch = call(lay_out(rows[:4], 'left'))
    for kw in dict(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']), batch:
        expected, cache = c2c.generate(**kw, max_new_tokens=4), c2c.prefill(**kw)
        assert isinstance(cache, DynamicCache) and len(cache) == c2c.receiver.config.get_text_config().num_hidden_layers
        assert torch.equal(c2c.receiver.generate(batch['input_ids'], attention_mask=batch['attention_mask'], past_key_values=cache, max_new_tokens=4), expected)
    t = batch['input_ids'].shape[1]
    cache, mask, ids = c2c.prefill(**batch), batch['attention_mask'], batch['input_ids']         # and by hand
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        n = cache.get_seq_length()
        logits = c2c.receiver(ids[:, n:], attention_mask=mask, position_ids=positions[:, n:], past_key_values=cache).logits[:, -1]
    assert torch.equal(logits.argmax(-1), expected[:, t])


@pytest.mark.parametrize('kw', [dict(do_sample=True, top_p=.9, temperature=1.5), dict(num_beams=3), dict(repetition_penalty=1.5), dict(do_sample=True, num_return_sequences=3), dict(num_beams=2, do_sample=True)], ids=str)
def test_6_every_way_to_generate(kw):
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 8)
    copies = max(kw.get('num_beams', 1), kw.get('num_return_sequences', 1))
    torch.manual_seed(1); ours = c2c.generate(ids, max_new_tokens=5, **kw)
    cache = c2c.prefill(ids); cache.batch_repeat_interleave(copies)
    torch.manual_seed(1); theirs = c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, **kw)
    assert torch.equal(ours, theirs)
    torch.manual_seed(1)
    assert torch.equal(c2c.generate(ids, generation_config=GenerationConfig(max_new_tokens=5, pad_token_id=0, **kw)), ours)


@pytest.mark.parametrize('receiver', ['qwen3', 'mistral', 'gpt2'])
def test_6_assistants(receiver):
    "Assisted decoding gives the greedy answer over the fused cache, also on a cache that is continued and with padding on the left."
    c2c, ids = c2c_of(receiver, ['llama']), ids_of(1, 8)
    greedy = c2c.generate(ids, max_new_tokens=7)
    mask = torch.ones_like(ids); mask[:, :2] = 0
    for kw in dict(prompt_lookup_num_tokens=3), dict(assistant_model=tiny(receiver, 5)):
        assert torch.equal(c2c.generate(ids, max_new_tokens=7, **kw), greedy)
        assert torch.equal(c2c.generate(ids, cache=c2c.prefill(ids[:, :5]), max_new_tokens=7, **kw), c2c.generate(ids, cache=c2c.prefill(ids[:, :5]), max_new_tokens=7))
    assert torch.equal(c2c.generate(ids, mask, max_new_tokens=7, prompt_lookup_num_tokens=3), c2c.generate(ids, mask, max_new_tokens=7))


def test_6_streams_stops_and_returns_a_cache():
    from transformers.generation.streamers import BaseStreamer
    class Kept(BaseStreamer):
        def __init__(self): self.seen, self.ended = [], False
        def put(self, x): self.seen += x.flatten().tolist()
        def end(self): self.ended = True
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 8)
    out, kept = c2c.generate(ids, max_new_tokens=6), Kept()
    c2c.generate(ids, max_new_tokens=6, streamer=kept)
    assert kept.seen == out[0].tolist() and kept.ended
    stopped = c2c.generate(ids, max_new_tokens=6, eos_token_id=out[0, 9].item(), return_dict_in_generate=True)
    first = out[0, 8:].tolist().index(out[0, 9].item())
    assert stopped.sequences[0].tolist() == out[0, :9 + first].tolist() and isinstance(stopped.past_key_values, DynamicCache)


# 7: incremental equals at once

@pytest.mark.parametrize('receiver', architectures)
@both_fusions
def test_7_incremental_equals_at_once(receiver, fusion):
    c2c, ids = c2c_of(receiver, ['llama', 'gpt2'], fusion), ids_of(2, 12)
    mask = torch.ones_like(ids); mask[1, :2] = 0
    sections = torch.tensor([[0]*4 + [1]*3 + [2]*4 + [3]]*2)
    active = torch.tensor([[True, True]]*4 + [[False, True]]*3 + [[True, False]]*4 + [[True, True]]).expand(2, -1, -1)
    once = c2c.prefill(ids, mask, active=active, sections=sections)
    step = None
    for stop in 5, 8, 12:
        s = sections[:, :stop]
        step = c2c.prefill(ids[:, :stop], mask[:, :stop], active=active[:, :stop], sections=s, cache=step)
        assert step.get_seq_length() == stop - 1
    for a, b in zip(step.layers, once.layers):
        for x, y in ((a.keys, b.keys), (a.values, b.values)): close(x[0], y[0]); close(x[1, :, 2:], y[1, :, 2:])
    answer = c2c.generate(ids, mask, active=active, sections=sections, max_new_tokens=4)
    assert torch.equal(c2c.generate(ids, mask, active=active, sections=sections, cache=step, max_new_tokens=4), answer)


def test_7_turns_of_a_chat():
    "After an answer the text goes on: what was answered stays as it was read, what is new is fused."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 7)
    cache = c2c.prefill(ids)
    first = c2c.generate(ids, cache=cache, max_new_tokens=4)
    text = torch.cat([first, ids_of(1, 5, seed=1)], 1)
    sections = torch.tensor([[0]*6 + [1]*4 + [2]*5 + [3]])       # prompt, what the cache holds of the answer, new, last
    expected = c2c.prefill(text, sections=sections, active=(sections != 1)[..., None])
    assert cache.get_seq_length() == 10
    for a, b in zip(c2c.prefill(text, cache=cache).layers, expected.layers): close(a.keys, b.keys); close(a.values, b.values)


def test_7_a_plain_cache_is_continued():
    "A cache that the receiver made itself: what stands in it is not fused, what follows is; the sharer reads from the start."
    for receiver in 'qwen3', 'gpt2', 'mistral', 'gemma3':
        c2c, ids = c2c_of(receiver, ['llama']), ids_of(1, 9)
        plain = DynamicCache()
        with torch.no_grad(): c2c.receiver(ids[:, :4], past_key_values=plain)
        sections = torch.tensor([[0]*4 + [1]*4 + [2]])
        expected = c2c.prefill(ids, sections=sections, active=(sections == 1)[..., None])
        for a, b in zip(c2c.prefill(ids, cache=plain).layers, expected.layers): close(a.keys, b.keys); close(a.values, b.values)


def test_7_a_clone_goes_its_own_way():
    "`clone_cache` of a fused cache: two texts that begin alike, each with its own sharer cache."
    c2c, start = c2c_of('qwen3', ['llama']), ids_of(1, 6)
    texts = [torch.cat([start, ids_of(1, 5, seed=s)], 1) for s in (1, 2)]
    cache = c2c.prefill(start)
    clone = clone_cache(cache)
    first = c2c.prefill(texts[0], cache=clone)
    second = c2c.prefill(texts[1], cache=cache)
    for got, text in ((first, texts[0]), (second, texts[1])):
        expected = c2c.prefill(text, cache=c2c.prefill(start))
        for a, b in zip(got.layers, expected.layers): close(a.keys, b.keys)


@pytest.mark.parametrize('change', ['crop', 'beams', 'select', 'reset'])
def test_7_a_changed_cache_goes_on(change):
    "What transformers does to a cache (crop, repeat, select, reset) reaches the sharers' caches too."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 9)
    cache, text = c2c.prefill(ids), torch.cat([ids[:, :5], ids_of(2, 6, seed=1)], 1)
    expected = c2c.prefill(text, cache=c2c.prefill(ids[:, :6]))
    if change == 'crop': cache.crop(-3)
    if change == 'reset': cache.reset(); expected = c2c.prefill(text)
    if change == 'beams': cache = c2c.prefill(ids[:, :6]); cache.batch_repeat_interleave(2); text = text.repeat_interleave(2, 0)
    if change == 'select': cache = c2c.prefill(ids[:, :6]); cache.batch_select_indices(torch.tensor([1])); text = text[1:]
    got = c2c.prefill(text, cache=cache)
    for a, b in zip(got.layers, expected.layers):
        close(a.keys, {'beams': b.keys.repeat_interleave(2, 0), 'select': b.keys[1:]}.get(change, b.keys))


def test_7_a_ragged_turn():
    "A second turn of different lengths has padding inside the rows; it belongs to no section."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 12)
    mask = torch.ones_like(ids); mask[1, 6:8] = 0
    keep = mask[1].bool()
    sections = torch.tensor([[0]*9 + [1]*2 + [2]]*2); sections[1, 6:8] = 7
    active = torch.ones(2, 12, 1, dtype=torch.bool); active[0, 8:] = False; active[1, 6:] = False
    for kw in dict(), dict(sections=sections), dict(active=active):
        got = c2c.generate(ids, mask, **kw, cache=c2c.prefill(ids[:, :4]), max_new_tokens=3, **logits_of)
        for i, cols in enumerate((slice(None), keep)):
            want = c2c.generate(ids[i:i+1, cols], **{k: v[i:i+1, cols] for k, v in kw.items()}, cache=c2c.prefill(ids[i:i+1, :4]), max_new_tokens=3, **logits_of)
            for a, b in zip(got.logits, want.logits): close(a[i], b[0])


def test_7_logits_over_a_continued_cache():
    "`forward` on a cache: row i's logits are those of its last section; rows whose last sections begin apart are refused."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 10)
    sections, first = torch.tensor([[0]*7 + [1]*3, [0]*9 + [1]]), dict(sections=torch.tensor([[0]*4 + [1]]*2))
    with pytest.raises(ValueError, match='on a cache they must be equally long'): c2c(ids, sections=sections, cache=c2c.prefill(ids[:, :5], **first))
    sections[1, 7:] = 1
    with torch.no_grad():
        got = c2c(ids, sections=sections, cache=c2c.prefill(ids[:, :5], **first)).logits
        for i in range(2): close(got[i], c2c(ids[i:i+1], sections=sections[i:i+1], cache=c2c.prefill(ids[i:i+1, :5], sections=first['sections'][:1])).logits[0])


# 8: nothing is left behind

def snapshot(c2c):
    "Everything of the models that a call could leave changed."
    out = {}
    for k, m in dict(receiver=c2c.receiver, **{f'sharer{j}': s for j, s in enumerate(c2c.sharers)}, **{f'fuser{j}': f for j, f in enumerate(c2c.fusers)}).items():
        out[k] = dict(training=[x.training for x in m.modules()], hooks=[(dict(x._forward_hooks), dict(x._forward_pre_hooks), dict(x._backward_hooks)) for x in m.modules()],
            forwards=[x.__dict__.get('forward') for x in m.modules()], attributes=[sorted(x.__dict__) for x in m.modules()],
            parameters={n: (id(p), p.dtype, p.requires_grad, None if p.grad is None else p.grad.clone(), p.device, p._version) for n, p in m.named_parameters()},
            buffers={n: (b.dtype, b._version) for n, b in m.named_buffers()})
        if hasattr(m, 'config') and hasattr(m.config, 'to_dict'): out[k] |= dict(config=m.config.to_dict(), generation=m.generation_config.to_dict())
    out['rng'], out['threads'], out['grad'], out['dtype'] = torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    return out


class Trouble(Exception): pass


def calls(c2c, ids):
    labels = ids.clone(); labels[:, :5] = -100
    active = (torch.arange(ids.shape[1]) < 4)[None, :, None].expand(*ids.shape, len(c2c.sharers))
    return dict(generate=lambda: c2c.generate(ids, max_new_tokens=3), beams=lambda: c2c.generate(ids, max_new_tokens=3, num_beams=2), prefill=lambda: c2c.prefill(ids),
        forward=lambda: c2c(ids), loss=lambda: c2c(ids, labels=labels, active=active).loss, assisted=lambda: c2c.generate(ids[:1], max_new_tokens=3, prompt_lookup_num_tokens=2))


@pytest.mark.parametrize('receiver', ['qwen3', 'gpt2', 'gemma3'])
def test_8_calls_leave_no_trace(receiver):
    c2c, ids = c2c_of(receiver, ['llama', 'gpt2']), ids_of(2, 8)
    before = snapshot(c2c)
    for name, run in calls(c2c, ids).items():
        run()
        assert snapshot(c2c) == before, f'{name} left something behind'
    for f, s in zip(c2c.fusers, c2c.sharers): f.check(c2c.receiver, s)
    C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers))
    assert snapshot(c2c) == before, 'making a model left something behind'


def broken(module, after=0):
    "Context: `module.forward` raises at its call number `after`."
    class Context:
        def __enter__(self):
            self.count, real = 0, module.forward
            def forward(*args, **kwargs):
                self.count += 1
                if self.count > after: raise Trouble
                return real(*args, **kwargs)
            module.forward = forward
            return self
        def __exit__(self, *exc): del module.forward
    return Context()


@pytest.mark.parametrize('call', ['generate', 'prefill', 'forward', 'loss', 'beams', 'assisted'])
def test_8_errors_leave_no_trace(call):
    "An exception anywhere: in the receiver, in a sharer, in a projector, in decoding."
    c2c, ids = c2c_of('qwen3', ['llama', 'gpt2']), ids_of(2, 8)
    with torch.no_grad(): expected = [x() for x in (lambda: c2c.generate(ids, max_new_tokens=3), lambda: c2c(ids).logits)]
    places = [(c2c.receiver.model.layers[1], 0), (c2c.receiver.model.layers[2].mlp, 0 if call == 'prefill' else 1), (c2c.sharers[0].model.layers[1], 0), (c2c.sharers[1].transformer.h[2], 0), (c2c.fusers[0], 0), (c2c.fusers[1], 0), (c2c.fusers[1].stacks[0], 0)]
    for module, after in places:
        before = snapshot(c2c)
        with broken(module, after), pytest.raises(Trouble): calls(c2c, ids)[call]()
        assert snapshot(c2c) == before, f'an error in {type(module).__name__} left something behind'
    real = C2CProjector.half
    try:                                                         # in the middle of the batched call
        C2CProjector.half = lambda *args: (_ for _ in ()).throw(Trouble)
        before = snapshot(c2c)
        with pytest.raises(Trouble): calls(c2c, ids)[call]()
    finally: C2CProjector.half = real
    assert snapshot(c2c) == before
    with torch.no_grad(): now = [x() for x in (lambda: c2c.generate(ids, max_new_tokens=3), lambda: c2c(ids).logits)]
    for a, b in zip(now, expected): assert torch.equal(a, b), 'after an error the answers are others'


def test_8_errors_leave_a_given_cache_alone():
    "A cache that was to be continued is as it was, so that trying again gives the right answer."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 9)
    cache, expected = c2c.prefill(ids[:, :5]), c2c.generate(ids, cache=c2c.prefill(ids[:, :5]), max_new_tokens=3)
    for module in c2c.sharers[0].model.layers[1], c2c.fusers[0], c2c.receiver.model.layers[2]:
        with broken(module), pytest.raises(Trouble): c2c.generate(ids, cache=cache, max_new_tokens=3)
        assert cache.get_seq_length() == 4 and [s.get_seq_length() for s in cache.sharers] == [4]
    assert torch.equal(c2c.generate(ids, cache=cache, max_new_tokens=3), expected)


def test_8_evaluation_uses_no_randomness_and_training_does():
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 8)
    state = torch.get_rng_state()
    for name, run in calls(c2c, ids).items(): run(); assert torch.equal(torch.get_rng_state(), state), name
    c2c.train()
    assert not torch.equal(c2c(ids).logits, c2c(ids).logits) and not torch.equal(torch.get_rng_state(), state)
    c2c.eval()


def test_8_nothing_is_kept_alive():
    "No cache or activation survives a call: the tensors of a call are gone when its result is."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 8)
    c2c.generate(ids, max_new_tokens=3); gc.collect()
    def count():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    before = count()
    for _ in range(3): c2c.generate(ids, max_new_tokens=3); c2c(ids); c2c.prefill(ids)
    gc.collect()
    assert count() <= before + 2


@both_fusions
def test_8_two_threads_use_one_model(fusion):
    "Answers in two threads are those that each gets alone; a third looks at the fuser's weights meanwhile."
    c2c = c2c_of('qwen3', ['llama', 'gpt2'], fusion, gate=[1., -1., .5])
    prompts = [ids_of(1, 6, seed=1), ids_of(2, 9, seed=2)]
    expected = [c2c.generate(ids, max_new_tokens=3) for ids in prompts]
    prints, trouble, interval = [f.fingerprint() for f in c2c.fusers], [], sys.getswitchinterval()
    def work(ids, want, times=8):
        try:
            for _ in range(times):
                if not torch.equal(c2c.generate(ids, max_new_tokens=3), want): trouble.append('another answer')
        except Exception as e: trouble.append(f'{type(e).__name__}: {e}')
    def look():
        try:
            for _ in range(40):
                if [f.fingerprint() for f in c2c.fusers] != prints: trouble.append('other weights')
        except Exception as e: trouble.append(f'{type(e).__name__}: {e}')
    threads = [threading.Thread(target=work, args=a) for a in zip(prompts, expected)] + [threading.Thread(target=look)]
    try:
        sys.setswitchinterval(1e-6)
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(interval)
    assert not trouble, trouble[:3]


# 9: save, load, same

def weights(folder): return folder/'model.safetensors'


def edit(folder, **tensors):
    "Write the weights again with some tensors replaced, or dropped where None is given; the metadata stays."
    from safetensors import safe_open
    with safe_open(weights(folder), 'pt') as f: metadata = f.metadata()
    state = load_file(weights(folder))
    for name, x in tensors.items():
        name = name if name.startswith('stacks') else f'stacks.0.projector.{name}'
        if x is None: del state[name]
        else: state[name] = x
    save_file(state, weights(folder), metadata=metadata)


@pytest.mark.parametrize('kwargs', [dict(), dict(key_space='unrotated', layer_map='depth_nearest'), dict(layer_map=[None, 1, 0], num_layers=4, gate_noise='logistic'), dict(**C2CProjector.ablations['residual'])], ids=str)
def test_9_saved_and_loaded_is_the_same(tmp_path, kwargs):
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser = fuser_for(r, s, **kwargs)
    fuser.set_temperature(.37)
    assert fuser.save_pretrained(tmp_path/'fuser') is None
    again = Fuser.from_pretrained(tmp_path/'fuser')
    assert not again.training and again.config.layer_map == fuser.config.layer_map and again.config.projector_args == fuser.config.projector_args and again.config.key_space == fuser.config.key_space
    for (n, a), (m, b) in zip(fuser.state_dict().items(), again.state_dict().items()): assert n == m and torch.equal(a, b)
    ids = ids_of(2, 8)
    with torch.no_grad():
        assert torch.equal(C2CModel(r, [s], [again])(ids).logits, C2CModel(r, [s], [fuser])(ids).logits)
        a, b = (C2CModel(r, [s], [f]).generate(ids, max_new_tokens=4, **logits_of) for f in (fuser, again))
    assert torch.equal(a.sequences, b.sequences) and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits))
    torch.manual_seed(0); x = C2CModel(r, [s], [fuser.train()])(ids).logits
    torch.manual_seed(0); assert torch.equal(C2CModel(r, [s], [again.train()])(ids).logits, x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_9_types_survive(tmp_path, dtype):
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1)).to(dtype)
    fuser.save_pretrained(tmp_path/'fuser')
    assert Fuser.from_pretrained(tmp_path/'fuser').dtype == dtype
    assert Fuser.from_pretrained(tmp_path/'fuser', dtype=torch.float32).dtype == torch.float32
    assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() == fuser.fingerprint()


def test_9_saved_over_an_older_one(tmp_path):
    r, s = tiny('qwen3'), tiny('llama', 1)
    for seed in 1, 2: (fuser := fuser_for(r, s, seed=seed)).save_pretrained(tmp_path/'fuser')
    assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() == fuser.fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fuser'] and sorted(p.name for p in (tmp_path/'fuser').iterdir()) == ['README.md', 'config.json', 'model.safetensors']


@pytest.mark.parametrize('says,tensors', [
    ('missing: stacks.0.projector.key_in.weight', dict(**{'key_in.weight': None})),
    ('unexpected: stacks.0.projector.more', dict(more=torch.zeros(2))),
    ('stacks.0.projector.key_proj_out.bias has shape (3, 5), its config says (3, 16)', dict(**{'key_proj_out.bias': torch.zeros(3, 5)})),
    ('stacks.0.projector.key_gate_logit has shape (2,), its config says (3,)', dict(key_gate_logit=torch.zeros(2)))])
def test_9_loading_is_strict(tmp_path, says, tensors):
    fuser_for(tiny('qwen3'), tiny('llama', 1)).save_pretrained(tmp_path/'fuser')
    edit(tmp_path/'fuser', **tensors)
    with pytest.raises(ValueError) as e: Fuser.from_pretrained(tmp_path/'fuser')
    assert says in str(e.value) and str(tmp_path/'fuser') in str(e.value)


def test_9_config_of_another_save(tmp_path):
    r, s = tiny('qwen3'), tiny('llama', 1)
    for seed in 1, 2: fuser_for(r, s, seed=seed).save_pretrained(tmp_path/str(seed))
    (tmp_path/'1'/'config.json').write_text((tmp_path/'2'/'config.json').read_text())
    with pytest.raises(ValueError, match='different saves'): Fuser.from_pretrained(tmp_path/'1')


@pytest.mark.parametrize('key,value', [('layer_map', [1, 0, 0]), ('key_space', 'unrotated')])
def test_9_an_edited_config_is_noticed(tmp_path, key, value):
    "What decides the answers and leaves all shapes as they are."
    fuser_for(tiny('qwen3'), tiny('llama', 1)).save_pretrained(tmp_path/'fuser')
    file = tmp_path/'fuser'/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match='fingerprint'): Fuser.from_pretrained(tmp_path/'fuser')


def test_9_a_wrong_pair_is_named():
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser = fuser_for(r, s)
    fuser.check(r, s)
    fuser.check(copy.deepcopy(r).bfloat16(), copy.deepcopy(s).bfloat16())
    other = copy.deepcopy(r)
    with torch.no_grad(): other.model.layers[-1].mlp.down_proj.weight += .05    # as after fine-tuning; a change of single rows may go unseen, the fingerprint is a sample
    for receiver, sharer, says in ((s, r, 'receiver: the fuser was made for KVGeometry(layers=3, kv_heads=2, head_dim=8), this model has KVGeometry(layers=2, kv_heads=4, head_dim=8)'),
            (r, tiny('gptneox'), "sharer model_type: the fuser was made for 'llama', this model has 'gpt_neox'"), (r, tiny('llama', 2), 'sharer weights: the fuser was made for'), (other, s, 'receiver weights: the fuser was made for')):
        for run in (lambda: fuser.check(receiver, sharer)), (lambda: C2CModel(receiver, [sharer], [fuser])):
            with pytest.raises(ValueError) as e: run()
            assert says in str(e.value) and 'Load the models it was trained with' in str(e.value)
    with pytest.raises(ValueError, match='does not fit'): C2CModel(r, [s, tiny('gpt2', 2)], [fuser_for(r, tiny('gpt2', 2)), fuser])


def test_9_a_changed_tokenizer_is_named(golden, tmp_path):
    from transformers import AutoTokenizer
    a, b = (AutoTokenizer.from_pretrained(golden/n) for n in ('tokA', 'tokB'))
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser_for(r, s, receiver_tokenizer=a, sharer_tokenizer=b).save_pretrained(tmp_path/'fuser')
    fuser = Fuser.from_pretrained(tmp_path/'fuser')
    fuser.check(r, s, AutoTokenizer.from_pretrained(golden/'tokA'), b)
    with pytest.raises(ValueError, match='receiver tokenizer: its fingerprint is'): fuser.check(r, s, receiver_tokenizer=b)
    with pytest.raises(ValueError, match='sharer tokenizer: its fingerprint is'): fuser.check(r, s, sharer_tokenizer=a)
    a.add_tokens(['<one more>'])
    with pytest.raises(ValueError, match='receiver tokenizer: its fingerprint is'): fuser.check(r, s, receiver_tokenizer=a)


def test_9_a_model_from_its_fuser_alone(tmp_path):
    r, s = copy.deepcopy(tiny('qwen3')), copy.deepcopy(tiny('llama', 1))
    r.save_pretrained(tmp_path/'receiver'); s.save_pretrained(tmp_path/'sharer')
    r.config.name_or_path, s.config.name_or_path = str(tmp_path/'receiver'), str(tmp_path/'sharer')
    fuser = fuser_for(r, s); fuser.save_pretrained(tmp_path/'fuser')
    ids = ids_of(1, 8)
    with torch.no_grad(): close(C2CModel.from_pretrained(tmp_path/'fuser')(ids).logits, C2CModel(r, [s], [fuser])(ids).logits)
