"Where a fuser lies, which layers it maps, what it refuses, and in which types it runs."
import copy, itertools, json, time, warnings

import pytest, torch
from torch import nn

from c2c_nb.cache import KVGeometry
from c2c_nb.fuser import Fuser, FuserConfig, alignments, depth_nearest, fusable, last_aligned, layer_devices, map_layers, model_facts
from c2c_nb.model import C2CModel
from c2c_nb.projector import C2CProjector

from tiny import architectures, fuser_for, ids_of, tiny

small = dict(hidden_dim=6, intermediate_dim=5, gate_init=1.)


def kv_of(geometry, seed=0, b=2, t=5):
    "Random keys and values of every layer; None where a layer keeps none."
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(b, h, t, d, generator=g) for _ in range(2)) if h and d else None for h, d in map(geometry.layer, range(geometry.layers))]


def fuser_of(receiver, sharer, layer_map='last_aligned', seed=0, **kwargs):
    "A random fuser between two geometries."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Fuser(FuserConfig(kwargs.pop('projector', 'C2CProjector'), map_layers(layer_map, receiver, sharer) if isinstance(layer_map, str) else layer_map, receiver.to_dict(), sharer.to_dict(), small | kwargs)).eval()


def same(a, b, exact=True):
    for x, y in itertools.zip_longest(itertools.chain(*a), itertools.chain(*b)):
        assert (x is None) == (y is None)
        if x is not None: assert torch.equal(x, y) if exact else torch.allclose(x, y, atol=1e-5, rtol=0)


# layers that keep nothing

plain, hybrid, mixed = KVGeometry(4, 2, 8), KVGeometry(6, (0, 2, 0, 2, 0, 2), (0, 8, 0, 8, 0, 8)), KVGeometry(5, (2, 2, 1, 0, 1), (4, 4, 8, 0, 8))


def test_maps_run_over_layers_that_can_be_fused():
    assert fusable(plain) == [0, 1, 2, 3] and fusable(hybrid) == [1, 3, 5] and fusable(mixed) == [0, 1, 2, 4]
    assert map_layers('last_aligned', hybrid, plain) == [None, 1, None, 2, None, 3]
    assert map_layers('last_aligned', plain, hybrid) == [1, 1, 3, 5] and map_layers('last_aligned', mixed, hybrid) == [1, 1, 3, None, 5]
    assert map_layers('depth_nearest', hybrid, KVGeometry(5, (2, 0, 2, 0, 2), (8, 0, 8, 0, 8))) == [None, 0, None, 2, None, 4]
    for r, s in itertools.product((plain, hybrid, mixed), repeat=2):
        for name, f in dict(last_aligned=last_aligned, depth_nearest=depth_nearest).items():
            made = map_layers(name, r, s)
            assert [i for i, j in enumerate(made) if j is not None] == fusable(r) and [j for j in made if j is not None] == [fusable(s)[j] for j in f(len(fusable(r)), len(fusable(s)))]
    for r, s, says in ((plain, KVGeometry(2, 0, 0), 'the sharer has no layer'), (KVGeometry(3, 0, 0), plain, 'the receiver has no layer')):
        with pytest.raises(ValueError, match=says): map_layers('last_aligned', r, s)
    with pytest.raises(ValueError, match="layer_map='nearest' was given; known are last_aligned, depth_nearest"): map_layers('nearest', plain, plain)


@pytest.mark.parametrize('receiver,sharer', list(itertools.product((plain, hybrid, mixed), repeat=2)), ids=str)
def test_fusing_around_layers_that_keep_nothing(tmp_path, receiver, sharer):
    "Batched equals one by one; nothing comes out where nothing is; saved and loaded alike."
    fuser, theirs, ours = fuser_of(receiver, sharer), kv_of(sharer, 1), kv_of(receiver, 2)
    with torch.no_grad(): fused = fuser(theirs, ours)
    for layers, stack in zip(fuser.groups, fuser.stacks):
        for n, i in enumerate(layers):
            j = fuser.layer_map[i]
            single = C2CProjector(*sharer.layer(j), *receiver.layer(i), **small).eval()
            single.load_state_dict(stack.single(n), strict=False)
            with torch.no_grad(): same([fused[i]], [single(*theirs[j], *ours[i])], exact=False)
    assert [x[0] is not None for x in fused] == [i in fusable(receiver) for i in range(receiver.layers)]
    assert [g[0] for g in fuser.open_gates()] == [i in fusable(receiver) for i in range(receiver.layers)]
    fuser.save_pretrained(tmp_path/'fuser')
    with torch.no_grad(): same(Fuser.from_pretrained(tmp_path/'fuser')(theirs, ours), fused)


