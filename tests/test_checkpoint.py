"No kill, full disk or flipped bit leaves a checkpoint that loads but is wrong; trees come back exactly."
import errno, hashlib, json, math, os, random, re, resource, select, shutil, signal, struct, subprocess, sys, time, traceback, warnings
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import root as repository, run_python
from c2c_nb.checkpoint import MANIFEST, check_checkpoint, clean_partial, find_checkpoint, list_checkpoints, load_tree, remove_checkpoint, replace_file, save_tree, step_of, write_checkpoint

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def payload(step, size=50_000):
    "What a trainer would write: a tree, and a folder in the folder."
    def write(folder):
        save_tree(dict(step=step, weights=torch.full((size,), float(step)), states={0: torch.tensor([step])}), folder/'state')
        (folder/'fuser').mkdir()
        (folder/'fuser'/'config.json').write_text(json.dumps(dict(step=step)))
    return write


def content(path):
    "The step that everything in a checkpoint agrees on."
    tree = load_tree(path/'state')
    steps = {tree['step'], *tree['weights'].tolist(), tree['states'][0].item(), json.loads((path/'fuser'/'config.json').read_text())['step'], step_of(path), check_checkpoint(path)['step']}
    assert len(steps) == 1, steps
    return tree['step']


def quiet(root):
    "`find_checkpoint`, of which no warning is expected."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return find_checkpoint(root)


def dotted(root): return sorted(p.name for p in root.iterdir() if p.name.startswith('.'))


def fork(do):
    "Run `do` in a child process; its number. The exit status is 1 if `do` raises."
    sys.stdout.flush(); sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)                    # of threads, from Python 3.12 on; the child starts none
        child = os.fork()
    if child: return child
    status = 1
    try: do(); status = 0
    except BaseException: traceback.print_exc()
    finally: sys.stderr.flush(); os._exit(status)


def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- kills

def test_killed_at_random_moments(tmp_path):
    "A run that is killed again and again and always goes on from what it finds never goes back and never reads half a checkpoint."
    rng, seen, kills, interrupted, took = random.Random(0), 0, 0, 0, []
    ready, tell = os.pipe()
    def train():
        clean_partial(tmp_path)
        assert not dotted(tmp_path)
        found = quiet(tmp_path)
        step = content(found) if found else 0
        os.write(tell, b'.')
        while True:
            step += 1
            write_checkpoint(tmp_path, step, payload(step), keep_last=2, keep=[3])
    for i in range(3):                                                         # how long does one take here, just now?
        start = time.perf_counter()
        write_checkpoint(tmp_path/'elsewhere', i, payload(i))
        took.append(time.perf_counter() - start)
    shutil.rmtree(tmp_path/'elsewhere')
    try:
        while kills < 30 or (seen < 10 or interrupted < 5) and kills < 150:
            child = fork(train)
            while not select.select([ready], [], [], .1)[0]: assert os.waitpid(child, os.WNOHANG)[0] == 0, 'what was found is wrong, see above'
            os.read(ready, 1)
            time.sleep(rng.uniform(0, 2.5*max(took)))
            os.kill(child, signal.SIGKILL)
            assert ended(child) == -signal.SIGKILL
            found = quiet(tmp_path)
            step = content(found) if found else 0
            assert step >= seen, 'a checkpoint was lost'
            seen, kills, interrupted = step, kills + 1, interrupted + bool(dotted(tmp_path))
            for p in list_checkpoints(tmp_path): content(p)                    # none of the others is wrong either
    finally: os.close(ready); os.close(tell)
    assert seen >= 10 and interrupted >= 5, f'{kills} kills did not hit what they should: {seen} steps, {interrupted} interrupted'
    assert (tmp_path/'step-00000003').is_dir()
    clean_partial(tmp_path)
    assert not dotted(tmp_path)


