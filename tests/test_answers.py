"Generating answers: a server with every bad habit, a kill in the middle, and the golden model."
import copy, json, os, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM

from c2c_nb.align import load_tokenizer, read_chat
from c2c_nb.answers import Answer, LocalModel, Prompt, Sampling, Server, Unanswered, generate_answers, make_answers, read_prompts, recover, split_thinking
from c2c_nb.data import Chats, load_samples
from c2c_nb.sets import GSM8K, Generated
from conftest import root

KEY = 'sk-very-secret-4711'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.getbasetemp()/'datasets'))
    datasets.disable_progress_bars()


@pytest.fixture
def serve():
    "Start servers that answer by a function of (number of the request, body) -> status, reply, headers."
    running = []
    def start(reply):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                with lock: server.seen.append((body, dict(self.headers), self.path)); n = len(server.seen)
                out = reply(n, body)
                if out is None: self.connection.close(); return          # hang up
                status, data, headers = (*out, {})[:3]
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                try:
                    self.send_response(status)
                    for k, v in headers.items(): self.send_header(k, v)
                    self.send_header('Content-Length', str(len(data))); self.end_headers(); self.wfile.write(data)
                except OSError: pass                                     # whoever asked is gone
        lock, server = threading.Lock(), ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.daemon_threads, server.seen = True, []
        server.url = f'http://127.0.0.1:{server.server_port}/v1'
        threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
        running.append(server)
        return server
    yield start
    for server in running: server.shutdown(); server.server_close()


def ok(text, finish='stop', **more): return 200, dict(choices=[dict(message=dict(role='assistant', content=text, **more), finish_reason=finish)])
def asked(body): return body['messages'][-1]['content']
def client(server, **args): return Server(server.url, 'm', **{**dict(key_env='C2C_TEST_KEY', wait=.005, concurrency=4, retries=4), **args})
def lines(path): return [json.loads(x) for x in path.read_text(encoding='utf-8').split('\n') if x]
def run(prompts, model, out, *args, **kwargs): return generate_answers(prompts, model, out, *args, progress=False, **kwargs)


# ---------------------------------------------------------------- a server

