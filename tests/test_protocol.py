"Evaluation recipes: read strictly, official files as they stand; what they say is what is run; and benchmarks as validation in training."
import copy, json, os, shutil, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import pytest, torch, yaml
from transformers import AutoModelForCausalLM

import tiny_train
from conftest import changed, root, run_python
from c2c_nb import evaluate as rooms, recipe as room
from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.baseline import Alone, System, WorldPrompts, make_systems, register_system
from c2c_nb.bench import default_template, make_benchmark
from c2c_nb.cli import c2c_evaluate
from c2c_nb.evaluate import PartC2C, evaluate, load_models, part_of, prepare, prompt_key, read_records, run_recipe
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.protocol import EvalRecipe, official_eval_keys
from c2c_nb.recipe import TrainRecipe, differences, read_recipe, recipe_from_dict, recipe_keys, set_values, shipped_recipes
from c2c_nb.toy import build_models, connect, get_world
from c2c_nb.train import ask, load_questions_of


def made(d, where=''): return recipe_from_dict(d, where, EvalRecipe)
def ours(**changes): return dict(model=dict(fusers=['a/fuser']), benchmarks='openbookqa', output=dict(folder='results/x')) | changes


def at(recipe, path):
    d = recipe.to_dict()
    for part in path.split('/'): d = d[part]
    return d


# ---------------------------------------------------------------- ours

def test_the_tree():
    assert {f.name for f in fields(EvalRecipe)} == {'kind', 'name', 'imports', 'model', 'systems', 'benchmarks', 'template', 'variant', 'method', 'chat', 'cue', 'max_new_tokens', 'max_length', 'batch_size', 'max_errors', 'seed', 'output', 'notes'}
    keys = recipe_keys(EvalRecipe)
    assert keys['model.fusers'] == list[str] and keys['output.folder'] is str and 'notes' not in keys and not set(keys) & {'validation.every', 'training.seed'}
    assert at(made(ours()), 'systems') == {'receiver': {}, 'sharer': {}, 'T2T': {}, 'C2C': {}}


@pytest.mark.parametrize('path, hint', [('sytems', "did you mean 'systems'"), ('benchmark', "did you mean 'benchmarks'"), ('model.fuser', "did you mean 'fusers'"), ('output.output_dir', 'in official recipes that is output.folder'), ('model.max_new_tokens', 'it belongs to max_new_tokens'),
                                        ('model.sample_interval', 'in official recipes that is benchmarks.NAME.interval'), ('training', 'nown are'), ('model.layer_map', 'nown are')])
def test_unknown_keys(path, hint):
    with pytest.raises(ValueError, match=f'my.yaml: {path} is not a key of a recipe; .*{hint}'): made(changed(ours(), path, 1), 'my.yaml')


@pytest.mark.parametrize('d, message', [(None, 'nothing was given'), ({}, 'benchmarks is missing'), (ours(output=None), 'output.folder is missing'), (ours(kind='training'), 'no recipe for evaluation'), (ours(systems=3), 'systems is 3'), (ours(systems=['C2C', 'C2C']), "'C2C' twice"),
    (ours(benchmarks=[['gsm8k']]), "has .'gsm8k'. in it"), (ours(benchmarks=dict(gsm8k=[1])), 'benchmarks.gsm8k is .1., but a mapping'), (ours(batch_size='many'), 'a whole number is expected'), (ours(max_errors=None), 'max_errors'), (ours(model=dict(fusers='x')), r'Write it as a list: \[x\]'), (ours(cue='none'), 'write null')])
def test_refused(d, message):
    with pytest.raises(ValueError, match=message): made(d)


whole = ours(kind='evaluation', name='ü', imports=['x.py'], model=dict(receiver='a', sharers=['b', 'c'], sharer_revisions=['v1', None], fusers=['d', 'e'], alignment=['shared', None], generation=dict(repetition_penalty=1.1), world_args=dict(seed=1)),
    systems={'C2C': None, 'short T2T': dict(kind='T2T', message_tokens=8, prompts=dict(ask='{question}?'))}, benchmarks={'a': dict(type='mmlu', limit=[1, 5]), 'gsm8k': {}}, template='t.yaml', variant='cot', method='options', cue='So: ', max_new_tokens=8, batch_size=2, max_errors=1, seed=3)


@pytest.mark.parametrize('d', [ours(), whole], ids=['short', 'whole'])
def test_there_and_back(tmp_path, d):
    r = made(d)
    for name, text in (('r.yaml', r.to_yaml()), ('r.json', json.dumps(r.to_dict())), ('recipe.yaml', yaml.safe_dump(d))):
        (tmp_path/name).write_text(text); assert read_recipe(tmp_path/name, EvalRecipe) == r
    assert read_recipe(tmp_path, EvalRecipe) == r == made(r.to_dict()) and differences(r, r) == [] and set_values(r, []) == r
    assert type(r.max_errors) is float and r.output.folder == 'results/x'


def test_set_values():
    r = made(ours())
    s = set_values(r, ['benchmarks.openbookqa.limit=100', 'systems.T2T.message_tokens=8', 'model.device=cpu', 'seed=7'])
    assert s.benchmarks == dict(openbookqa=dict(limit=100)) and s.systems['T2T'] == dict(message_tokens=8) and r == made(ours())
    assert sorted(differences(r, s)) == ['benchmarks.openbookqa.limit: not given -> 100', 'model.device: null -> "cpu"', 'seed: 0 -> 7', 'systems.T2T.message_tokens: not given -> 8']
    assert list(set_values(r, ['systems=[C2C]']).systems) == ['C2C']
    for value, message in [('eval.limit=3', r'in official recipes that is benchmarks.NAME.limit'), ('eval.gpu_ids=3', 'without effect'), ('systems.T2T.x.y', 'write path=value'), ('systems.T2T=3', 'a mapping of its settings')]:
        with pytest.raises(ValueError, match=message): set_values(r, [value])