def test_an_explicit_map_to_a_layer_that_keeps_nothing():
    "Refused, naming model, layer and reason, in any way of making one."
    for layer_map, r, s, says in (([None, 0, None, 1, 2, 3], hybrid, plain, 'layer 4 of the receiver small/receiver'), ([0, 1, 2, 3, 3, 3], hybrid, plain, 'layers 0, 2, 4 of the receiver'), ([1, 2, 3, 5], plain, hybrid, 'layer 2 of the sharer small/sharer')):
        config = FuserConfig('C2CProjector', layer_map, r.to_dict(), s.to_dict(), small, receiver=dict(name='small/receiver'), sharer=dict(name='small/sharer'))
        with pytest.raises(ValueError) as e: Fuser(config)
        assert says in str(e.value) and 'attention keys and values' in str(e.value) and 'Layers that can be fused are ' in str(e.value) and '1, 3, 5' in str(e.value)


# placement

def places(fuser, names): return fuser.place(list(itertools.islice(itertools.cycle(names), len(fuser.layer_map))))


@pytest.mark.parametrize('names', [['cpu'], ['cpu:0'], ['cpu', 'cpu:0'], ['cpu:0', 'cpu:0', 'cpu']], ids=str)
@pytest.mark.parametrize('receiver,sharer', [(plain, plain), (mixed, hybrid), (hybrid, mixed)], ids=str)
def test_placing_parts_stacks_and_changes_nothing(tmp_path, receiver, sharer, names):
    fuser, theirs, ours = fuser_of(receiver, sharer), kv_of(sharer, 1), kv_of(receiver, 2)
    with torch.no_grad():
        for k, p in enumerate(fuser.stacks.parameters()): p.requires_grad_(k % 2 == 0)
        fuser.stacks[0].projector.key_gate_logit[0] = -1.
        fuser.set_temperature(.37)
        before, fused, frozen = fuser.fingerprint(), fuser(theirs, ours), {n: p.requires_grad for n, p in fuser.stacks[0].named_parameters()}
        fuser.save_pretrained(tmp_path/'before')
        placed = places(copy.deepcopy(fuser), names)
        wanted = {}
        for i, j in enumerate(fuser.layer_map):
            if j is not None: wanted.setdefault((*sharer.layer(j), *receiver.layer(i), torch.device(names[i % len(names)])), []).append(i)
        assert placed.groups == list(wanted.values()) and len(placed.stacks) == len(wanted)
        same(placed(theirs, ours), fused, exact=len(set(names)) == 1)
        assert placed.fingerprint() == before and placed.open_gates() == fuser.open_gates() and not placed.training
        assert {n: p.requires_grad for n, p in placed.stacks[0].named_parameters()} == frozen and all(s.projector.gate_temperature == torch.tensor(.37) for s in placed.stacks)
        placed.save_pretrained(tmp_path/'placed')
        for name in 'model.safetensors', 'config.json': assert (tmp_path/'placed'/name).read_bytes() == (tmp_path/'before'/name).read_bytes()
        loaded = Fuser.from_pretrained(tmp_path/'placed')
        assert loaded.groups == fuser.groups
        same(loaded(theirs, ours), fused)
        for n in reversed(range(1, 4)): places(placed, ['cpu', 'cpu:0'][:n])                       # again and again, and back
        places(placed, ['cpu'])
        assert placed.groups == fuser.groups and placed.fingerprint() == before
        same(placed(theirs, ours), fused)
    assert fuser.fingerprint() == before, 'a copy was placed, the original changed'