def test_messages_settings_and_key_are_sent(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('C2C_TEST_KEY', KEY)
    server = serve(lambda n, body: ok('yes'))
    chat = [dict(role='user', content='<|im_start|>a'), dict(role='assistant', content='b'), dict(role='user', content='c')]
    report = run([chat], client(server), tmp_path/'a.jsonl', Sampling(extra=dict(min_p=.1)), 'Be kind.')
    body, headers, path = server.seen[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == f'Bearer {KEY}' and report.kept == 1
    assert body == dict(model='m', messages=[dict(role='system', content='Be kind.'), *chat], temperature=.7, top_p=.8, top_k=20, max_tokens=1024, seed=0, min_p=.1)
    run(['x'], client(server), tmp_path/'b.jsonl', Sampling(thinking=False, top_k=None))
    assert server.seen[1][0]['chat_template_kwargs'] == dict(enable_thinking=False) and 'top_k' not in server.seen[1][0]
    for p in tmp_path.iterdir(): assert KEY not in p.read_text()
    monkeypatch.delenv('C2C_TEST_KEY'); run(['y'], client(server), tmp_path/'b.jsonl', Sampling(thinking=False, top_k=None))
    assert 'Authorization' not in server.seen[2][1]


def test_busy_servers_are_waited_for(serve, tmp_path):
    failures = Counter()
    def reply(n, body):
        failures[asked(body)] += 1
        bad = {'0': 429, '1': 500, '2': 503, '3': None, '4': 502}.get(asked(body))
        if failures[asked(body)] <= 3 and asked(body) in '01234': return bad and (bad, dict(error=dict(message='busy')))
        return ok(f'answer {asked(body)}')
    server = serve(reply)
    report = run([str(i) for i in range(12)], client(server), tmp_path/'a.jsonl')
    assert (report.rows, report.kept, report.problems) == (12, 12, {})
    assert {r['input_text']: r['model_response'] for r in lines(tmp_path/'a.jsonl')} == {str(i): f'answer {i}' for i in range(12)}
    assert [failures[str(i)] for i in range(6)] == [4]*5 + [1]


def test_a_server_says_how_long_to_wait(serve, tmp_path):
    times = []
    def reply(n, body):
        times.append(time.monotonic())
        return (429, {}, {'Retry-After': '1'}) if n == 1 else ok('yes')
    assert run(['a'], client(serve(reply)), tmp_path/'a.jsonl').kept == 1 and times[1] - times[0] >= .95


def test_failures_are_counted_for_each_prompt_and_tried_again(serve, tmp_path):
    well = threading.Event()
    def reply(n, body):
        bad = {'1': (400, dict(error=dict(message=f'context   too long {KEY}'))), '2': (500, 'oops'), '3': (200, b'no json'), '4': (200, dict(choices=[])), '5': (200, dict(choices=[dict(message=dict(content=[1]))]))}
        return ok('yes') if well.is_set() or asked(body) not in bad else bad[asked(body)]
    server = serve(reply)
    report = run([str(i) for i in range(8)], client(server, retries=1), tmp_path/'a.jsonl')
    assert (report.rows, report.kept, report.left_out) == (8, 3, 5)
    assert {k: sorted(v) for k, v in report.problems.items()} == {f'HTTP 400: context too long {KEY}': [1], 'HTTP 500: oops': [2], 'the reply is not JSON': [3], 'the reply has no answer in it': [4, 5]}     # no key was set here, so nothing is hidden
    assert Counter(asked(b) for b, *_ in server.seen) == Counter({**{str(i): 1 for i in range(8)}, '2': 2})          # only what may get better is asked again
    assert {r['input_text'] for r in lines(tmp_path/'a.jsonl')} == {'0', '6', '7'}
    well.set()
    again = run([str(i) for i in range(8)], client(server), tmp_path/'a.jsonl')
    assert (again.found, again.kept, again.problems) == (3, 8, {}) and len(lines(tmp_path/'a.jsonl')) == 8


def test_the_key_is_never_shown(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('C2C_TEST_KEY', KEY)
    server = serve(lambda n, body: (400, dict(error=dict(message=f'bad key {KEY}'))) if asked(body) == 'a' else (401, f'who is {KEY}?'))
    model = client(server)
    report = run(['a'], model, tmp_path/'a.jsonl')
    assert 'bad key ***' in repr(report)
    with pytest.raises(ConnectionError, match=r'HTTP 401: who is \*\*\*\?.*C2C_TEST_KEY, which is set') as e: run(['b'], model, tmp_path/'a.jsonl')
    assert KEY not in repr(report) + str(e.value) + repr(model) + ''.join(p.read_text() for p in tmp_path.iterdir()) + ''.join(capfd.readouterr())
    import traceback
    assert KEY not in ''.join(traceback.format_exception(e.value))


def test_the_key_is_not_sent_on(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('C2C_TEST_KEY', KEY)
    other = serve(lambda n, body: ok('stolen'))
    first = serve(lambda n, body: (302, {}, {'Location': other.url + '/chat/completions'}))
    with pytest.raises(ConnectionError, match='HTTP 302'): run(['a'], client(first), tmp_path/'a.jsonl')
    assert not other.seen


def test_a_server_that_is_gone_ends_the_run(serve, tmp_path):
    server = serve(lambda n, body: ok('yes') if n <= 3 else None)
    with pytest.raises(ConnectionError, match='5 prompts in a row got no answer .* What was answered is kept'):
        run([str(i) for i in range(1000)], client(server, retries=0, patience=5, concurrency=1), tmp_path/'a.jsonl')
    assert len(lines(tmp_path/'a.jsonl')) == 3 and len(server.seen) < 1000
    with pytest.raises(ConnectionError, match='no reply: '): run(['x'], Server('http://127.0.0.1:9/v1', 'm', retries=1, wait=.01, patience=1), tmp_path/'b.jsonl')
    with pytest.raises(ConnectionError, match='HTTP 404'): run(['x'], client(serve(lambda n, body: (404, dict(error='no such model')))), tmp_path/'c.jsonl')


def test_a_server_that_never_replies_is_given_up(serve, tmp_path):
    server = serve(lambda n, body: time.sleep(3) or ok('late') if asked(body) == 'slow' else ok('yes'))
    start = time.monotonic()
    report = run(['slow', 'quick'], client(server, timeout=.3, retries=1), tmp_path/'a.jsonl')
    assert report.problems == {'no reply: TimeoutError': [0]} and report.kept == 1 and time.monotonic() - start < 2.9


def test_thoughts_and_cut_off_answers(serve, tmp_path):
    said = dict(a=ok('<think>\nhm\n</think>\n\nyes'), b=ok('yes', reasoning_content=' hm '), c=ok('yes and no and', 'length'), d=ok('<think>\nlet me', 'length'), e=ok(None, 'length', reasoning_content='let me'), f=ok('no', 'content_filter'), g=ok('hm</think>yes'), h=ok('yes', reasoning='hm'))
    report = run([*said], client(serve(lambda n, body: said[asked(body)])), tmp_path/'a.jsonl')
    got = {r['input_text']: (r['model_reasoning'], r['model_response'], r['is_finished'], r['finish_reason']) for r in lines(tmp_path/'a.jsonl')}
    assert got == dict(a=('hm', 'yes', True, 'stop'), b=('hm', 'yes', True, 'stop'), c=('', 'yes and no and', False, 'length'), d=('let me', '', False, 'length'), e=('let me', '', False, 'length'), f=('', 'no', False, 'content_filter'), g=('hm', 'yes', True, 'stop'), h=('hm', 'yes', True, 'stop'))
    assert report.unfinished == 4 and report.kept == 8
    samples, left = load_samples(Generated(data_files=str(tmp_path/'a.jsonl')))
    assert {s['prompt'][0]['content']: s['answer'] for s in samples} == dict.fromkeys('abgh', 'yes') and len(left.problems['unfinished answer']) == 4
    samples, left = load_samples(Generated(data_files=str(tmp_path/'a.jsonl'), unfinished=True))
    assert left.problems.keys() == {'answer: empty'} and left.kept == 6


@settings(max_examples=300, deadline=None)
@given(st.text('ab <>/think\n', max_size=12), st.text('ab\n ', max_size=8))
def test_thoughts_are_taken_off_and_nothing_else(thought, answer):
    assert split_thinking(answer) == ('', answer.strip())
    if '<think>' not in thought and '</think>' not in thought:
        assert split_thinking(f'<think>\n{thought}\n</think>\n\n{answer}') == (thought.strip(), answer.strip())
        assert split_thinking(f'{thought}\n</think>{answer}') == (thought.strip(), answer.strip())
        assert split_thinking(f'<think>{thought}') == (thought.strip(), '')


# ---------------------------------------------------------------- kills

WORKER = """
import sys
from c2c_nb.answers import Server, generate_answers
print('ready', flush=True)
generate_answers([f'prompt {{i}}' for i in range(60)], Server({url!r}, 'm', concurrency=3, wait=.01), {out!r}, progress=False)
"""


def test_killed_and_resumed(serve, tmp_path):
    out = tmp_path/'a.jsonl'
    server = serve(lambda n, body: time.sleep(.02) or ok(f'answer to {asked(body)} ' + 'x'*(n*37 % 400)))
    kills = 0
    for n in 8, 40:
        worker = subprocess.Popen([sys.executable, '-c', WORKER.format(url=server.url, out=str(out))], cwd=root, env=os.environ | dict(PYTHONPATH=str(root)), stdout=subprocess.PIPE)
        end = time.monotonic() + 60
        while (not out.exists() or out.read_bytes().count(b'\n') < n) and worker.poll() is None and time.monotonic() < end: time.sleep(.003)
        kills += worker.poll() is None
        worker.send_signal(signal.SIGKILL); worker.wait()
        before = out.read_bytes()
        assert before.count(b'\n') >= n
        with open(out, 'ab') as f: f.write(b'{"id": "half a li')                # what a kill in the middle of a write leaves
    assert kills == 2
    found = out.read_bytes().count(b'\n')
    report = run([f'prompt {i}' for i in range(60)], Server(server.url, 'm', concurrency=3), out)
    assert (report.found, report.kept, report.problems) == (found, 60, {}) and 40 <= found < 60
    got = lines(out)
    assert len(got) == 60 and Counter(r['input_text'] for r in got) == Counter(f'prompt {i}' for i in range(60))
    assert all(r['model_response'].startswith(f"answer to {r['input_text']} ") for r in got)
    assert len(server.seen) <= 60 + 3*2*2                                        # no more is asked again than was under way


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400))
def test_a_file_cut_anywhere_is_recovered(tmp_path_factory, cut):
    out = tmp_path_factory.mktemp('cut')/'a.jsonl'
    records = [dict(id=str(i), text='ä\u2028"x'*i, is_finished=bool(i % 2)) for i in range(5)]
    whole = b''.join(json.dumps(r, ensure_ascii=False).encode() + b'\n' for r in records)
    out.write_bytes(whole[:cut])
    complete = whole[:cut].count(b'\n')
    ids, unfinished = recover(out)
    assert ids == {str(i) for i in range(complete)} and unfinished == sum(not r['is_finished'] for r in records[:complete])
    assert out.read_bytes() == b''.join(whole.splitlines(keepends=True)[:complete])


def test_a_file_belongs_to_its_settings(serve, tmp_path):
    server, out = serve(lambda n, body: ok('yes')), tmp_path/'a.jsonl'
    run(['a'], client(server), out)
    for model, how, system, differs in ((client(server), Sampling(top_p=.9), None, 'top_p: 0.8 -> 0.9'), (Server(server.url, 'other'), None, None, "model: 'm' -> 'other'"), (client(server), None, 'Hi', "system: None -> 'Hi'"), (client(server), Sampling(extra=dict(a=1)), None, "extra: {} -> {'a': 1}")):
        with pytest.raises(ValueError) as e: run(['a', 'b'], model, out, how, system)
        assert differs in str(e.value)
    assert run(['a', 'b'], client(server, concurrency=1, timeout=9), out).kept == 2       # how fast it is asked is nobody's business
    (tmp_path/'a.settings.json').unlink()
    with pytest.raises(ValueError, match='how it was made'): run(['a'], client(server), out)
    (tmp_path/'b.jsonl').write_text('{"id": "a"}\n{"id": "b", "is_finished": true}\n'); (tmp_path/'b.settings.json').write_text((json.dumps(dict(format=1, model='m', temperature=.7, top_p=.8, top_k=20, max_tokens=1024, thinking=None, seed=0, extra={}, system=None))))
    with pytest.raises(ValueError, match='line 1 is damaged'): run(['a'], client(server), tmp_path/'b.jsonl')
    assert '{"id": "a"}' in (tmp_path/'b.jsonl').read_text()                      # nothing is thrown away
    (tmp_path/'c.settings.json').write_text('{"for')
    with pytest.raises(ValueError, match='c.settings.json is damaged'): run(['a'], client(server), tmp_path/'c.jsonl')


def test_a_full_disk_leaves_a_file_to_go_on_with(serve, tmp_path, monkeypatch):
    server, out, real = serve(lambda n, body: ok('yes')), tmp_path/'a.jsonl', os.fsync
    calls = []
    def full(fd):
        calls.append(fd)
        if len(calls) == 4: raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): run([str(i) for i in range(9)], client(server, concurrency=1), out)
    monkeypatch.setattr(os, 'fsync', real)
    assert run([str(i) for i in range(9)], client(server), out).kept == 9 and len({r['id'] for r in lines(out)}) == len(lines(out)) == 9


# ---------------------------------------------------------------- prompts

def test_prompts_of_all_kinds(serve, tmp_path):
    (tmp_path/'maths.jsonl').write_text('\n'.join(json.dumps(dict(question=f'{i}+1?', answer=a)) for i, a in enumerate(['1\n#### 1', None, '3\n#### 3'])))
    prompts, report = read_prompts(GSM8K(data_files=str(tmp_path/'maths.jsonl')))
    assert [(p.row, p.reference) for p in prompts] == [(0, '1\n#### 1'), (2, '3\n#### 3')] and report.problems == {'answer: nothing': [1]}
    report = run(GSM8K(data_files=str(tmp_path/'maths.jsonl')), client(serve(lambda n, body: ok('4'))), tmp_path/'a.jsonl')
    assert (report.rows, report.kept, report.problems) == (3, 2, {'answer: nothing': [1]})
    assert {r['row']: r['reference'] for r in lines(tmp_path/'a.jsonl')} == {0: '1\n#### 1', 2: '3\n#### 3'}
    assert [p.id for p in read_prompts(['a', 'b'])[0]] == [p.id for p in read_prompts(['a', 'b'])[0]] and read_prompts(['a'])[0][0].id != read_prompts(['a'], 'Hi')[0][0].id
    for bad in ([''], [[dict(role='assistant', content='a')]], [3], [[dict(role='user')]], [[]]):
        with pytest.raises(ValueError, match='prompt 0 is'): read_prompts(bad)
    with pytest.raises(ValueError, match='no prompts'): run([], client(serve(lambda n, body: ok('4'))), tmp_path/'b.jsonl')
    with pytest.raises(ValueError, match='ends in .jsonl'): run(['a'], None, tmp_path/'b.csv')


@pytest.mark.parametrize('args', [dict(temperature=-1), dict(top_p=0), dict(top_p=1.5), dict(top_k=0), dict(top_k=1.5), dict(max_tokens=0), dict(max_tokens=None), dict(temperature='hot'), dict(top_p=True)], ids=str)
def test_sampling_that_makes_no_sense(args):
    with pytest.raises(ValueError, match='was given; use'): Sampling(**args)


def test_addresses_that_make_no_sense():
    for url in 'localhost:8000', 'file:///etc/passwd', 'http://', '':
        with pytest.raises(ValueError, match='must be an address'): Server(url, 'm')
    with pytest.raises(ValueError, match='has a user or a password') as e: Server(f'http://me:{KEY}@host/v1', 'm')
    assert KEY not in str(e.value)


# ---------------------------------------------------------------- a local model

@pytest.fixture(scope='module')
def local(golden):
    model = AutoModelForCausalLM.from_pretrained(golden/'receiver', dtype=torch.float32)
    return model, load_tokenizer(str(golden/'receiver'))


CHATS = ['hi', 'what is the sum of two and two, please tell me', [dict(role='user', content='a'), dict(role='assistant', content='b'), dict(role='user', content='c')], 'the end', 'one two three four five', 'x y']


def test_greedy_answers_are_the_models_own(local, tmp_path):
    model, tokenizer = local
    own = []
    for chat in CHATS:
        ids = torch.tensor([read_chat(tokenizer, chat if isinstance(chat, list) else [dict(role='user', content=chat)]).ids])
        own.append(model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:].tolist())
    ended = [tokenizer.eos_token_id in row for row in own]
    report = run(CHATS, LocalModel(model, tokenizer, batch_size=4), tmp_path/'a.jsonl', Sampling(temperature=0, max_tokens=12))
    got = {r['row']: r for r in lines(tmp_path/'a.jsonl')}
    for i, row in enumerate(own):
        text = tokenizer.decode(row[:row.index(tokenizer.eos_token_id)] if ended[i] else row, skip_special_tokens=True)
        assert (got[i]['model_reasoning'], got[i]['model_response']) == split_thinking(text)
        assert got[i]['is_finished'] == ended[i] and got[i]['finish_reason'] == ('stop' if ended[i] else 'length')
    assert report.kept == len(CHATS) and report.unfinished == ended.count(False)


