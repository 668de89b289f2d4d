"Faults that only show late in a call, or only in gradients and rounding."
import copy

import pytest, torch
from transformers import LogitsProcessorList

from c2c_nb.model import C2CModel

from tiny import c2c_of, fuser_for, ids_of, tiny


def test_an_error_in_decoding_leaves_a_given_cache_alone():
    c2c, ids = c2c_of(), ids_of(1, 12)
    cache = c2c.prefill(ids[:, :6])
    def broken(input_ids, scores): raise RuntimeError('stopped on purpose')
    with pytest.raises(RuntimeError, match='on purpose'):
        c2c.generate(ids, cache=cache, num_beams=2, max_new_tokens=3, logits_processor=LogitsProcessorList([broken]))
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape[0] == 1
    torch.testing.assert_close(c2c.generate(ids, cache=cache, max_new_tokens=3), c2c.generate(ids, cache=c2c.prefill(ids[:, :6]), max_new_tokens=3))


def test_labels_that_are_in_the_cache_already_are_refused():
    c2c, ids = c2c_of(), ids_of(1, 12)
    sections = torch.tensor([[0]*5 + [1]*7])
    labels = torch.full_like(ids, -100); labels[:, 7:9] = ids[:, 7:9]
    with pytest.raises(ValueError, match='get no prediction'): c2c(ids, labels=labels, sections=sections, cache=c2c.prefill(ids[:, :10]))


def test_padding_ids_outside_of_the_vocabulary_are_refused():
    ids, mask = ids_of(1, 6), torch.ones(1, 6, dtype=torch.long)
    ids[:, 0], mask[:, 0] = -100, 0
    with pytest.raises(ValueError, match='ids for the receiver go from -100'): c2c_of().generate(ids, mask, max_new_tokens=2)


def test_nan_where_a_sharer_is_silent_reaches_no_gradient():
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1))
    kv = lambda g: [(torch.randn(2, h, 5, d), torch.randn(2, h, 5, d)) for h, d in map(g.layer, range(g.layers))]
    theirs, ours, active = kv(fuser.sharer_geometry), kv(fuser.receiver_geometry), torch.tensor([[True]*5, [False]*5])
    for k, v in theirs: k[1], v[1] = float('nan'), float('nan')
    sum(x.sum() for pair in fuser(theirs, ours, active=active) for x in pair).backward()
    assert all(torch.isfinite(p.grad).all() for p in fuser.parameters() if p.grad is not None)


def test_several_sharers_are_summed_before_rounding():
    "In bf16 the sum of two sharers is rounded once."
    receiver, sharers = copy.deepcopy(tiny('qwen3')).bfloat16(), [copy.deepcopy(tiny('llama', j)).bfloat16() for j in (1, 2)]
    c2c, ids = C2CModel(receiver, sharers, [fuser_for(tiny('qwen3'), tiny('llama', j), seed=j) for j in (1, 2)]), ids_of(1, 8)
    both = torch.ones(1, 8, 2, dtype=torch.bool)
    own = c2c.prefill(ids, active=both & False).layers[0].keys
    read = [s.base_model(input_ids=ids[:, :7], use_cache=True).past_key_values.layers for s in sharers]
    mine = [(l.keys.float(), l.values.float()) for l in c2c.prefill(ids, active=both & False).layers]
    with torch.no_grad(): total = sum(f([(l.keys, l.values) for l in layers], mine)[0][0] - own.float() for f, layers in zip(c2c.fusers, read))
    assert torch.equal(c2c.prefill(ids, active=both).layers[0].keys, (own.float() + total).bfloat16())