def test_a_placed_fuser_is_not_tied_to_the_one_before():
    "Temperature and weights of stacks that were parted are their own."
    fuser = places(fuser_of(plain, plain), ['cpu', 'cpu:0'])
    fuser.stacks[0].projector.gate_temperature.fill_(.5)
    assert fuser.stacks[1].projector.gate_temperature == 1.
    with torch.no_grad(): fuser.stacks[0].projector.key_in.weight.zero_()
    assert fuser.stacks[1].projector.key_in.weight.abs().sum() > 0
    fuser.set_temperature(.25)
    assert [s.projector.gate_temperature.item() for s in fuser.stacks] == [.25, .25]
    fuser.train(); fuser.stacks[1].projector.gate_noise = None
    assert places(fuser, ['cpu']).training and fuser.stacks[0].projector.training


def test_a_placed_fuser_learns():
    "The same gradients as an unplaced one, layer by layer."
    fuser, theirs, ours = fuser_of(plain, plain, gate_noise=None), kv_of(plain, 1), kv_of(plain, 2)
    placed = places(copy.deepcopy(fuser), ['cpu', 'cpu:0'])
    grads = []
    for f in fuser, placed:
        sum(x.square().sum() for kv in f(theirs, ours) for x in kv).backward()
        grads.append({(n, i): p.grad[k] for layers, s in zip(f.groups, f.stacks) for n, p in s.named_parameters() if p.grad is not None for k, i in enumerate(layers)})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for k in grads[0]: torch.testing.assert_close(grads[0][k], grads[1][k])


def test_each_projector_is_where_its_layer_is():
    fuser = fuser_of(mixed, plain)
    fuser.place(['cpu', 'meta', 'cpu', 'cpu:0', 'meta'])
    found = {i: {p.device.type for p in s.parameters()} for layers, s in zip(fuser.groups, fuser.stacks) for i in layers}
    assert found == {0: {'cpu'}, 1: {'meta'}, 2: {'cpu'}, 4: {'meta'}} and [d.type for d in fuser.devices] == ['cpu', 'meta'] and fuser.device.type == 'cpu'
    assert all(b.device == next(s.parameters()).device for s in fuser.stacks for b in s.buffers())
    assert 'float32 on cpu, meta' in fuser.extra_repr() and 'float32 on cpu, meta' in str(fuser)


@pytest.mark.parametrize('devices,says', [(['cpu']*3, '3 devices were given, the receiver has 4 layers'), ([], '0 devices were given'), (['cpu']*5, '5 devices'), ('cpu', "use fuser.to('cpu')"), (torch.device('cpu'), 'a list with the device of every receiver layer'), (0, 'a list'),
    (['cpu', 'cpu', 'cpu', 'moon'], 'moon'), (['cpu', None, 'cpu', 'cpu'], 'devices='), (['cpu', 'cpu', 'cpu', 'cuda:77'], 'cuda:77')], ids=str)
def test_placement_lists_that_do_not_fit(devices, says):
    fuser = fuser_of(plain, plain)
    before, stacks = fuser.fingerprint(), list(fuser.stacks)
    with pytest.raises(ValueError) as e: fuser.place(devices)
    assert says in str(e.value)
    assert fuser.fingerprint() == before and all(a is b for a, b in zip(fuser.stacks, stacks)) and fuser.groups == [[0, 1, 2, 3]]


@pytest.mark.parametrize('name', architectures)
def test_layers_of_a_model_are_found(name):
    model = copy.deepcopy(tiny(name))
    n = model.config.num_hidden_layers
    assert layer_devices(model) == [torch.device('cpu')]*n
    layers = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    layers[0].to('meta')
    assert [d.type for d in layer_devices(model)] == ['meta'] + ['cpu']*(n-1)
    fuser = fuser_for(tiny(name), tiny('llama', 1)).place(model)
    assert {next(s.parameters()).device.type: l for l, s in zip(fuser.groups, fuser.stacks)} == {'meta': [0], 'cpu': list(range(1, n))}


