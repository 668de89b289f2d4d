"Every notebook runs from top to bottom, each in a process of its own."
import os, subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest, torch

from conftest import root, run_python

notebooks = sorted(p.relative_to(root) for p in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(root).parts))

RUN = """
import sys, warnings
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb
import torch
torch.set_num_threads(1)
warnings.filterwarnings('error', module=r'c2c_nb\\b')
config = get_config()
ok, seconds = run_nb(Path({notebook!r}).absolute(), skip_flags=config.tst_flags.split(), force_flags={flags!r}, basepath=config.config_path)
sys.exit(not ok)
"""


def flags() -> list[str]:
    "Flags of the cells to run that are left out otherwise: `cuda` where there is a GPU, `slow` if `C2C_SLOW` is set."
    return ['cuda'] * torch.cuda.is_available() + ['slow'] * bool(os.environ.get('C2C_SLOW'))


def status() -> str:
    "What git sees as changed."
    return subprocess.run(['git', 'status', '--porcelain'], cwd=root, capture_output=True, text=True).stdout


@pytest.fixture(scope='module')
def runs(request):
    "All notebooks that were asked for, one behind the other, beside the other tests; and what git saw before."
    asked = [i.callspec.params['notebook'] for i in request.session.items if i.originalname == 'test_notebook' and i.path == request.path]
    before = status()
    with ThreadPoolExecutor(1) as pool: yield {n: pool.submit(run_python, RUN.format(notebook=str(n), flags=flags()), cwd=root, timeout=1800) for n in asked}, before


@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.relative_to('nbs').as_posix())
def test_notebook(notebook, runs):
    done = runs[0][notebook].result()
    assert done.returncode == 0, f'{notebook} failed:\n{(done.stdout + done.stderr)[-6000:]}'


def test_they_leave_nothing_behind(runs):
    if not os.environ.get('CI'): pytest.skip('a working copy may be in work; CI has a clean one')
    started, before = runs
    for f in started.values(): f.result()
    assert status() == before, 'a notebook leaves files behind when it runs'


def test_there_are_notebooks(): assert notebooks
