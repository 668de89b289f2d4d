"Properties that hold for whatever shapes, layouts, masks and sections one draws (hypothesis, the same draws in every run)."
import tempfile
from pathlib import Path

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import LlamaConfig

from c2c_nb.cache import KVGeometry, build_cache, clone_cache, read_layer, rope_table, rotate_keys, unrotate_keys, write_layer
from c2c_nb.fuser import Fuser, FuserConfig, depth_nearest, last_aligned
from c2c_nb.projector import exponential_temperature, linear_temperature

from test_contracts import call, close, kv_for, looped, one
from tiny import c2c_of, ids_of, lay_out, set_gates, tiny

few = settings(derandomize=True, deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), database=None)
some = settings(few, max_examples=40)
sizes = st.integers(1, 5)


# rows, sections, masks

@st.composite
def row(draw, sharers, labels=False):
    "One text: its length, sections, where each sharer is active, and what of it each sharer reads."
    n = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 50))
    bools = lambda: torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    out = dict(input_ids=ids_of(n, seed=seed))
    if draw(st.booleans()) or labels: out['sections'] = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))).cumsum(0)
    if draw(st.booleans()): out['active'] = torch.stack([bools() for _ in range(sharers)], -1)
    for j in range(sharers):
        if draw(st.booleans()): out[f'sharer_input_ids{j}'] = ids_of(n, seed=seed + 100 + j)
        out[f'sharer_attention_mask{j}'] = bools().long() if draw(st.booleans()) else torch.ones(n, dtype=torch.long)
    if labels:
        last = (out['sections'] == out['sections'][-1]).nonzero()[:, 0]
        wanted = torch.full((n,), -100); wanted[last[1:]] = ids_of(n, seed=seed + 200)[last[1:]]
        out['labels'] = wanted
    return out


@st.composite
def batch(draw, sharers, labels=False):
    "A few rows with the same keywords."
    rows = [draw(row(sharers, labels)) for _ in range(draw(st.integers(1, 4)))]
    for r in rows:
        n = len(r['input_ids'])
        if any('sections' in x for x in rows): r.setdefault('sections', torch.arange(n) // 3)
        if any('active' in x for x in rows): r.setdefault('active', torch.ones(n, sharers, dtype=torch.bool))
        for j in range(sharers): r.setdefault(f'sharer_input_ids{j}', r['input_ids'])
    return rows


layouts = st.sampled_from(['left', 'right', 'both', 'middle'])


@pytest.mark.parametrize('receiver,sharers,fusion', [('qwen3', ['llama'], 'parallel'), ('qwen2', ['gptneox', 'llama'], 'sequential'), ('mistral', ['gpt2', 'mistral'], 'parallel')])
def test_rows_are_independent(receiver, sharers, fusion):
    c2c = c2c_of(receiver, sharers, fusion, gate=[1., -1., .5])
    @few
    @given(batch(len(sharers)), layouts, st.integers(0, 99))
    def check(rows, where, seed):
        laid = call(lay_out(rows, where, seed))
        with torch.no_grad(): together = c2c(**laid)
        cache = c2c.prefill(**laid)
        plan = c2c.plan(**laid)
        for i, r in enumerate(rows):
            with torch.no_grad(): single = c2c(**one(r)).logits
            n = single.shape[1]
            close(together.logits[i, :n], single[0])
            alone = c2c.prefill(**one(r))
            m, t = min(alone.get_seq_length(), cache.get_seq_length()), plan.ids.shape[1]
            begin = t - len(r['input_ids'])                      # the row lies at the right end
            if plan.mask is not None and int(plan.mask[i].sum()) != len(r['input_ids']): begin = None
            if begin is None or m == 0: continue
            stop = min(cache.get_seq_length(), begin + m)
            for a, b in zip(cache.layers, alone.layers):
                if stop > begin: close(a.keys[i, :, begin:stop], b.keys[0, :, :stop-begin]); close(a.values[i, :, begin:stop], b.values[0, :, :stop-begin])
    check()


@few
@given(batch(2, labels=True), layouts, st.integers(0, 99))
def test_the_loss_of_a_batch_is_that_of_its_rows(rows, where, seed):
    "The mean over all labels; and every row alone has its share."
    c2c = c2c_of('qwen3', ['llama', 'gpt2'])
    counts = [int((r['labels'] != -100).sum()) for r in rows]
    laid = lay_out(rows, where, seed)
    laid['labels'][laid['attention_mask'] == 0] = 7              # labels on padding do not count
    if not any(counts):
        with pytest.raises(ValueError, match='supervise nothing'): c2c(**call(laid))
        return
    with torch.no_grad():
        loss = c2c(**call(laid)).loss
        total = sum(c2c(**one(r)).loss*n for r, n in zip(rows, counts) if n)
    assert loss.item() == pytest.approx(total.item()/sum(counts), abs=1e-4)


@few
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(0, 99), st.booleans(), st.sampled_from(['parallel', 'sequential']))
def test_incremental_equals_at_once(lengths, seed, padded, fusion):
    "A text prefilled in any pieces has the cache of one call."
    c2c, g = c2c_of('qwen3', ['llama', 'gptneox'], fusion), torch.Generator().manual_seed(seed)
    n = sum(lengths) + 1
    ids, mask = ids_of(2, n, seed=seed), torch.ones(2, n, dtype=torch.long)
    if padded: mask[1, :min(2, n-2)] = 0
    sections = torch.cat([torch.full((m,), i) for i, m in enumerate([*lengths, 1])]).expand(2, -1)
    active = (torch.rand(2, len(lengths)+1, 2, generator=g) < .7)[:, sections[0]]
    once = c2c.prefill(ids, mask, active=active, sections=sections)
    cache, stop = None, 0
    for m in lengths:
        stop += m
        part = dict(attention_mask=mask[:, :stop+1], sections=sections[:, :stop+1], active=active[:, :stop+1])
        cache = c2c.prefill(ids[:, :stop+1], **part, cache=cache)
    assert cache.get_seq_length() == once.get_seq_length() == n - 1
    for a, b in zip(cache.layers, once.layers):
        for i in range(2): real = mask[i, :-1] > 0; close(a.keys[i][:, real], b.keys[i][:, real]); close(a.values[i][:, real], b.values[i][:, real])