def test_layers_kept_elsewhere_run_where_accelerate_runs_them():
    model = copy.deepcopy(tiny('qwen3'))
    model.hf_device_map = {'model.embed_tokens': 0, 'model.layers.0': 0, 'model.layers.1': 'disk', 'model.layers.2': 1, 'model.norm': 1, 'lm_head': 1}
    assert [str(d) for d in layer_devices(model)] == ['cuda:0', 'cuda:0', 'cuda:1']
    model.hf_device_map = {'model': 'cpu', 'lm_head': 'disk'}
    assert layer_devices(model) == [torch.device('cpu')]*3
    model.hf_device_map = {'': 'cuda:3'}
    assert layer_devices(model) == [torch.device('cuda:3')]*3
    model.hf_device_map = {'model.layers.1': 'cuda:1'}            # what the map does not say, parameters do
    assert [str(d) for d in layer_devices(model)] == ['cpu', 'cuda:1', 'cpu']


def test_a_placed_fuser_in_a_model():
    r, s, ids = tiny('qwen3'), tiny('llama', 1), ids_of(2, 8)
    fuser = fuser_for(r, s)
    placed = copy.deepcopy(fuser).place(['cpu', 'cpu:0', 'cpu'])
    assert len(placed.stacks) == 2
    for kw in dict(), dict(attention_mask=torch.tensor([[1]*8, [0, 0] + [1]*6])):
        a, b = (C2CModel(r, [s], [f]).generate(ids, **kw, max_new_tokens=4) for f in (fuser, placed))
        assert torch.equal(a, b)


# is it the right pair?

def test_all_differences_in_one_message(golden):
    "Geometry, kind, sizes, weights and tokenizers of both models, at once."
    from transformers import AutoTokenizer
    a, b = (AutoTokenizer.from_pretrained(golden/n) for n in ('tokA', 'tokB'))
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser = fuser_for(r, s, receiver_tokenizer=a, sharer_tokenizer=b)
    fuser.check(r, s, a, b)
    with pytest.raises(ValueError) as e: fuser.check(tiny('gpt2'), tiny('qwen2'), b, a)
    lines = str(e.value).splitlines()
    assert lines[0].startswith('this fuser does not fit these models') and lines[-1].startswith('Load the models it was trained with')
    for says in ('receiver: the fuser was made for KVGeometry', 'receiver model_type', 'receiver weights', 'sharer: the fuser was made for KVGeometry', 'sharer model_type', 'sharer weights', 'receiver tokenizer', 'sharer tokenizer'): assert sum(l.strip().startswith(says) for l in lines) == 1, says


def test_not_strict_is_one_warning():
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser = fuser_for(r, s)
    with pytest.warns(UserWarning) as said: fuser.check(tiny('qwen3', 7), tiny('llama', 8), strict=False)
    assert len(said) == 1 and 'receiver weights' in str(said[0].message) and 'sharer weights' in str(said[0].message) and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fuser.check(r, s, strict=False)
        with pytest.raises(ValueError, match='KVGeometry') as e: fuser.check(r, tiny('qwen2'), strict=False)          # cannot be run at all
        assert 'sharer weights' in str(e.value)
        with pytest.raises(ValueError, match='no rotary position embedding'): fuser_for(tiny('gpt2'), s, key_space='unrotated').check(tiny('gpt2'), s, strict=False)


def renamed(model, name, dtype=None):
    model = copy.deepcopy(model)
    model.config.name_or_path = name
    return model if dtype is None else model.to(dtype)


