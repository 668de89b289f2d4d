"`c2c_train` and `c2c_answers` as they are installed."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest, yaml

from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

root = Path(__file__).resolve().parents[1]
quick = ['training.steps=4', 'training.batch_size=16', 'data.args.limit=400', 'validation.limit=40', 'validation.every=2', 'output.save_every=2', 'output.log_every=1', 'training.scheduler=linear', 'training.scheduler_args={}']


def start(name, *args, cwd=None, **env):
    code = f'import sys\nfrom c2c_nb.cli import {name}\nif __name__ == "__main__": sys.argv[0] = "{name}"; sys.exit({name}())'
    env = {**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def shell(name, *args, timeout=300, **kwargs):
    p = start(name, *args, **kwargs)
    p.stdout_text, p.stderr_text = p.communicate(timeout=timeout)
    return p


def test_train_again_and_resume(tmp_path):
    "A run from the shipped recipe; over it nothing is written, but it can go on."
    args = ['toy', '--quiet', '--set', *quick, f'output.folder={tmp_path}/run']
    done = shell('c2c_train', *args)
    assert done.returncode == 0, done.stderr_text
    assert '4 of 4 steps' in done.stdout_text and re.search(r'best: \d+ of 40 questions right', done.stdout_text) and 'fuser' in done.stdout_text
    assert len(C2CModel.from_pretrained(tmp_path/'run'/'fuser').fusers) == 1
    log = [json.loads(l) for l in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log if 'loss' in r] == [1, 2, 3, 4] and [r['step'] for r in log if 'validation' in r] == [2, 4]
    before = (tmp_path/'run'/'fuser'/'model.safetensors').read_bytes()
    again = shell('c2c_train', *args)
    assert again.returncode == 2 and 'holds a run already' in again.stderr_text and 'Traceback' not in again.stderr_text
    other = shell('c2c_train', *args[:-1], 'training.seed=5', args[-1], '--resume')
    assert other.returncode == 2 and 'training.seed: 0 -> 5' in other.stderr_text
    assert (tmp_path/'run'/'fuser'/'model.safetensors').read_bytes() == before
    resumed = shell('c2c_train', str(tmp_path/'run'/'recipe.yaml'), '--quiet', '--resume')
    assert resumed.returncode == 0 and 'going on after step 4 of 4' in resumed.stderr_text


def test_dry_run_writes_nothing(tmp_path):
    done = shell('c2c_train', 'toy', '--dry-run', '--quiet', '--set', 'output.folder=run', 'data.args.limit=400', cwd=tmp_path)
    assert done.returncode == 0, done.stderr_text
    assert not list(tmp_path.iterdir())
    resolved = yaml.safe_load(done.stdout_text.split('\n\n')[0])
    assert resolved['model']['world'] == 'skill' and resolved['training']['steps'] == 140
    for said in 'KVGeometry(layers=3', '211,506 parameters', 'steps: 140', 'GB', '400 rows: 400 kept': assert said in done.stdout_text


def test_official_recipe_as_it_stands(golden, assets, tmp_path):
    "The golden checkpoints' own config.json trains a fuser, once it is told where the data are."
    done = shell('c2c_train', 'ckpt_s2/config.json', '--quiet', '--set', f'output.folder={tmp_path}/run', 'training.steps=2', 'training.max_length=600', 'validation.every=null',
        f'data.args={{data_files: {assets}/train/sharegpt_en.jsonl, limit: 40}}', cwd=golden)
    assert done.returncode == 0, done.stderr_text
    assert 'note: training.device' in done.stderr_text and 'held-out loss' in done.stdout_text
    fuser = Fuser.from_pretrained(tmp_path/'run'/'fuser')
    assert fuser.config.training['steps'] == 2 and fuser.config.projector_args['hidden_dim'] == 32 and fuser.config.alignment == 'shared'


def test_stopped_by_hand(tmp_path):
    "Ctrl-C says how to go on, and it does."
    args = ['toy', '--quiet', '--set', *quick, f'output.folder={tmp_path}/run', 'training.steps=100000', 'validation.every=null', 'output.save_every=1']
    p = start('c2c_train', *args)
    for _ in range(600):
        if list(tmp_path.glob('run/checkpoints/step-*')): break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and '--resume' in err and 'Traceback' not in err
    found = sorted(tmp_path.glob('run/checkpoints/step-*'))
    done = shell('c2c_train', *args[:-4], f'output.folder={tmp_path}/run', f'training.steps={int(found[-1].name[5:]) + 2}', 'validation.every=null', 'output.save_every=1', '--resume', '--force')
    assert done.returncode == 0, done.stderr_text


@pytest.mark.parametrize('args,says', [
    (['nowhere.yaml'], 'no file nowhere.yaml'), (['toy', '--set', 'training.learning_rat=1'], "did you mean 'learning_rate'"), (['toy', '--set', 'training.scheduler=lineer', 'model.projector.type=C2C'], "did you mean 'linear'"), ([], 'no recipe was given')])
def test_refused(args, says, tmp_path):
    done = shell('c2c_train', *args, '--quiet', cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr_text and 'Traceback' not in done.stderr_text
    assert not list(tmp_path.iterdir())


def test_answers_of_a_local_model(golden, assets, tmp_path):
    "Answers by a local model, which a recipe then trains on."
    done = shell('c2c_answers', 'GSM8K', str(golden/'receiver'), 'out.jsonl', '--args', f'data_files={assets}/benchmarks/gsm8k/main/test.jsonl', 'limit=6', '--max-tokens', '5', '--temperature', '0', '--quiet', cwd=tmp_path)
    assert done.returncode == 0, done.stderr_text
    rows = [json.loads(l) for l in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert len(rows) == 6 and all(r['model_response'] or not r['is_finished'] for r in rows)