def test_kinds_are_told_apart(tmp_path):
    assert shipped_recipes('evaluation') == ['embedded_pair', 'paper'] and not {'embedded_pair', 'paper'} & set(shipped_recipes())
    for name, cls in (('paper', TrainRecipe), ('toy', EvalRecipe)):
        with pytest.raises(FileNotFoundError, match=f"no recipe '{name}'"): read_recipe(name, cls)
    (tmp_path/'r.yaml').write_text(made(ours()).to_yaml())
    with pytest.raises(ValueError, match="kind is 'evaluation'; this is no recipe for training"): read_recipe(tmp_path/'r.yaml')


def test_shipped(tmp_path, monkeypatch):
    "The paper's setting; and all names in them are known, without a model."
    monkeypatch.chdir(tmp_path)
    r = read_recipe('paper', EvalRecipe).check()
    assert list(r.benchmarks) == ['mmlu-redux', 'openbookqa', 'arc-challenge', 'c-eval'] and r.max_new_tokens == 64 and r.systems['T2T'] == dict(message_tokens=256) and list(r.systems) == ['receiver', 'sharer', 'T2T', 'C2C']
    assert not list(rooms._check_systems(r.systems)) and all(make_benchmark(n, a) for n, a in r.benchmarks.items())
    toy = read_recipe('embedded_pair', EvalRecipe)
    with pytest.raises(ValueError, match='runs/toy/fuser'): toy.check()
    (tmp_path/'runs/toy/fuser').mkdir(parents=True); (tmp_path/'runs/toy/fuser/config.json').write_text('{}')
    assert len(prepare(toy).questions['toy'][0]) > 400
    assert read_recipe('toy').output.folder == 'runs/toy'


def test_light():
    "A recipe is read and checked without torch."
    done = run_python('import sys, c2c_nb.recipe as r, c2c_nb.protocol as p; r.read_recipe("paper", p.EvalRecipe).check(); print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))', root)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


@pytest.mark.parametrize('values, message', [
    (['method=logits'], "method is 'logits'; known are generate, options"), (['batch_size=0', 'max_errors=2'], r'(?s)2 problems.*batch_size is 0.*max_errors is 2.0, but it must be from 0 to 1'), (['model.fusion=paralel'], "did you mean 'parallel'"),
    (['model.fusers=[]'], 'model is empty'), (['model.fusers=[]', 'model.receiver=gpt2', 'systems=[receiver, C2C]'], "'C2C', which needs a fuser"), (['model.fusers=[]', 'model.receiver=gpt2', 'systems=[T2T]'], "'T2T', which needs a sharer"),
    (['model.fusers=[]', 'model.receiver=gpt2', 'systems={half: {kind: C2C in part}}'], "'half', which needs a fuser"), (['model.world=skill', 'model.receiver=gpt2'], 'cannot be given as well'), (['model.fusers=[/nowhere]'], 'no such folder'), (['model.fusers=[./a/b/c]'], 'no such folder'),
    (['model.receiver=/nowhere'], 'no such folder'), (['model.sharers=[a, b]'], 'fusers has 1 entries, but there are 2 sharers'), (['benchmarks={}'], 'benchmarks is empty'), (['systems=[]'], 'systems is empty'), (['cue=So'], "it is for 'options'"), (['output.folder='], 'output.folder'),
    (['benchmarks={a/b: {type: toy}, toy: {}}'], 'cannot be the name of a folder'), (['model.sharer_revisions=[x]'], 'sharer_revisions has 1 entries'), (['template=${NOWHERE}/t.yaml'], 'NOWHERE is not set'), (['model.dtype=float23'], "did you mean 'float32'")])
def test_check(values, message):
    with pytest.raises(ValueError, match=message): set_values(made(ours(output=dict(folder='runs/not/there'))), values).check()


def test_check_of_folders(tmp_path):
    r = made(ours(output=dict(folder=str(tmp_path/'f'/'x'))))
    assert r.check() is r
    (tmp_path/'f').write_text('')
    with pytest.raises(ValueError, match='is a file'): r.check()
    assert set_values(r, ['model.fusers=["owner/repository:pair/final"]', f'output.folder={tmp_path}/y']).check()


# ---------------------------------------------------------------- official files

def evaluation(**more): return dict(dataset='openbookqa', gpu_ids=[0], answer_method='generate', use_cot=False, use_template=True) | more
def rosetta(**more): return dict(base_model='a/receiver', teacher_model='a/sharer', checkpoints_dir='runs/x/final') | more
c2c = dict(model=dict(model_name='Rosetta', rosetta_config=rosetta(), generation_config=dict(do_sample=False, max_new_tokens=64)), output=dict(output_dir='results/x'), eval=evaluation())
several = changed(c2c, 'model.rosetta_config', rosetta(teacher_model=dict(one='a/one', two='a/two'), checkpoints_dir=['runs/one/final', 'runs/two/final']))
aligned = changed(changed(c2c, 'model.rosetta_config.is_do_alignment', True), 'model.rosetta_config.alignment_strategy', 'longest')
logits = changed(c2c, 'eval.answer_method', 'logits')
alone = dict(model=dict(model_name='Qwen/Qwen3-0.6B', generation_config=dict(max_new_tokens=64)), output=c2c['output'], eval=evaluation())
t2t = dict(model=dict(model_name='two_stage', context_model_path='a/sharer', answer_model_path='a/receiver', background_prompt='Tell me of {question}'), output=c2c['output'], eval=evaluation())
both = dict(model=dict(model_name='two_stage_rosetta', context_model_path='a/sharer', rosetta_checkpoint_dir='runs/x'), output=c2c['output'], eval=evaluation())
longbench = changed(c2c, 'eval.dataset', 'longbench')