# fusers and projectors

@st.composite
def fusers(draw):
    "A random fuser of any geometry, with any arguments."
    r, s = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    uniform = draw(st.booleans())
    each = lambda n, options: draw(st.sampled_from(options)) if uniform else tuple(draw(st.sampled_from(options)) for _ in range(n))
    layer_map = draw(st.lists(st.one_of(st.none(), st.integers(0, s-1)), min_size=r, max_size=r).filter(lambda m: any(x is not None for x in m)))
    args = dict(hidden_dim=draw(st.sampled_from([4, 7, 16])), intermediate_dim=draw(st.sampled_from([3, 8])), num_layers=draw(st.integers(2, 4)), dropout=0.,
        weights=draw(st.booleans()), read_receiver=draw(st.booleans()), residual=draw(st.booleans()), gate=draw(st.booleans()), gate_init=draw(st.sampled_from([-1., 0., 1.])))
    torch.manual_seed(draw(st.integers(0, 9)))
    fuser = Fuser(FuserConfig('C2CProjector', layer_map, dict(layers=r, kv_heads=each(r, [1, 2, 3]), head_dim=each(r, [2, 4, 8])), dict(layers=s, kv_heads=each(s, [1, 2]), head_dim=each(s, [2, 6])), args)).eval()
    if args['gate'] and draw(st.booleans()): set_gates(fuser, draw(st.lists(st.sampled_from([-1., 0., 1.]), min_size=r, max_size=r)))
    return fuser


@some
@given(fusers(), sizes, sizes, st.integers(0, 9), st.booleans())
@torch.no_grad()
def test_batched_equals_looped(fuser, b, t, seed, partly):
    s_kv, r_kv = kv_for(fuser.sharer_geometry, b, t, seed), kv_for(fuser.receiver_geometry, b, t, seed+1)
    active = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < .5 if partly else None
    for i, (fast, slow, own, gates) in enumerate(zip(fuser(s_kv, r_kv, active=active), looped(fuser, s_kv, r_kv), r_kv, fuser.open_gates())):
        for f, x, o, is_open in zip(fast, slow, own, gates):
            assert (f is not None) == is_open
            if active is not None: x = torch.where(active[:, None, :, None], x, o)
            close(o if f is None else f, x)
            if f is not None and active is not None: assert torch.equal(f.transpose(1, 2)[~active], o.transpose(1, 2)[~active])


@some
@given(fusers())
def test_saved_and_loaded_is_the_same(fuser):
    with tempfile.TemporaryDirectory() as folder:
        fuser.save_pretrained(Path(folder)/'fuser')
        again = Fuser.from_pretrained(Path(folder)/'fuser')
    assert again.fingerprint() == fuser.fingerprint() and again.layer_map == fuser.layer_map and again.open_gates() == fuser.open_gates()
    assert (again.receiver_geometry, again.sharer_geometry) == (fuser.receiver_geometry, fuser.sharer_geometry)
    s_kv, r_kv = kv_for(fuser.sharer_geometry, 2, 3, 0), kv_for(fuser.receiver_geometry, 2, 3, 1)
    with torch.no_grad():
        for a, b in zip(again(s_kv, r_kv), fuser(s_kv, r_kv)):
            for x, y in zip(a, b): assert x is y is None or torch.equal(x, y)


