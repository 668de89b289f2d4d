"The authors' checkpoints: all three official projector classes, any type, and what is refused."
import copy, json, shutil, time, warnings

import pytest, torch
from safetensors.torch import load_file

from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.projector import C2CProjector
from c2c_nb.published import PUBLISHED, AllInOneProjector, our_projector, published_pairs, read_published

from test_faults import Evil
from tiny import ids_of, tiny

units = [f'ablation{i}' for i in range(5)] + ['allinone_recipe', 'allinone_blend_value']
known = dict(hidden_dim=8, num_layers=2, gate_granularity='scalar', weight_granularity='scalar', scalar_temperature=1., max_sequence_length=16, preserve_target_weight=True)


def checkpoint(folder, states, description, layer_map=None):
    "Write a folder in the official layout."
    folder.mkdir(parents=True)
    for i, state in enumerate(states):
        torch.save(state, folder/f'projector_{i}.pt')
        (folder/f'projector_{i}.json').write_text(json.dumps(description))
    (folder/'projector_config.json').write_text(json.dumps({'0': {'1': {str(i): [[j, i]] for i, j in enumerate(layer_map or range(len(states)))}}}))
    return folder


def unit(golden, name):
    "State dict and description of a golden unit."
    return torch.load(golden/f'unit_ablation/{name}.pt', weights_only=True), json.loads((golden/f'unit_ablation/{name}.json').read_text())


def inputs(golden):
    g = load_file(golden/'u02_other_projectors.safetensors')
    return [(g['source_key'], g['source_value'])], [(g['target_key'], g['target_value'])], g