@pytest.mark.parametrize('step, keep_last', [(2, 1), (1, None)], ids=['next step', 'same step again'])
def test_killed_at_every_operation(tmp_path, step, keep_last):
    "The same, exhaustively: at each operation on the file system that a write makes."
    found_, n, killed = set(), 0, True
    def write(here, n):
        left = [n]
        def count(event, args):
            if event.split('.')[0] in ('open', 'os', 'shutil') and event != 'os.kill':
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        write_checkpoint(here, step, lambda f: (f/'a').write_text('new'), keep_last=keep_last)
    while killed:
        here = tmp_path/str(n)
        write_checkpoint(here, 1, lambda f: (f/'a').write_text('old'))
        status = ended(fork(lambda: write(here, n)))
        assert status in (0, -signal.SIGKILL)
        killed, n = status != 0, n + 1
        for cleaned in False, True:
            if cleaned: clean_partial(here); assert not dotted(here)
            found = quiet(here)
            if not cleaned and found is None and step == 1: continue           # between two renames; cleaning brings it back
            found_.add((step_of(found), (found/'a').read_text()))
    assert n > 15
    assert found_ == {(1, 'old'), (step, 'new')}


def test_everything_is_synced_before_the_name(tmp_path, monkeypatch):
    "SIGKILL leaves what was written in the system's memory, a power cut does not: so the order of syncs counts."
    log, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: (log.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, 'rename', lambda a, b: (log.append('renamed'), rename(a, b))[1])
    path = write_checkpoint(tmp_path, 1, payload(1, size=5))
    before, after = log[:log.index('renamed')], log[log.index('renamed')+1:]
    files = [f for f in path.rglob('*') if f.is_file()]
    assert len(files) == 4
    assert {f.stat().st_ino for f in [*files, path, path/'fuser']} <= set(before)
    assert after == [tmp_path.stat().st_ino]
    manifest = before.index((path/MANIFEST).stat().st_ino)
    assert all(before.index(f.stat().st_ino) < manifest for f in files if f.name != MANIFEST)
    assert before.index(path.stat().st_ino) > manifest


def test_two_processes_write_different_steps(tmp_path):
    "They clean up all the time, and neither takes the other's work for a leftover."
    def writer(first):
        for step in range(first, 40, 2):
            clean_partial(tmp_path)
            write_checkpoint(tmp_path, step, payload(step, size=2000))
    children = [fork(lambda: writer(first)) for first in (0, 1)]
    assert [ended(c) for c in children] == [0, 0]
    assert [content(p) for p in list_checkpoints(tmp_path)] == list(range(40))
    assert not dotted(tmp_path)


def test_two_processes_remove_the_same_ones(tmp_path):
    def writer(first):
        warnings.simplefilter('error')
        for step in range(first, 40, 2): write_checkpoint(tmp_path, step, payload(step, size=20), keep_last=2)
    children = [fork(lambda: writer(first)) for first in (0, 1)]
    assert [ended(c) for c in children] == [0, 0]
    assert content(quiet(tmp_path)) == 39
    assert not dotted(tmp_path)


def test_one_that_is_being_written_is_nobodys_leftover(tmp_path):
    write_checkpoint(tmp_path, 1, payload(1, 5))
    def write(folder):
        assert clean_partial(tmp_path) == [] and folder.is_dir()
        assert quiet(tmp_path).name == 'step-00000001'
        payload(2, 5)(folder)
    assert content(write_checkpoint(tmp_path, 2, write)) == 2
    (tmp_path/'.step-00000003-0123abcd').mkdir()
    (tmp_path/'.gone-step-00000001-0123abcd').mkdir()
    (tmp_path/'.somebody-elses').mkdir()
    assert clean_partial(tmp_path) == ['.gone-step-00000001-0123abcd', '.step-00000003-0123abcd']
    assert dotted(tmp_path) == ['.somebody-elses']
    assert clean_partial(tmp_path/'nowhere') == []


# ---------------------------------------------------------------- failures

@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt(), OSError(errno.EACCES, 'Permission denied')], ids=lambda e: type(e).__name__)
def test_what_write_raises_is_passed_on(tmp_path, error):
    write_checkpoint(tmp_path, 1, payload(1, 5))
    def fail(folder): payload(2, 5)(folder); raise error
    with pytest.raises(type(error)) as caught: write_checkpoint(tmp_path, 2, fail, keep_last=1)
    assert caught.value is error
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000001'] and content(quiet(tmp_path)) == 1


