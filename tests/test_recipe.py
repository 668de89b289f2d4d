"Recipes are read strictly, the official ones as they stand, and what is wrong with them is said before a model is loaded."
import copy, importlib.machinery, json, math, socket, sys, types
from dataclasses import fields, replace

import pytest, torch, transformers, yaml
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from conftest import changed, run_python, root
from c2c_nb import recipe as room
from c2c_nb.recipe import (DataRecipe, FinetuneRecipe, ModelRecipe, OutputRecipe, ProjectorRecipe, TrainRecipe, TrainingRecipe, ValidationRecipe, accumulation, describe, differences, is_official,
                           learning_rates, make_scheduler, nearest, official_keys, official_lora, read_recipe, recipe_from_dict, recipe_keys, set_values, shipped_recipes, steps)

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def ours(**changes): return dict(model=dict(world='skill'), data=dict(type='Toy'), output=dict(folder='runs/x')) | changes


def write(folder, text, name='r.yaml'):
    (folder/name).write_text(text, encoding='utf-8')
    return folder/name


def at(recipe, path):
    d = recipe.to_dict()
    for part in path.split('.'): d = d[part]
    return d


# ---------------------------------------------------------------- the official project's recipes

official = {
    'model': {'base_model': 'a/receiver', 'teacher_model': 'a/sharer', 'is_do_alignment': False, 'alignment_strategy': 'first', 'projector': {'type': 'C2CProjector', 'params': {'hidden_dim': 16, 'initial_temperature': 1.0, 'final_temperature': .001, 'anneal_steps': 5}}, 'mapping': 'last_aligned'},
    'training': {'learning_rate': 1e-3, 'weight_decay': .01, 'num_epochs': 1, 'max_length': 2048, 'device': 'cuda', 'scheduler_type': 'linear', 'warmup_ratio': .1, 'max_grad_norm': 1.0, 'gradient_accumulation_steps': 2, 'per_device_train_batch_size': 2, 'num_processes': 1, 'freeze': ['teacher', 'base'], 'seed': 42},
    'output': {'output_dir': 'runs/x', 'save_steps': 2, 'eval_steps': 2, 'wandb_config': {'project': 'x', 'mode': 'disabled', 'entity': None, 'run_name': 'toy'}},
    'data': {'type': 'OpenHermesChatDataset', 'kwargs': {'num_samples': 12}, 'train_ratio': .8},
}
baseline = {'model': {'baseline_model': 'a/model'}, **{k: official[k] for k in ('output', 'data')}, 'training': {k: v for k, v in official['training'].items() if k != 'freeze'}}


aligned = changed(official, 'model.is_do_alignment', True)
# their path, a value, in which recipe, what of ours becomes what
cases = [
    ('model.base_model', 'b/other', official, {'model.receiver': 'b/other'}),
    ('model.teacher_model', 'b/other', official, {'model.sharers': ['b/other']}),
    ('model.baseline_model', 'b/other', baseline, {'finetune.model': 'b/other', 'finetune.method': 'full'}),
    ('model.is_do_alignment', False, official, {'model.alignment': 'shared'}),
    ('model.is_do_alignment', True, official, {'model.alignment': 'first'}),
    ('model.alignment_strategy', 'longest', aligned, {'model.alignment': 'longest'}),
    ('model.alignment_strategy', 'first', aligned, {'model.alignment': 'first'}),
    ('model.alignment_strategy', 'longest', official, {'model.alignment': 'shared'}),
    ('model.attn_implementation', 'eager', official, {'model.attn_implementation': 'eager'}),
    ('model.attn_implementation', 'eager', baseline, {'finetune.attn_implementation': 'eager'}),
    ('model.include_response', True, official, {'model.follow_response': True}),
    ('model.multi_source_fusion_mode', 'parallel', official, {'model.fusion': 'parallel'}),
    ('model.multi_source_fusion_mode', 'sequential', official, {'model.fusion': 'sequential'}),
    ('model.projector.type', 'c2cprojector', official, {'model.projector.type': 'c2cprojector'}),
    ('model.projector.params', {'hidden_dim': 8, 'dropout': .2, 'use_gumbel': False}, official, {'model.projector.args': {'hidden_dim': 8, 'dropout': .2, 'gate_noise': None}, 'training.gates.steps': 1929}),
    ('model.projector.params.initial_temperature', 2.0, official, {'training.gates.initial_temperature': 2., 'model.projector.args': {'hidden_dim': 16}}),
    ('model.projector.params.final_temperature', .01, official, {'training.gates.final_temperature': .01, 'model.projector.args': {'hidden_dim': 16}}),
    ('model.projector.params.anneal_steps', 7, official, {'training.gates.steps': 7, 'model.projector.args': {'hidden_dim': 16}}),
    ('model.mapping', 'k_nearest', official, {'model.layer_map': 'depth_nearest'}),
    ('model.mapping', 'last_aligned', official, {'model.layer_map': 'last_aligned'}),
    ('training.learning_rate', 3e-4, official, {'training.learning_rate': 3e-4}),
    ('training.learning_rate', '3e-4', official, {'training.learning_rate': 3e-4}),            # what YAML 1.1 makes of 3e-4
    ('training.weight_decay', .1, official, {'training.weight_decay': .1}),
    ('training.num_epochs', 3, official, {'training.epochs': 3.}),
    ('training.scheduler_type', 'cosine', official, {'training.scheduler': 'cosine'}),
    ('training.warmup_ratio', .2, official, {'training.warmup_ratio': .2}),
    ('training.max_grad_norm', .5, official, {'training.max_grad_norm': .5}),
    ('training.per_device_train_batch_size', 8, official, {'training.batch_size': 8}),
    ('training.gradient_accumulation_steps', 4, official, {'training.accumulation': 4}),
    ('training.max_length', 512, official, {'training.max_length': 512}),
    ('training.seed', 7, official, {'training.seed': 7}),
    ('training.freeze', ['teacher'], official, {'training.freeze': ['sharer']}),
    ('training.freeze', ['base', 'teacher', 'projector'], official, {'training.freeze': ['receiver', 'sharer', 'fuser']}),
    ('training.freeze', [], official, {'training.freeze': ['sharer']}),
    ('training.freeze', ['baseline'], baseline, {'training.freeze': ['model']}),
    ('training.freeze', ['base'], baseline, {'training.freeze': ['model']}),
    ('training.freeze', [], baseline, {'training.freeze': []}),
    ('training.pad_to_multiple_of', 8, official, {'training.pad_to_multiple_of': 8}),
    ('training.device', 'cpu', official, {}),
    ('training.num_processes', 8, official, {}),
    ('training.lora', {}, baseline, {'finetune.method': 'lora', 'finetune.lora': official_lora}),
    ('training.lora', {'r': 4, 'target_modules': ['q_proj']}, baseline, {'finetune.method': 'lora', 'finetune.lora': official_lora | {'r': 4, 'target_modules': ['q_proj']}}),
    ('training.lora', None, baseline, {'finetune.method': 'full', 'finetune.lora': {}}),
    ('training.lora', {'r': 4}, official, {}),
    ('training.partial_training.method', 'layer_wise', baseline, {'finetune.method': 'layers', 'finetune.share': .6}),
    ('training.partial_training.method', 'parameter_wise', baseline, {'finetune.method': 'parameters', 'finetune.share': .6}),
    ('training.partial_training.ratio', .3, baseline, {'finetune.method': 'layers', 'finetune.share': .3}),
    ('training.partial_training', None, baseline, {'finetune.method': 'full'}),
    ('output.output_dir', 'runs/y', official, {'output.folder': 'runs/y'}),
    ('output.save_steps', 500, official, {'output.save_every': 500}),
    ('output.eval_steps', 100, official, {'validation.every': 100}),
    ('output.wandb_config.project', 'c2c', official, {'output.project': 'c2c', 'output.trackers': []}),
    ('output.wandb_config.mode', 'offline', official, {'output.trackers': ['wandb'], 'output.tracker_args': {'wandb': {'mode': 'offline', 'entity': None, 'name': 'toy'}}}),
    ('output.wandb_config.mode', 'disabled', official, {'output.trackers': []}),
    ('output.wandb_config.entity', 'us', official, {'output.tracker_args': {'wandb': {'mode': 'disabled', 'entity': 'us', 'name': 'toy'}}}),
    ('output.wandb_config.run_name', 'one', official, {'output.tracker_args': {'wandb': {'mode': 'disabled', 'entity': None, 'name': 'one'}}}),
    ('data.type', 'MMLUChatDataset', official, {'data.type': 'MMLUChatDataset'}),
    ('data.kwargs', {'split': 'train', 'max_word_count': 2048}, official, {'data.args': {'split': 'train', 'max_word_count': 2048}}),
    ('data.kwargs', None, official, {'data.args': {}}),
    ('data.train_ratio', .99, official, {'validation.share': .01}),
    ('data.train_ratio', 1, baseline, {'validation.share': 0.}),
]


