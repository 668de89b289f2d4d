"Fusers on the hub: the card, what is uploaded, what is downloaded; with huggingface_hub's own client against a hub in a thread, and against faked uploads."
import re

import pytest, torch, yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from c2c_nb.align import load_tokenizer
from c2c_nb.fuser import CARD_MARK, Fuser
from c2c_nb.hub import hub_id, local_folder, read_json, wilson

from conftest import root, run_python
from fake_hub import fake_hub
from tiny import fuser_for, tiny

results = [dict(task='OpenBookQA', system='receiver alone', correct=191, total=500), dict(task='OpenBookQA', system='C2C', correct=263, total=500)]


def named_fuser(**training):
    "A fuser as after training, between models that have names."
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1), alignment='longest')
    fuser.config.receiver |= dict(name='Qwen/Qwen3-0.6B', revision='c1899de')
    fuser.config.sharer |= dict(name='meta-llama/Llama-3.2-1B-Instruct')
    fuser.config.training = dict(dict(steps=300, datasets=['teknium/OpenHermes-2.5'], recipe=dict(learning_rate=1e-4), results=results, license='apache-2.0'), **training)
    return fuser


def front(card): return yaml.safe_load(re.match(r'---\n(.*?)\n---\n', card, re.S)[1])


# the card

def test_the_card_says_it_all(tmp_path):
    fuser = named_fuser()
    fuser.save_pretrained(tmp_path/'fuser')
    assert sorted(p.name for p in (tmp_path/'fuser').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    card = (tmp_path/'fuser'/'README.md').read_text()
    top = front(card)
    assert top['library_name'] == 'c2c_nb' and top['base_model'] == ['Qwen/Qwen3-0.6B', 'meta-llama/Llama-3.2-1B-Instruct'] and top['datasets'] == ['teknium/OpenHermes-2.5'] and top['license'] == 'apache-2.0'
    assert {'c2c', 'kv-cache', 'pytorch_model_hub_mixin'} <= set(top['tags']) and top['pipeline_tag'] == 'text-generation'
    facts = fuser.config
    for says in ('works for this pair only', 'c1899de', facts.receiver['weights'], facts.sharer['weights'], fuser.fingerprint(), 'C2CProjector', 'hidden dim | 16', '3 of 3 of the receiver', '0 0 1', 'longest', f'{sum(p.numel() for p in fuser.parameters()):,}',
            'learning_rate', '| steps | 300 |', '263 of 500 | 52.6 % | 48.2 to 56.9 %', '191 of 500 | 38.2 % | 34.0 to 42.5 %', "C2CModel.from_pretrained('fuser'", "Fuser.from_pretrained('fuser')", 'apache-2.0', 'open gates | 3 of 3 for keys'): assert says in card, says
    loaded = ModelCard.load(tmp_path/'fuser'/'README.md')
    assert loaded.data.base_model == top['base_model'] and CARD_MARK in loaded.text


def test_a_card_of_a_fuser_that_knows_nothing(tmp_path):
    fuser = fuser_for(tiny('qwen3'), tiny('llama', 1))
    card = fuser.generate_model_card().content
    assert 'No results were recorded' in card and 'No licence was recorded' in card and 'Nothing was recorded' in card
    assert not {'base_model', 'datasets', 'license', 'metrics'} & front(card).keys()


def test_a_card_tells_no_folders_of_this_machine(tmp_path):
    fuser = named_fuser(imported_from=str(tmp_path/'secret'/'final'))
    fuser.config.receiver['name'] = str(tmp_path/'secret'/'my-receiver')
    card = fuser.generate_model_card().content
    assert str(tmp_path) not in card and 'secret' not in card and '| my-receiver |' in card and front(card)['base_model'] == ['meta-llama/Llama-3.2-1B-Instruct']


def test_a_card_survives_what_stands_in_a_config():
    nasty = 'a | b\n# heading <script>alert(1)</script> `code`'
    fuser = named_fuser(note=nasty, results=[dict(task=nasty, system=nasty, correct=1, total=2)], license=None)
    fuser.config.receiver['name'] = nasty
    card = fuser.generate_model_card('me/my-fuser').text
    assert '<script>' not in card and not re.search(r'^# heading', card, re.M)
    for line in card.splitlines():
        if line.startswith('|'): assert len(re.findall(r'(?<!\\)\|', line)) in (3, 4, 6), line


def test_hand_written_cards_are_kept_and_ours_renewed(tmp_path):
    fuser, file = named_fuser(), tmp_path/'fuser'/'README.md'
    fuser.save_pretrained(tmp_path/'fuser')
    fuser.config.training['steps'] = 999
    fuser.save_pretrained(tmp_path/'fuser')
    assert '| steps | 999 |' in file.read_text()
    file.write_text(file.read_text().replace(CARD_MARK, 'edited'))
    fuser.config.training['steps'] = 1000
    fuser.save_pretrained(tmp_path/'fuser')
    assert '| steps | 999 |' in file.read_text() and Fuser.from_pretrained(tmp_path/'fuser').config.training['steps'] == 1000
    (tmp_path/'fuser'/'README.md').write_bytes(b'\xff\xfe not text')
    fuser.save_pretrained(tmp_path/'fuser')
    assert file.read_bytes() == b'\xff\xfe not text'


@pytest.mark.parametrize('bad,says', [('97 %', 'must be a list'), ([3], 'results[0] is 3'), ([{}], "needs 'task', 'system', 'correct' and 'total'"), ([results[0] | dict(correct=501)], '501 correct of 500'), ([results[0] | dict(correct=-1)], '-1 correct'),
    ([results[0], results[0] | dict(total=0, correct=0)], 'results[1]'), ([results[0] | dict(correct=.382)], 'whole numbers'), ([results[0] | dict(correct='191')], 'whole numbers'), ([results[0] | dict(correct=True)], 'whole numbers')])
def test_results_that_cannot_be(tmp_path, bad, says):
    "Named, and nothing is written; what was there stays."
    fuser = named_fuser()
    fuser.save_pretrained(tmp_path/'old')
    before = {p.name: p.read_bytes() for p in (tmp_path/'old').iterdir()}
    fuser.config.training['results'] = bad
    for folder in 'old', 'new':
        with pytest.raises(ValueError) as e: fuser.save_pretrained(tmp_path/folder)
        assert says in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ['old'] and {p.name: p.read_bytes() for p in (tmp_path/'old').iterdir()} == before


def test_intervals_are_wilsons():
    stats = pytest.importorskip('scipy.stats')
    for k, n in (0, 10), (10, 10), (263, 500), (1, 3):
        expected = stats.binomtest(k, n).proportion_ci(.95, 'wilson')
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_names_for_the_hub(tmp_path, monkeypatch):
    assert [hub_id(x) for x in ('Qwen/Qwen3-0.6B', 'gpt2', '/a/b', './a', 'a/b/c', 'a b/c', 'a//b', '', None, 3, str(tmp_path))] == ['Qwen/Qwen3-0.6B'] + [None]*10
    (tmp_path/'models'/'mine').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id('models/mine') is None and hub_id('models/other') == 'models/other'


# to the hub and back

def test_it_is_the_mixin():
    assert issubclass(Fuser, PyTorchModelHubMixin) and Fuser._save_pretrained is not PyTorchModelHubMixin._save_pretrained


def test_what_goes_up(monkeypatch, tmp_path):
    "Exactly the three files of a saved fuser, in the repository that was named."
    seen = {}
    class Made: repo_id = 'me/my-fuser'
    monkeypatch.setattr('huggingface_hub.HfApi.create_repo', lambda self, repo_id, **kw: (seen.update(repo=repo_id, private=kw['private']), Made)[1])
    def upload(self, *, repo_id, folder_path, **kw):
        seen.update(kw, to=repo_id, files={p.relative_to(folder_path).as_posix(): p.read_bytes() for p in folder_path.rglob('*')})
        return 'https://huggingface.co/me/my-fuser/commit/1'
    monkeypatch.setattr('huggingface_hub.HfApi.upload_folder', upload)
    fuser = named_fuser()
    assert fuser.push_to_hub('me/my-fuser', private=True, commit_message='first', branch='dev').endswith('/commit/1')
    assert (seen['repo'], seen['to'], seen['private'], seen['commit_message'], seen['revision'], seen['repo_type']) == ('me/my-fuser', 'me/my-fuser', True, 'first', 'dev', 'model')
    assert sorted(seen['files']) == ['README.md', 'config.json', 'model.safetensors']
    assert "Fuser.from_pretrained('me/my-fuser')" in seen['files']['README.md'].decode()
    for name, data in seen['files'].items(): (tmp_path/name).write_bytes(data)
    assert Fuser.from_pretrained(tmp_path).fingerprint() == fuser.fingerprint()
    assert fuser.save_pretrained(tmp_path/'saved', push_to_hub=True, repo_id='me/my-fuser', private=False).endswith('/commit/1') and seen['private'] is False
    with pytest.raises(TypeError, match='save_pretrained does not know colour'): fuser.save_pretrained(tmp_path/'saved', colour='red')
    fuser.config.training['results'] = 'good'
    seen.pop('files')
    with pytest.raises(ValueError, match='must be a list'): fuser.push_to_hub('me/my-fuser')
    assert 'files' not in seen


ROUND_TRIP = """
import sys, torch
from c2c_nb.align import load_tokenizer
from c2c_nb.fuser import Fuser
from c2c_nb.hub import local_folder
fuser = Fuser.from_pretrained({folder!r})
print('pushed', fuser.push_to_hub('me/my-fuser', token='hf_test'))
for kw in dict(), dict(revision={first!r}), dict(subfolder='inner/fuser'), dict(dtype=torch.bfloat16), dict(subfolder='/inner/fuser/'):
    again = Fuser.from_pretrained('me/' + ('many' if 'subfolder' in kw else 'my-fuser'), **kw)
    print('loaded', again.fingerprint(), again.dtype, again.config.training['steps'])
published = Fuser.from_published('authors/C2C_Fuser', subfolder='a+b_Fuser/final/', revision='v1')
print('published', published.fingerprint(), published.config.receiver, published.config.training['revision'])
for name, kw in ('me/nothing', dict()), ('me/my-fuser', dict(revision='nonesuch')), ('me/my-fuser', dict(subfolder='elsewhere')):
    try: Fuser.from_pretrained(name, **kw)
    except FileNotFoundError as e: print('refused', str(e).splitlines()[0])
for load in Fuser.from_pretrained, load_tokenizer:
    try: load('me/gated')
    except FileNotFoundError as e: print('refused', str(e).splitlines()[0])
for kw in dict(), dict(revision='nonesuch'):
    try: load_tokenizer('me/nothing' if not kw else 'me/my-fuser', **kw)
    except FileNotFoundError as e: print('refused', str(e).splitlines()[0])
print('tokenizer', len(load_tokenizer('me/many', subfolder='/inner/words/')))
"""


def test_there_and_back_with_the_real_client(tmp_path, golden):
    "huggingface_hub uploads to and downloads from a hub in a thread: `revision`, `subfolder`, only the files that are needed."
    fuser = named_fuser()
    fuser.save_pretrained(tmp_path/'fuser')
    files = lambda folder, prefix='': {prefix + p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    older = named_fuser(steps=7)
    older.save_pretrained(tmp_path/'older')
    published = files(golden/'ckpt_s1', 'a+b_Fuser/')
    with fake_hub() as (hub, address):
        hub.gated.add('me/gated'); hub.commit('me/gated', {'config.json': b'{}', 'tokenizer.json': b'{}'})
        hub.commit('me/many', files(golden/'tokA', 'inner/words/'))
        first = hub.commit('me/my-fuser', files(tmp_path/'older'))
        hub.commit('me/many', files(tmp_path/'fuser', 'inner/fuser/') | {'inner/other/model.safetensors': b'huge'})
        hub.commit('authors/C2C_Fuser', published | {'c+d_Fuser/final/projector_0.pt': b'huge'}, 'v1')
        done = run_python(ROUND_TRIP.format(folder=str(tmp_path/'fuser'), first=first), cwd=root, timeout=120, HF_ENDPOINT=address, HF_HUB_OFFLINE='0', TRANSFORMERS_OFFLINE='0', HF_HOME=str(tmp_path/'home'), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1')
    assert done.returncode == 0, done.stderr[-3000:]
    out = done.stdout.splitlines()
    assert [o.split()[0] for o in out] == ['pushed'] + ['loaded']*5 + ['published'] + ['refused']*7 + ['tokenizer'], done.stdout
    assert out[0].startswith(f'pushed {address}/me/my-fuser')
    assert set(hub.repos['me/my-fuser']['main']) == {'README.md', 'config.json', 'model.safetensors'}
    assert hub.repos['me/my-fuser']['main']['model.safetensors'] == (tmp_path/'fuser'/'model.safetensors').read_bytes() and b"Fuser.from_pretrained('me/my-fuser')" in hub.repos['me/my-fuser']['main']['README.md']
    mine = fuser.fingerprint()
    assert out[1].split()[1:] == [mine, 'torch.float32', '300'] and out[2].split()[1:] == [older.fingerprint(), 'torch.float32', '7'] and out[3].split()[1:] == [mine, 'torch.float32', '300'] and out[4].split()[2] == 'torch.bfloat16' and out[5] == out[3]
    assert Fuser.from_published(golden/'ckpt_s1'/'final').fingerprint() in out[6] and "{'name': 'receiver'}" in out[6] and out[6].endswith('v1')
    assert 'no such repository' in out[7] and 'me/my-fuser' in out[8] and 'holds no config.json' in out[9]
    for line in out[10:12]: assert 'the repository me/gated is gated' in line and 'ask for access' in line and 'hf auth login' in line
    assert 'no such repository' in out[12] and 'me/my-fuser' in out[13] and 'no such repository' not in out[13]
    assert int(out[14].split()[1]) == len(load_tokenizer(golden/'tokA'))
    assert not [a for a in hub.asked if 'inner/other' in a or 'c+d_Fuser' in a], 'files were downloaded that nobody needs'


# on this machine

@pytest.mark.parametrize('subfolder', ['a/b', '/a/b', 'a/b/', '//a/b//'])
def test_slashes_around_a_subfolder(tmp_path, golden, subfolder):
    named_fuser().save_pretrained(tmp_path/'a'/'b')
    assert local_folder(tmp_path, ('config.json',), subfolder) == tmp_path/'a'/'b'
    assert Fuser.from_pretrained(tmp_path, subfolder=subfolder).fingerprint() == named_fuser().fingerprint()
    assert Fuser.from_published(golden, subfolder=subfolder.replace('a', 'ckpt_s1').replace('b', 'final')).config.training['imported_from'] == 'ckpt_s1/final'
    assert len(load_tokenizer(golden, subfolder=subfolder.replace('a/b', 'tokA'))) == len(load_tokenizer(golden/'tokA'))


@pytest.mark.parametrize('content,says', [('', 'damaged'), ('{', 'damaged'), (b'\xff\xfe\x00', 'damaged'), ('['*100_000, 'damaged'), ('{"a":'*100_000, 'damaged'), (None, 'is not valid JSON')], ids=['empty', 'half', 'bytes', 'deep list', 'deep dict', 'folder'])
def test_json_that_cannot_be_read(tmp_path, content, says):
    file = tmp_path/'x.json'
    if content is None: file.mkdir()
    else: file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as e: read_json(file)
    assert str(file) in str(e.value)