def test_an_answer_that_ends_is_finished(local, tmp_path):
    model, tokenizer = local
    eager = copy.deepcopy(model)
    greedy = lambda chat: LocalModel(eager, tokenizer).generate([LocalModel(eager, tokenizer)._read(Prompt(0, chat), Sampling(max_tokens=8))], Sampling(temperature=0, max_tokens=8))[0]
    ids = torch.tensor([read_chat(tokenizer, [dict(role='user', content='hi')]).ids])
    second = int(eager.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=0)[0, -1])
    eager.generation_config.eos_token_id = [second, 5]                 # models name more than one end
    assert greedy('hi').finish_reason == 'stop' and greedy('hi').finished
    report = run(CHATS, LocalModel(eager, tokenizer, batch_size=4), tmp_path/'a.jsonl', Sampling(temperature=0, max_tokens=8))
    got = {r['row']: r for r in lines(tmp_path/'a.jsonl')}
    for i, chat in enumerate(CHATS): assert (got[i]['model_response'], got[i]['finish_reason']) == (greedy(chat).text, greedy(chat).finish_reason)
    assert got[0]['is_finished'] and report.unfinished == sum(not r['is_finished'] for r in got.values())


def test_local_runs_resume_and_leave_nothing_behind(local, tmp_path):
    model, tokenizer = local
    model.train(); torch.manual_seed(3); state = torch.get_rng_state()
    out = tmp_path/'a.jsonl'
    class Killed(LocalModel):
        def answers(self, *args):
            for i, batch in enumerate(super().answers(*args)):
                if i == 2: raise KeyboardInterrupt
                yield batch
    how = Sampling(max_tokens=6)
    with pytest.raises(KeyboardInterrupt): run(CHATS, Killed(model, tokenizer, batch_size=2), out, how)
    assert len(lines(out)) == 4 and model.training and torch.equal(torch.get_rng_state(), state)
    report = run(CHATS, LocalModel(model, tokenizer, batch_size=2), out, how)
    assert (report.found, report.kept) == (4, 6) and len({r['id'] for r in lines(out)}) == 6
    run(CHATS, LocalModel(model, tokenizer, batch_size=2), tmp_path/'b.jsonl', how); run(CHATS, LocalModel(model, tokenizer, batch_size=2), tmp_path/'c.jsonl', how)
    assert lines(tmp_path/'b.jsonl') == lines(tmp_path/'c.jsonl')                  # the same draws
    run(CHATS, LocalModel(model, tokenizer, batch_size=2), tmp_path/'d.jsonl', Sampling(max_tokens=6, seed=1))
    assert [r['model_response'] for r in lines(tmp_path/'b.jsonl')] != [r['model_response'] for r in lines(tmp_path/'d.jsonl')]
    other = copy.deepcopy(model)
    with torch.no_grad(): next(iter(other.parameters())).mul_(2)
    with pytest.raises(ValueError, match='fingerprint: '): run(CHATS, LocalModel(other, tokenizer), out, how)
    model.eval()