@pytest.mark.parametrize('path, value, recipe, expected', cases, ids=[f'{p}={v}'[:60] for p, v, _, _ in cases])
def test_every_official_key(path, value, recipe, expected):
    r = recipe_from_dict(changed(recipe, path, value))
    for k, v in expected.items(): assert at(r, k) == v and type(at(r, k)) is type(v), k
    same = {k: v for k, v in at_all(recipe_from_dict(recipe)).items() if not any(k == e or k.startswith(f'{e}.') or e.startswith(k) for e in expected)}
    assert {k: at_all(r)[k] for k in same} == same, 'something else has changed'
    no_effect = not expected or path == 'model.alignment_strategy' and recipe is official
    assert any(path.startswith(n.partition('=')[0]) and 'no effect' in n for n in r.notes) == no_effect


def at_all(recipe): return room._leaves(recipe.to_dict())


def test_every_official_key_was_tried():
    assert {p for p, *_ in cases if p in official_keys} == set(official_keys)
    assert {k.ours for k in official_keys.values() if k.ours and not k.ours.startswith('output.tracker_args.')} <= set(recipe_keys())


def test_official_defaults_where_they_differ():
    r = recipe_from_dict({'model': {'base_model': 'a', 'teacher_model': 'b', 'projector': {'type': 'C2CProjector', 'params': {}}, 'mapping': 'last_aligned'}, 'training': {}, 'output': {'output_dir': 'x'}, 'data': {'type': 'MMLUChatDataset'}})
    assert (r.model.fusion, r.model.alignment, r.training.gates.steps, r.training.accumulation, r.training.max_length, r.output.trackers, r.training.freeze) == ('sequential', 'shared', 1929, 1, 2048, [], ['sharer'])
    assert (r.training.gates.initial_temperature, r.training.gates.final_temperature, r.training.gates.schedule, r.training.gates.noise) == (1., .001, 'exponential', 'projector')
    b = recipe_from_dict(baseline)
    assert b.model is None and 'model' not in b.to_dict() and b.finetune == FinetuneRecipe(model='a/model')


def test_wandb_config_without_entity():
    d = copy.deepcopy(official)
    del d['output']['wandb_config']['entity']
    assert recipe_from_dict(d).output.tracker_args == {'wandb': {'mode': 'disabled', 'name': 'toy'}}
    del d['output']['wandb_config']
    assert (recipe_from_dict(d).output.tracker_args, recipe_from_dict(d).output.trackers) == ({}, [])


def test_official_projectors():
    d = changed(official, 'model.projector', {'type': 'AblationProjector', 'params': {'hidden_dim': 8, 'ablation_level': 3}})
    assert recipe_from_dict(d).model.projector == ProjectorRecipe('C2CProjector', dict(hidden_dim=8, gate=False, weights=False, residual=False, read_receiver=False))
    assert recipe_from_dict(changed(d, 'model.projector.type', 'ablationprojector')).model.projector.type == 'C2CProjector'
    with pytest.raises(ValueError, match='ablation_level=9'): recipe_from_dict(changed(d, 'model.projector.params.ablation_level', 9))
    r = recipe_from_dict(changed(official, 'model.projector', {'type': 'AllInOneProjector', 'params': {'hidden_dim': 8, 'pos_emb': True}}))
    assert r.model.projector.args == {'hidden_dim': 8} and any('pos_emb' in n for n in r.notes)
    assert recipe_from_dict(changed(official, 'model.projector', {'type': 'MyOwn', 'params': {'width': 3}})).model.projector == ProjectorRecipe('MyOwn', dict(width=3))


@pytest.mark.parametrize('path, value, message', [
    ('model.base_modle', 'x', r"model.base_modle is not a key of an official recipe.*did you mean 'base_model'"), ('training.warmup', .1, "did you mean 'warmup_ratio'"), ('output.wandb_config.projct', 'x', "output.wandb_config.projct is not.*did you mean 'project'"),
    ('output.saves', 1, 'output.saves is not'), ('data.ratio', 1, "did you mean 'train_ratio'"), ('extra', 1, 'extra is not a key of an official recipe'), ('model.projector.parms', {}, "did you mean 'params'"), ('model.receiver', 'x', 'model.receiver is not'),
    ('training.partial_training', 'x', 'training.partial_training.* is .x., but a mapping'), ('training.partial_training.rate', .5, "did you mean 'ratio'"), ('model.alignment_strategy', 'prefix', "alignment_strategy is 'prefix'"),
    ('model.mapping', 'k_neares', "did you mean 'k_nearest'"), ('training.freeze', ['techer'], "did you mean 'teacher'"), ('training.freeze', 'teachers', "did you mean 'teacher'"), ('model.is_do_alignment', 'yes', 'true or false is expected'),
    ('model.include_response', 'yes', 'model.follow_response is .yes., but true or false'), ('data.train_ratio', 'most', 'a number is expected'), ('training.seed', 1.5, 'training.seed is 1.5, but a whole number'), ('model', {'base_model': 'x'}, 'model.teacher_model is missing'),
    ('model', {'teacher_model': 'x'}, 'model.base_model is missing'), ('model.projector.type', None, 'model.projector.type is None'), ('training', [], 'a mapping is expected')])
