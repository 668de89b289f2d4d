"`c2c_chat`: the conversation line by line, saved and gone on with, stopped, piped, in a terminal, and refused."
import copy, json, os, pty, re, select, shutil, subprocess, sys, time

import pytest, torch

from c2c_nb.align import C2CProcessor
from c2c_nb.chat import Chat, check_templates, embedded_fuser, open_model
from c2c_nb.cli import c2c_chat, read_conversation
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

from conftest import root
from test_chat import letters, ours, same_state, state_of, talker, theirs


@pytest.fixture(scope='module')
def c2c(): return talker('qwen3', ['llama', 'qwen2'], ['offsets', 'shared'])


class Heard(list):
    "Keeps what is written; raises at the `stop`-th piece."
    stop = None
    def __call__(self, text):
        self.append(text)
        if len(self) == self.stop: self.stop = None; raise KeyboardInterrupt
    def take(self): text = ''.join(self); self.clear(); return text


def chat_of(c2c, **kwargs): return Chat(c2c, write=Heard(), **dict(max_new_tokens=4) | kwargs)
def said(chat, side): return [m['content'] for m in chat.talks[side].messages]


# line by line

def test_each_side_answers_as_its_model_does(c2c):
    chat = chat_of(c2c)
    chat.run(['/both', 'who is it?', 'why?'])
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for side in 'receiver', 'c2c':
        messages, tokenizer, cache = [], c2c.processor.receiver_tokenizer, c2c.new_cache()
        for q in 'who is it?', 'why?':
            messages.append(dict(role='user', content=q))
            if side == 'c2c': text = c2c.chat(messages, cache=cache, **kwargs)
            else:
                ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids])
                text = tokenizer.decode(c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[0, ids.shape[1]:], skip_special_tokens=True)     # all read anew
            messages.append(dict(role='assistant', content=text))
        assert chat.talks[side].messages == messages
    assert said(chat, 'receiver') != said(chat, 'c2c')
    lines = chat.write.take().splitlines()
    assert lines[1] == f"receiver> {said(chat, 'receiver')[1]}" and lines[2] == f"c2c> {said(chat, 'c2c')[1]}"


def test_only_what_is_new_is_read(c2c):
    chat, counts = chat_of(c2c, mode='both'), []
    hook = c2c.receiver.model.register_forward_pre_hook(lambda m, args, kwargs: counts.append(kwargs['input_ids'].shape[1]), with_kwargs=True)
    try:
        for q in ['the cat sat on the mat is that all there is?']*3:
            counts.clear(); chat.take(q)
    finally: hook.remove()
    whole = len(c2c.processor.receiver_tokenizer.apply_chat_template(chat.talks['c2c'].messages).input_ids)
    assert sum(counts) < whole                                   # of both sides together


def test_switching_keeps_histories_apart(c2c):
    chat = chat_of(c2c, label=False)
    chat.run(['who', '/receiver', 'why', '', '   ', '/c2c', 'what', '/quit', 'never'])
    assert said(chat, 'receiver')[::2] == ['why'] and said(chat, 'c2c')[::2] == ['who', 'what']
    text = chat.write.take()
    assert 'now: the receiver answers alone' in text and 'receiver>' not in text and 'c2c>' not in text


def test_words_come_as_they_are_generated(c2c):
    seen, chat = [], chat_of(c2c, max_new_tokens=120, label=False, temperature=1., seed=4)
    chat.write = lambda text: seen.append(chat.talks['c2c'].messages == [] and text)
    chat.take('who is it?')
    words = [s for s in seen if s]
    assert len(words) > 2                                        # written while the history does not hold the answer yet
    assert ''.join(words) == said(chat, 'c2c')[1]


def test_commands(c2c):
    chat = chat_of(c2c, system='be kind')
    assert said(chat, 'c2c') == ['be kind']
    chat.take('who'); chat.take('/reset')
    assert said(chat, 'c2c') == said(chat, 'receiver') == ['be kind'] and chat.talks['c2c'].cache is None
    chat.write.take()
    for line, says in ('/help', '/gates'), ('/hepl', 'did you mean /help?'), ('/nothing of the kind', 'no command /nothing'), ('/save', 'name of a file'), ('/_begin', 'no command'), ('/run', 'no command'):
        assert chat.take(line) is False
        assert says in chat.write.take(), line
    assert chat.take('/quit') is True


