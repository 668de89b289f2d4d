"Training that is killed at any moment, again and again, ends as if nobody had disturbed it (contract 10)."
import json, os, subprocess, sys

from conftest import root

kills = 20


def test_killed_again_and_again(tmp_path):
    "SIGKILL while it loads, while it trains and while it saves: weights, optimizer, log and summary come out to the bit."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=f'{root}{os.pathsep}{root/"tests"}')
    done = subprocess.run([sys.executable, root/'tests'/'kill_driver.py', tmp_path, str(kills), '0'], env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said['kills'] == kills and said['moments'] >= 4 and said['operations'] >= 6 and said['in_a_save'] >= 4, f'the kills did not hit what they should: {said}'
    print(said)