def refused(root, step=2, size=1_000_000):
    "Write a checkpoint for which there is no room, look at what is left, and return the message."
    try: write_checkpoint(root, step, payload(step, size), keep_last=1)
    except OSError as e: error = e
    else: raise AssertionError('there was room')
    assert sorted(p.name for p in root.iterdir()) == ['step-00000001']
    assert content(quiet(root)) == 1
    assert error.errno in (errno.ENOSPC, errno.EFBIG)
    for part in f'step {step}', 'output.keep_last', 'resume', 'step-00000001', 'Free some space': assert part in str(error), error
    return str(error)


def test_file_size_limit(tmp_path):
    "RLIMIT_FSIZE, as on machines with quotas; also where a library writes the file."
    write_checkpoint(tmp_path, 1, payload(1))
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        refused(tmp_path)
        try: write_checkpoint(tmp_path, 2, lambda f: (f/'a').write_bytes(bytes(500_000)))
        except OSError as e: assert 'no room' in str(e)
        else: raise AssertionError
    assert ended(fork(limited)) == 0


def test_full_disk(tmp_path):
    "A real one, of one megabyte."
    code = f"import sys; sys.path[:0] = [{str(repository)!r}, {str(repository/'tests')!r}]; from test_checkpoint import *; root = Path({str(tmp_path)!r}); write_checkpoint(root, 1, payload(1)); print(refused(root))"
    mount = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; exec "$@"', str(tmp_path)]
    if not shutil.which('unshare') or subprocess.run([*mount, 'true'], capture_output=True).returncode: pytest.skip('no file system can be mounted here')
    done = subprocess.run([*mount, sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'No space left on device' in done.stdout


def test_message_where_there_is_no_earlier_one(tmp_path):
    def fail(folder): raise RuntimeError('could not serialize: I/O error (os error 28)')
    with pytest.raises(OSError, match='there is no earlier one') as caught: write_checkpoint(tmp_path/'new', 5, fail)
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value.__cause__, RuntimeError)
    assert list((tmp_path/'new').iterdir()) == []


def test_bad_arguments(tmp_path):
    for args, message in [((-1,), 'step=-1'), ((1.,), 'step=1.0'), ((True,), 'step=True'), (('3',), "step='3'")]:
        with pytest.raises(ValueError, match=re.escape(message)): write_checkpoint(tmp_path, *args, payload(1, 5))
    for keep_last in 0, -1, 1.5:
        with pytest.raises(ValueError, match='keep_last'): write_checkpoint(tmp_path, 1, payload(1, 5), keep_last=keep_last)
    with pytest.raises(ValueError, match='manifest.json'): write_checkpoint(tmp_path, 1, lambda f: (f/MANIFEST).write_text('{}'))
    with pytest.raises(ValueError, match='plain files'): write_checkpoint(tmp_path, 1, lambda f: (f/'link').symlink_to('/etc'))
    with pytest.raises(ValueError, match='plain files'): write_checkpoint(tmp_path, 1, lambda f: os.mkfifo(f/'pipe'))
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): write_checkpoint(tmp_path/'file', 1, payload(1, 5))


# ---------------------------------------------------------------- damage

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Two checkpoints, and the bytes of the newer one's files."
    root = tmp_path_factory.mktemp('damage')
    for step in 1, 2: write_checkpoint(root, step, payload(step, 20))
    newer = root/'step-00000002'
    return root, newer, {p.relative_to(newer).as_posix(): p.read_bytes() for p in newer.rglob('*') if p.is_file()}