def test_gates(c2c):
    chat = chat_of(c2c)
    stack = c2c.fusers[1].stacks[0].projector
    with torch.no_grad(): stack.value_gate_logit[2] = -1
    try: chat.take('/gates')
    finally:
        with torch.no_grad(): stack.value_gate_logit[2] = 1
    text = chat.write.take()
    assert 'sharer 0: 6 of 6' in text and 'sharer 1: 5 of 6' in text
    assert [l.split()[1:] for l in text.splitlines() if l.split()[0] == 'values'] == [['■', '■', '■'], ['■', '■', '·']]
    assert text.splitlines()[7].split()[2:] == list(map(str, c2c.fusers[1].layer_map))


# saved and gone on with

def test_save_and_load(c2c, tmp_path):
    file = tmp_path/'talk.json'
    chat = chat_of(c2c, system='be kind', mode='both', temperature=.8, seed=3, fusers=['a/b', 'c/d'])
    chat.take('who is it?'); chat.take(f'/save {file}')
    assert os.listdir(tmp_path) == ['talk.json'] and f'saved: {file}' in chat.write.take()
    kept = read_conversation(file)
    assert kept['fusers'] == [dict(name=n, fingerprint=f.fingerprint()) for n, f in zip(('a/b', 'c/d'), c2c.fusers)]
    assert kept['settings'] == dict(max_new_tokens=4, temperature=.8, seed=3, fusion='parallel', follow_response=False)
    again = chat_of(c2c, temperature=.8, seed=3)
    again.load(kept)
    assert not again.write and again.mode == 'both' and again.system == 'be kind'
    for c in chat, again: c.take('why?')                         # sampled, and yet the same
    assert said(chat, 'receiver') == said(again, 'receiver') and said(chat, 'c2c')[:4] == said(again, 'c2c')[:4]
    third = chat_of(c2c, temperature=.8, seed=3)                 # with C2C an answer that is read anew is fused, so it is the loaded ones that agree
    third.load(kept); third.take('why?')
    assert said(third, 'c2c') == said(again, 'c2c')
    again.write.clear()
    kept['fusers'][0]['fingerprint'] = '0'
    again.load(kept)
    assert 'other fusers' in again.write.take()


def test_save_does_not_overwrite_other_files(c2c, tmp_path):
    chat, other = chat_of(c2c), tmp_path/'thesis.txt'
    other.write_text('important')
    for name, says in (other, 'not a saved conversation'), (tmp_path/'nowhere'/'x.json', f"{tmp_path}/nowhere/x.json: No such file"), (tmp_path, f'{tmp_path}: Is a directory'):
        chat.take(f'/save {name}')
        assert 'not saved' in (text := chat.write.take()) and says in text and '/.' not in text     # not the name of the temporary file
    assert other.read_text() == 'important' and os.listdir(tmp_path) == ['thesis.txt']
    chat.take(f'/save {tmp_path}/a b.json'); chat.take('who'); chat.take(f'/save {tmp_path}/a b.json')
    assert len(read_conversation(tmp_path/'a b.json')['sides']['c2c']) == 2


@pytest.mark.parametrize('change', [dict(version=2), dict(sides={}), dict(settings={}), dict(settings=dict(fusion='parallel', follow_response=False, max_new_tokens='9', temperature=0., seed=0)), dict(mode='x'), dict(sides=dict(c2c=[], receiver=[dict(role='user')])), dict(fusers='a'), dict(fusers=[dict(name=5)]), dict(system=None), dict(format='x')])
def test_damaged_conversations(c2c, tmp_path, change):
    chat, file = chat_of(c2c), tmp_path/'t.json'
    chat.take(f'/save {file}')
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(str(file))): read_conversation(file)


# stopped, failed

@pytest.mark.parametrize('mode', ['c2c', 'receiver'])
def test_ctrl_c_keeps_what_was_said(c2c, mode):
    chat = chat_of(c2c, max_new_tokens=30, mode=mode, label=False, temperature=1., seed=4)
    chat.take('who')
    before, old = state_of(chat.talks[mode].cache), said(chat, mode)
    chat.write.clear(); chat.write.stop = 2
    chat.take('who is it?')
    text = chat.write.take()
    assert text.endswith(' [stopped]\n') and text[:-len(' [stopped]\n')] == said(chat, mode)[-1] != ''
    assert said(chat, mode)[:-2] == old and len(said(chat, mode)) == 4
    assert same_state(state_of(chat.talks[mode].cache), before)
    chat.temperature = 0
    chat.take('why?')                                            # goes on from there, as from a cache that never was
    twin = chat_of(c2c, max_new_tokens=30, mode=mode)
    twin.talks[mode].messages = chat.talks[mode].messages[:-2]
    twin.take('why?')
    if mode == 'receiver': assert said(twin, mode) == said(chat, mode)     # with C2C, what was answered unfused may stay so
    assert len(said(chat, mode)) == 6