# their path, a value, in which file, what of ours becomes what
cases = [
    ('model.model_name', 'my_rosetta_model', c2c, {'systems': {'C2C': {}}}), ('model.model_name', 'b/other', alone, {'model/receiver': 'b/other', 'systems': {'receiver': {}}}), ('model.model_name', 'two_stage', t2t, {'systems': {'T2T': dict(message_tokens=1024, prompts=dict(ask='Tell me of {question}'))}}), ('model.model_name', 'two_stage_rosetta', both, {'systems': {'T2T+C2C': dict(message_tokens=1024)}}),
    ('model.rosetta_config.base_model', 'b/other', c2c, {'model/receiver': 'b/other'}),
    ('model.rosetta_config.teacher_model', 'b/other', c2c, {'model/sharers': ['b/other']}), ('model.rosetta_config.teacher_model', dict(b='b/other'), c2c, {'model/sharers': ['b/other']}), ('model.rosetta_config.teacher_model', dict(two='a/two', one='a/one'), several, {'model/sharers': ['a/two', 'a/one'], 'model/fusers': ['runs/one/final', 'runs/two/final']}),
    ('model.rosetta_config.checkpoints_dir', 'runs/y/final', c2c, {'model/fusers': ['runs/y/final']}), ('model.rosetta_config.checkpoints_dir', ['runs/y/final'], c2c, {'model/fusers': ['runs/y/final']}),
    ('eval.checkpoints_dir', 'runs/z/final', changed(c2c, 'model.rosetta_config.checkpoints_dir', None), {'model/fusers': ['runs/z/final']}), ('eval.checkpoints_dir', 'runs/z/final', c2c, {}),
    ('model.rosetta_config.is_do_alignment', False, c2c, {'model/alignment': 'shared'}), ('model.rosetta_config.alignment_strategy', 'first', aligned, {'model/alignment': 'first'}), ('model.is_do_alignment', True, changed(c2c, 'model.rosetta_config.alignment_strategy', 'first'), {'model/alignment': 'first'}),
    ('model.alignment_strategy', 'longest', changed(c2c, 'model.is_do_alignment', True), {'model/alignment': 'longest'}),
    ('model.rosetta_config.multi_source_fusion_mode', 'parallel', several, {'model/fusion': 'parallel'}), ('model.rosetta_config.multi_source_fusion_mode', 'sequential', c2c, {'model/fusion': 'sequential'}), ('model.rosetta_config.include_response', True, c2c, {'model/follow_response': True}),
    ('model.generation_config', dict(max_new_tokens=9, repetition_penalty=1.2), c2c, {'max_new_tokens': 9, 'model/generation': dict(repetition_penalty=1.2)}), ('model.generation_config', dict(do_sample=False, temperature=.7, top_p=.8), c2c, {'max_new_tokens': None, 'model/generation': {}}), ('model.generation_config.max_new_tokens', 7, alone, {'max_new_tokens': 7}), ('model.generation_config.do_sample', False, alone, {}),
    ('model.context_model_path', 'b/other', t2t, {'model/sharers': ['b/other']}), ('model.answer_model_path', 'b/other', t2t, {'model/receiver': 'b/other'}), ('model.answer_model_path', 'b/other', both, {'model/receiver': 'b/other'}), ('model.background_prompt', 'Say {question}', t2t, {'systems/T2T/prompts': dict(ask='Say {question}')}),
    ('model.rosetta_checkpoint_dir', 'runs/y/', both, {'model/fusers': ['runs/y/final']}), ('model.rosetta_subfolder', 'checkpoint-5', both, {'model/fusers': ['runs/x/checkpoint-5']}),
    ('model.max_length', 32768, c2c, {'max_length': 32768}), ('eval.gpu_ids', [0, 1, 2], c2c, {}), ('eval.debug_dump_bad_samples', False, c2c, {}), ('eval.cuda_launch_blocking', True, c2c, {}), ('eval.math_grading_method', 'x', c2c, {}), ('eval.longbench_prompt_format_path', 'x', longbench, {}), ('eval.longbench_maxlen_format_path', 'x', longbench, {}), ('eval.longbench_e', True, longbench, {'benchmarks/longbench/extended': True}), ('eval.longbench_e', True, c2c, {}),
    *(('eval.dataset', name, c2c, {'benchmarks': {mine: args}}) for name, mine, args in [('mmlu-redux', 'mmlu-redux', dict(errors='official')), ('mmmlu', 'mmmlu', {}), ('gpqa', 'gpqa', {}), ('math-500', 'math-500', {}), ('gsm8k', 'gsm8k', {}), ('openbookqa', 'openbookqa', {}), ('ai2-arc', 'arc-challenge', {}), ('mmlu-pro', 'mmlu-pro', {}), ('ceval', 'c-eval', dict(split='test')), ('longbench', 'longbench', {}), (None, 'mmlu-redux', dict(errors='official'))]),
    ('eval.answer_method', 'logits', c2c, {'method': 'options', 'cue': 'The correct answer is'}), ('eval.answer_method', 'generate', c2c, {'method': 'generate', 'cue': None}), ('eval.response_text', 'So it is', logits, {'cue': 'So it is'}), ('eval.response_text', 'So it is', c2c, {}),
    ('eval.use_cot', True, c2c, {'variant': 'cot'}), ('eval.use_template', False, c2c, {'variant': 'direct'}), ('eval.use_template', True, c2c, {'variant': 'plain'}),
    ('eval.sample_interval', 10, c2c, {'benchmarks/openbookqa/interval': 10}), ('eval.limit', 5, c2c, {'benchmarks/openbookqa/limit': 5}), ('eval.limit', [5, 9], c2c, {'benchmarks/openbookqa/limit': [5, 9]}), ('eval.limit', None, c2c, {}), ('eval.subjects', ['anatomy'], changed(c2c, 'eval.dataset', 'mmlu-redux'), {'benchmarks/mmlu-redux/subjects': ['anatomy']}),
    ('eval.kv_cache_proportion', 1.0, c2c, {}), ('eval.kv_cache_proportion', .25, c2c, {'systems': {'C2C': dict(kind='C2C in part', share=.25, order='front')}}), ('eval.kv_cache_proportion', .25, aligned, {}), ('eval.kv_cache_order_mode', 'back', changed(c2c, 'eval.kv_cache_proportion', .5), {'systems/C2C/order': 'back'}), ('eval.kv_cache_order_mode', 'back', c2c, {}), ('eval.kv_cache_proportion', .5, alone, {}),
    ('eval.communication_max_new_tokens', 99, t2t, {'systems/T2T/message_tokens': 99}), ('eval.communication_max_new_tokens', 99, both, {'systems/T2T+C2C/message_tokens': 99}), ('eval.communication_max_new_tokens', 99, c2c, {}), ('eval.response_max_new_tokens', 88, t2t, {'max_new_tokens': 88}), ('eval.max_new_tokens', 77, t2t, {'max_new_tokens': 77}), ('eval.max_new_tokens', 77, c2c, {}),
    ('output.output_dir', 'results/y', c2c, {'output/folder': 'results/y'}),
]
idle = {'eval.gpu_ids', 'eval.debug_dump_bad_samples', 'eval.cuda_launch_blocking', 'eval.math_grading_method', 'eval.longbench_prompt_format_path', 'eval.longbench_maxlen_format_path'}


