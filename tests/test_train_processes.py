"Two processes learn what one learns from the same rows, only the first writes, and one that dies ends the job (accelerate launch, gloo, on the CPU)."
import json, os, socket, subprocess, sys, time

import pytest, torch
from safetensors.torch import load_file

from conftest import root
from tiny_train import assert_same, outcome, questions, recipe, run


def launch(*jobs, options=(), timeout=300):
    "Run jobs in two processes. (With --cpu accelerate would start one, unless there is mpirun; with --multi_gpu and no GPU it starts two with gloo.)"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK')} | dict(PYTHONPATH=f'{root}{os.pathsep}{root/"tests"}', OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port), *options, root/'tests'/'process_driver.py', json.dumps(jobs)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


cases = dict(
    everything=(2, ['training.steps=5'], 3, 1),                   # dropout, tossed gates, a choice of sharers; the second step of an epoch has 5 of 6 rows
    hard_gates=(1, ['model.projector.args.gate_noise=null', 'training.steps=3'], 3, 1),
    accumulated=(1, ['training.steps=3', 'model.follow_response=true'], 1, 3),
    receiver=(1, ['training.freeze=[sharer]', 'training.steps=3'], 3, 1),
    stream=(1, ['data.args={streaming: true, rows: 14}', 'validation.share=0', 'training.steps=3'], 3, 1),
    spread=(1, ['training.steps=3', 'model.shard=true', 'data.args.most=4'], 1, 3),   # layers over both processes; batches of one row have one to four cuts
    spread_to_choose=(2, ['training.steps=3', 'model.shard=true', 'data.args.most=3'], 1, 3),   # and a sharer that only one of them hears
    few=(1, ['data.args={rows: 10}', 'training.steps=4'], 1, 3),   # 8 rows: the second step of an epoch has 2, less than the 6 batches of a step
)


def values_of(name, processes):
    _, values, batch, accumulation = cases[name]
    values = [v for v in values if processes > 1 or v != 'model.shard=true']      # one process has nobody to share with
    return ['data.args.rows=14', *values, f'training.batch_size={batch}', f'training.accumulation={accumulation*2//processes}', 'training.sharer_dropout=0.3' if cases[name][0] > 1 else 'training.sharer_dropout=0', 'output.keep_best=false']


def job(folder, name, **more): return dict(folder=str(folder/name), values=values_of(name, 2), sharers=cases[name][0], **more)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A job of which a process dies; then all cases in two processes, and that job again, resumed."
    folder, begun = tmp_path_factory.mktemp('two'), time.monotonic()
    died = launch(job(folder/'died', 'everything', kill=[1, 3]))
    died = dict(returncode=died.returncode, seconds=time.monotonic() - begun, files=sorted(p.name for p in (folder/'died'/'everything').iterdir()), checkpoints=sorted(p.name for p in (folder/'died'/'everything'/'checkpoints').iterdir()))
    done = launch(*(job(folder, name) for name in cases), job(folder/'died', 'everything', resume=True))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')], died


@pytest.mark.parametrize('name', cases)
def test_as_one(two, tmp_path, monkeypatch, name):
    "Weights and losses of each step are those of one process that reads the same rows."
    monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)
    run(recipe(tmp_path/name, *values_of(name, 1), sharers=cases[name][0]), fresh=True)
    ours, theirs = outcome(two[0]/name), outcome(tmp_path/name)
    files = sorted((two[0]/name).glob('*/*.safetensors'))
    assert files and [f.parent.name for f in files] == [f.parent.name for f in sorted((tmp_path/name).glob('*/*.safetensors'))]
    for file in files:
        a, b = load_file(file), load_file(tmp_path/name/file.parent.name/file.name)
        assert a.keys() == b.keys()
        for n in a: assert (a[n] - b[n]).abs().max() <= 1e-6, (file.parent.name, n, (a[n] - b[n]).abs().max())
    assert [r['step'] for r in ours['log']] == [r['step'] for r in theirs['log']]
    for a, b in zip(ours['log'], theirs['log']):
        if 'loss' in a: assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4) and a['lr'] == b['lr']
        elif b['validation']['held_out_loss'] is not None: assert a['validation']['held_out_loss'] == pytest.approx(b['validation']['held_out_loss'], rel=1e-5)
    assert ours['summary']['tokens'] == pytest.approx(theirs['summary']['tokens'], rel=.2)


def test_spread(two, tmp_path, monkeypatch):
    "With model.shard, no process holds all weights; both answer as the whole models do, and what is saved says which models they were."
    monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)
    whole = run(recipe(tmp_path/'spread_to_choose', *values_of('spread_to_choose', 1), sharers=2), fresh=True)
    assert len(two[1]) == 2
    for said in two[1]: assert said['spread']['here'] < .9*said['spread']['weights'] and said['spread']['said'] == whole.task.answer(questions, 8)
    facts = [[json.loads((f/'spread_to_choose'/f'fuser-{j}'/'config.json').read_text())[k] for j in (0, 1) for k in ('receiver', 'sharer', 'receiver_tokenizer')] for f in (two[0], tmp_path)]
    assert facts[0] == facts[1] and all(x['weights'] for x in facts[0] if isinstance(x, dict))


@pytest.mark.parametrize('value, says', [('model.follow_response=true', 'model.follow_response'), ('training.store=there', 'training.store'), ('training.freeze=[sharer]', "without 'receiver'")])
def test_not_spread(tmp_path, value, says):
    with pytest.raises(ValueError, match=f'model.shard is true, which does not go with .*{says}'): run(recipe(tmp_path/'run', 'model.shard=true', value))


def test_only_the_first_writes(two):
    said = {s['rank']: s for s in two[1]}
    assert said[1]['wrote'] == 0, said[1]['what']
    assert said[0]['wrote'] > 50


def test_one_process_does_not_go_on(two):
    with pytest.raises(ValueError, match='processes: 2 -> 1'): run(recipe(two[0]/'few', *values_of('few', 2)), resume=True)


def test_a_process_that_dies(two):
    "The job ends with an error in seconds; resumed, it ends as if nothing had been."
    folder, _, died = two
    assert died['returncode'] != 0 and died['seconds'] < 120
    assert died['checkpoints'] == ['step-00000002'] and 'summary.json' not in died['files']
    assert_same(outcome(folder/'died'/'everything'), outcome(folder/'everything'))


def test_nothing_to_spread(tmp_path):
    "One process is told that its models lie on it whole."
    with pytest.warns(UserWarning, match='model.shard is true, but there is one process'): run(recipe(tmp_path/'x', 'model.shard=true', 'training.steps=1', 'data.args.rows=14'), fresh=True)
