"The store of frozen work: the same losses and gradients as without it, never half built, never another run's."
import json, os, random, signal, shutil

import pytest, torch
from tokenizers import Regex, Tokenizer, models as token_models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import c2c_nb.store as room
from c2c_nb.align import C2CProcessor
from c2c_nb.batch import drop_sharers, encode_sample
from c2c_nb.model import C2CModel
from c2c_nb.recipe import DataRecipe, GateRecipe, ModelRecipe, OutputRecipe, ProjectorRecipe, TrainingRecipe, TrainRecipe, ValidationRecipe
from c2c_nb.store import Store, build_store, fill_cache, gather_rows, store_bytes, store_parts
from c2c_nb.task import FuserTask, empty_model
from c2c_nb.train import read_log, train
from conftest import root, run_python
from tiny import close, config_of, fuser_for, tiny

words = 'aa ab abb ba bab cab dad ebb fad gab u: a: ; .'.split()


def tokenizer_of(split, known, template):
    "A tokenizer of words or of characters, with a chat template of its own."
    vocabulary = {w: i for i, w in enumerate(['<pad>', '<end>', '<unk>', *known])}
    made = Tokenizer(token_models.WordLevel(vocabulary, unk_token='<unk>'))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token='<pad>', eos_token='<end>', unk_token='<unk>', chat_template=template)


template = "{{% for m in messages %}}{}{{{{ m['content'] }}}} ; {{% endfor %}}{{% if add_generation_prompt %}}{}{{% endif %}}"
by_word = tokenizer_of(pre_tokenizers.Split(Regex(r'\s*\S+'), 'isolated'), words + [f' {w}' for w in words], template.format("{{ 'u: ' if m['role'] == 'user' else 'a: ' }}", 'a: '))
by_letter = tokenizer_of(pre_tokenizers.Split(Regex('.'), 'isolated'), list('abcdefgu:;. '), template.format("{{ '. . u: ' if m['role'] == 'user' else '. a: ' }}", '. a: '))


def processor_for(strategies): return C2CProcessor(by_word, [by_word if s == 'shared' else by_letter for s in strategies], list(strategies))


def chats(n=10, seed=0):
    "Chats of one or two questions, of any length, with their answers."
    rng = random.Random(seed)
    say = lambda low, high: ' '.join(rng.choices(words[:10], k=rng.randint(low, high)))
    return [([m for _ in range(rng.randint(0, 1)) for m in (dict(role='user', content=say(1, 6)), dict(role='assistant', content=say(1, 3)))] + [dict(role='user', content=say(1, 8))], say(1, 5)) for _ in range(n)]


def rows_for(processor, **kwargs):
    "Encoded chats; the longest lose the end of their answers, or are left out."
    encode = lambda n: [encode_sample(dict(prompt=p, answer=a), processor, n) for p, a in chats(**kwargs)]
    rows = encode(sorted(len(r['input_ids']) for r in encode(1000))[-3] - 1)
    rows = [r | dict(row=i, length=len(r['input_ids'])) for i, r in enumerate(rows) if r['problem'] is None]
    assert len({r['length'] for r in rows}) > 4 and len(rows) > 5
    return rows


def model_for(strategies=('offsets',), receiver='qwen3', sharers=('llama', 'qwen2'), **kwargs):
    r, ss = tiny(receiver), [tiny(s, j+1) for j, s in enumerate(sharers[:len(strategies)])]
    return C2CModel(r, ss, [fuser_for(r, s, seed=10+j, dropout=0., **kwargs) for j, s in enumerate(ss)], processor=processor_for(strategies))


def loss_of(c2c, rows, numbers, store=None, share=0., step=0, multiple=None):
    "Loss and gradients of some rows, with the same noise."
    batch = c2c.processor.pad([rows[n] for n in numbers], multiple=multiple)
    if share: batch['active'] = drop_sharers(batch['active'], [rows[n]['row'] for n in numbers], share, 0, step)
    plan = c2c.plan(**batch, align='section')
    cache = None if store is None else fill_cache(c2c, store.parts, gather_rows(store, plan, numbers))
    torch.manual_seed(step); c2c.zero_grad(); c2c.train()
    loss = c2c.answer_loss(plan, cache)/plan.supervised.shape[1]
    if loss.requires_grad: loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in c2c.fusers.parameters()], plan