def test_prompts_are_sorted_by_length(local, tmp_path):
    model, tokenizer = local
    widths = []
    class Watched(LocalModel):
        def generate(self, rows, *args): widths.append([len(r) for r in rows]); return [Answer('x')]*len(rows)
    prompts = ['word '*(1 + i*7 % 20) for i in range(20)]
    most = model.config.max_position_embeddings
    report = run([*prompts, 'word '*most], Watched(model, tokenizer, batch_size=4), tmp_path/'a.jsonl', Sampling(max_tokens=5))
    assert [len(w) for w in widths] == [4]*5 and [x for w in widths for x in w] == sorted(x for w in widths for x in w)
    assert report.kept == 20 and report.problems == {f'prompt and max_tokens exceed the {most} positions of the model': [20]}


def test_by_name(golden, assets, tmp_path):
    out = tmp_path/'a.jsonl'
    args = dict(data_files=str(assets/'train'/'sharegpt_en.jsonl'), limit=4)
    report = make_answers(str(out), 'Chats', str(golden/'receiver'), args, device='cpu', dtype='float32', max_tokens=4, batch_size=2, progress=False)
    truth = load_samples(Chats(**args))[0]
    assert report.rows == 4 and report.kept + report.left_out == 4 and all(r['reference'] == truth[r['row']]['answer'] for r in lines(out))
    with pytest.raises(KeyError, match='no data set called'): make_answers(str(out), 'Chatz', 'no/model')
    with pytest.raises(FileNotFoundError, match='no file'): make_answers(str(out), 'Chats', 'no/model', dict(data_files='nothing.jsonl'))
    with pytest.raises(TypeError, match='temprature'): make_answers(str(out), 'Chats', 'no/model', args, temprature=1)