def test_ctrl_c_before_anything_is_said(c2c, monkeypatch):
    chat = chat_of(c2c, mode='both')
    chat.take('who')
    before = {s: (said(chat, s), chat.talks[s].cache) for s in chat.talks}
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(c2c.receiver, 'generate', interrupted)
    chat.take('why')
    monkeypatch.undo()
    assert {s: (said(chat, s), chat.talks[s].cache) for s in chat.talks} == before
    chat.write.stop = len(chat.write) + 1                        # while the side's name is written: the other side is asked all the same
    chat.run(['why', 'what'])
    assert [said(chat, s)[::2] for s in chat.talks] == [['who', 'what'], ['who', 'why', 'what']]


def test_a_failure_is_told_and_leaves_things_as_they_were(c2c, monkeypatch):
    chat = chat_of(c2c)
    chat.take('who')
    before, old = state_of(chat.talks['c2c'].cache), said(chat, 'c2c')
    monkeypatch.setattr(c2c.receiver, 'generate', lambda *a, **k: 1/0)
    chat.write.clear(); chat.take('why')
    assert 'the question is taken back: ZeroDivisionError' in chat.write.take()
    monkeypatch.undo()
    assert said(chat, 'c2c') == old and same_state(state_of(chat.talks['c2c'].cache), before)


@pytest.mark.parametrize('mode', ['c2c', 'receiver'])
def test_a_conversation_ends_with_the_positions(c2c, mode, monkeypatch):
    monkeypatch.setattr(c2c.receiver.config, 'max_position_embeddings', 16)
    chat = chat_of(c2c, max_new_tokens=100, mode=mode, label=False)
    chat.take('who')
    assert len(said(chat, mode)) == 2 and chat.talks[mode].cache.get_seq_length() <= 16
    chat.write.clear(); chat.take('the cat sat')
    assert '16 positions' in chat.write.take() and len(said(chat, mode)) == 2


def test_templates_are_needed(c2c):
    with pytest.raises(ValueError, match='no tokenizers'): check_templates(None)
    with pytest.raises(ValueError, match='sharer 1 has no chat template'): check_templates(C2CProcessor(ours, [theirs, letters(template=None)]))
    check_templates(c2c.processor)
    bare = copy.copy(ours); bare.chat_template = None
    check_templates(C2CProcessor(ours, [bare], 'shared'))         # it reads the receiver's template
    with pytest.raises(ValueError, match='sharer 0 has no chat template'): check_templates(C2CProcessor(ours, [bare], 'offsets'))
    with pytest.raises(ValueError, match='receiver has no chat template'): check_templates(C2CProcessor(bare, [ours], 'shared'))


# the command

SCRIPT = 'import sys\nfrom c2c_nb.cli import c2c_chat\nif __name__ == "__main__": sys.exit(c2c_chat())\n'      # as it is installed


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp('bin')/'c2c_chat'
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A fuser whose models can be found, and which can chat."
    folder, c2c = tmp_path_factory.mktemp('saved'), talker('qwen3', ['qwen2'], ['offsets'])
    for model, name in (c2c.receiver, 'receiver'), (c2c.sharers[0], 'sharer'): model.save_pretrained(folder/name); model.config.name_or_path = str(folder/name)
    named = Fuser.from_models(c2c.receiver, c2c.sharers[0], hidden_dim=16, intermediate_dim=12, gate_init=1.)
    for model in (c2c.receiver, c2c.sharers[0]): model.config.name_or_path = ''
    C2CModel(c2c.receiver, c2c.sharers, [named], processor=c2c.processor).save_pretrained(folder/'fuser')
    return folder/'fuser'


def environment(): return os.environ | dict(PYTHONPATH=str(root), COLUMNS='100')


def command(script, *args, text='', timeout=120):
    return subprocess.run([sys.executable, script, *map(str, args)], input=text, capture_output=True, text=True, timeout=timeout, env=environment())


def test_piped(script, saved, tmp_path):
    done = command(script, saved, '--max_new_tokens', 4, text=f'who is it?\n\n/both\nwhy?\n/nope\n/save {tmp_path}/t.json\n')
    assert done.returncode == 0, done.stderr
    kept = read_conversation(tmp_path/'t.json')
    assert kept['fusers'][0]['name'] == str(saved) and kept['mode'] == 'both'
    c2c, alone = (kept['sides'][s] for s in ('c2c', 'receiver'))
    assert done.stdout == f"{c2c[1]['content']}\nnow: both answer, one after the other; each side has its own history\nreceiver> {alone[1]['content']}\nc2c> {c2c[3]['content']}\nthere is no command /nope: /help lists them\nsaved: {tmp_path}/t.json\n"
    assert 'you>' not in done.stdout + done.stderr
    chat = Chat(open_model([str(saved)]), max_new_tokens=4, write=Heard())
    chat.run(['who is it?', '/both', 'why?'])
    assert [chat.talks[s].messages for s in ('c2c', 'receiver')] == [c2c, alone]