def check_equal(c2c, rows, store, share=0., multiple=None, seed=0):
    "Batches that are put together otherwise than when the store was built."
    rng, seen = random.Random(seed), []
    for step in range(3):
        numbers = rng.sample(range(len(rows)), (1, 3, 5)[step])
        (a, ga, plan), (b, gb, _) = (loss_of(c2c, rows, numbers, s, share, step, multiple) for s in (None, store))
        close(a, b)
        for x, y in zip(ga, gb): close(x, y)
        seen.append(any(x.abs().max() > 1e-4 for x in ga))
    assert any(seen)


def built(folder, c2c, rows, **kwargs):
    build_store(Store(folder, c2c, rows), **dict(dict(batch_size=3, progress=False), **kwargs))
    return Store(folder, c2c, rows)


@pytest.mark.parametrize('strategies', [('shared',), ('first',), ('longest',), ('offsets',), ('shared', 'offsets'), ('longest', 'first')], ids='-'.join)
def test_same_losses_and_gradients(tmp_path, strategies):
    "Every alignment, one and two sharers, several sections, ragged rows, rows cut at the end, several files."
    c2c = model_for(strategies)
    rows = rows_for(c2c.processor)
    assert any(r['cut'] for r in rows) and (strategies == ('shared',) or max(r['sections'][-1] for r in rows) > 2)
    store = built(tmp_path/'s', c2c, rows, shard_bytes=20_000)
    assert len(list((tmp_path/'s').glob('*.safetensors'))) > 1
    check_equal(c2c, rows, store, multiple=8 if strategies == ('first',) else None)
    real = sum(f.stat().st_size for f in (tmp_path/'s').glob('*.safetensors'))
    tensors = sum(2*(len(strategies) + 1) for _ in rows)
    assert 0 <= real - store_bytes(c2c, rows) < 120*tensors      # a file's head names each tensor


@pytest.mark.parametrize('strategy, receiver, sharer', [('offsets', 'mistral', 'gemma3'), ('first', 'gpt2', 'mistral'), ('shared', 'gemma3', 'gpt2')])
def test_windows_and_learned_positions(tmp_path, strategy, receiver, sharer):
    "Models whose windows are narrower than the prompt, or that number positions by a table."
    c2c = model_for((strategy,), receiver, (sharer,))
    rows = rows_for(c2c.processor)
    check_equal(c2c, rows, built(tmp_path/'s', c2c, rows))


def test_dropped_sharers(tmp_path):
    "Where a sharer is dropped, a row is fused later than the store has read it."
    c2c = model_for(('shared', 'offsets'))
    rows = rows_for(c2c.processor)
    store = built(tmp_path/'s', c2c, rows)
    late = 0
    for step in range(2):
        for n in range(0, len(rows), 2):
            (a, ga, plan), (b, gb, _) = (loss_of(c2c, rows, [n], s, .9, step) for s in (None, store))
            late += plan.cuts[0].stop > store.lengths[n][0]
            close(a, b)
            for x, y in zip(ga, gb): close(x, y)
    assert late > 2
    check_equal(c2c, rows, store, share=.5)


def test_built_while_gates_are_closed(tmp_path):
    "Gates that are closed when the store is built may be open later, and the other way round."
    c2c = model_for(('shared', 'offsets'), gate=-1., gate_noise=None)
    rows = rows_for(c2c.processor)
    store = built(tmp_path/'s', c2c, rows)
    assert all(a > 0 for lengths in store.lengths for a in lengths)
    (a, _, plan), (b, _, _) = (loss_of(c2c, rows, [0, 1, 2], s) for s in (None, store))
    assert not plan.cuts
    close(a, b)
    opened = lambda j: [p.data.fill_(1.) for n, p in c2c.fusers[j].named_parameters() if n.endswith('gate_logit')]
    opened(1); check_equal(c2c, rows, store)                     # the sharer that is heard late only
    opened(0); check_equal(c2c, rows, store)