@quick
@given(data=st.data())
def test_any_damage_is_found(good, data):
    root, newer, files = good
    name = data.draw(st.sampled_from(sorted(files)))
    raw = files[name]
    how = data.draw(st.sampled_from(['flip', 'cut', 'longer', 'missing', 'extra', 'swap']))
    named = name
    try:
        if how == 'flip':
            i, bits = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
            (newer/name).write_bytes(raw[:i] + bytes([raw[i] ^ bits]) + raw[i+1:])
        elif how == 'cut': (newer/name).write_bytes(raw[:data.draw(st.integers(0, len(raw) - 1))])
        elif how == 'longer': (newer/name).write_bytes(raw + data.draw(st.binary(min_size=1, max_size=3)))
        elif how == 'missing': (newer/name).unlink()
        elif how == 'extra': named = 'fuser/more.bin'; (newer/named).write_bytes(b'')
        else:
            other = data.draw(st.sampled_from(sorted(set(files) - {name})))
            (newer/name).write_bytes(files[other])
        with pytest.raises(ValueError) as caught: check_checkpoint(newer)
        assert named in str(caught.value) and str(newer) in str(caught.value)
        with pytest.warns(UserWarning, match=r'(?s)passed over 1 damaged checkpoint, step-00000001 is the newest good one.*' + re.escape(named)): found = find_checkpoint(root)
        assert content(found) == 1
        assert clean_partial(root) == [] and newer.is_dir()                    # damaged is not partial: nothing is removed
    finally:
        (newer/'fuser'/'more.bin').unlink(missing_ok=True)
        for n, b in files.items(): (newer/n).write_bytes(b)
    assert content(quiet(root)) == 2


def test_every_byte_of_the_manifest_counts(good):
    root, newer, files = good
    raw = files[MANIFEST]
    try:
        for i in range(len(raw)):
            (newer/MANIFEST).write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i+1:])
            with pytest.raises(ValueError, match='manifest.json is damaged'): check_checkpoint(newer)
    finally: (newer/MANIFEST).write_bytes(raw)


def test_other_kinds_of_wrong(tmp_path):
    path = write_checkpoint(tmp_path, 10, payload(10, 5))
    copy = shutil.copytree(path, tmp_path/'best')
    assert check_checkpoint(copy)['step'] == 10                                # any name may be given to a copy
    shutil.copytree(path, tmp_path/'step-00000020')
    with pytest.raises(ValueError, match='holds step 10'): check_checkpoint(tmp_path/'step-00000020')
    with pytest.warns(UserWarning): assert find_checkpoint(tmp_path) == path
    with pytest.raises(ValueError, match='no checkpoint'): check_checkpoint(tmp_path/'nowhere')
    (copy/'state.json').unlink(); (copy/'state.json').symlink_to(path/'state.json')
    with pytest.raises(ValueError, match='state.json: not a plain file'): check_checkpoint(copy)
    from c2c_nb.checkpoint import _manifest_bytes
    (path/MANIFEST).write_bytes(_manifest_bytes(json.loads((path/MANIFEST).read_bytes()) | dict(format=2)))
    with pytest.raises(ValueError, match='format 2'): check_checkpoint(path)
    with pytest.warns(UserWarning, match='passed over 2 damaged checkpoints, there is no good one'): assert find_checkpoint(tmp_path) is None


def test_names_that_only_look_like_checkpoints(tmp_path):
    path = write_checkpoint(tmp_path, 5, payload(5, 5))
    for name in 'step-9', 'step-000000009', 'step-00000009.bak', 'xstep-00000009', '.step-00000009', 'step--0000009', 'step-0000000९', 'step-00000009 ': shutil.copytree(path, tmp_path/name)
    (tmp_path/'step-00000008').write_text('a file')
    (tmp_path/'step-00000007').symlink_to(path)
    assert list_checkpoints(tmp_path) == [path]
    assert quiet(tmp_path) == path and clean_partial(tmp_path) == []
    assert quiet(tmp_path/'nowhere') is None and quiet(tmp_path/'step-00000008') is None
    assert step_of('a/step-123456789') == 123456789 and step_of('step-0000000009') is None
    big = write_checkpoint(tmp_path, 10**9, payload(10**9, 5))
    assert quiet(tmp_path) == big


# ---------------------------------------------------------------- what stays

