"The runner: the same records for any batch size, after any kill, from any number of processes."
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest, torch
from transformers import AutoModelForCausalLM

from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.baseline import Answer, System, make_systems
from c2c_nb.bench import default_template, make_benchmark
from c2c_nb.evaluate import Evaluation, evaluate, read_records
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def pair(golden):
    receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', 'sharer2'))
    t = load_tokenizer(golden/'tokA')
    return C2CModel(receiver, [sharer], [Fuser.from_published(golden/'ckpt_s2'/'final').eval()], processor=C2CProcessor(t, [t])).eval()


def bench(assets, **kwargs): return make_benchmark('openbookqa', dict(data_files=str(assets/'benchmarks'/'openbookqa'/'main'/'test.jsonl'), limit=12) | kwargs)
plain = lambda records: sorted(json.dumps({k: v for k, v in r.items() if k not in ('seconds', 'scores', 'extra')}, sort_keys=True) for r in records)


@pytest.mark.parametrize('method', ['generate', 'options'])
def test_any_batch_size(pair, assets, tmp_path, method):
    systems, records = make_systems(pair, ['receiver', 'C2C', 'T2T'], message_tokens=6), []
    for size in 1, 5, 12: records.append(evaluate(systems, bench(assets), tmp_path/str(size), method=method, batch_size=size, max_new_tokens=6, progress=False).records)
    assert len(records[0]) == 36 and plain(records[0]) == plain(records[1]) == plain(records[2])
    if method == 'options':
        for a, b in zip(*(sorted(rs, key=lambda r: (r['system'], r['id'])) for rs in records[:2])):
            assert a['scores'].keys() == b['scores'].keys() and all(a['scores'][k] == pytest.approx(b['scores'][k], abs=1e-4) for k in a['scores'])


def test_real_benchmark_counts_what_it_leaves_out(pair, assets, tmp_path):
    "MMLU-Redux: questions without a right answer are dropped and reported, and all others have a record."
    b = make_benchmark('mmlu-redux', dict(data_files=str(assets/'benchmarks'/'mmlu-redux-2.0'), subjects=['anatomy', 'virology'], limit=15))
    e = evaluate(make_systems(pair, ['receiver']), b, tmp_path/'e', method='options', progress=False)
    asked, report = b.questions()
    assert e.count('receiver')[1] == len(asked) == report.kept and report.rows == 30 and report.left_out == 30 - len(asked)
    assert {r['subject'] for r in e.records} == {'anatomy', 'virology'} and {r['category'] for r in e.records} - {''}
    assert json.loads((tmp_path/'e'/'summary.json').read_text())['systems']['receiver']['asked'] == len(asked)
    assert e.results() == [dict(task='mmlu-redux, subjects=anatomy+virology, limit=15, options', system='receiver', correct=e.count('receiver')[0], total=len(asked))]


