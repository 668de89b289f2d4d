"The package is what the notebooks say: modules, clean notebooks, sidebar, README, wheel, light import."
import configparser, importlib, json, os, re, subprocess, sys, tarfile, zipfile

import pytest, yaml

from conftest import copy_repository, repository_files, root, run_python

from readme import readme
from test_notebooks import notebooks

settings = configparser.ConfigParser(delimiters=['='])
settings.read(root/'settings.ini')
settings = settings['DEFAULT']


def cells(notebook): return json.loads((root/notebook).read_text(encoding='utf-8'))['cells']


def default_exps(notebook):
    "Modules that a notebook is exported to by default."
    source = '\n'.join(''.join(c['source']) for c in cells(notebook) if c['cell_type'] == 'code')
    return re.findall(r'^#\|\s*default_exp\s+(\S+)', source, re.M)


def test_every_module_has_its_notebook():
    lib = root/settings['lib_path']
    modules = {p.relative_to(lib).with_suffix('').as_posix().replace('/', '.') for p in lib.rglob('*.py') if not p.name.startswith('_')}
    assert modules == {m for n in notebooks for m in default_exps(n)}


@pytest.mark.parametrize('command', ['from nbdev.doclinks import nbdev_export as run', 'from nbdev.clean import nbdev_clean as run'],
                         ids=['nbdev_export', 'nbdev_clean'])
def test_command_leaves_no_diff(command, tmp_path):
    copy_repository(tmp_path)
    done = run_python(f'{command}; run()', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = {f: (root/f).read_bytes() for f in repository_files()}
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and p.name != '.last_checked'}
    assert set(after) == set(before)
    assert [f.as_posix() for f in before if before[f] != after[f]] == []


def test_every_notebook_is_in_the_sidebar_and_back():
    def entries(contents):
        for o in contents: yield from entries(o['contents']) if isinstance(o, dict) and 'contents' in o else [o['href'] if isinstance(o, dict) else o]
    sidebar = yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    named = list(entries(sidebar))
    assert len(named) == len(set(named))
    assert set(named) == {n.relative_to('nbs').as_posix() for n in notebooks}


def test_readme_is_the_index():
    text, nb = (root/'README.md').read_text(encoding='utf-8'), json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))
    assert text == readme(nb), 'run tools/readme.py'
    fence, heading = re.compile(r'^```.*?^```', re.M | re.S), re.compile(r'^#+ .*', re.M)
    prose = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    assert heading.findall(fence.sub('', text)) == heading.findall(fence.sub('', prose))
    assert [f for f in fence.findall(text) if not f.startswith('```python')] == fence.findall(prose)


def test_readme_has_the_two_commands():
    lines = (root/'README.md').read_text(encoding='utf-8').splitlines()
    commands = [line for line in lines if line.startswith('python3 -m venv')]
    assert [c.split()[-1] for c in commands] == ['.venv/bin/c2c_demo', '.venv/bin/pytest']
    assert all('-c constraints.txt' in c for c in commands)


def test_links_of_the_readme_exist():
    links = re.findall(r'(?:\]\(|src=")(?!\w+:|#)([^)"#\s]+)', (root/'README.md').read_text(encoding='utf-8'))
    assert links and [o for o in links if not (root/o).exists()] == []


def test_import_is_light():
    done = run_python('import sys, c2c_nb; print(c2c_nb.__version__, sorted({"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)))', cwd=root)
    assert done.stdout.split(maxsplit=1) == [settings['version'], '[]\n'], done.stderr


def test_modules_import_without_side_effects(tmp_path):
    modules = [f"{settings['lib_path']}.{m}" for n in notebooks for m in default_exps(n)]
    if not modules: pytest.skip('no modules yet')
    code = f"""
import importlib, os, random, sys, threading
sys.path.insert(0, {str(root)!r})
import torch, transformers
def state():
    environ = {{k: v for k, v in os.environ.items() if not k.startswith(('TORCHINDUCTOR', 'HF_XET_', 'HF_HUB_ENABLE_HF_TRANSFER'))}}  # torch's own, set when it compiles its first function, and what lm_eval sets when it is imported
    return dict(rng=torch.get_rng_state().tolist(), random=random.getstate(), threads=threading.active_count(), torch_threads=torch.get_num_threads(),
                dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(), environ=environ, files=sorted(os.listdir()))
before = state()
for m in {modules!r}: importlib.import_module(m)
print(*[k for k, v in state().items() if v != before[k]], end='')
"""
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize('script', settings['console_scripts'].split())
def test_console_script_exists(script):
    name, _, target = script.partition('=')
    module, _, function = target.partition(':')
    assert callable(getattr(importlib.import_module(module), function))


def test_wheel_holds_the_package_only(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    copy_repository(tmp_path/'src')
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path, tmp_path/'src'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    lib = settings['lib_path']
    info = f"{settings['lib_name']}-{settings['version']}.dist-info/"
    assert {n for n in names if not n.startswith(info)} == {f.as_posix() for f in repository_files() if f.parts[0] == lib}
    assert f'{info}entry_points.txt' in names and f'{info}licenses/LICENSE' in names
    assert {n for n in names if n.endswith('.yaml')} == {f'{lib}/recipes/{name}.yaml' for name in ('embedded_pair', 'mmlu', 'openhermes_300', 'openhermes_500k', 'paper', 'tiny', 'toy')}


def test_sdist_holds_what_the_wheel_is_made_from(tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    copy_repository(tmp_path/'src')
    done = subprocess.run([sys.executable, '-c', 'import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])', tmp_path], cwd=tmp_path/'src', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sdist, = tmp_path.glob('*.tar.gz')
    with tarfile.open(sdist) as f: names = {n.partition('/')[2] for n in f.getnames()}
    lib = settings['lib_path']
    assert {f.as_posix() for f in repository_files() if f.parts[0] == lib} | {'setup.py', 'settings.ini', 'README.md', 'LICENSE', 'constraints.txt'} <= names


def test_constraints_are_exact_and_hold_here():
    from importlib.metadata import PackageNotFoundError, version
    pins = dict(line.split('==') for line in (root/'constraints.txt').read_text().splitlines() if line and line[0] != '#')
    named = {re.split(r'[<>=]', r)[0] for key in ('requirements', 'dev_requirements') for r in settings[key].split()}
    assert named <= set(pins), 'every requirement is pinned'
    if not os.environ.get('CI'): pytest.skip('the pins bind only in CI')
    def here(name):
        try: return version(name).partition('+')[0]
        except PackageNotFoundError: return pins[name]
    assert {n: here(n) for n in pins} == pins


def test_no_file_speaks_of_a_machine():
    "Absolute paths of somebody's computer, also in stored outputs."
    pattern = re.compile('|'.join([r'(?<![\w.~-])/' + top + r'\b' for top in ('wo' + 'rk', 'ro' + 'ot', 'ho' + r'me/\w', 'tmp/ipy' + r'kernel\w*')]))
    found = []
    for file in repository_files():
        try: text = (root/file).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{file}:{n}: {line.strip()[:120]}' for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert found == []