def test_official_mistakes(path, value, message):
    with pytest.raises(ValueError, match='my.json: .*' + message): recipe_from_dict(changed(aligned, path, value), 'my.json')


def test_official_baseline_mistakes():
    with pytest.raises(ValueError, match='one of them, or neither'): recipe_from_dict(changed(changed(baseline, 'training.lora', {}), 'training.partial_training', {'ratio': .5}))
    with pytest.raises(ValueError, match='training.lora is 3'): recipe_from_dict(changed(baseline, 'training.lora', 3))
    for section in 'training', 'output', 'data':
        with pytest.raises(ValueError, match=f'{section} is missing'): recipe_from_dict({k: v for k, v in baseline.items() if k != section})
    r = recipe_from_dict(changed(baseline, 'model.mapping', 'last_aligned'))
    assert r.notes[0] == "model.mapping='last_aligned' has no effect: this is a recipe for the baseline"


def test_golden_recipes(golden):
    r = read_recipe(golden/'sft_run'/'config.json')
    assert r == TrainRecipe(
        model=ModelRecipe(receiver='models/receiver', sharers=['models/sharer'], projector=ProjectorRecipe(args=dict(hidden_dim=16, intermediate_dim=24, num_layers=3, dropout=.1)), alignment='shared', fusion='sequential'),
        data=DataRecipe('ToyChat', dict(n=12)),
        training=TrainingRecipe(learning_rate=1e-3, accumulation=2, batch_size=2, freeze=['sharer', 'receiver'], gates=room.GateRecipe(steps=5)),
        validation=ValidationRecipe(share=.2, every=2),
        output=OutputRecipe('runs/out_default', save_every=2, project='x', tracker_args=dict(wandb=dict(mode='disabled', entity=None, name='toy'))))
    assert [n.partition('=')[0] for n in r.notes] == ['model.alignment_strategy', 'training.device', 'training.num_processes']
    r = read_recipe(golden/'ckpt_s1'/'config.json')
    assert (r.data, r.validation.share, r.training.gates.steps, r.output.save_every, r.validation.every) == (DataRecipe('OpenHermesChatDataset', dict(split='train', max_word_count=2048, num_samples=500000)), .01, 1929, 500, 100)
    assert r.model.projector.args == dict(hidden_dim=32, intermediate_dim=48, num_layers=3, dropout=0.)


def test_official_in_yaml_is_the_same(tmp_path):
    assert read_recipe(write(tmp_path, yaml.safe_dump(official))) == recipe_from_dict(official) == read_recipe(write(tmp_path, json.dumps(official), 'r.json'))
    assert is_official(official) and is_official(baseline) and not is_official(ours()) and not is_official(dict(model=3))


# ---------------------------------------------------------------- strictness

def test_the_tree():
    assert {f.name for f in fields(TrainRecipe)} == {'kind', 'name', 'imports', 'model', 'finetune', 'data', 'training', 'validation', 'output', 'notes'}
    keys = recipe_keys()
    assert keys['training.gates.noise'] == str | None and keys['validation.data.type'] is str and 'notes' not in keys and len(keys) == 80
    assert nearest('sed', ['seed']) == "did you mean 'seed'? Known are seed" and nearest('x', []) == 'there are none'


@pytest.mark.parametrize('path', ['x', 'model.x', 'model.projector.x', 'finetune.x', 'data.x', 'training.x', 'training.gates.x', 'validation.x', 'validation.data.x', 'output.x', 'notes'])
def test_unknown_keys_everywhere(path):
    d = changed(ours(validation=dict(data=dict(type='Toy'))), path, 1)
    with pytest.raises(ValueError, match=f'my.yaml: {path} is not a key of a recipe; .*nown are'): recipe_from_dict(d, 'my.yaml')


@pytest.mark.parametrize('path, hint', [('training.save_every', 'it belongs to output.save_every'), ('training.num_epochs', 'in official recipes that is training.epochs'), ('training.warmup', "did you mean 'warmup_ratio'"), ('output.output_dir', 'that is output.folder'), ('Training', "did you mean 'training'"),
                                        ('training.gates.seed', 'it belongs to training.seed'), ('training.gates.temperature', "did you mean '(initial|final)_temperature'"), ('batch_size', 'training.batch_size or validation.batch_size')])
def test_hints(path, hint):
    with pytest.raises(ValueError, match=f'{path} is not a key of a recipe; .*{hint}'): recipe_from_dict(changed(ours(), path, 1))


@pytest.mark.parametrize('path, value, message', [
    ('training.seed', 'x', 'a whole number is expected'), ('training.seed', True, 'a whole number'), ('training.seed', 1.5, 'a whole number'), ('training.seed', None, 'a whole number is expected'), ('training.seed', math.inf, 'a whole number'), ('training.learning_rate', 'fast', 'a number is expected'),
    ('training.learning_rate', True, 'a number'), ('training.learning_rate', math.nan, 'a number'), ('training.learning_rate', 'nan', 'a number'), ('training.learning_rate', [1], 'a number'), ('training.betas', [.9], 'a list of 2, each of it a number'), ('training.betas', .9, 'a list of 2'),
    ('training.betas', [.9, 'x'], r"training.betas\[1\] is 'x'"), ('training.freeze', 'receiver', r'Write it as a list: \[receiver\]'), ('training.freeze', [1], r'training.freeze\[0\] is 1, but a text'), ('training.steps', 'none', 'For none, write null'), ('training.precision', 16, 'put it in quotes'),
    ('training.scheduler', False, 'put the word in quotes'), ('training.gates.noise', False, 'for none, write null'), ('training.gates', 3, 'a mapping is expected, with initial_temperature'), ('model', 'skill', 'model is .skill., but a mapping'), ('model.follow_response', 'no', 'true or false is expected. Write it without quotes'),
    ('model.follow_response', 0, 'true or false'), ('model.projector.args', [1], 'a mapping of names to values'), ('model.projector.args', {1: 2}, 'has the key 1, but names must be texts'), ('data.args', {'a': {'b': object()}}, 'data.args.a.b is .*object'), ('data.args', {'when': yaml.safe_load('2024-01-01')}, 'data.args.when .*put it in quotes'),
    ('data.type', None, 'data.type is None, but a text'), ('model.receiver_revision', 1234567, 'put it in quotes'), ('model.layer_map', 3, 'a text or a list is expected'), ('output.folder', None, 'output.folder is None'), ('training.gates.noise', 'None', 'For none, write null')])