@some
@given(st.integers(1, 40), st.integers(1, 40))
def test_layer_maps(r, s):
    for f in last_aligned, depth_nearest:
        m = f(r, s)
        assert len(m) == r and all(0 <= j < s for j in m) and m == sorted(m)
        assert m[-1] == (s - 1 if r > 1 or f is last_aligned else 0)
    assert last_aligned(r, s) == [max(s - r + i, 0) for i in range(r)]
    for i, j in enumerate(depth_nearest(r, s)):
        depth = i/(r-1) if r > 1 else 0.
        assert all(abs(depth - j/max(s-1, 1)) <= abs(depth - k/max(s-1, 1)) + 1e-12 for k in range(s))
    if r == s: assert last_aligned(r, s) == depth_nearest(r, s) == list(range(r))


@some
@given(st.integers(0, 3000), st.floats(.1, 2.), st.floats(1e-4, .1), st.integers(1, 2000))
def test_temperatures_fall(step, initial, final, steps):
    for f in exponential_temperature, linear_temperature:
        now, later = f(step, initial, final, steps), f(step+1, initial, final, steps)
        assert final*(1 - 1e-9) <= later <= now*(1 + 1e-9) <= initial*(1 + 2e-9)
        assert f(0, initial, final, steps) == pytest.approx(initial) and f(steps, initial, final, steps) == pytest.approx(final)


# caches

@st.composite
def caches(draw):
    layers, b, t = draw(st.integers(1, 3)), draw(sizes), draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = [(draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))) for _ in range(layers)]
    keys, values = ([torch.randn(b, h, t, d, generator=g) for h, d in shapes] for _ in range(2))
    start = draw(st.integers(0, t))
    return keys, values, draw(st.integers(0, layers-1)), start, draw(st.integers(start, t))


@some
@given(caches())
def test_what_is_written_is_read(drawn):
    keys, values, layer, start, stop = drawn
    cache = build_cache(keys, values)
    for i in range(len(keys)):
        k, v = read_layer(cache, i)
        assert torch.equal(k, keys[i]) and torch.equal(v, values[i])
    copy = clone_cache(cache)
    k, v = (x.clone() for x in read_layer(cache, layer, start, stop))
    assert torch.equal(k, keys[layer][:, :, start:stop])
    write_layer(copy, layer, k + 1, v - 1, start)
    assert torch.equal(read_layer(copy, layer, start, stop)[0], k + 1) and torch.equal(read_layer(copy, layer, start, stop)[1], v - 1)
    for i in range(len(keys)):
        assert torch.equal(read_layer(cache, i)[0], keys[i]) and torch.equal(read_layer(cache, i)[1], values[i]), 'the original changed'
        if i != layer: assert torch.equal(read_layer(copy, i)[0], keys[i])
    for a, b in ((0, start), (stop, keys[layer].shape[2])): assert torch.equal(read_layer(copy, layer, a, b)[0], keys[layer][:, :, a:b])
    write_layer(copy, layer, k, v, start)
    assert torch.equal(read_layer(copy, layer)[0], keys[layer]) and torch.equal(read_layer(copy, layer)[1], values[layer])


@some
@given(st.sampled_from([2, 4, 8, 16]), sizes, sizes, st.integers(1, 6), st.integers(0, 99), st.floats(100., 1e6), st.sampled_from([.5, 1.]), st.integers(0, 4000))
def test_rotation_round_trip(d, b, h, t, seed, theta, partial, far):
    "Undone and redone keys are what they were; and what is undone does not depend on where it stood."
    if d*partial < 2: partial = 1.
    g = torch.Generator().manual_seed(seed)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=d, rope_parameters=dict(rope_type='default', rope_theta=theta, partial_rotary_factor=partial))
    positions = torch.randint(0, far + 1, (b, t), generator=g)
    cos, sin = rope_table(config, positions)
    assert cos.shape == (b, t, int(d*partial))
    keys = torch.randn(b, h, t, d, generator=g)
    turned = rotate_keys(keys, cos, sin)
    torch.testing.assert_close(unrotate_keys(turned, cos, sin), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate_keys(unrotate_keys(keys, cos, sin), cos, sin), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(turned[..., cos.shape[-1]:], keys[..., cos.shape[-1]:])


@some
@given(st.integers(1, 6), st.data())
def test_geometry_round_trip(layers, data):
    g = KVGeometry(layers, *(data.draw(st.one_of(st.integers(1, 9), st.lists(st.integers(1, 3), min_size=layers, max_size=layers).map(tuple))) for _ in range(2)))
    assert KVGeometry(**g.to_dict()) == g == KVGeometry(layers, tuple(g.layer(i)[0] for i in range(layers)), [g.layer(i)[1] for i in range(layers)])
    assert g.bytes_per_token() == 4*sum(h*d for h, d in map(g.layer, range(layers)))
