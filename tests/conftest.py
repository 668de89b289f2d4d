"What every test shares: one thread, no network, the folder of shared data, and copies of the repository."
import copy, os, shutil, subprocess, sys
from pathlib import Path

for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'): os.environ[name] = '1'
for name, value in dict(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_DISABLE_TELEMETRY='1', MPLBACKEND='agg').items():
    os.environ.setdefault(name, value)

import pytest, torch

torch.set_num_threads(1)
root = Path(__file__).resolve().parents[1]


def shared_path() -> Path:
    "The folder of models, tokenizers, benchmarks and official outputs: `C2C_SHARED`, or `../shared` beside the repository."
    return Path(os.environ.get('C2C_SHARED') or root.parent/'shared').resolve()


def _part(name:str) -> Path:
    path = shared_path()/name
    if not path.is_dir(): pytest.skip(f'no folder {name or "shared"!r} of shared data: put it at ../shared or name its parent in C2C_SHARED')
    return path


def pytest_collection_modifyitems(items):
    "The notebooks begin: they take longest, and one of two processes is busy with them."
    items.sort(key=lambda item: item.path.name != 'test_notebooks.py')


@pytest.fixture(scope='session')
def shared() -> Path:
    "The folder of shared data, or a skip."
    return _part('')


@pytest.fixture(scope='session')
def golden() -> Path:
    "Outputs of the official implementation, or a skip."
    return _part('golden')


@pytest.fixture(scope='session')
def assets() -> Path:
    "Real models, tokenizers, benchmarks and texts, or a skip."
    return _part('assets')


def repository_files() -> list[Path]:
    "Files that git tracks or would track, relative to the root."
    if not (root/'.git').exists(): pytest.skip('not a git checkout')
    out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, check=True).stdout
    return sorted({Path(name) for name in out.decode().split('\0') if name and (root/name).is_file()})


def copy_repository(to:Path) -> Path:
    "A copy of the repository's files in `to`."
    for file in repository_files():
        (to/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/file, to/file)
    return to


def changed(d, path, value):
    "A copy of nested mappings with another value at a path such as 'training.steps'."
    d = copy.deepcopy(d)
    *before, last = path.split('.')
    here = d
    for part in before: here = here.setdefault(part, {})
    here[last] = value
    return d


def run_python(code:str, cwd:Path, timeout:int=600, **env) -> subprocess.CompletedProcess:
    "Run `code` in a fresh interpreter whose first import path is `cwd`; output is captured."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')} | {'PYTHONDONTWRITEBYTECODE': '1'} | env
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