def test_sharer_without_a_word(tmp_path):
    "A row in which one of two sharers is heard nowhere."
    c2c = model_for(('shared', 'offsets'))
    rows = rows_for(c2c.processor)
    for r in rows[:4]: r['active'] = [a & 1 for a in r['active']]
    rows = rows[:4] + rows[5:7]
    store = built(tmp_path/'s', c2c, rows, batch_size=1)
    assert gather_rows(store, c2c.plan(**c2c.processor.pad(rows[:1]), align='section'), [0])[2][0].shape[-2] == 0
    check_equal(c2c, rows, store)


def test_half_precision(tmp_path):
    "bf16 models: kept as they are, and with the same batch to the last bit."
    c2c = model_for(('offsets',))
    rows = rows_for(c2c.processor)
    half = [type(m)(m.config).to(torch.bfloat16).eval() for m in (c2c.receiver, *c2c.sharers)]
    for new, old in zip(half, (c2c.receiver, *c2c.sharers)): new.load_state_dict(old.state_dict())
    c2c = C2CModel(half[0], half[1:], list(c2c.fusers), processor=c2c.processor)
    store = built(tmp_path/'s', c2c, rows, batch_size=1)
    assert store.key['types of the receiver'] == ['bfloat16']*2 and gather_rows(store, c2c.plan(**c2c.processor.pad(rows[:2]), align='section'), [0, 1])[0][0].dtype == torch.bfloat16
    for n in range(len(rows)):
        (a, ga, _), (b, gb, _) = (loss_of(c2c, rows, [n], s) for s in (None, store))
        assert a == b and all(map(torch.equal, ga, gb))
    with pytest.raises(ValueError, match=r'types of the receiver \(.*bfloat16.*there.*float32.*here'): Store(tmp_path/'s', model_for(('offsets',)), rows)


def test_refuses_other_work(tmp_path):
    "What differs is named, and nothing is changed."
    c2c = model_for(('offsets',))
    rows = rows_for(c2c.processor)
    built(tmp_path/'s', c2c, rows)
    before = (tmp_path/'s'/'index.json').read_bytes()
    other_sharer = C2CModel(c2c.receiver, [tiny('llama', 7)], [fuser_for(c2c.receiver, tiny('llama', 7))], processor=c2c.processor)
    other_map = C2CModel(c2c.receiver, list(c2c.sharers), [fuser_for(c2c.receiver, c2c.sharers[0], layer_map=[1, 1, 1])], processor=c2c.processor)
    other_rows = [*rows[1:], rows[0]]
    for model, data, name in (other_sharer, rows, 'sharer 0'), (other_map, rows, 'layers of the sharer 0'), (c2c, other_rows, 'rows'), (c2c, rows[:-1], 'rows'), (model_for(('offsets', 'offsets')), rows, 'sharer 1'):
        with pytest.raises(ValueError, match=f'which differs in .*{name}'): Store(tmp_path/'s', model, data)
    with pytest.raises(ValueError, match='autocast .None there, bfloat16 here'), torch.autocast('cpu', torch.bfloat16): Store(tmp_path/'s', c2c, rows)
    assert (tmp_path/'s'/'index.json').read_bytes() == before and Store(tmp_path/'s', c2c, rows).index
    fp16 = [type(tiny('llama'))(tiny('llama').config).half().eval() for _ in range(2)]      # no fingerprint of their weights: told apart by what they keep
    for seed, m in enumerate(fp16): m.load_state_dict(tiny('llama', 20 + seed).state_dict())
    keys = [Store(tmp_path/'t', C2CModel(c2c.receiver, [m], [fuser_for(c2c.receiver, m)], processor=c2c.processor), rows).key['sharer 0'] for m in (*fp16, fp16[0])]
    assert keys[0] == keys[2] != keys[1]