def test_types(path, value, message):
    with pytest.raises(ValueError, match=message) as caught: recipe_from_dict(changed(ours(), path, value))
    assert path in str(caught.value)


@pytest.mark.parametrize('d, message', [(None, 'nothing was given'), ([], 'a recipe is a mapping'), ({}, 'data.type is missing'), (ours(data={}), 'data.type is missing'), (ours(output=None), 'output.folder is missing'), (ours(kind='evaluation'), 'no recipe for training'), (ours(validation=dict(data={})), 'validation.data.type is missing')])
def test_missing(d, message):
    with pytest.raises(ValueError, match=message): recipe_from_dict(d)


def test_what_is_converted():
    r = recipe_from_dict(ours(training=dict(learning_rate='1e-4', steps='1e3', seed='7', epochs=2, betas=['.9', 1/2], max_grad_norm=None), model=None, validation=None))
    t = r.training
    assert (t.learning_rate, t.steps, t.seed, t.epochs, t.betas, t.max_grad_norm, r.model, r.validation) == (1e-4, 1000, 7, 2., (.9, .5), None, None, ValidationRecipe())
    assert type(t.epochs) is float and type(t.steps) is int and recipe_from_dict(ours(training=dict(seed='123456789012345678901'))).training.seed == 123456789012345678901
    assert recipe_from_dict(ours(data=dict(type='Toy', args=dict(a=(1, (2,)), b=root)))).data.args == dict(a=[1, [2]], b=str(root))


def test_yaml_traps(tmp_path):
    text = 'model: {world: skill}\ndata: {type: Toy, args: {a: 1e-4, b: 1E5, c: -2.e-3, d: .5e+1, e: 1_0e2, f: "1e-4", g: 1e, h: off, i: 0x10, j: 500_000}}\noutput: {folder: x}\ntraining: {learning_rate: 1e-4, max_grad_norm: .inf}\n'
    r = read_recipe(write(tmp_path, text))
    assert r.data.args == dict(a=1e-4, b=1e5, c=-2e-3, d=5., e=1000., f='1e-4', g='1e', h=False, i=16, j=500000)
    assert (r.training.learning_rate, r.training.max_grad_norm) == (1e-4, math.inf)
    assert yaml.safe_load('1e-4') == '1e-4', 'PyYAML itself is as it was'
    for bad, message in [('a: 1\na: 2', "'a' is there twice"), ('training: {seed: 1, seed: 2}', "'seed' is there twice"), ('a: [', 'not valid YAML'), ('a: !!python/object:os.system x', 'not valid YAML'), ('- 1', 'a recipe is a mapping'), ('', 'nothing was given')]:
        with pytest.raises(ValueError, match=f'(?s)r.yaml.*{message}'): read_recipe(write(tmp_path, bad))
    for odd in '\x85', 'a\x85b', '1e-4', '-1E+5', '.5e1', 'off', '~', '', ' ', '1:30', '2024-01-01', '\u2028', 'a: b #c', 'é', '😀', '\n\n a', '${X}':
        r = recipe_from_dict(ours(data=dict(type='Toy', args={'value': odd, 'list': [odd], odd: 1})))
        assert read_recipe(write(tmp_path, r.to_yaml())) == r
    assert 'é' in set_values(r, ['name=é']).to_yaml()
    assert room._read_yaml('{a: &x {b: 1}, c: {<<: *x, b: 2}}') == {'a': {'b': 1}, 'c': {'b': 2}}


def test_files(tmp_path):
    text = json.dumps(ours())
    good = recipe_from_dict(ours())
    for name in 'r.json', 'r.yaml', 'r.yml', 'r.JSON', 'recipe.yaml': assert read_recipe(write(tmp_path, text, name)) == good
    assert read_recipe(tmp_path) == good == read_recipe(str(tmp_path))                          # the folder of a run
    (tmp_path/'bom.json').write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert read_recipe(tmp_path/'bom.json') == good
    (tmp_path/'latin.yaml').write_bytes('name: "é"'.encode('latin1'))
    with pytest.raises(ValueError, match='latin.yaml is not a text in UTF-8'): read_recipe(tmp_path/'latin.yaml')
    with pytest.raises(ValueError, match="r.json is not valid JSON: the key 'a' is there twice"): read_recipe(write(tmp_path, '{"a": 1, "a": 2}', 'r.json'))
    with pytest.raises(ValueError, match='r.json is not valid JSON'): read_recipe(write(tmp_path, '{', 'r.json'))
    with pytest.raises(FileNotFoundError, match='no file .*none.yaml; shipped recipes are mmlu'): read_recipe(tmp_path/'none.yaml')
    with pytest.raises(FileNotFoundError, match="did you mean 'mmlu'"): read_recipe('mmlu2')
    with pytest.raises(FileNotFoundError, match='recipe.txt'): read_recipe('recipe.txt')


# ---------------------------------------------------------------- properties

text = st.text(st.characters(exclude_categories=['Cs']), max_size=8)
floats = st.floats(allow_nan=False)
plain = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), floats, text, st.sampled_from(['1e-4', '1_0', 'no', '~', '2024-01-01', '0x1f', '.5E3', '=', '<<', '1:30', ' a', "it's: #1", '\x85', '\u2028'])), lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)


def values(kind):
    "Values that a field of this type takes."
    options = room.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    known = {str: text.filter(lambda s: types.NoneType not in options or s.lower() not in ('none', 'null')), bool: st.booleans(), int: st.integers(), float: floats, types.NoneType: st.none(), dict: st.dictionaries(text, plain, max_size=3), list: st.lists(plain, max_size=3),
             list[str]: st.lists(text, max_size=3), tuple[float, float]: st.tuples(floats, floats).map(list)}
    return st.one_of(*[known[k] for k in options])


@st.composite
def recipes(draw):
    "Any recipe that can be read, sensible or not."
    d = ours()
    for path, kind in recipe_keys().items():
        if path != 'kind' and draw(st.integers(0, 9)) < 3: d = changed(d, path, draw(values(kind)))
    for part in 'data', 'benchmark':
        if part in d.get('validation', {}): d['validation'][part].setdefault('type', draw(text))
    return recipe_from_dict(d)