@pytest.mark.parametrize('path, value, file, expected', cases, ids=[f'{p}={v}'[:60] for p, v, _, _ in cases])
def test_every_official_key(path, value, file, expected):
    r = made(changed(file, path, value))
    for k, v in expected.items(): assert at(r, k) == v and type(at(r, k)) is type(v), k
    if not expected: assert r == made(file), differences(made(file), r)
    noted = any(n.startswith(f'{path}=') and 'no effect' in n for n in r.notes)
    as_ever = path in ('model.generation_config.do_sample', 'eval.kv_cache_order_mode') or value is None or value == 1. and path == 'eval.kv_cache_proportion'
    assert noted == (path in idle or not expected and not as_ever), r.notes
    assert made(r.to_dict()) == r and made(yaml.safe_load(r.to_yaml())) == r


def test_every_official_key_was_tried():
    assert {p for p, *_ in cases} == set(official_eval_keys)
    assert {o.ours.split('.')[0] for o in official_eval_keys.values() if o.ours} <= {f.name for f in fields(EvalRecipe)}


@pytest.mark.parametrize('file', [c2c, several, aligned, logits, alone, t2t, both, longbench], ids='c2c several aligned logits alone t2t both longbench'.split())
def test_every_kind_of_official_file(file, tmp_path, monkeypatch):
    "From YAML and from JSON; and what comes out passes the check, systems and benchmarks included."
    monkeypatch.chdir(tmp_path)
    for folder in 'x', 'one', 'two': (tmp_path/'runs'/folder/'final').mkdir(parents=True); (tmp_path/'runs'/folder/'final'/'projector_config.json').write_text('{}')
    (tmp_path/'e.yaml').write_text(yaml.safe_dump(file)); (tmp_path/'e.json').write_text(json.dumps(file))
    r = read_recipe('e.yaml', EvalRecipe)
    assert r == read_recipe('e.json', EvalRecipe) == made(file) and r.check() is r
    assert not list(rooms._check_systems(r.systems)) and all(make_benchmark(a.pop('type', n), a) for n, a in r.benchmarks.items())
    assert any('our own wording' in n for n in r.notes) and (file is several) == any('all sharers are heard' in n for n in r.notes)


@pytest.mark.parametrize('path, value, file, message', [
    ('eval.answer_method', 'guess', c2c, "eval.answer_method is 'guess'; known are generate, logits"), ('eval.answer_method', None, c2c, 'eval.answer_method is missing'), ('eval.gpu_idx', [0], c2c, "eval.gpu_idx is not a key of an official recipe, which this one is by its eval section; did you mean 'gpu_ids'"),
    ('model.rosetta_config.teacher', 'x', c2c, "did you mean 'teacher_model'"), ('eval.dataset', 'openbook', c2c, "eval.dataset: .*did you mean 'openbookqa'"), ('model.generation_config.do_sample', True, c2c, 'greedily'), ('model.rosetta_config.is_do_alignment', True, c2c, 'alignment_strategy is not given'),
    ('model.rosetta_config.is_do_alignment', 'yes', c2c, 'true or false is expected'), ('model.rosetta_config.alignment_strategy', 'prefix', aligned, "'prefix'; .*nown are first, longest"), ('model.rosetta_config.checkpoints_dir', None, c2c, 'checkpoints_dir is missing; C2C needs it'), ('model.rosetta_config.checkpoints_dir', ['x'], several, 'names 1, teacher_model 2'),
    ('model.rosetta_config.base_model', None, c2c, 'base_model is missing'), ('model.context_model_path', None, t2t, 'context_model_path is missing; T2T needs it'), ('model.rosetta_checkpoint_dir', None, both, 'rosetta_checkpoint_dir is missing'), ('eval.kv_cache_proportion', 2, c2c, 'a number from 0 to 1'), ('eval.kv_cache_order_mode', 'middle', c2c, "'middle'; .*front, back"),
    ('model.model_name', 3, c2c, 'a text is expected'), ('output.output_dir', None, c2c, 'output.output_dir is missing'), ('eval.limit', 'x', c2c, None)])
def test_official_mistakes(path, value, file, message):
    if message is None:                                          # such values are for the benchmark to judge
        with pytest.raises(ValueError, match='limit'): make_benchmark('openbookqa', made(changed(file, path, value)).benchmarks['openbookqa'])
        return
    with pytest.raises(ValueError, match=f'(?s)my.yaml: .*{message}'): made(changed(file, path, value), 'my.yaml')


def test_official_sections():
    for section in 'model', 'output':
        with pytest.raises(ValueError, match=f'{section} is missing'): made({k: v for k, v in c2c.items() if k != section})
    with pytest.raises(ValueError, match='eval is missing'): made({k: v for k, v in c2c.items() if k != 'eval'})