def test_foreign_and_damaged_folders(tmp_path):
    "A folder with something else in it is not touched; a damaged store is not read."
    c2c = model_for(('shared',))
    rows = rows_for(c2c.processor)
    (tmp_path/'home').mkdir(); (tmp_path/'home'/'thesis.tex').write_text('years of work')
    (tmp_path/'web').mkdir(); (tmp_path/'web'/'index.json').write_text('{"pages": 3}')
    for name in 'home', 'web':
        with pytest.raises(ValueError, match='no store|not the index'): Store(tmp_path/name, c2c, rows)
    assert (tmp_path/'home'/'thesis.tex').read_text() == 'years of work'
    (tmp_path/'s').mkdir()                                       # an empty folder is as good as none
    built(tmp_path/'s', c2c, rows)
    file = next((tmp_path/'s').glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='damaged.*00000.safetensors'): Store(tmp_path/'s', c2c, rows)


def test_no_room(tmp_path, monkeypatch):
    "Told before anything is read or written."
    c2c = model_for(('shared',))
    rows = rows_for(c2c.processor)
    store = Store(tmp_path/'s', c2c, rows)
    size = store_bytes(c2c, rows)
    monkeypatch.setattr(room, 'make_plan', lambda *args, **kwargs: pytest.fail('something was read'))
    with pytest.raises(OSError, match='training.store_gb allows 1e-09'): build_store(store, limit_gb=1e-9)
    monkeypatch.setattr(room.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(size*10, size*10, size))
    with pytest.raises(OSError, match='the disk has'): build_store(store)
    assert not list(tmp_path.iterdir()) and store.index is None