@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.one_of(st.none(), st.integers(1, 4)), st.sets(st.integers(0, 12), max_size=3))
def test_what_stays(tmp_path, steps, keep_last, keep):
    "The one just written, the newest before it, and those asked for; later ones are left alone."
    here = tmp_path/str(random.random())
    expected = set()
    for step in steps:
        write_checkpoint(here, step, lambda f: (f/'a').write_text(str(step)), keep_last=keep_last, keep=keep)
        expected |= {step}
        older = sorted(s for s in expected if s < step)
        if keep_last: expected -= set(older[:max(0, len(older) + 1 - keep_last)]) - keep
        assert [step_of(p) for p in list_checkpoints(here)] == sorted(expected)
    assert not dotted(here)
    shutil.rmtree(here)


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    for step in 1, 2: path = write_checkpoint(tmp_path, step, payload(step, 5))
    (path/'state.json').unlink()
    assert content(write_checkpoint(tmp_path, 2, payload(2, 5))) == 2
    remove_checkpoint(path)
    assert content(quiet(tmp_path)) == 1 and not dotted(tmp_path)


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    file = tmp_path/'recipe.yaml'
    replace_file(file, 'old')
    def fail(part): part.write_text('ne'); raise RuntimeError
    with pytest.raises(RuntimeError): replace_file(file, fail)
    assert file.read_text() == 'old' and list(tmp_path.iterdir()) == [file]
    replace_file(file, b'new')
    assert file.read_bytes() == b'new' and list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------- trees

dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool, torch.complex64]


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.lists(st.integers(0, 3), max_size=3))
    n = math.prod(shape)*dtype.itemsize
    raw = draw(st.binary(min_size=n, max_size=n))                              # any bits: nan with payload, denormals, -0
    if dtype is torch.bool: raw = bytes(b & 1 for b in raw)
    x = torch.frombuffer(bytearray(raw), dtype=dtype).view(shape).clone() if n else torch.empty(shape, dtype=dtype)
    return x.transpose(0, -1) if x.dim() > 1 and draw(st.booleans()) else x


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2**300, 2**300), st.floats(), st.text(), st.text(st.characters(categories=['Cs', 'Lu']), max_size=4), st.sampled_from(['$tensor', '$dict', '0000 a', 'nan']))
keys = st.one_of(st.text(max_size=5), st.sampled_from(['$tensor', '$tuple', '$int', '$', 'state']), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.tuples(st.integers(), st.text(max_size=2)))
trees = st.recursive(st.one_of(scalars, tensors()), lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=4)), max_leaves=12)


def bits(x): return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b''