@settings(quick, max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])                        # shrinking whole recipes takes minutes
@given(recipes())
def test_there_and_back(tmp_path, recipe):
    assert read_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert read_recipe(write(tmp_path, json.dumps(recipe.to_dict()), 'r.json')) == recipe
    back = recipe_from_dict(recipe.to_dict())
    assert back == recipe and back.to_dict() == recipe.to_dict() and differences(recipe, back) == []
    try: assert read_recipe(write(tmp_path, describe(recipe))) == recipe
    except (ValueError, ZeroDivisionError, OverflowError) as e: assert recipe.training.batch_size < 1 or recipe.training.global_batch is not None or recipe.training.accumulation < 1 or not math.isfinite(recipe.training.warmup_ratio), e


@settings(quick, max_examples=80)
@given(st.data())
def test_set_values_sets_this_and_nothing_else(data):
    before = recipe_from_dict(ours(validation=dict(data=dict(type='Toy'), benchmark=dict(type='toy'))))
    path = data.draw(st.sampled_from([k for k in recipe_keys() if k != 'kind' and not k.startswith('finetune')]))
    value = data.draw(values(recipe_keys()[path]))
    after = set_values(before, [f'{path}={yaml.dump(value, Dumper=room._Dumper)}'])
    assert at(after, path) == value
    for d in differences(before, after): assert d.startswith((f'{path}: ', f'{path}.')), d
    restored = set_values(after, [f'{path}={yaml.dump(at(before, path), Dumper=room._Dumper)}'])
    assert restored == before and differences(before, restored) == []


def test_set_values():
    r = recipe_from_dict(ours())
    new = set_values(r, ['training.learning_rate=3e-4', 'model.projector.args.hidden_dim=64', 'data.args.deep.er=[a, 1]', 'validation.data.type=Toy', 'validation.data.args={world: skill}', 'model.layer_map=[0, null]', 'name=a=b', 'training.seed = 3'])
    assert (new.training.learning_rate, new.model.projector.args, new.data.args, new.validation.data, new.model.layer_map, new.name, new.training.seed) == (3e-4, dict(hidden_dim=64), dict(deep=dict(er=['a', 1])), DataRecipe('Toy', dict(world='skill')), [0, None], 'a=b', 3)
    assert r == recipe_from_dict(ours()) and set_values(r, []) == r
    assert set_values(r, ['data.args.base_model=1']).data.args == dict(base_model=1)            # inside arguments anything goes
    o = recipe_from_dict(official)
    assert set_values(o, ['training.seed=1']).notes == o.notes != []
    for value, message in [('training.seed', 'write path=value'), ('=3', 'write path=value'), ('training.sed=1', "training.sed is not a key of a recipe; did you mean 'seed'"), ('trainig.seed=1', "trainig is not a key of a recipe; did you mean 'training'"), ('training.seed.x=1', 'training.seed is 42, which has nothing below it'),
                           ('model.sharers.0=x', r'set the whole list'), ('model.base_model=x', 'in official recipes that is model.receiver'), ('training.device=cpu', 'without effect'), ('training.seed=[', 'not valid YAML'), ('training.seed=', 'training.seed is None'), ('finetune.model=[1]', 'finetune.model'), ('notes=[x]', 'notes is not a key')]:
        with pytest.raises(ValueError, match=message): set_values(r, [value])


def test_differences():
    a = recipe_from_dict(ours())
    b = set_values(a, ['training.seed=43', 'data.args.limit=100', 'training.freeze=[sharer]', 'name=é', 'training.gates.noise='])
    assert differences(a, b) == ['name: "" -> "é"', 'training.freeze: ["receiver", "sharer"] -> ["sharer"]', 'training.seed: 42 -> 43', 'training.gates.noise: "projector" -> null', 'data.args.limit: not given -> 100']
    f = recipe_from_dict(dict(finetune=dict(model='x'), data=dict(type='Toy'), output=dict(folder='runs/x')))
    assert 'model.world: "skill" -> not given' in differences(a, f) and 'finetune.model: not given -> "x"' in differences(a, f)
    assert differences(set_values(a, ['data.args.x=1']), set_values(a, ['data.args.x=true'])) == ['data.args.x: 1 -> true']


# ---------------------------------------------------------------- checking

@pytest.fixture
def sealed(monkeypatch):
    "No network, and no model is loaded."
    def no(what):
        def refuse(*args, **kwargs): raise AssertionError(f'{what} was used')
        return refuse
    monkeypatch.setattr(socket.socket, 'connect', no('the network'))
    monkeypatch.setattr(socket, 'getaddrinfo', no('the network'))
    monkeypatch.setattr(transformers.PreTrainedModel, 'from_pretrained', no('a model'))
    monkeypatch.setattr(transformers.PreTrainedModel, '__init__', no('a model'))


@pytest.fixture
def toy(tmp_path): return set_values(read_recipe('toy'), [f'output.folder={tmp_path}/run'])


@pytest.fixture
def big(tmp_path): return set_values(read_recipe('openhermes_300'), [f'output.folder={tmp_path}/run'])