# ---------------------------------------------------------------- what is run

@pytest.fixture(scope='module')
def pair(golden):
    receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', 'sharer2'))
    t = load_tokenizer(golden/'tokA')
    return C2CModel(receiver, [sharer], [Fuser.from_published(golden/'ckpt_s2'/'final').eval()], processor=C2CProcessor(t, [t], 'shared')).eval()


@pytest.fixture
def base(golden, assets, tmp_path):
    "The golden pair and its published checkpoint, asked a few real questions."
    return made(dict(model=dict(receiver=str(golden/'receiver'), sharers=[str(golden/'sharer2')], fusers=[str(golden/'ckpt_s2'/'final')], alignment='shared'), systems=dict(receiver={}, T2T=dict(message_tokens=4), C2C={}),
        benchmarks=dict(openbookqa=dict(data_files=str(assets/'benchmarks'/'openbookqa'/'main'/'test.jsonl'), limit=6)), max_new_tokens=4, output=dict(folder=str(tmp_path/'out'))))


def plain(records): return sorted(json.dumps({k: v for k, v in r.items() if k not in ('seconds', 'scores', 'extra', 'flops')}, sort_keys=True) for r in records)


def test_run_is_what_the_recipe_says(base, pair, tmp_path):
    "The same records as by hand; recipe, versions and fingerprints in the summary; run again, nothing is asked, and another recipe changes nothing."
    found = run_recipe(base, progress=False)
    by_hand = evaluate(make_systems(pair, base.systems), make_benchmark('openbookqa', base.benchmarks['openbookqa']), tmp_path/'hand', max_new_tokens=4, progress=False)
    assert plain(found['openbookqa'].records) == plain(by_hand.records) and len(by_hand.records) == 18
    s = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert made(s['recipe']) == base == read_recipe(tmp_path/'out', EvalRecipe) and s['seed'] == 0 and s['device'] == 'cpu' and s['versions']['torch'] == torch.__version__ and {'c2c_nb', 'transformers', 'python'} <= s['versions'].keys()
    one = s['systems']['C2C']
    assert one['fusers'] == [pair.fusers[0].fingerprint()] and s['systems']['receiver']['fusers'] == [] and one['accuracy'] == one['right']/6 and one['interval'][0] <= one['accuracy'] <= one['interval'][1] and {'sharer', 'fusion', 'decode'} <= one['seconds'].keys()
    before = {f.name: f.read_bytes() for f in (tmp_path/'out').iterdir()}
    again = run_recipe(base, progress=False)
    assert {f.name: f.read_bytes() for f in (tmp_path/'out').iterdir()} == before and repr(again) == repr(found) and 'of 6' in repr(found)
    for value in 'max_new_tokens=5', 'systems.T2T.message_tokens=5', 'variant=cot':
        with pytest.raises(FileExistsError, match='another evaluation'): run_recipe(set_values(base, [value]), progress=False)
    assert {f.name: f.read_bytes() for f in (tmp_path/'out').iterdir()} == before


def test_official_file_is_run(base, golden, tmp_path):
    "As the official evaluator scores options: the first token behind the generation prompt and the response text; nothing of these is fused."
    file = dict(model=dict(model_name='Rosetta', rosetta_config=dict(base_model=base.model.receiver, teacher_model=dict(x=base.model.sharers[0]), checkpoints_dir=base.model.fusers, is_do_alignment=False)), output=dict(output_dir=str(tmp_path/'official')),
        eval=dict(dataset='openbookqa', gpu_ids=[0], answer_method='logits', use_cot=False, use_template=False, limit=4, response_text='The correct answer is'))
    r = set_values(made(file), [f"benchmarks.openbookqa.data_files={base.benchmarks['openbookqa']['data_files']}"])
    c2c, found = load_models(r.model), run_recipe(r, progress=False)['openbookqa']
    questions = {q.id: q for q in prepare(set_values(r, [f'output.folder={tmp_path}/other'])).questions['openbookqa'][0]}
    t, template = c2c.processor.receiver_tokenizer, default_template('direct')
    for x in found.records:
        text = t.apply_chat_template(template.render(questions[x['id']]), tokenize=False, add_generation_prompt=True, enable_thinking=False)
        instruction, behind = (torch.tensor([t(s, add_special_tokens=False).input_ids]) for s in (text, 'The correct answer is'))
        ids = torch.cat([instruction, behind], 1)
        active = (torch.arange(ids.shape[1]) < instruction.shape[1])[None, :, None]
        with torch.no_grad(): logits = c2c(input_ids=ids, active=active).logits[0, -1]
        options = [t(f' {l}', add_special_tokens=False).input_ids[0] for l in 'ABCD']
        assert torch.allclose(torch.tensor([x['scores'][l] for l in 'ABCD']), logits[options].log_softmax(-1), atol=1e-4)
    assert len(found.records) == 4


def test_part_of_is_the_official_part(golden):
    official = json.loads((golden/'eval_text.json').read_text())['segmented_kv_cache_index']
    assert len(official) == 60
    for c in official:
        n = c['instruction_length']
        got = part_of([1]*n + [0]*c['response_length'], c['proportion'], c['order'])
        assert got == [int(kind == 1) for k, kind in c['sections'] for _ in range(k)], c