def test_gone_on_with(script, saved, tmp_path):
    "What was loaded is said in one line, on the standard error."
    file = tmp_path/'t.json'
    Chat(open_model([saved]), max_new_tokens=2, fusers=[str(saved)], write=Heard()).run(['who is it?', '/both', 'why?', f'/save {file}'])
    done = command(script, '--load', file, text='what?\n')
    assert done.returncode == 0 and done.stderr.splitlines()[1:] == [f'{file}: 2 questions to C2C and 1 to the receiver alone; now both answer, one after the other; each side has its own history']
    assert str(file) not in done.stdout and done.stdout.startswith('receiver> ')


def test_piped_to_what_stops_reading(script, saved):
    "As `c2c_chat | head -1`: no traceback, and the status of a program that a closed pipe ends."
    child = subprocess.Popen([sys.executable, script, saved, '--max_new_tokens', '2'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    child.stdin.write('/reset\n'); child.stdin.flush()
    assert child.stdout.readline() == 'all is forgotten\n'
    child.stdout.close()
    child.stdin.write('who is it?\nwhy?\n/help\n'); child.stdin.close()
    said = child.stderr.read(); child.stderr.close()
    assert child.wait(60) == 141 and said == 'Loading ...\n', said


def test_a_question_whose_answer_nobody_reads(c2c):
    "It is not told as a failure of the model: whoever runs the conversation hears of it."
    chat, heard = chat_of(c2c, mode='both'), []
    def closed(text):
        heard.append(text)
        if len(heard) == 2: raise BrokenPipeError
    chat.write = closed
    with pytest.raises(BrokenPipeError): chat.take('who')
    assert said(chat, 'receiver') == said(chat, 'c2c') == [] and len(heard) == 2


def test_in_a_terminal(script, saved):
    "Prompt, answer, Ctrl-C in an answer and at the prompt, Ctrl-D."
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, script, saved, '--max_new_tokens', '100000', '--device', 'cpu'], stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment() | dict(TERM='dumb'), start_new_session=True,
        preexec_fn=lambda: __import__('fcntl').ioctl(0, __import__('termios').TIOCSCTTY, 0))
    os.close(slave)
    heard = ''
    def until(pattern, seconds=60):
        nonlocal heard
        end = time.monotonic() + seconds
        while not re.search(pattern, heard):
            assert time.monotonic() < end and child.poll() is None, heard[-2000:]
            if select.select([master], [], [], .2)[0]: heard += os.read(master, 65536).decode(errors='replace')
        heard = heard[re.search(pattern, heard).end():]
    type_ = lambda text: os.write(master, text.encode())
    try:
        until('you> '); type_('who is it?\n'); until('c2c> ')
        type_('\x03'); until(r'\[stopped\]'); until('you> ')
        type_('half a line'); until('half a line'); time.sleep(.5)     # python's readline may miss a signal that comes before it waits
        type_('\x03'); until('you> ')
        type_('/receiver\n'); until('answers alone'); until('you> ')
        type_('\x04')
        assert child.wait(30) == 0
    finally:
        if child.poll() is None: child.kill()
        child.wait(); child.stderr.close(); os.close(master)