@pytest.mark.parametrize('values, message', [
    ('model.world=skil', "no world called 'skil'"), ('model.world_args.sed=1', 'model.world_args=.*does not fit the world'), ('model.receiver=gpt2', 'cannot be given as well'), ('model.world=', 'model.receiver is missing.*model.sharers is empty'),
    ('model.projector.type=C3CProjector', 'no projector called .C3CProjector.; registered are'), ('model.projector.args.hidden=3', "hidden is not an argument of C2CProjector; did you mean 'hidden_dim'"), ('model.projector.args.anneal_steps=3', 'it belongs to training.gates.steps'),
    ('model.projector.args.final_temperature=3', 'it belongs to training.gates.final_temperature'), ('model.projector.args.num_layers=1', 'num_layers=1 was given'), ('model.projector.args.gate_noise=gumble', "gate_noise='gumble'"), ('model.projector.args.hidden_dim=wide', 'model.projector.args does not fit'),
    ('model.projector.args.sharer_dim=8', 'sharer_dim is not an argument'), ('model.layer_map=last_algned', "did you mean 'last_aligned'"), ('model.layer_map=[0, -1]', 'layer_map has -1'), ('model.layer_map=[a]', "layer_map has 'a'"), ('model.key_space=cach', "did you mean 'cache'"), ('model.alignment=frist', "did you mean 'first'"),
    ('model.alignment=[shared, first]', 'has 2 entries, but there is 1 sharer'), ('model.alignment=[share]', "did you mean 'shared'"), ('model.fusion=serial', "did you mean 'sequential'"), ('model.dtype=float23', "did you mean 'float32'"), ('model.fusers=[/nowhere/f]', r'model.fusers\[0\] is ./nowhere/f.; there is no such folder'),
    ('model.fusers=[1]', r'model.fusers\[0\] is 1'), ('training.scheduler=cosin', "did you mean 'cosine'"), ('training.scheduler_args={a: 1}', 'does not fit'), ('training.scheduler=reduce_lr_on_plateau,training.scheduler_args={},validation.every=', 'give validation.every'), ('training.learning_rate=0', 'training.learning_rate is 0.0, but it must be more than 0'),
    ('training.learning_rate=.inf', 'training.learning_rate is inf'), ('training.weight_decay=-1', '0 or more'), ('training.betas=[.9, 1]', 'training.betas'), ('training.warmup_ratio=1.1', 'from 0 to 1'), ('training.epochs=0', 'training.epochs'), ('training.steps=0', 'training.steps is 0, but it must be 1 or more'), ('training.batch_size=0', 'training.batch_size'),
    ('training.accumulation=0', 'training.accumulation'), ('training.max_length=1', '2 or more'), ('training.seed=-1', 'training.seed'), ('training.seed=4294967296', 'less than 2'), ('training.precision=fp16', "did you mean 'bf16'"), ('training.gates.schedule=lnear', "did you mean 'linear'"), ('training.gates.noise=gumbell', "did you mean 'gumbel'"),
    ('training.gates.final_temperature=0', 'final_temperature is 0.0'), ('training.gates.steps=0', 'gates.steps'), ('training.global_batch=100', 'not a multiple of training.batch_size=128'), ('training.global_batch=256,training.accumulation=2', 'are both given'), ('training.freeze=[receiver]', 'sharers are never trained'),
    ('training.freeze=[receiver, sharer, fuser]', 'nothing to train'), ('training.freeze=[base, sharer]', "'base' in it"), ('training.sharer_dropout=.5', 'only one sharer'), ('training.sharer_dropout=1', 'less than 1'), ('training.bucket=-1', 'training.bucket'), ('training.store_gb=0', 'training.store_gb'), ('training.workers=-1', 'training.workers'),
    ('validation.share=1', 'validation.share is 1.0'), ('validation.every=0', 'validation.every'), ('validation.method=chose', "did you mean 'choices'"), ('validation.metric=acuracy', "did you mean 'accuracy'"), ('validation.metric=loss', 'nothing is held out'), ('validation.metric=accuracy,validation.data=', 'there are no questions'),
    ('validation.patience=0', 'validation.patience'), ('validation.patience=2,validation.every=', 'nothing to be patient about'), ('validation.patience=2,validation.data=', 'nothing can be measured'), ('output.keep_last=0', 'output.keep_last'), ('output.trackers=[wandbee]', "did you mean 'wandb'"), ('output.trackers=[swanlab]', 'pip install swanlab'),
    ('output.tracker_args={wandb: 3}', 'output.tracker_args.wandb is 3'), ('output.folder=', 'output.folder is None'), ('output.folder=""', 'output.folder is empty'), ('imports=[no_such_module_here]', 'imports: no_such_module_here cannot be imported .ModuleNotFoundError'), ('finetune.model=gpt2', 'exactly one of model'),
    ('validation.benchmark.type=openbookqa', 'are both given'), ('validation.data=,validation.benchmark.type=openbokqa', "validation.benchmark: .*did you mean 'openbookqa'"), ('validation.data=,validation.benchmark={type: gsm8k}', 'no options to choose from: set validation.method=answers'),
    ('validation.data=,validation.benchmark={type: mmlu, args: {limt: 3}}', "did you mean 'limit'"), ('output.folder=/dev/null/x', '/dev/null is a file'), ('training.store=${NO_SUCH_VARIABLE}/x', 'training.store is .*NO_SUCH_VARIABLE is not set')])
def test_check(toy, sealed, values, message):
    import re
    values = [v for v in re.split(r',(?=[a-z_]+\.[a-z_.]+=)', values)]
    with pytest.raises(ValueError, match='(?s)' + message): set_values(toy, values).check()


def test_benchmark_as_validation(toy, sealed):
    "Accuracy, patience and schedulers may follow a benchmark as they may follow questions of a data set."
    for values in ['validation.benchmark={type: mmlu-redux}'], ['validation.benchmark={type: gsm8k}', 'validation.method=answers']:
        r = set_values(toy, ['validation.data=', *values, 'validation.metric=accuracy', 'validation.patience=2'])
        assert r.check() is r and recipe_from_dict(r.to_dict()) == r


@pytest.mark.parametrize('name', ['mmlu', 'openhermes_300', 'openhermes_500k', 'tiny', 'toy'])
def test_shipped_recipes_pass(name, sealed, tmp_path, monkeypatch):
    assert name in shipped_recipes()
    for m in 'stories260K', 'aidreams260K': write((tmp_path/'assets/models'/m), '{}', 'config.json') if (tmp_path/'assets/models'/m).mkdir(parents=True) is None else None
    monkeypatch.setenv('C2C_SHARED', str(tmp_path)); monkeypatch.chdir(tmp_path)
    write(tmp_path, '{"text": "a dream of four words"}\n', 'dreams.jsonl')
    r = read_recipe(name)
    assert r.name == name and r.check() is r and not r.notes
    assert r.output.save_every % r.validation.every == 0
    assert set(yaml.safe_load((root/'c2c_nb/recipes'/f'{name}.yaml').read_text())) == {'name', 'model', 'data', 'training', 'validation', 'output'}


def test_shipped_recipes_are_the_papers():
    main, short, mmlu, toy, tiny = map(read_recipe, ('openhermes_500k', 'openhermes_300', 'mmlu', 'toy', 'tiny'))
    for r in main, short, mmlu:
        t, g = r.training, r.training.gates
        assert (r.model.receiver, r.model.sharers, r.model.layer_map, r.model.fusion) == ('Qwen/Qwen3-0.6B', ['Qwen/Qwen2.5-0.5B-Instruct'], 'last_aligned', 'parallel')
        assert (t.learning_rate, t.scheduler, t.warmup_ratio, t.weight_decay, t.max_grad_norm, t.seed, r.validation.share) == (1e-4, 'linear', .1, .01, 1., 42, .01)
        assert (g.initial_temperature, g.final_temperature, g.schedule, g.steps) == (1., .001, 'exponential', None)
    assert (main.training.global_batch, main.training.max_length, main.data.args, main.training.epochs, main.training.steps) == (256, 2048, dict(limit=500_000, max_tokens=2048), 1., None)
    assert accumulation(main, 8) == 8 and main.training.batch_size == 4
    assert (short.training.steps, short.training.global_batch, differences(main, short)[0]) == (300, 256, 'name: "openhermes_500k" -> "openhermes_300"')
    assert short.data.args['limit']*.99 > 300*256
    assert (mmlu.training.steps, mmlu.training.global_batch, mmlu.training.max_length, mmlu.data.args['limit']) == (116, 128, 1024, 15_000)
    from c2c_nb.toy import SkillWorld
    assert toy.model.projector.args == SkillWorld.fuser_args and (toy.training.steps, toy.model.layer_map) == (SkillWorld.fuser_steps, SkillWorld.layer_map)
    assert learning_rates(toy.training, 140) == pytest.approx([2e-3*(.05 + .95*min(1., 2 - 2*i/140)) for i in range(140)])
    assert toy.training.precision == tiny.training.precision == 'fp32'