@pytest.mark.parametrize('name', units)
def test_units_as_checkpoints(golden, tmp_path, name):
    "Outputs equal the official ones, through the fuser; saved and loaded they are the same bits."
    state, description = unit(golden, name)
    fuser = Fuser.from_published(checkpoint(tmp_path/'final', [state], description))
    sharer_kv, receiver_kv, g = inputs(golden)
    with torch.no_grad(): fused = fuser(sharer_kv, receiver_kv)[0]
    for half, own, x in zip(('key', 'value'), receiver_kv[0], fused): torch.testing.assert_close(own if x is None else x, g[f'{name}.{half}'], atol=1e-5, rtol=0)
    assert fuser.config.projector == ('C2CProjector' if 'ablation' in name else 'AllInOneProjector')
    for n, x in fuser.stacks[0].single(0).items(): assert torch.equal(x, state[n])
    fuser.save_pretrained(tmp_path/'converted')
    assert sorted(p.name for p in (tmp_path/'converted').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    again = Fuser.from_pretrained(tmp_path/'converted')
    assert again.fingerprint() == fuser.fingerprint() and again.config.projector_args == fuser.config.projector_args
    with torch.no_grad():
        for a, b in zip(again(sharer_kv, receiver_kv)[0], fused): assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize('name', ['allinone_recipe', 'allinone_blend_value'])
def test_several_layers_of_the_test_bench(golden, tmp_path, name):
    "Three layers, other weights in each: batched equals one by one, halves alone equal both."
    state, description = unit(golden, name)
    states = [{n: x if n == 'gate_temperature' else x + .1*i for n, x in state.items()} for i in range(3)]
    fuser = Fuser.from_published(checkpoint(tmp_path/'final', states, description, [0, 0, 1]))
    (sharer_kv,), (receiver_kv,), _ = inputs(golden)
    other = tuple(x.flip(0) for x in sharer_kv)
    with torch.no_grad():
        fused = fuser([sharer_kv, other], [receiver_kv]*3)
        for i, kv in enumerate((sharer_kv, sharer_kv, other)):
            p = AllInOneProjector(2, 12, 2, 16, **our_projector('AllInOneProjector', {k: v for k, v in description['init_args'].items() if not k.startswith(('source_', 'target_'))})[1]).eval()
            p.load_state_dict(states[i])
            both = p(*kv, *receiver_kv)
            for a, b in zip(fused[i], both): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
            for halves in dict(keys=False), dict(values=False):
                for a, b in zip(p(*kv, *receiver_kv, **halves), both): assert a is None or torch.equal(a, b)


def test_the_test_bench_in_a_model(tmp_path):
    "Runs in a model; position tables are exact for texts of one length, refused for padded batches and beyond their end. It can be trained but for its gates."
    r, s = tiny('qwen3'), tiny('llama', 1)
    torch.manual_seed(0)
    merged = known | dict(weight_granularity='head_merged', weight_depends_on_input=True, weight_hidden_dim=6, weight_input_features='target_projected_key', use_swiglu=True, use_concat=True, preserve_target_weight=False, add_self=True)
    tables = known | dict(gate_granularity='head', weight_granularity='value')
    for args, position_wise in ((merged, True), (tables, False), (known, True)):
        fuser = Fuser.from_models(r, s, 'AllInOneProjector', **args)
        with torch.no_grad():
            for n, p in fuser.named_parameters(): p.add_(.5 if 'gate_logit' in n else torch.randn_like(p)*.1)
        assert fuser.stacks[0].projector.position_wise == position_wise
        c2c, ids = C2CModel(r, [s], [fuser.eval()]), ids_of(2, 8)
        both = c2c.prefill(ids)
        for row in range(2): torch.testing.assert_close(c2c.prefill(ids[row:row+1]).layers[-1].keys, both.layers[-1].keys[row:row+1], atol=1e-5, rtol=0)
        mask = torch.ones_like(ids); mask[1, :3] = 0
        if position_wise: torch.testing.assert_close(c2c.prefill(ids, mask).layers[-1].keys[1:, :, 3:], c2c.prefill(ids[1:, 3:]).layers[-1].keys, atol=1e-5, rtol=0)
        else:
            with pytest.raises(ValueError, match='how far a position is from the start of its section'): c2c.prefill(ids, mask)
            with pytest.raises(ValueError, match='numbers for 16 positions, 19 were given'): c2c.prefill(ids_of(1, 20))
        fuser.save_pretrained(tmp_path/f'{position_wise}')
        assert torch.equal(C2CModel(r, [s], [Fuser.from_pretrained(tmp_path/f'{position_wise}')]).prefill(ids).layers[-1].keys, both.layers[-1].keys)
    fuser.train()
    labels = ids.clone(); labels[:, :5] = -100
    C2CModel(r, [s], [fuser])(ids, labels=labels, active=(torch.arange(8) < 4)[None, :, None].expand(2, -1, 1)).loss.backward()
    grads = {n: p.grad for n, p in fuser.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for n, g in grads.items() if 'gate' not in n) and any(g.abs().sum() > 0 for g in grads.values() if g is not None)


bad_arguments = dict(
    gate_depends_on_input=dict(gate_depends_on_input=True), gate_granularity=dict(gate_granularity='head_merged'), weight_granularity=dict(weight_granularity='block'), weight_depends_on_input=dict(weight_depends_on_input=True),
    weight_input_features=dict(weight_granularity='head_merged', weight_depends_on_input=True, weight_hidden_dim=8, weight_input_features='target_key'), weight_hidden_dim=dict(weight_granularity='head_merged', weight_depends_on_input=True, weight_input_features='target_projected_key'),
    activation=dict(activation='eval'), num_layers=dict(num_layers=0), endless=dict(num_layers=10**9), scalar_temperature=dict(scalar_temperature=0.), add_self=dict(add_self=True), unknown=dict(__import__='os'), colour=dict(colour=1), negative=dict(hidden_dim=-1), text=dict(hidden_dim='8'), nothing=dict(num_layers=None), listed=dict(activation=['gelu']))


@pytest.mark.parametrize('case', bad_arguments)
def test_test_bench_arguments_that_are_not_known(tmp_path, case):
    "Refused by name when a checkpoint is read; its weights are not looked at."
    description = {'class': 'AllInOneProjector', 'init_args': dict(source_dim=12, target_dim=16, source_num_heads=2, target_num_heads=2) | known | bad_arguments[case]}
    folder = checkpoint(tmp_path/'final', [{'x': torch.zeros(1)}], description)
    torch.save(Evil(tmp_path/'pwned'), folder/'projector_0.pt')
    with pytest.raises(ValueError) as e: Fuser.from_published(folder)
    assert 'AllInOneProjector cannot be made' in str(e.value) and str(folder) in str(e.value)
    if case in known or case.startswith(('gate', 'weight', 'add', 'activation', 'colour')): assert case in str(e.value)
    assert not (tmp_path/'pwned').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['final']


def test_defaults_that_a_checkpoint_does_not_say(tmp_path):
    "What the official code takes for an argument that is left out is not in the file: it must be given, or is refused."
    for name in known:
        description = {'class': 'AllInOneProjector', 'init_args': dict(source_dim=12, target_dim=16, source_num_heads=2, target_num_heads=2) | {k: v for k, v in known.items() if k != name}}
        with pytest.raises(ValueError, match=name): read_published(checkpoint(tmp_path/name, [{}], description))
    with pytest.raises(ValueError, match='use_residual'): AllInOneProjector(2, 16, 2, 16, **known)
    AllInOneProjector(2, 16, 2, 16, **known, use_residual=False)
    with pytest.raises(ValueError, match='add_self'): AllInOneProjector(2, 12, 2, 16, **known | dict(preserve_target_weight=False))
    ignored = dict(gate_init_value=3., pos_emb=True, initial_temperature=1., dtype={})
    assert our_projector('AllInOneProjector', known | ignored) == ('AllInOneProjector', known)


@pytest.mark.parametrize('level', [None, 5, -1, '0', True, 1.5, [1]])
def test_ablation_levels_that_there_are_not(golden, tmp_path, level):
    state, description = unit(golden, 'ablation0')
    args = {k: v for k, v in description['init_args'].items() if k != 'ablation_level'} | ({} if level is None else dict(ablation_level=level))
    with pytest.raises(ValueError, match='ablation_level'): read_published(checkpoint(tmp_path/'final', [state], description | dict(init_args=args)))


@pytest.mark.parametrize('table', [{'10000000000': [[0, 0]]}, {'-1': [[0, 0]]}, {'0': [[-1, 0]]}])
def test_maps_that_no_model_has(golden, tmp_path, table):
    state, description = unit(golden, 'ablation0')
    folder = checkpoint(tmp_path/'final', [state], description)
    (folder/'projector_config.json').write_text(json.dumps({'0': {'1': table}}))
    with pytest.raises(ValueError, match='layer'): Fuser.from_published(folder)


def test_networks_without_end(golden, tmp_path):
    "A file that asks for more layers than memory has is refused at once."
    state, description = unit(golden, 'ablation0')
    folder = checkpoint(tmp_path/'final', [state], description | dict(init_args=description['init_args'] | dict(num_layers=10**9)))
    with pytest.raises(ValueError, match='num_layers=1000000000'): Fuser.from_published(folder)


def test_weights_of_another_level(golden, tmp_path):
    state, _ = unit(golden, 'ablation0')
    for name, says in ('ablation1', 'unexpected'), ('ablation3', 'unexpected'), ('allinone_recipe', 'missing'):
        with pytest.raises(ValueError, match=says): read_published(checkpoint(tmp_path/name, [state], unit(golden, name)[1]))


@pytest.mark.parametrize('stored', [torch.bfloat16, torch.float16, torch.float32])
def test_any_type_from_any_type(golden, tmp_path, stored):
    "As published, or in the type that was asked for; the same numbers."
    states = [{n: x.to(stored) for n, x in torch.load(golden/f'ckpt_s1/final/projector_{i}.pt', weights_only=True).items()} for i in range(6)]
    folder = checkpoint(tmp_path/'final', states, json.loads((golden/'ckpt_s1/final/projector_0.json').read_text()), [0, 0, 0, 1, 2, 3])
    assert Fuser.from_published(folder).dtype == stored
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        fuser = Fuser.from_published(folder, dtype=dtype)
        assert {p.dtype for p in fuser.parameters()} == {dtype}
        for i in range(6): assert all(torch.equal(x, states[i][n].to(dtype)) for n, x in fuser.stacks[0].single(i).items())
        fuser.save_pretrained(tmp_path/str(dtype))
        again = Fuser.from_pretrained(tmp_path/str(dtype))
        assert again.dtype == dtype and again.fingerprint() == fuser.fingerprint() and load_file(tmp_path/str(dtype)/'model.safetensors')


def test_what_the_recipe_tells(golden, tmp_path):
    "Names, alignment and training come along, into the card too; a recipe that is something else does no harm."
    shutil.copytree(golden/'ckpt_s1', tmp_path/'run', copy_function=shutil.copyfile)
    for p in (tmp_path/'run').rglob('*'): p.chmod(0o755 if p.is_dir() else 0o644)
    recipe = json.loads((tmp_path/'run'/'config.json').read_text())
    fuser = Fuser.from_published(tmp_path/'run', 'final')
    assert fuser.config.alignment == 'shared' and fuser.config.receiver == dict(name='receiver') and fuser.config.training['datasets'] == ['teknium/OpenHermes-2.5']
    assert fuser.config.training['recipe'] == recipe['training'] and 'teknium/OpenHermes-2.5' in fuser.generate_model_card().content
    for change, expected in ((dict(is_do_alignment=True, alignment_strategy='longest'), 'longest'), (dict(is_do_alignment=True, alignment_strategy='prefix'), None), (dict(is_do_alignment=True, alignment_strategy=[1]), None), (dict(base_model=3), 'shared')):
        (tmp_path/'run'/'config.json').write_text(json.dumps(recipe | dict(model=recipe['model'] | change)))
        assert Fuser.from_published(tmp_path/'run', 'final').config.alignment == expected
    for content in '[]', '3', '{"model": 1, "data": [], "training": null}', '{"model": {"base_model": ["x"]}, "data": {"type": ["x"]}}':
        (tmp_path/'run'/'config.json').write_text(content)
        fuser = Fuser.from_published(tmp_path/'run', 'final')
        assert fuser.config.receiver is None and fuser.config.alignment is None
        fuser.save_pretrained(tmp_path/'saved')


def test_the_table_of_published_fusers():
    "Eight folders, each loaded by the three lines that the notebook prints."
    assert PUBLISHED == 'nics-efc/C2C_Fuser' and len({p.folder for p in published_pairs}) == 8
    for p in published_pairs:
        assert p.folder.endswith('_Fuser') and p.receiver.startswith('Qwen/Qwen3-') and p.receiver.removeprefix('Qwen/').lower().replace('-', '_') == p.folder.split('+')[0]


def test_from_the_hub_only_what_is_needed(golden, monkeypatch):
    "What `from_published` asks the hub for."
    asked = {}
    def download(name, allow_patterns, **kw): asked.update(kw, name=name, patterns=allow_patterns); return golden/'ckpt_s1'
    monkeypatch.setattr('c2c_nb.hub.snapshot_download', download)
    fuser = Fuser.from_published('nics-efc/C2C_Fuser', subfolder='final', revision='8704f555', token='hf_x')
    assert asked == dict(name='nics-efc/C2C_Fuser', patterns=['final/projector_*', 'final/projector_config.json', 'config.json'], revision='8704f555', token='hf_x')
    assert fuser.config.training['license'] == 'apache-2.0' and fuser.config.training['revision'] == '8704f555' and fuser.config.training['imported_from'] == 'nics-efc/C2C_Fuser/final'
    assert Fuser.from_published(golden/'ckpt_s1'/'final').fingerprint() == fuser.fingerprint()


@pytest.mark.parametrize('kind,says', dict(sparse='sparse_coo', meta='on meta', float8='float8_e4m3fn', quantised='qint8', whole='int32', complex='complex64').items())
def test_weights_of_an_odd_kind(golden, tmp_path, kind, says):
    "Only dense floating point numbers in memory; others are named."
    make = dict(sparse=lambda x: x.to_sparse(), meta=lambda x: x.to('meta'), float8=lambda x: x.to(torch.float8_e4m3fn), whole=lambda x: x.int(), complex=lambda x: x.to(torch.complex64),
        quantised=lambda x: torch.quantize_per_tensor(x.float(), .1, 0, torch.qint8))
    state, description = unit(golden, 'ablation0')
    name = next(n for n, x in state.items() if x.dim() == 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                          # torch calls quantised tensors outdated
        folder = checkpoint(tmp_path/'final', [state | {name: make[kind](state[name])}], description)
        with pytest.raises(ValueError, match='dense tensors of type float16') as e: Fuser.from_published(folder)
    assert f'{name} is ' in str(e.value) and says in str(e.value) and 'projector_0.pt' in str(e.value)


@pytest.mark.parametrize('table', [{'0': [[10**11, 0]]}, {str(10**11): [[0, 0]]}, {'0': [[0, 10**11]]}], ids=str)
def test_layers_that_no_model_has(golden, tmp_path, table):
    "Answered at once."
    folder = checkpoint(tmp_path/'final', [unit(golden, 'ablation0')[0]], unit(golden, 'ablation0')[1])
    (folder/'projector_config.json').write_text(json.dumps({'0': {'1': table}}))
    start = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match='projector_config.json'): Fuser.from_published(folder)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize('file', ['projector_config.json', 'projector_0.json', '../config.json', 'projector_0.pt'])
@pytest.mark.parametrize('content', ['['*100_000, '{', '', b'\x80\x02', b'\xff'*50], ids=['deep', 'half', 'empty', 'pickle', 'bytes'])
def test_damaged_files(golden, tmp_path, file, content):
    folder = checkpoint(tmp_path/'run'/'final', [unit(golden, 'ablation0')[0]], unit(golden, 'ablation0')[1])
    (folder/file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=file.removeprefix('../')): Fuser.from_published(folder)