def test_refused_before_anything_is_loaded(script, saved, tmp_path):
    deep, numbered = tmp_path/'deep', tmp_path/'numbered'
    deep.mkdir(); (deep/'config.json').write_text('['*100_000); (tmp_path/'deep.json').write_text('['*100_000)
    numbered.mkdir(); (numbered/'config.json').write_text(json.dumps(json.loads((saved/'config.json').read_text()) | dict(receiver=dict(name=[5]))))
    nameless, other, broken, config = tmp_path/'nameless', tmp_path/'other', tmp_path/'broken', json.loads((saved/'config.json').read_text())
    for folder, content in (nameless, json.dumps(config | dict(sharer=config['sharer'] | dict(name=None)))), (other, json.dumps(config | dict(receiver=config['receiver'] | dict(name='else')))), (broken, '{'):
        folder.mkdir(); (folder/'config.json').write_text(content)
    (tmp_path/'empty').mkdir(); (tmp_path/'note.json').write_text('{}')
    start = time.monotonic()
    for args, says in ((['nowhere'], 'there is no folder nowhere'), ([tmp_path/'empty'], 'holds no fuser'), ([nameless], 'which sharer'), ([saved, other], 'different receivers'), ([broken], 'cannot be read'), ([deep], 'cannot be read'), (['--load', tmp_path/'deep.json'], 'not a saved conversation'), ([numbered], 'which receiver'),
        ([tmp_path/'note.json'], '--load'), (['--load', tmp_path/'note.json'], 'not a saved conversation'), (['--load', tmp_path/'gone'], 'No such file'), ([saved, '--max_new_tokens', 0], 'positive'),
        ([saved, '--temperature', 'nan'], 'temperature'), ([saved, '--fusion', 'all'], 'sequential'), ([saved, '--mode', 'all'], 'receiver'), ([saved, '--dtype', 'int8'], 'bfloat16'), ([saved, '--temperature', 'warm'], 'invalid')):
        done = command(script, *args)
        assert done.returncode == 2 and says in done.stderr and not done.stdout and 'Loading' not in done.stderr and 'Traceback' not in done.stderr, (args, done.stderr)


def test_light():
    done = subprocess.run([sys.executable, '-c', 'import sys, c2c_nb.cli; print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))'], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == '[]'


def call(*args, **kwargs):
    "Exit status of the command, run within this process."
    with pytest.raises(SystemExit) as e: c2c_chat(*args, **kwargs)
    return e.value.code


def test_refused_when_loaded(saved, tmp_path, monkeypatch, capsys):
    lost, mute = tmp_path/'lost', tmp_path/'mute'
    shutil.copytree(saved, lost); shutil.copytree(saved, mute)
    config = json.loads((lost/'config.json').read_text())
    (lost/'config.json').write_text(json.dumps(config | dict(receiver=config['receiver'] | dict(name=str(tmp_path/'gone')))))
    (mute/'sharer_tokenizers/0/chat_template.jinja').unlink()
    monkeypatch.setattr(C2CModel, 'from_pretrained', classmethod(lambda *a, **k: pytest.fail('models were loaded')))
    assert call([str(mute)]) == 2 and 'sharer 0 has no chat template' in capsys.readouterr().err
    monkeypatch.undo()
    assert call([str(lost)]) == 2 and str(lost) in capsys.readouterr().err
    if torch.cuda.device_count() > 9: return
    for device in 'cuda:9', 'moon':                              # torch asserts what it was built for, or raises
        assert call([str(saved)], device=device) == 2
        assert f'c2c_chat: {saved} on {device}: ' in capsys.readouterr().err


def test_the_embedded_pair(tmp_path, monkeypatch):
    import c2c_nb.chat
    from transformers import AutoModelForCausalLM
    def built(world, progress, cache):                           # the models are not what is tested here: untrained ones
        for role in world.roles:
            if not (cache/'world'/role).exists(): AutoModelForCausalLM.from_config(world.config(role)).save_pretrained(cache/'world'/role)
        return [AutoModelForCausalLM.from_pretrained(cache/'world'/role) for role in world.roles]
    monkeypatch.setattr(c2c_nb.chat, 'build_models', built)
    threads = torch.get_num_threads()
    folder = embedded_fuser(tmp_path, progress=False, steps=2)
    assert torch.get_num_threads() == threads
    (folder/'model.safetensors').write_bytes(b'damaged')          # made again
    assert embedded_fuser(tmp_path, progress=False, steps=2) == folder and Fuser.from_pretrained(folder)
    monkeypatch.setattr(c2c_nb.chat, 'train_fuser', lambda *a, **k: pytest.fail('trained again'))
    assert embedded_fuser(tmp_path, progress=False, steps=2) == folder
    assert not list(folder.parent.glob('.*')), 'nothing is left behind'
    chat = Chat(open_model([folder]), max_new_tokens=1, write=Heard(), system='ignored')
    rendered = lambda q: chat.c2c.processor.receiver_tokenizer.apply_chat_template([dict(role='user', content='x'), dict(role='assistant', content='y'), dict(role='user', content=q)], tokenize=False)
    for q in 'sum of 3 1 4 1', ' Sum of  3 1 4 1?', 'sum of 3 1 4 1 ? it is': assert rendered(q) == '<s> sum of 3 1 4 1 ? it is'
    chat.run(['/both', 'sum of 3 1 4 1', 'item 2 of 5 6 7 8', '/gates'])
    for side in chat.talks: assert len(said(chat, side)) == 5 and all(len(a.split()) <= 1 for a in said(chat, side)[2::2])
