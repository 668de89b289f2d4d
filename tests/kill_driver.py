"""Train in children of a warmed-up process, kill them, resume, and compare with a run that nobody disturbed: python kill_driver.py FOLDER KILLS SEED.

Prints what was hit, as JSON. A process of its own, because a child can only be forked safely before torch has made threads."""
import json, os, random, select, shutil, signal, sys, time, traceback, warnings
from pathlib import Path

import matplotlib.figure, torch

from c2c_nb.checkpoint import find_checkpoint
from c2c_nb.fuser import Fuser
from tiny_train import assert_same, model, outcome, recipe, start, tokenizer

torch.set_num_threads(1)


def train(folder, ready, operation):
    "A whole run, from the newest checkpoint. `operation`: with which of the accesses to its folder it kills itself."
    it = start(recipe(folder, 'training.steps=6', 'output.log_every=3', 'validation.every=3', 'data.args.rows=10', 'validation.share=0.1', sharers=2), resume=True)
    left = [operation]
    def count(event, args):
        if event in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'shutil.rmtree') and args and str(folder) in str(args[0]):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    if operation: sys.addaudithook(count)
    os.write(ready, b'.')
    it.fit()


def fork(folder, operation=None):
    "A child that trains, and a file that can be read as soon as it is about to."
    reading, ready = os.pipe()
    child = os.fork()
    if child: os.close(ready); return child, reading
    status = 1
    try: train(folder, ready, operation); status = 0
    except BaseException: traceback.print_exc()
    finally: sys.stderr.flush(); os._exit(status)


def ended(child, reading):
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest(points):
    "Step of the newest good checkpoint, which must load and be finite. No kill makes one that is damaged."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = find_checkpoint(points) if points.is_dir() else None
    if found is None: return 0
    for j in 0, 1: assert all(torch.isfinite(p).all() for p in Fuser.from_pretrained(found/f'fuser-{j}').parameters())
    return int(found.name[5:])


def main(root, kills, seed):
    rng = random.Random(seed)
    for role in 'receiver', 'llama', 'qwen2': model(role)
    tokenizer(), tokenizer('two')
    child, reading = fork(root/'whole')
    select.select([reading], [], [])
    began = time.monotonic()
    assert ended(child, reading) == 0, 'the run that nobody disturbs failed'
    whole, expected = time.monotonic() - began, outcome(root/'whole')
    folder, counts, seen, runs = root/'killed', dict(kills=0, loading=0, moments=0, operations=0, in_a_save=0, finished=0), 0, 0
    while counts['kills'] < kills:
        kind = ('moments', 'operations', 'moments', 'operations', 'moments', 'loading')[runs % 6]
        runs += 1
        child, reading = fork(folder, rng.randint(1, 90) if kind == 'operations' else None)
        if kind == 'loading': time.sleep(rng.uniform(0, .7))
        elif kind == 'moments':
            select.select([reading], [], [], 60)
            time.sleep(rng.uniform(0, .5*whole))
        if kind != 'operations': os.kill(child, signal.SIGKILL)
        status = ended(child, reading)
        assert status in (0, -signal.SIGKILL), f'a child ended with {status}'
        if status == 0:
            assert_same(outcome(folder), expected)
            counts['finished'] += 1
            shutil.rmtree(folder); seen = 0
            continue
        points = folder/'checkpoints'
        step = newest(points)
        assert step >= seen, f'a checkpoint was lost: {seen} -> {step}'
        counts['kills'] += 1; counts[kind] += 1
        counts['in_a_save'] += points.is_dir() and any(p.name.startswith('.') for p in points.iterdir()) or any(p.name.startswith('.') for p in folder.glob('.*'))
        seen = step
    assert ended(*fork(folder)) == 0
    assert_same(outcome(folder), expected)
    print(json.dumps(counts | dict(runs=runs, seconds=round(time.monotonic() - began), whole=round(whole, 2))))


if __name__ == '__main__': main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