def test_all_problems_at_once(big):
    with pytest.raises(ValueError) as caught: set_values(big, ['training.learning_rate=-1', 'model.layer_map=x', 'output.trackers=[x]']).check()
    lines = str(caught.value).splitlines()
    assert lines[0] == '3 problems in the recipe:' and len(lines) == 4


def test_check_of_folders(big, tmp_path, sealed):
    (tmp_path/'empty').mkdir(); write(tmp_path, '', 'file')
    for name, message in [(tmp_path/'empty', 'without config.json'), (tmp_path/'file', 'which is a file'), (tmp_path/'none', 'no such folder'), ('./none', 'no such folder'), ('a/b/c', 'no such folder')]:
        with pytest.raises(ValueError, match=f'model.receiver is .*{message}'): set_values(big, [f'model.receiver={name}']).check()
        with pytest.raises(ValueError, match=rf'model.sharers\[1\] is .*{message}'): set_values(big, [f'model.sharers=[gpt2, "{name}"]']).check()
        with pytest.raises(ValueError, match=f'finetune.model is .*{message}'): replace(big, model=None, finetune=FinetuneRecipe(str(name))).check()
    two = set_values(big, ['model.sharers=[gpt2, a/b]', 'training.sharer_dropout=.5', 'model.alignment=[first, null]'])
    assert two.check() is two
    with pytest.raises(ValueError, match='are 2 sharers'): set_values(two, ['model.fusers=[gpt2]']).check()


def test_check_of_baselines(big, tmp_path, sealed, monkeypatch):
    b = replace(big, model=None, finetune=FinetuneRecipe('gpt2'))
    for method in 'full', 'layers', 'parameters': assert set_values(b, [f'finetune.method={method}']).check()
    assert set_values(b, ['finetune.model=', 'finetune.world=skill']).check() and recipe_from_dict(changed(baseline, 'output.output_dir', f'{tmp_path}/y')).check()
    for values, message in [(['finetune.method=ful'], "did you mean 'full'"), (['finetune.share=0'], 'finetune.share'), (['finetune.lora={r: 1}'], "finetune.method is 'full'"), (['training.freeze=[model]'], 'nothing to train'), (['training.freeze=[modell]'], "did you mean 'model'"),
                            (['finetune.model='], 'one of finetune.model and finetune.world'), (['finetune.world=skill'], 'one of finetune.model'), (['finetune.dtype=int8'], 'finetune.dtype'), (['finetune.model=', 'finetune.world=skil'], 'no world called')]:
        with pytest.raises(ValueError, match=message): set_values(b, values).check()
    with pytest.raises(ValueError, match='exactly one of'): replace(big, model=None).check()
    lora = recipe_from_dict(changed(changed(baseline, 'training.lora', {}), 'output.output_dir', f'{tmp_path}/y'))
    find, here = room.importlib.util.find_spec, 'peft' in sys.modules
    monkeypatch.setattr(room.importlib.util, 'find_spec', lambda name: None if name == 'peft' else find(name))
    with pytest.raises(ValueError, match='pip install peft'): lora.check()
    peft = types.ModuleType('peft')
    exec('def LoraConfig(r=8, lora_alpha=8, target_modules=None, lora_dropout=0., bias="none", task_type=None): pass', peft.__dict__)
    monkeypatch.setitem(sys.modules, 'peft', peft)
    monkeypatch.setattr(room.importlib.util, 'find_spec', lambda name: peft if name == 'peft' else find(name))
    assert lora.check()
    with pytest.raises(ValueError, match='finetune.lora does not fit.*rank'): set_values(lora, ['finetune.lora.rank=3']).check()


def test_check_of_data(toy, monkeypatch, sealed):
    "Through the room of data sets, which is asked by `make_data` and `check`."
    asked = []
    class Data:
        def __init__(self, args): self.args = args
        def check(self):
            if 'data_files' in self.args: raise FileNotFoundError(f"there is no file {self.args['data_files']!r}")
    def make_data(type, args):
        asked.append((type, args))
        if type != 'Toy': raise KeyError(f'there is no data set called {type!r}')
        if 'wrld' in args: raise ValueError("there is no argument 'wrld'")
        return Data(args)
    module = types.ModuleType('c2c_nb.data')
    module.make_data, module.__spec__ = make_data, importlib.machinery.ModuleSpec('c2c_nb.data', None)
    monkeypatch.setitem(sys.modules, 'c2c_nb.data', module)
    monkeypatch.setattr(sys.modules['c2c_nb'], 'data', module, raising=False)
    monkeypatch.setenv('DREAMS', 'night')
    toy.check()
    assert asked == [('Toy', dict(world='skill', split='train')), ('Toy', dict(world='skill', split='valid'))]
    for values, message in [(['data.type=Toys'], "^data: there is no data set called 'Toys'$"), (['data.args.wrld=x'], "^data: there is no argument 'wrld'"), (['data.args.data_files=${DREAMS}.txt'], "^data: there is no file 'night.txt'"), (['validation.data.type=X'], "^validation.data: there is no data set called 'X'")]:
        with pytest.raises(ValueError, match=message): set_values(toy, values).check()


def test_check_with_the_real_data_sets(toy, sealed, tmp_path):
    pytest.importorskip('c2c_nb.data')
    for values, message in [(['data.type=OpenHermess'], "did you mean 'OpenHermes'"), (['data.args.wrld=x'], "did you mean 'world'"), (['data.type=Chats', f'data.args={{data_files: {tmp_path}/none.jsonl}}'], 'no file'), (['data.args.limit=-1'], 'limit')]:
        with pytest.raises(ValueError, match=message): set_values(toy, values).check()
    assert replace(toy, data=DataRecipe('OpenHermesChatDataset', dict(split='train', max_word_count=2048, num_samples=500000))).check()


def test_check_sees_recipes_made_in_python(toy):
    with pytest.raises(ValueError, match='training.seed is .x., but a whole number'): replace(toy, training=replace(toy.training, seed='x')).check()
    with pytest.raises(ValueError, match='data.args.a is'): replace(toy, data=DataRecipe('Toy', dict(a=torch.zeros(1)))).check()
    with pytest.raises(ValueError, match='kind is .x.'): replace(toy, kind='x').check()


