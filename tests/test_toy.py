"The toy world's builders and its command: caching, damage, concurrency, interruption, bad input."
import json, os, random, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest, torch

from c2c_nb import toy
from tiny_world import TinyWorld

COMMAND = Path(sys.executable).parent/'c2c_demo'


@pytest.fixture(autouse=True)
def _children_find_the_tiny_world(monkeypatch): monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent))


def weights(model): return {n: p.clone() for n, p in model.named_parameters()}


def same(a, b): return all(torch.equal(x, b[n]) for n, x in a.items())


def left_behind(cache): return [p.name for p in Path(cache).iterdir() if p.name.startswith('.')]


def test_models_are_made_once_and_damaged_ones_again(tmp_path):
    world = TinyWorld()
    first = [weights(m) for m in toy.build_models(world, progress=False, cache=tmp_path)]
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    second = [weights(m) for m in toy.build_models(world, progress=False, cache=tmp_path)]
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    assert all(same(a, b) for a, b in zip(first, second))
    assert same(first[0], weights(toy.pretrain(world, 'receiver')[0]))          # the child does what the function does
    file = next(tmp_path.rglob('sharer/model.safetensors')); file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match='made again'): mended = toy.build_models(world, progress=False, cache=tmp_path)
    assert same(first[1], weights(mended[1])) and left_behind(tmp_path) == []


def test_seed_and_recipe_have_their_own_folders():
    assert len({TinyWorld(0).key(), TinyWorld(1).key(), toy.SkillWorld(0).key(), toy.SkillWorld(0, early=False).key()}) == 4
    assert TinyWorld(0).key() == TinyWorld(0).key()


def test_a_failing_child_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match='receiver failed(.|\n)*no more lessons'): toy.build_models(TinyWorld(fail=True), progress=False, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool: pairs = list(pool.map(lambda _: toy.build_models(TinyWorld(), progress=False, cache=tmp_path), range(2)))
    assert same(weights(pairs[0][1]), weights(pairs[1][1])) and left_behind(tmp_path) == []


def test_nothing_is_left_behind():
    world = TinyWorld()
    receiver, sharer = (toy.pretrain(world, role)[0].requires_grad_(False) for role in ('receiver', 'sharer'))
    state, before = torch.get_rng_state(), [weights(receiver), weights(sharer)]
    c2c = toy.connect(world, receiver, sharer)
    history = toy.train_fuser(c2c, world, steps=2, batch=8, progress=False)
    toy.evaluate(world, c2c, limit=8, timed=2, progress=False)
    assert torch.equal(state, torch.get_rng_state()) and same(before[0], weights(receiver)) and same(before[1], weights(sharer))
    assert not c2c.training and not any(p.grad is not None for m in (receiver, sharer) for p in m.parameters()) and len(history) == 2
    again = toy.connect(world, receiver, sharer)
    assert toy.train_fuser(again, world, steps=2, batch=8, progress=False) == history


def test_controls_change_the_sharers_cache_only():
    world = TinyWorld()
    receiver, sharer = (toy.pretrain(world, role)[0].requires_grad_(False) for role in ('receiver', 'sharer'))
    silent, other = toy.silenced(sharer), toy.untrained(sharer)
    ids = torch.tensor([[1, 4, 5, 6]])
    kv = lambda m: torch.stack([x for layer in m(input_ids=ids).past_key_values.layers for x in (layer.keys, layer.values)])
    assert kv(silent).abs().max() == 0 and kv(sharer).abs().max() > 0 and not torch.allclose(kv(other), kv(sharer))
    questions = [q.prompt for q in random.Random(0).sample(world.questions('sum', 'valid'), 7)]
    others = toy.other_questions(questions, world.tokenizer)
    assert sorted(others) == sorted(questions) and all(a != b for a, b in zip(others, questions))


@pytest.mark.parametrize('args, says', [(['--world', 'flat'], 'no world called'), (['--steps', '-3'], '--steps is -3'), (['--figure', 'no/where.png'], 'no folder'),
    (['--figure', 'x.doc'], 'must end in'), (['--results', 'no/where.json'], 'no folder'), (['--world', 'trio'], 'has 3 models')])
def test_bad_arguments(args, says, tmp_path):
    done = subprocess.run([COMMAND, *args], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr and list(tmp_path.iterdir()) == []


def test_interrupted_demo_leaves_no_half_made_models(tmp_path):
    run = subprocess.Popen([COMMAND, '--fresh'], cwd=tmp_path, env=os.environ | dict(XDG_CACHE_HOME=str(tmp_path/'cache')), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if list((tmp_path/'cache').rglob('*.log')): break
        time.sleep(.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and 'Traceback' not in errors, errors
    assert list((tmp_path/'cache').rglob('*.safetensors')) == [] and left_behind(tmp_path/'cache'/'c2c_nb') == []