def test_c2c_in_part(base, pair, tmp_path):
    "All of it is C2C, none of it the receiver; the batch does not matter; what is fused is what `active` says."
    systems = {'receiver': {}, 'C2C': {}} | {f'{o}{s}': dict(kind='C2C in part', share=s, order=o) for o in ('front', 'back') for s in (0, .5, 1)}
    made_, b = make_systems(pair, systems), make_benchmark('openbookqa', base.benchmarks['openbookqa'])
    for method in 'generate', 'options':
        many, one = (evaluate(made_, b, tmp_path/f'{method}{size}', method=method, batch_size=size, max_new_tokens=4, progress=False) for size in (6, 1))
        said = lambda e, n: [(r['text'], None if r['scores'] is None else [round(v, 3) for v in r['scores'].values()]) for r in sorted(e.by[n].values(), key=lambda r: r['id'])]
        for o in 'front', 'back':
            assert said(many, f'{o}0') == said(many, 'receiver') and said(many, f'{o}1') == said(many, 'C2C')
            if method == 'generate': assert said(many, f'{o}0.5') == said(one, f'{o}0.5')
            else: assert all(abs(x - y) < 2e-3 for a, c in zip(said(many, f'{o}0.5'), said(one, f'{o}0.5')) for x, y in zip(a[1], c[1]))
    assert len({json.dumps(said(many, n)) for n in ('receiver', 'C2C', 'front0.5', 'back0.5')}) == 4
    prompt = default_template().render(b.questions()[0][0])
    row, half = made_['C2C'].encode(prompt), made_['back0.5'].encode(prompt)
    n = len(row['input_ids'])
    assert half['active'] == [0]*(n - 1 - (n - 1)//2) + [1]*((n - 1)//2) + [0] and half['input_ids'] == row['input_ids']
    ids = torch.tensor([row['input_ids']])
    out = pair.generate(input_ids=ids, active=torch.tensor(half['active'])[None, :, None] > 0, max_new_tokens=4, do_sample=False, pad_token_id=pair.processor.receiver_tokenizer.pad_token_id, eos_token_id=pair.processor.receiver_tokenizer.eos_token_id)
    assert made_['back0.5'].answer([prompt], max_new_tokens=4)[0].text == pair.processor.receiver_tokenizer.decode(out[0, n:], skip_special_tokens=True)
    assert made_['back0.5'].answer([prompt], max_new_tokens=1)[0].flops < made_['C2C'].answer([prompt], max_new_tokens=1)[0].flops
    assert len({json.dumps(made_[n].describe(), default=str) for n in ('front0.5', 'back0.5', 'front1', 'C2C')}) == 4
    for wrong in dict(share=2), dict(share='x'), dict(order='middle'):
        with pytest.raises(ValueError, match=next(iter(wrong))): PartC2C(pair, **wrong)
    with pytest.raises(ValueError, match='follow_response'): PartC2C(C2CModel(pair.receiver, list(pair.sharers), list(pair.fusers), follow_response=True, processor=pair.processor).eval())


def test_several_benchmarks(base, tmp_path, assets):
    "A folder each, and a table; with something else in the folder nothing is begun."
    file = base.benchmarks['openbookqa']['data_files']
    r = set_values(base, ['systems=[receiver, C2C]', f'benchmarks={{easy: {{type: openbookqa, data_files: {file}, limit: 3}}, openbookqa: {{data_files: {file}, limit: 4}}}}'])
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='notes.txt'): run_recipe(r, progress=False)
    (tmp_path/'out'/'notes.txt').unlink()
    found = run_recipe(r, progress=False)
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'easy', 'openbookqa', 'recipe.yaml', 'table.md', 'summary.json'} and read_recipe(tmp_path/'out', EvalRecipe) == r == read_recipe(tmp_path/'out'/'easy', EvalRecipe)
    assert [len(read_records(tmp_path/'out'/n)) for n in ('easy', 'openbookqa')] == [6, 8] and found.rows()[0] == ['system', 'easy', 'openbookqa'] and len(found.rows()) == 3
    s = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert s['benchmarks']['openbookqa']['C2C']['asked'] == 4 and (tmp_path/'out'/'table.md').read_text().startswith('| system | easy | openbookqa |')
    with pytest.raises(FileExistsError): run_recipe(set_values(r, ['benchmarks={easy: {type: openbookqa, data_files: %s, limit: 3}}' % file]), progress=False)      # one alone would lie in the folder itself


@register_system('always B')
def _always_b(c2c, processor, name, letter='B'):
    class Always(System):
        def describe(self): return dict(letter=letter)
        def respond(self, prompts, options, max_new_tokens, questions, stages): from c2c_nb.baseline import Answer; return [Answer(text=letter) for _ in prompts]
    return Always()


def test_without_fusers(base, tmp_path):
    "Models alone and through text; a system of one's own; and no fuser where one is needed."
    r = set_values(base, ['model.fusers=[]', 'systems={receiver: , T2T: {message_tokens: 4}, mine: {kind: always B, letter: C}}', 'max_new_tokens=2'])
    found = run_recipe(r, progress=False)['openbookqa']
    assert {x['text'] for x in found.by['mine'].values()} == {'C'} and found.count('T2T')[1] == 6
    one = load_models(set_values(base, ['model.fusers=[]', 'model.sharers=[]']).model)
    assert one.sharers == [] and isinstance(make_systems(one, ['receiver'])['receiver'], Alone)
    with pytest.raises(AttributeError, match='model.fusers'): make_systems(load_models(set_values(base, ['model.fusers=[]']).model), ['C2C'])


@pytest.mark.parametrize('values, message', [(['systems=[C3C]'], "did you mean 'C2C'"), (['systems={x: {kind: T3T}}'], "did you mean 'T2T'"), (['systems.T2T.mesage_tokens=1'], "systems.T2T.mesage_tokens .*did you mean 'message_tokens'"), (['systems.T2T.prompts={aks: x}'], "did you mean 'ask'"), (['systems.T2T.prompts=x'], 'a mapping is expected'),
    (['benchmarks=[openbokqa]'], "did you mean 'openbookqa'"), (['benchmarks.openbookqa.limt=3'], "did you mean 'limit'"), (['benchmarks.openbookqa.data_files=/nowhere.jsonl'], 'nowhere.jsonl'), (['variant=cots'], "did you mean 'cot'"), (['template=nowhere.yaml'], 'no template file'), (['imports=[no_such_room]'], 'cannot be imported'),
    (['benchmarks.gsm8k.data_files=GSM', 'method=options'], 'questions without options'), (['systems=[C3C]', 'variant=cots', 'benchmarks.openbookqa.limit=0'], r'(?s)3 problems.*C3C.*limit=0.*cots'), (['model.world=skil', 'model.receiver=null', 'model.sharers=[]'], "no world called 'skil'")])