def test_output_folder(toy, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    toy.check()
    write(run, 'x', 'notes.txt')
    with pytest.raises(ValueError, match=r'holds something else than a run \(notes.txt\)'): toy.check()
    write(run, toy.to_yaml(), 'recipe.yaml')
    toy.check()
    with pytest.raises(ValueError, match='holds a different run.*resume(?s:.*)training.seed: 0 -> 1'): set_values(toy, ['training.seed=1']).check()
    set_values(toy, ['training.seed=1']).check(resume=True)
    write(run, 'x: 1', 'recipe.yaml')
    with pytest.raises(ValueError, match='whose recipe cannot be read'): toy.check()
    run2 = write(tmp_path, '', 'file')
    with pytest.raises(ValueError, match='is a file'): set_values(toy, [f'output.folder={run2}']).check()


def test_environment(toy, tmp_path, monkeypatch):
    monkeypatch.setenv('PLACE', str(tmp_path)); monkeypatch.setenv('NAME', 'run'); monkeypatch.setenv('HOME', str(tmp_path))
    r = set_values(toy, ['output.folder=${PLACE}/${NAME}', 'training.store=~/store', 'name=${NAME}'])
    e = set_values(r, ['data.args.deep=[{a: "${NAME}", b: "$NAME"}]']).expanded()
    assert (e.output.folder, e.training.store, e.data.args['deep'], e.name) == (f'{tmp_path}/run', f'{tmp_path}/store', [dict(a='run', b='$NAME')], '${NAME}')
    assert r.output.folder == '${PLACE}/${NAME}' and 'PLACE' in r.to_yaml()
    (tmp_path/'run').mkdir(); write(tmp_path/'run', r.to_yaml(), 'recipe.yaml')
    r.check()                                                                                   # compared as it was written, not as it is here
    monkeypatch.delenv('PLACE')
    with pytest.raises(ValueError, match=r'output.folder is .*the environment variable PLACE is not set: run `export PLACE='): r.check()
    assert recipe_from_dict(official).expanded().notes


def test_imports(toy, tmp_path, monkeypatch):
    "A projector of one's own is known by its name, in a module and in a file."
    monkeypatch.chdir(tmp_path)
    code = 'from c2c_nb.projector import C2CProjector, register_projector\n@register_projector\nclass {0}(C2CProjector):\n    def __init__(self, *args, width=3, **kwargs): super().__init__(*args, **kwargs)\n'
    write(tmp_path, code.format('MineInModule'), 'my_recipe_module.py'); write(tmp_path, code.format('MineInFile'), 'my_recipe_file.py'); write(tmp_path, '1/0', 'my_broken_file.py'); write(tmp_path, '', 'json.py')
    path = list(sys.path)
    try:
        for name, kind in ('my_recipe_module', 'MineInModule'), ('my_recipe_file.py', 'MineInFile'):
            r = set_values(toy, [f'model.projector.type={kind}', 'model.projector.args={width: 5, hidden_dim: 8}'])
            with pytest.raises(ValueError, match='no projector called'): r.check()
            assert set_values(r, [f'imports=[{name}]']).check().check()
            with pytest.raises(ValueError, match="did you mean 'width'"): set_values(r, [f'imports=[{name}]', 'model.projector.args.widht=3']).check()
        for name, message in ('my_broken_file.py', 'ZeroDivisionError'), ('none.py', 'FileNotFoundError'), ('json.py', 'a module called json already'):
            with pytest.raises(ValueError, match=f'imports: {name} cannot be imported .*{message}'): set_values(toy, [f'imports=[{name}]']).check()
        assert 'my_broken_file' not in sys.modules and json.dumps
    finally:
        sys.path[:] = path
        for m in 'my_recipe_module', 'my_recipe_file': sys.modules.pop(m, None)


# ---------------------------------------------------------------- steps and schedules

@settings(quick, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_steps_are_those_of_a_loop(rows, batch, processes, accumulated, epochs):
    r = recipe_from_dict(ours(training=dict(batch_size=batch, accumulation=accumulated, epochs=epochs)))
    counted = 0
    for _ in range(epochs):
        share = math.ceil(rows/processes)                                                       # of each process; the last ones are filled up
        batches = math.ceil(share/batch)
        for i in range(batches): counted += (i + 1) % accumulated == 0 or i + 1 == batches
    assert steps(r, rows, processes) == counted
    whole = recipe_from_dict(ours(training=dict(batch_size=batch, global_batch=batch*processes*accumulated, epochs=epochs)))
    assert accumulation(whole, processes) == accumulated and steps(whole, rows, processes) == counted


def test_steps():
    r = recipe_from_dict(ours(training=dict(batch_size=4, global_batch=32, epochs=.5)))
    assert steps(r, 320) == 5 and steps(set_values(r, ['training.steps=7'])) == 7 and steps(r, 3) == 1
    with pytest.raises(ValueError, match='give training.steps'): steps(r)
    with pytest.raises(ValueError, match='training.global_batch=32 is not a multiple of training.batch_size=4 times 3 processes'): accumulation(r, 3)
    text = describe(r, rows=320, processes=2)
    assert text.startswith('# 32 rows to a step: 4 at once, 2 processes, 4 batches each\n# 5 steps, the first 0 to warm up; 320 rows\n') and recipe_from_dict(yaml.safe_load(text)) == r
    assert "# training.device='cuda' has no effect: accelerate decides where it runs\n" in describe(recipe_from_dict(official))


@pytest.mark.parametrize('name', [s.value for s in transformers.SchedulerType])
def test_every_scheduler(name, toy):
    needed = dict(warmup_stable_decay=dict(num_decay_steps=4), cosine_with_min_lr=dict(min_lr=1e-5), cosine_warmup_with_min_lr=dict(min_lr=1e-5)).get(name, {})
    t = TrainingRecipe(scheduler=name, scheduler_args=needed)
    assert set_values(toy, [f'training.scheduler={name}', f'training.scheduler_args={json.dumps(needed)}']).check()
    rates = learning_rates(t, 20)
    assert len(rates) == 20 and max(rates) <= 1 and learning_rates(t, 20, first=3) == rates[:3]
    if name in ('linear', 'cosine', 'polynomial'): assert rates[0] == 0 and max(rates) == rates[2] == 1e-4                  # 2 of 20 steps to warm up
    if needed:
        with pytest.raises(ValueError, match='training.scheduler_args'): learning_rates(TrainingRecipe(scheduler=name), 20)
    if name not in ('constant', 'constant_with_warmup'):                                        # which take none at all
        with pytest.raises(ValueError, match='training.scheduler_args'): make_scheduler(TrainingRecipe(scheduler=name, scheduler_args=needed | dict(no_such=1)), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.1), 20)


def test_the_room_is_light():
    "Recipes are read without torch, so that a command line can refuse a bad one at once."
    done = run_python('import sys, c2c_nb.recipe as r; r.read_recipe("toy"); print(sorted({"torch", "transformers", "datasets", "accelerate"} & set(sys.modules)))', cwd=root)
    assert done.stdout == '[]\n', done.stdout + done.stderr