def test_interrupted_and_overtaken(tmp_path, monkeypatch):
    "An error leaves nothing behind; two who build at once do not harm each other."
    c2c = model_for(('shared',))
    rows = rows_for(c2c.processor)
    save, calls = room.save_file, []
    def full(*args):
        calls.append(1)
        if len(calls) == 2: raise OSError(28, 'No space left on device')
        save(*args)
    monkeypatch.setattr(room, 'save_file', full)
    with pytest.raises(OSError, match='No space'): built(tmp_path/'s', c2c, rows, shard_bytes=10_000)
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    def meanwhile(*args):
        monkeypatch.setattr(room, 'save_file', save)
        built(tmp_path/'s', c2c, rows)
        save(*args)
    monkeypatch.setattr(room, 'save_file', meanwhile)
    store = Store(tmp_path/'s', c2c, rows)
    build_store(store, batch_size=3, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ['s']
    check_equal(c2c, rows, store)


def test_killed_while_building(tmp_path):
    "Nothing half built is used, and what was left is removed by the next who builds."
    code = f'''
import os, sys, signal; sys.path.insert(0, {str(root/'tests')!r})
from pathlib import Path
import c2c_nb.store as room, test_store as t
save, calls = room.save_file, []
def killed(*args):
    save(*args); calls.append(1)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
room.save_file = killed
c2c = t.model_for(('shared',))
t.built(Path({str(tmp_path)!r})/'s', c2c, t.rows_for(c2c.processor), shard_bytes=10_000)
'''
    assert run_python(code, root).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith('.s-') and len(list(left.glob('*.safetensors'))) == 2
    c2c = model_for(('shared',))
    rows = rows_for(c2c.processor)
    (tmp_path/'.s-notes').mkdir()
    store = built(tmp_path/'s', c2c, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.s-notes', 's']
    check_equal(c2c, rows, store)


def test_models_that_are_refused(tmp_path):
    "Layers that share keys and values or keep a state; known without weights, so before any are loaded."
    plain = tiny('qwen3')
    for name in 'gemma3n', 'gemma4', 'qwen3_next', 'lfm2':
        odd = tiny(name)
        with pytest.raises(ValueError, match='the receiver .* keeps other things'): store_parts([odd, plain], [fuser_for(odd, plain)])
    for name in 'qwen3_next', 'gemma4':
        with pytest.raises(ValueError, match='the sharer 0 .* keeps other things'): store_parts([plain, tiny(name)], [fuser_for(plain, tiny(name), layer_map=[1, 3, 3] if name == 'qwen3_next' else [0, 1, 1])])
    task = task_for(tmp_path, store='s', models=[tiny('qwen3_next'), tiny('llama', 1)])
    task.models = [empty_model(config_of('qwen3_next')), empty_model(config_of('llama'))]
    with pytest.raises(ValueError, match='the receiver .* leave training.store out'): task.describe()


def test_sharer_with_layers_nobody_listens_to(tmp_path):
    "A sharer that shares keys and values in layers that are not listened to."
    c2c = model_for(('shared',), sharers=('gemma3n',), layer_map=[1, 3, 3])
    rows = rows_for(c2c.processor)
    check_equal(c2c, rows, built(tmp_path/'s', c2c, rows))


def recipe_for(folder, store=None, **kwargs):
    file = folder/'chats.jsonl'
    file.write_text(''.join(json.dumps(dict(messages=[*p, dict(role='assistant', content=a)])) + '\n' for p, a in chats(17)))
    model = kwargs.pop('model', {})
    return TrainRecipe(model=ModelRecipe(receiver='r', sharers=['s'], projector=ProjectorRecipe(args=dict(hidden_dim=16, intermediate_dim=12)), **model), data=DataRecipe('Chats', dict(data_files=str(file))), validation=ValidationRecipe(share=.2),
        training=TrainingRecipe(**dict(dict(learning_rate=3e-3, batch_size=6, epochs=3, precision='fp32', store=store and str(folder/store), gates=GateRecipe(final_temperature=.1)), **kwargs)), output=OutputRecipe(str(folder/'run'), log_every=1, save_every=None, keep_best=False))


def task_for(folder, store=None, models=None, **kwargs): return FuserTask(recipe_for(folder, store, **kwargs), models or [tiny('qwen3'), tiny('llama', 1)], processor_for(('offsets',)))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_whole_run(tmp_path, monkeypatch, precision):
    "The loop with and without a store: same losses, held-out loss included; the prompts are read once."
    monkeypatch.setattr(TrainRecipe, 'check', lambda self, *args, **kwargs: self)        # names of models that are at hand
    monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)
    found, read = {}, []
    for store in (None, 's', 's') if precision == 'fp32' else (None, 's'):    # the third run finds the store
        task, logs = task_for(tmp_path, store, precision=precision), []
        handle = task.models[1].base_model.register_forward_pre_hook(lambda *a: logs.append(1))
        try: train(task.recipe, force=True, task=task, progress=False)
        finally: handle.remove()
        found.setdefault(store, []).append([r['loss'] for r in read_log(tmp_path/'run') if 'loss' in r] + [r['validation']['held_out_loss'] for r in read_log(tmp_path/'run') if 'validation' in r])
        read.append(len(logs))
    for other in found['s']: torch.testing.assert_close(torch.tensor(other), torch.tensor(found[None][0]), atol=1e-5 if precision == 'fp32' else 2e-2, rtol=0)
    assert len(found[None][0]) > 7
    if precision == 'bf16': return
    assert found['s'][0] == found['s'][1] and read[0] > 2*read[2]
    other = task_for(tmp_path, 's', precision=precision, seed=1)   # holds out other rows
    with pytest.raises(ValueError, match='differs in rows'): train(other.recipe, force=True, task=other, progress=False)


def test_recipes_that_are_refused(tmp_path):
    "Before a model is loaded."
    for kwargs in dict(model=dict(follow_response=True)), dict(freeze=['sharer']):
        with pytest.raises(ValueError, match='training.store keeps what frozen models make'): task_for(tmp_path, 's', **kwargs)
    task = task_for(tmp_path, 's')
    with pytest.raises(ValueError, match='a stream has none'): task.prepare(lambda epoch: iter(()), 'key', False)