def test_a_name_counts_only_where_weights_cannot_be_compared():
    r, s = renamed(tiny('qwen3'), 'Qwen/Qwen3-0.6B'), tiny('llama', 1)
    fuser = fuser_for(r, s)
    fuser.check(renamed(r, '/data/anything'), s)                                              # the same weights under another name
    fuser.check(renamed(r, '/data/anything', torch.bfloat16), s)
    for same_model in ('Qwen/Qwen3-0.6B', '/data/Qwen3-0.6B', 'me/qwen3-0.6b', '/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de', ''): fuser.check(renamed(r, same_model, torch.float16), s)
    for other in 'Qwen/Qwen3-0.6B-Base', '/data/anything', '/cache/models--me--Qwen3-0.6B-Base/snapshots/1':
        with pytest.raises(ValueError) as e: fuser.check(renamed(r, other, torch.float16), s)
        assert f"receiver name: the fuser was made for 'Qwen/Qwen3-0.6B', this model is '{other}'" in str(e.value) and 'half precision' in str(e.value)
        with pytest.warns(UserWarning, match='receiver name'): fuser.check(renamed(r, other, torch.float16), s, strict=False)
    published = copy.deepcopy(fuser)                              # of a published fuser only names are known
    published.config.receiver, published.config.sharer = dict(name='Qwen/Qwen3-0.6B'), None
    published.check(renamed(r, '/data/Qwen3-0.6B'), s)
    with pytest.raises(ValueError, match='not recorded'): published.check(renamed(r, '/data/Qwen3-0.6B-Base'), s)


def test_weights_that_are_not_numbers_of_their_own_are_not_compared():
    "Quantised, in half precision or not in memory: no fingerprint, and no error."
    r = tiny('qwen3')
    assert model_facts(r)['weights'] and model_facts(copy.deepcopy(r).bfloat16())['weights'] == model_facts(r)['weights']
    quantised = copy.deepcopy(r); quantised.config.quantization_config = dict(quant_method='torchao')
    for other in copy.deepcopy(r).half(), copy.deepcopy(r).to('meta'), quantised: assert model_facts(other)['weights'] is None


# alignment

@pytest.mark.parametrize('alignment', alignments)
def test_alignment_is_kept(tmp_path, alignment):
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1), alignment=alignment)
    fuser.save_pretrained(tmp_path/'fuser')
    assert Fuser.from_pretrained(tmp_path/'fuser').config.alignment == alignment


@pytest.mark.parametrize('alignment', ['prefix', 'First', '', 0, ['first']], ids=str)
def test_alignments_that_there_are_not(tmp_path, alignment):
    with pytest.raises(ValueError, match=r"alignment=.* was given; known are 'shared', 'first', 'longest', 'offsets', None"): fuser_for(tiny('qwen3'), tiny('llama', 1), alignment=alignment)
    fuser_for(tiny('qwen3'), tiny('llama', 1)).save_pretrained(tmp_path/'fuser')
    file = tmp_path/'fuser'/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(alignment=alignment)))
    with pytest.raises(ValueError, match='config.json does not describe a fuser'): Fuser.from_pretrained(tmp_path/'fuser')


# types

types = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize('fuser_type', types, ids=str)
def test_models_and_fuser_of_any_types(fuser_type):
    "The answer has the receiver's type; the fuser keeps and states its own."
    r, s, ids = tiny('qwen3'), tiny('llama', 1), ids_of(2, 8)
    fuser, reference = fuser_for(r, s).to(fuser_type), C2CModel(r, [s], [fuser_for(r, s)]).prefill(ids)
    for receiver_type, sharer_type in itertools.product(types, repeat=2):
        c2c = C2CModel(copy.deepcopy(r).to(receiver_type), [copy.deepcopy(s).to(sharer_type)], [fuser])
        cache = c2c.prefill(ids)
        assert {x.dtype for l in cache.layers for x in (l.keys, l.values)} == {receiver_type} and fuser.dtype == fuser_type
        exact = receiver_type == sharer_type == fuser_type == torch.float32
        assert (cache.layers[-1].values.float() - reference.layers[-1].values).abs().max() < (1e-6 if exact else .3)
        assert c2c.generate(ids, max_new_tokens=2).shape == (2, 10)
    assert f'{str(fuser_type)[6:]} on cpu' in str(fuser)


# files that are damaged, or made to do harm