driver = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
from test_evaluate import *
golden, assets, out = map(Path, sys.argv[2:5])
receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', 'sharer2'))
t = load_tokenizer(golden/'tokA')
c2c = C2CModel(receiver, [sharer], [Fuser.from_published(golden/'ckpt_s2'/'final').eval()], processor=C2CProcessor(t, [t])).eval()
print('ready', flush=True)
evaluate(make_systems(c2c, ['receiver', 'C2C']), bench(assets), out, batch_size=2, max_new_tokens=6, progress=False)
'''


def port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def run(golden, assets, out, processes=1):
    head = [sys.executable] if processes == 1 else [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(processes), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port())]
    file = out.parent/'driver.py'; file.write_text(driver)
    return subprocess.Popen([*head, str(file), str(root/'tests'), str(golden), str(assets), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': '', 'GLOO_SOCKET_IFNAME': 'lo'})     # with --cpu accelerate would start one process


def test_killed_and_shared(pair, golden, assets, tmp_path):
    "Killed between two questions and started again by two processes, it ends with the records of one."
    whole = evaluate(make_systems(pair, ['receiver', 'C2C']), bench(assets), tmp_path/'whole', max_new_tokens=6, progress=False)
    p = run(golden, assets, tmp_path/'e')
    for _ in range(1200):
        if read_records(tmp_path/'e'): break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    some = read_records(tmp_path/'e')
    assert some and plain(some) != plain(whole.records)
    with open(tmp_path/'e'/'records-000.jsonl', 'a') as f: f.write('{"system": "rec')
    p = run(golden, assets, tmp_path/'e', 2)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-3000:]
    assert (tmp_path/'e'/'records-001.jsonl').exists() and plain(read_records(tmp_path/'e')) == plain(whole.records)
    assert sum(l.endswith('}') for f in (tmp_path/'e').glob('records*') for l in f.read_text().splitlines()) == len(whole.records), 'nobody asks what another process asks, or what has been asked'


class Fails(System):
    "Raises an error at questions whose number, counted from 0, is in a set."
    name = 'fails'
    def __init__(self, at): self.at, self.seen = at, {}
    def describe(self): return dict(system='Fails')
    def respond(self, prompts, options, max_new_tokens, questions, stages):
        for q in questions: self.seen.setdefault(q, len(self.seen))
        if any(self.seen[q] in self.at for q in questions): raise MemoryError('no room')
        return [Answer(text='B', tokens_out=1, seconds={}) for _ in prompts]


def test_errors_are_counted_and_too_many_fail(assets, tmp_path):
    e = evaluate({'fails': Fails({3})}, bench(assets), tmp_path/'few', max_errors=.1, batch_size=6, progress=False)
    wrong = [r for r in e.records if r['error']]
    assert len(wrong) == 1 and not wrong[0]['correct'] and 'no room' in wrong[0]['error'] and len(e.records) == 12 and e.rows()[1][5] == 1
    with pytest.raises(RuntimeError, match='more than the share'): evaluate({'fails': Fails({3, 7})}, bench(assets), tmp_path/'many', max_errors=.1, progress=False)
    assert not (tmp_path/'many'/'summary.json').exists()
    with pytest.raises(RuntimeError, match='every one of the first'): evaluate({'fails': Fails(set(range(12)))}, bench(assets), tmp_path/'all', progress=False)
    records = tmp_path/'few'/'records-000.jsonl'
    records.write_text(''.join(records.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RuntimeError, match='11 of 12 questions have a record'): Evaluation(tmp_path/'few', ['fails']).check(12, 1.)


def test_refused(pair, assets, tmp_path):
    systems = make_systems(pair, ['receiver'])
    evaluate(systems, bench(assets, limit=2), tmp_path/'e', max_new_tokens=2, progress=False)
    before = {f.name: f.read_bytes() for f in (tmp_path/'e').iterdir()}
    for other in dict(benchmark=bench(assets, limit=3)), dict(method='options'), dict(template=default_template('direct')), dict(max_new_tokens=3):
        with pytest.raises(FileExistsError, match='another evaluation'): evaluate(systems, **(dict(benchmark=bench(assets, limit=2), max_new_tokens=2) | other), folder=tmp_path/'e', progress=False)
    assert {f.name: f.read_bytes() for f in (tmp_path/'e').iterdir()} == before
    evaluate(make_systems(pair, ['C2C']), bench(assets, limit=2), tmp_path/'e', max_new_tokens=2, progress=False)      # a further system may join
    assert {r['system'] for r in read_records(tmp_path/'e')} == {'receiver', 'C2C'}
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'notes.txt').write_text('x')
    with pytest.raises(FileExistsError, match='something else'): evaluate(systems, bench(assets), tmp_path/'mine', progress=False)
    with pytest.raises(ValueError, match="'generate' or 'options'"): evaluate(systems, bench(assets), tmp_path/'x', method='logits', progress=False)
    with pytest.raises(ValueError, match='no systems'): evaluate({}, bench(assets), tmp_path/'x', progress=False)
    assert not (tmp_path/'x').exists()


def shell(*args, cwd):
    code = 'import sys\nfrom c2c_nb.cli import c2c_evaluate\nif __name__ == "__main__": sys.argv[0] = "c2c_evaluate"; sys.exit(c2c_evaluate())'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=cwd, env={**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': ''}, timeout=300)


def test_command(pair, golden, assets, tmp_path):
    "A fuser from a folder, a benchmark from a file: table, comparison, records; what is wrong is said before the models are loaded."
    pair.save_pretrained(tmp_path/'fuser')
    args = [str(tmp_path/'fuser'), 'openbookqa', str(tmp_path/'out'), '--systems', 'receiver', 'C2C', '--args', f'data_files={assets}/benchmarks/openbookqa/main/test.jsonl', 'limit=6', '--max-new-tokens', '4', '--quiet']
    done = shell(*args, cwd=golden)     # where its models are
    assert done.returncode == 0, done.stderr
    assert 'of 6' in done.stdout and 'the receiver alone' in done.stdout and len(read_records(tmp_path/'out')) == 12
    for change, says in ((['--method', 'logits'], 'known are generate, options'), (['--max-new-tokens', '5'], 'another evaluation')):
        done = shell(*args, *change, cwd=golden)
        assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr
        assert ('Loading' in done.stderr) == ('logits' not in change), 'what can be seen without torch is said without it'
    assert "did you mean 'openbookqa'" in shell(str(tmp_path/'fuser'), 'openbokqa', 'x', '--quiet', cwd=tmp_path).stderr


class Says(System):
    "Says always the same; raises an error at the questions that it is told to."
    name = 'says'
    def __init__(self, text, fails=()): self.text, self.fails, self.asked = text, set(fails), 0
    def describe(self): return dict(system='says', text=self.text)
    def respond(self, prompts, options, max_new_tokens, questions, stages):
        self.asked += len(prompts)
        if any(i in q for q in questions for i in self.fails): raise ArithmeticError('out of memory, say')
        return [Answer(self.text, tokens_out=1) for _ in prompts]


def few(tmp_path, kind='text', answers=None):
    file = tmp_path/'questions.jsonl'
    file.write_text(''.join(json.dumps(dict(question=f'question number {i:02d}', answer=(answers or {}).get(i, 'yes'))) + '\n' for i in range(20)))
    return make_benchmark('questions', dict(data_files=str(file), split='train', answers=kind))


def test_an_error_is_not_for_ever(tmp_path):
    "What raised an error is asked again, and only that; a start that failed leaves no wrong answers behind."
    b, bad = few(tmp_path), Says('yes', [f'{i:02d}' for i in range(20)])
    with pytest.raises(RuntimeError, match='every one of the first'): evaluate({'says': bad}, b, tmp_path/'e', batch_size=8, progress=False)
    with pytest.raises(RuntimeError, match='more than the share'): evaluate({'says': Says('yes', ['07', '11'])}, b, tmp_path/'e', batch_size=8, progress=False)
    good = Says('yes')
    e = evaluate({'says': good}, b, tmp_path/'e', batch_size=8, progress=False)
    assert e.count('says') == (20, 20) and good.asked == 2 and not any(r['error'] for r in e.records)


@pytest.mark.parametrize('text', ['one\u2028two', 'a\x85b', '東京', 'x\x0cy\x1dz'])
def test_any_characters_in_records(tmp_path, text):
    "Line ends of other kinds in an answer, and a kill in the middle of a character."
    b = few(tmp_path)
    assert len(evaluate({'says': Says(text)}, b, tmp_path/'e', progress=False).records) == 20
    file = tmp_path/'e'/'records-000.jsonl'
    whole = file.read_bytes()
    cut = whole.index(text.encode()[-1:], len(whole)*2//3) if text.encode()[-1] > 127 else len(whole)*2//3
    file.write_bytes(whole[:cut])
    e = evaluate({'says': Says(text)}, b, tmp_path/'e', progress=False)
    assert len(e.records) == 20 and {r['text'] for r in e.records} == {text}


def test_the_same_call_again(tmp_path):
    "However its arguments are written, and wherever its file lies now."
    b = few(tmp_path)
    ask = lambda **kw: evaluate({'says': Says('yes')}, make_benchmark('questions', dict(split='train', answers='text') | kw), tmp_path/'e', progress=False)
    ask(data_files=str(tmp_path/'questions.jsonl'), limit=(0, 10))
    (tmp_path/'moved.jsonl').write_bytes((tmp_path/'questions.jsonl').read_bytes())
    assert len(ask(data_files=str(tmp_path/'moved.jsonl'), limit=[0, 10]).records) == 10
    with pytest.raises(FileExistsError, match='another evaluation'): ask(data_files=str(tmp_path/'moved.jsonl'), limit=[0, 12])


@pytest.mark.parametrize('values, says', [(dict(batch_size=0), 'batch_size=0'), (dict(batch_size=-1), 'batch_size=-1'), (dict(max_new_tokens=0), 'max_new_tokens=0'), (dict(max_errors=7), 'max_errors=7'), (dict(max_errors=-.1), 'max_errors=-0.1')])
def test_numbers_that_make_no_sense(tmp_path, values, says):
    with pytest.raises(ValueError, match=says): evaluate({'says': Says('yes')}, few(tmp_path), tmp_path/'e', progress=False, **values)
    assert not (tmp_path/'e').exists()


def test_a_measure_is_not_lost(tmp_path):
    "Where answers are graded between 0 and 1, tables and comparisons are of the measure."
    class Half(Says):
        def respond(self, *args): return [Answer(self.text, tokens_out=1) for _ in args[0]]
    b = few(tmp_path)
    grade = type(b).grade
    class Graded(type(b)):
        def grade(self, prediction, question): return .75 if prediction == 'good' else .25
    g = Graded(data_files=b.data_files, split='train', answers='text')
    e = evaluate({'a': Half('good'), 'b': Half('bad')}, g, tmp_path/'e', progress=False)
    assert e.graded and e.rows()[0][2] == 'mean score' and [r[2] for r in e.rows()[1:]] == ['75.0 %', '25.0 %']
    assert e.compare('a', 'b').difference == pytest.approx(.5) and e.compare('a', 'b').p < .01


def test_a_card_tells_tasks_apart(pair, tmp_path):
    "What was asked in another way stands beside it, what was asked again in its place."
    fuser = Fuser.from_pretrained(pair.fusers[0].save_pretrained(tmp_path/'fuser') or tmp_path/'fuser')
    asked = [('e', 'yes', {}), ('f', 'no', dict(limit=10)), ('g', 'no', {}), ('h', 'yes', dict(template=default_template('cot'))), ('i', 'yes', dict(max_length=50, tokenizer=pair.processor.receiver_tokenizer))]
    for folder, text, how in asked:
        b = few(tmp_path)
        if 'limit' in how: b.limit = how.pop('limit')
        kept = evaluate({'says': Says(text)}, b, tmp_path/folder, progress=False, **how).add_to_card(fuser)
    name = 'questions, split=train, answers=text'
    assert [(r['task'], r['correct']) for r in kept] == [('questions, split=train, limit=10, answers=text', 0), (name, 0), (f'{name}, cot', 20), (f'{name}, at most 50 tokens', 20)]


def test_tokens_of_a_message_count(pair, assets, tmp_path):
    "What T2T's sharer wrote is written, too."
    e = evaluate(make_systems(pair, ['receiver', 'T2T'], message_tokens=6), bench(assets, limit=3), tmp_path/'e', max_new_tokens=4, progress=False)
    rs = list(e.by['T2T'].values())
    assert all(r['extra']['message_tokens'] for r in rs) and e.rows()[2][-2] == f"{sum(r['tokens_out'] + r['extra']['message_tokens'] for r in rs)/3:.1f}"


def test_cut_or_refused(tmp_path):
    with pytest.raises(ValueError, match='tokenizer that counts'): evaluate({'says': Says('yes')}, few(tmp_path), tmp_path/'e', max_length=9, progress=False)
    with pytest.raises(ValueError, match='max_length=0'): evaluate({'says': Says('yes')}, few(tmp_path), tmp_path/'e', max_length=0, progress=False)
    assert not (tmp_path/'e').exists()