def same(a, b):
    "Equal to the bit, and of equal types."
    if type(a) is not type(b): return False
    if isinstance(a, Tensor): return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, float): return struct.pack('d', a) == struct.pack('d', b) or (a != a and b != b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return len(a) == len(b) and all(same(k, l) and same(v, w) for (k, v), (l, w) in zip(a.items(), b.items()))
    return a == b


@settings(quick, max_examples=200)
@given(trees)
def test_trees_come_back_exactly(tmp_path, tree):
    save_tree(tree, tmp_path/'a.b')
    assert same(load_tree(tmp_path/'a.b'), tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.b.json', 'a.b.safetensors']
    first = [(tmp_path/f'a.b.{x}').read_bytes() for x in ('json', 'safetensors')]
    save_tree(tree, tmp_path/'a.b')
    assert first == [(tmp_path/f'a.b.{x}').read_bytes() for x in ('json', 'safetensors')]       # the same tree is the same bytes


def test_trees_of_interest(tmp_path):
    x = torch.arange(12.).view(3, 4)
    parameter = nn.Parameter(x.clone())
    tree = dict(whole=x, again=x, view=x[1:, ::2], turned=x.T, row=x[0], grown=x[:1].expand(5, 4), parameter=parameter, huge=10**5000, least=-2**63, numpy=np.random.default_rng(0).integers(0, 2**32, (2, 3), dtype=np.uint32),
        state=np.random.default_rng(0).bit_generator.state, dice=random.getstate(), rng=torch.get_rng_state(), conj=torch.tensor([1+2j]).conj(), deep={'a': [({1: [None]},)]})
    save_tree(tree, tmp_path/'t')
    back = load_tree(tmp_path/'t')
    assert back['whole'] is back['again'] and back['whole'] is not back['row']
    for name in 'whole', 'view', 'turned', 'row', 'grown': assert same(back[name], tree[name].contiguous())
    assert type(back['parameter']) is Tensor and same(back['parameter'], x)
    assert back['numpy'].dtype == np.uint32 and (back['numpy'] == tree['numpy']).all()
    assert torch.equal(back['conj'], tree['conj'])
    for name in 'huge', 'least', 'state', 'dice', 'deep': assert same(back[name], tree[name])
    random.setstate(back['dice'])
    back['whole'].add_(1)                                                      # not a window into the file
    assert same(load_tree(tmp_path/'t')['whole'], x)


def test_what_no_tree_holds(tmp_path):
    class Odd(int): pass
    for value, message in [({1}, 'builtins.set'), (b'raw', 'builtins.bytes'), (np.float64(1), 'numpy.float64'), (Odd(3), 'Odd'), (torch.float32, 'torch.dtype'), (torch.Size([1]), 'torch.Size'), (object(), 'object'), (torch.empty(2, device='meta'), 'not dense'),
                           (torch.eye(2).to_sparse(), 'not dense'), (torch.zeros(1, dtype=torch.complex128), 'complex128'), (np.array(['a']), 'numpy array'), ({'x': lambda: 0}, 'function'), ({torch.zeros(1): 1}, 'key')]:
        with pytest.raises(TypeError, match=message) as caught: save_tree(dict(optimizer=[0, value]), tmp_path/'t')
        assert 'optimizer' in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_trees(tmp_path):
    save_tree(dict(step=1, x=torch.zeros(3)), tmp_path/'one'); save_tree(dict(step=2, x=torch.ones(3)), tmp_path/'two')
    with pytest.raises(FileNotFoundError, match='nothing.json and .*nothing.safetensors are missing'): load_tree(tmp_path/'nothing')
    shutil.copy(tmp_path/'two.json', tmp_path/'one.json')
    with pytest.raises(ValueError, match='do not belong together'): load_tree(tmp_path/'one')
    raw = (tmp_path/'two.safetensors').read_bytes()
    (tmp_path/'two.safetensors').write_bytes(raw[:-4])
    with pytest.raises(ValueError, match='truncated or damaged'): load_tree(tmp_path/'two')
    (tmp_path/'two.safetensors').write_bytes(raw)
    for text in '[]', '{"tree": {"$tensor": "nobody"}}', '{"tree": {"$int": "x"}}', 'no json', '{"tree": {"$dict": [[[], 1]]}}':
        (tmp_path/'two.json').write_text(text)
        save_file({}, tmp_path/'two.safetensors', metadata=dict(tree=hashlib.sha256(text.encode()).hexdigest()))
        with pytest.raises(ValueError, match='does not hold a tree'): load_tree(tmp_path/'two')


def test_optimizers_and_schedulers_come_back(tmp_path):
    from transformers import get_scheduler
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    def make(params): opt = torch.optim.AdamW(params, lr=.1); return opt, get_scheduler('cosine', opt, 2, 10)
    opt, schedule = make(model.parameters())
    def step(model, opt, schedule): opt.zero_grad(); model(torch.ones(1, 3)).square().sum().backward(); opt.step(); schedule.step()
    for _ in range(4): step(model, opt, schedule)
    save_tree(dict(model=model.state_dict(), opt=opt.state_dict(), schedule=schedule.state_dict()), tmp_path/'t')
    back, other = load_tree(tmp_path/'t'), nn.Linear(3, 3)
    other.load_state_dict(back['model'])
    opt2, schedule2 = make(other.parameters())
    opt2.load_state_dict(back['opt']); schedule2.load_state_dict(back['schedule'])
    for _ in range(3): step(model, opt, schedule); step(other, opt2, schedule2)
    assert torch.equal(model.weight, other.weight)