@pytest.fixture
def saved(tmp_path):
    "A saved fuser that says much of itself."
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1), alignment='longest')
    fuser.config.receiver['name'], fuser.config.training = 'a/b', dict(steps=3, datasets=['x/y'], imported_from='a/b', results=[dict(task='t', system='s', correct=1, total=2)], license='mit', recipe=dict(lr=1.))
    fuser.save_pretrained(tmp_path/'fuser')
    return tmp_path/'fuser'


def change(file, path, value):
    "A JSON file with one entry changed."
    content = json.loads(file.read_text())
    part = content
    for k in path[:-1]: part = part[k]
    part[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize('path,value', [(('training', 'imported_from'), 5), (('training', 'datasets'), 5), (('training', 'results'), 5), (('training', 'results'), [5]), (('training', 'results'), [dict(task='t')]), (('training',), 5), (('receiver',), 'a/b'), (('sharer', 'name'), 5), (('sharer', 'weights'), ['x']),
    (('receiver', 'hidden_size'), '64'), (('receiver_tokenizer',), 5), (('projector',), ['C2CProjector']), (('projector_args',), 5), (('fingerprint',), {})], ids=str)
def test_config_fields_of_a_wrong_kind(saved, path, value):
    change(saved/'config.json', path, value)
    with pytest.raises(ValueError, match='config.json does not describe a fuser') as e: Fuser.from_pretrained(saved)
    assert path[-1] in str(e.value) and str(value).strip('[]') in str(e.value)


def test_whatever_stands_in_a_config(saved):
    "It loads and gives a card, or is refused with a ValueError, at once."
    file = saved/'config.json'
    good, outcomes, start = json.loads(file.read_text()), [], time.monotonic()
    paths = [(k,) for k in good] + [(k, i) for k, v in good.items() if isinstance(v, dict) for i in v]
    assert len(paths) > 35
    for path, value in itertools.product(paths, [5, 'x', [5], {'a': 5}, None, 10**11, [[10**11]]]):
        file.write_text(json.dumps(good))
        change(file, path, value)
        try: outcomes.append(bool(Fuser.from_pretrained(saved).generate_model_card()))
        except ValueError: outcomes.append(False)
    assert outcomes.count(True) > 20 and outcomes.count(False) > 100 and time.monotonic() - start < 90


@pytest.mark.parametrize('path,value', [(('receiver_geometry', 'layers'), 10**11), (('sharer_geometry', 'layers'), 10**11), (('layer_map',), [0, 0, 10**11]), (('layer_map',), [0, 0, -10**11]), (('sharer_geometry', 'kv_heads'), 10**11), (('projector_args', 'hidden_dim'), 10**11)], ids=str)
def test_numbers_that_no_model_has(saved, path, value):
    "Refused at once, without making what they speak of."
    change(saved/'config.json', path, value)
    start = time.monotonic()
    with pytest.raises(ValueError, match='config|weights'): Fuser.from_pretrained(saved)
    assert time.monotonic() - start < 15


def test_weights_that_cannot_be_read(saved, monkeypatch):
    "A folder in their place, cut off, or not allowed: the same kind of message."
    file = saved/'model.safetensors'
    whole = file.read_bytes()
    def refused():
        with pytest.raises(ValueError, match='model.safetensors cannot be read .*: the file is truncated, may not be read') as e: Fuser.from_pretrained(saved)
        return str(e.value)
    for content in b'', whole[:100], whole[:-1], b'\xff'*1000: file.write_bytes(content); refused()
    file.unlink(); file.mkdir(); refused()
    file.rmdir(); file.write_bytes(whole)
    def forbidden(*args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('c2c_nb.fuser.safe_open', forbidden)
    assert 'Permission denied' in refused()


def test_a_config_without_end(saved, tmp_path):
    "JSON so deep that Python gives up: refused on loading, and not overwritten."
    (saved/'config.json').write_text('['*100_000)
    with pytest.raises(ValueError, match='config.json is not valid JSON'): Fuser.from_pretrained(saved)
    with pytest.raises(FileExistsError, match='does not hold a fuser'): fuser_for(tiny('qwen3'), tiny('llama', 1)).save_pretrained(saved)