def test_mistakes_come_before_the_models(base, assets, values, message, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: pytest.fail('a model was loaded'))
    values = [v.replace('GSM', str(next((assets/'benchmarks'/'gsm8k').rglob('test*')))) for v in values]
    with pytest.raises((ValueError, OSError), match=message): run_recipe(set_values(base, values), progress=False)
    assert not Path(base.output.folder).exists()


def test_prompts_that_are_too_long(base, assets, tmp_path):
    "Cut for the receiver, in the command's table and in the summary; uncut, they are errors that fail the run."
    long = next((assets/'benchmarks'/'longbench').rglob('*.jsonl'))
    r = set_values(base, [f'benchmarks={{longbench: {{data_files: {long}, part: all, limit: 3}}}}', 'max_length=200', 'max_new_tokens=3', 'systems={receiver: , T2T: {message_tokens: 3}, C2C: }'])
    e = run_recipe(r, progress=False)['longbench']
    assert len(e.records) == 9 and not any(x['error'] for x in e.records) and all(x['cut'] for x in e.records) and all(200 <= x['tokens_in'] < 300 for x in e.by['receiver'].values())
    assert [row[-3] for row in e.rows()] == ['prompts cut', 3, 3, 3] and json.loads((tmp_path/'out'/'summary.json').read_text())['systems']['C2C']['cut'] == 3
    assert all(190 < x['extra']['asked_tokens'] < 300 for x in e.by['T2T'].values())         # the sharer is told the text too, as far as it was kept
    with pytest.raises(FileExistsError, match='max_length'): run_recipe(set_values(r, ['max_length=250']), progress=False)
    with pytest.raises(RuntimeError, match='max_position_embeddings'): run_recipe(set_values(r, ['max_length=null', f'output.folder={tmp_path}/other']), progress=False)


def test_without_a_chat_template(base, golden, tmp_path, monkeypatch):
    "Refused before any model is loaded, and asked in plain texts where that is wanted."
    t = load_tokenizer(golden/'tokA'); t.chat_template = None
    for m in 'receiver', 'sharer2':
        shutil.copytree(golden/m, tmp_path/m); t.save_pretrained(tmp_path/m)
        (tmp_path/m/'chat_template.jinja').unlink(missing_ok=True)
    r = set_values(base, [f'model.receiver={tmp_path}/receiver', f'model.sharers=[{tmp_path}/sharer2]'])
    with monkeypatch.context() as m, pytest.raises(ValueError, match='chat=false'):
        m.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: pytest.fail('a model was loaded'))
        run_recipe(r, progress=False)
    for method in 'generate', 'options':
        e = run_recipe(set_values(r, ['chat=false', f'method={method}', f'output.folder={tmp_path}/{method}']), progress=False)['openbookqa']
        assert len(e.records) == 18 and not any(x['error'] for x in e.records) and e.results()[0]['task'].endswith('as plain text')
    question = prepare(set_values(r, ['chat=false', f'output.folder={tmp_path}/more'])).questions['openbookqa'][0][0]
    assert e.by['receiver'][question.id]['prompt'] == prompt_key(default_template().render(question)[0]['content'])


def test_fusers_that_know_their_models(base, pair, golden, tmp_path, monkeypatch):
    "A fuser of ours is enough; a published one whose recipe names no models is not; one of another pair is refused."
    pair.save_pretrained(tmp_path/'fuser')
    monkeypatch.chdir(golden)
    own = load_models(set_values(base, [f'model.fusers=[{tmp_path}/fuser]', 'model.receiver=null', 'model.sharers=[]', 'model.alignment=null']).model)
    assert own.fusers[0].fingerprint() == pair.fusers[0].fingerprint() and own.processor.strategies == ['shared']
    with pytest.raises(ValueError, match='was made for|another|differ|geometry'): load_models(set_values(base, [f'model.fusers=[{tmp_path}/fuser]', f'model.sharers=[{golden}/sharer1]']).model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match='one is no folder here'): load_models(set_values(base, ['model.receiver=no/model']).model)
    nameless = Fuser.from_pretrained(tmp_path/'fuser'); nameless.config.receiver = None; nameless.save_pretrained(tmp_path/'nameless')
    with pytest.raises(ValueError, match='model.receiver has to be given'): load_models(set_values(base, [f'model.fusers=[{tmp_path}/nameless]', 'model.receiver=null', 'model.sharers=[]']).model)


def test_embedded_world(tmp_path):
    "The embedded pair with an untrained fuser, from fuser to table; its T2T speaks as its models have learned to."
    world = get_world('skill')
    fuser = connect(world, *build_models(world, progress=False))
    fuser.save_pretrained(tmp_path/'fuser')
    r = set_values(read_recipe('embedded_pair', EvalRecipe), [f'model.fusers=[{tmp_path}/fuser]', 'benchmarks.toy.limit=20', f'output.folder={tmp_path}/out'])
    found = run_recipe(r, progress=False)['toy']
    systems = make_systems(fuser, list(r.systems), C2CProcessor(world.tokenizer, [world.tokenizer]), prompts=WorldPrompts(world), message_tokens=world.note_tokens)
    assert plain(found.records) == plain(evaluate(systems, make_benchmark('toy', dict(limit=20)), tmp_path/'hand', max_new_tokens=2, progress=False).records) and len(found.records) == 160
    assert found.count('T2T')[0] >= 36 > found.count('receiver')[0]


# ---------------------------------------------------------------- the command

def shell(*args, cwd):
    code = 'import sys\nfrom c2c_nb.cli import c2c_evaluate\nif __name__ == "__main__": sys.argv[0] = "c2c_evaluate"; sys.exit(c2c_evaluate())'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=cwd, env={**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': ''}, timeout=300)


def test_command_with_recipes(base, golden, tmp_path, capsys):
    "An official file, changed; then, in a dry run, our own, whose models are not there."
    file = dict(model=dict(model_name='Rosetta', rosetta_config=dict(base_model='receiver', teacher_model='sharer2', checkpoints_dir='ckpt_s2/final', is_do_alignment=False), generation_config=dict(max_new_tokens=4)), output=dict(output_dir=str(tmp_path/'o')), eval=dict(dataset='openbookqa', gpu_ids=[0], answer_method='generate', use_cot=False, use_template=True))
    (tmp_path/'official.yaml').write_text(yaml.safe_dump(file))
    data = f"benchmarks.openbookqa.data_files={base.benchmarks['openbookqa']['data_files']}"
    done = shell(str(tmp_path/'official.yaml'), '--set', data, 'benchmarks.openbookqa.limit=3', '--systems', 'receiver', 'C2C', '--quiet', cwd=golden)
    assert done.returncode == 0, done.stderr
    assert '# eval.gpu_ids=[0] has no effect' in done.stdout and 'of 3' in done.stdout and 'the receiver alone' in done.stdout and len(read_records(tmp_path/'o')) == 6
    r = read_recipe(tmp_path/'o', EvalRecipe)
    assert list(r.systems) == ['receiver', 'C2C'] and r.benchmarks['openbookqa']['limit'] == 3
    (tmp_path/'mine.yaml').write_text(set_values(base, ['model.receiver=not/there', f'output.folder={tmp_path}/never']).to_yaml())
    c2c_evaluate([str(tmp_path/'mine.yaml')], dry_run=True, args=['limit=2'], message_tokens=9, dtype='float32', systems=['T2T', 'C2C', 'T2T+C2C'])
    said = capsys.readouterr().out
    assert 'openbookqa: 2 questions' in said and said.count('message_tokens: 9') == 2 and 'dtype: float32' in said and '"content":' in said and 'systems: T2T, C2C, T2T+C2C' in said and not (tmp_path/'never').exists()
    for names, more, says in (([str(tmp_path/'mine.yaml')], {}, 'not/there'), (['a', 'b'], {}, '2 names were given'), (['paper'], dict(args=['limit=3']), '--set benchmarks.mmlu-redux.limit=3'), (['toy'], {}, "no recipe 'toy'")):
        with pytest.raises(SystemExit) as left: c2c_evaluate(names, **more)
        assert left.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/'never').exists()
    c2c_evaluate([], list=True)
    assert capsys.readouterr().out == 'embedded_pair\npaper\n'


# ---------------------------------------------------------------- a benchmark as validation

def test_whoever_reads_along_may_stop():
    "`c2c_evaluate --list | head`: no traceback."
    code = 'import sys\nfrom c2c_nb.cli import c2c_evaluate\nif __name__ == "__main__": sys.argv[0] = "c2c_evaluate"; sys.exit(c2c_evaluate())'
    p = subprocess.Popen([sys.executable, '-c', code, '--list'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    p.stdout.close()
    said = p.stderr.read(); p.stderr.close()
    assert p.wait() == 1 and said == '', said


def test_validation_counts_as_an_evaluation_does(assets, tmp_path):
    "What a training run says of a benchmark is what an evaluation of its fuser says."
    questions = dict(data_files=str(assets/'benchmarks'/'openbookqa'/'main'/'test.jsonl'), limit=30)
    it = tiny_train.run(tiny_train.recipe(tmp_path/'run', 'training.steps=3', 'validation.every=3', f'validation.benchmark={{type: openbookqa, args: {json.dumps(questions)}}}'))
    log = [json.loads(line) for line in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    look = next(r['validation'] for r in log if 'validation' in r)
    model = it.task.c2c.eval()
    model.processor = it.task.processor
    found = evaluate(make_systems(model, ['C2C', 'receiver']), make_benchmark('openbookqa', questions), tmp_path/'e', method='options', progress=False)
    assert (look['right'], look['questions']) == found.count('C2C') and look['questions'] == 30 and 0 < look['right'] < 30 and it.best['value'] == look['accuracy']
    gold = [q[2] for q in load_questions_of(it.recipe)]
    said = lambda n: [r['scores'] for r in sorted(found.by[n].values(), key=lambda r: r['id'])]
    assert len({g[0] for g in gold}) > 1 and said('receiver') != said('C2C')


def test_answers_are_graded_by_the_benchmark(tmp_path):
    "A number in a sentence, with a separator, is the number; as a data set's answer it would have to be the same text. Several right options are all right."
    (tmp_path/'q.jsonl').write_text('\n'.join(json.dumps(dict(question=f'How many are {n} apples?', answer=str(n))) for n in (1250, 3)))
    r = tiny_train.recipe(tmp_path/'run', 'validation.method=answers', f'validation.benchmark={{type: questions, args: {{data_files: {tmp_path}/q.jsonl, answers: math}}}}')
    questions = load_questions_of(r.check())
    class Says:
        def __init__(self, said): self.said = said
        def answer(self, prompts, n): return [self.said]*len(prompts)
    assert ask(Says('The total is 1,250 apples.'), questions) == [1. if '1250' in q[0][0]['content'] else 0. for q in questions] and ask(Says('I cannot say'), questions) == [0., 0.]
    class Likes:
        processor = tiny_train.processor(strategy='shared')
        def next_tokens(self, prompts): return torch.nn.functional.one_hot(torch.tensor([self.processor.receiver_tokenizer('B').input_ids[0]]*len(prompts)), 340)
    prompt = [dict(role='user', content='which?')]
    assert ask(Likes(), [(prompt, ['A', 'B', 'C'], ['A', 'B']), (prompt, ['A', 'B', 'C'], ['C']), (prompt, ['A', 'B', 'C'], 'B')]) == [True, False, True]
