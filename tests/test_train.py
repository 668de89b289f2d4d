"The loop: what it learns from, what it leaves alone, what it refuses, and that nothing is lost when it is interrupted."
import json, math, random
from pathlib import Path

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

from c2c_nb.batch import encode_samples
from c2c_nb.data import load_samples, make_data
from c2c_nb.model import C2CModel, plain_head
from c2c_nb.fuser import Fuser
from c2c_nb.projector import C2CProjector
from c2c_nb.train import Trainer, read_log, train

from test_parity import close, cuts_of, golden_model, gradients, models, read_json, training_batch, trainings
from safetensors.torch import load_file
from tiny_train import Stopped, TinyChats, assert_same, chats, model, outcome, processor, recipe, run, start, task, tokenizer

few = settings(derandomize=True, deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), database=None)


# ---------------------------------------------------------------- parity with the official trainer (contract 4)

followed = dict(t04='t04_incl_resp_nogumbel_b1', t05='t05_incl_resp_gumbel_b1_T1')


def check_official(c2c, info, plan):
    "Loss, total gradient norm and the norm of every parameter."
    loss = c2c.answer_loss(plan, plain=plain_head(c2c.receiver)) / plan.supervised.shape[1]
    loss.backward()
    assert loss.item() == pytest.approx(info['loss'], abs=1e-4)
    ours = gradients(c2c)
    assert math.sqrt(sum(x.double().norm().item()**2 for x in ours.values())) == pytest.approx(info['total_grad_norm'], rel=1e-3)
    norm = lambda n: ours[n].norm().item() if n in ours else 0.
    assert set(ours) <= set(info['grad_norms'])
    assert not {n: (norm(n), v) for n, v in info['grad_norms'].items() if norm(n) != pytest.approx(v or 0., rel=1e-3, abs=1e-6*info['total_grad_norm'])}


@pytest.mark.parametrize('case', [*trainings, *followed])
def test_official_steps(golden, models, case):
    "t01 to t07, by the way that training goes: planned, and logits only where there is a label."
    name, sharers = (trainings | followed)[case], [1, 2] if case in ('t06', 't07') else [1]
    info, g = read_json(golden/'training.json')[name], load_file(golden/f'{name}.safetensors')
    ids, mask, labels, fused = training_batch(golden, name)
    c2c = golden_model(golden, models, sharers, 'sequential' if '_seq' in name else 'parallel')
    c2c.follow_response = case in followed
    for module in c2c.fusers.modules():
        if isinstance(module, C2CProjector): module.gate_noise = 'gumbel' if info['gumbel'] else None
    c2c.train()
    for fuser in c2c.fusers: fuser.set_temperature(info['gate_temperature'] or 1.)
    plan = c2c.plan(ids, mask, labels=labels, active=fused[..., None].expand(-1, -1, len(sharers)), sections=(~fused).long(), align='section')
    draws, active = iter([g[k] for k in sorted(g) if k.startswith('u.')]), plan.cuts[0].active
    def recorded(layers, like):
        "The official draws, put where the rows lie in our layout."
        u = torch.stack([torch.stack([next(draws), next(draws)]) for _ in range(layers)])
        if case in followed: return u
        out = torch.full((layers, 2, *like.shape[:-1], 1), .5)
        for row in range(len(ids)): out[:, :, row, :, active[row].any(-1)] = u[:, :, row][:, :, :, (fused & (mask > 0))[row].nonzero()[:, 0]]
        return out
    for fuser in c2c.fusers: fuser.draw_u = recorded
    check_official(c2c, info, plan)
    assert next(draws, None) is None or not info['gumbel'], 'all stored draws were used'


def test_official_step_with_two_tokenizers(golden, models):
    "t08: both models read their own templates."
    info, f = read_json(golden/'training.json')['t08_aligned_nogumbel_b1'], read_json(golden/'collator.json')['aligned_features'][0]
    c2c = golden_model(golden, models, [1], 'parallel')
    for stack in c2c.fusers[0].stacks: stack.projector.gate_noise = None
    c2c.train()
    ids, fused = [torch.tensor(x)[None] for x in f['input_ids']], torch.tensor(f['kv_cache_index'])[None, :, 0] > 0
    masks, n = [(~torch.tensor(x)[None]).long() for x in f['model_padding_mask']], fused.shape[1]
    sections = torch.cat([torch.zeros(1, 1, dtype=torch.long), (fused[:, 1:] != fused[:, :-1]).long().cumsum(1)], 1)
    check_official(c2c, info, c2c.plan(ids[0], masks[0], [ids[1]], [masks[1]], fused[..., None], sections, torch.arange(n)[None], torch.tensor(f['labels'])[None], align='section'))


# ---------------------------------------------------------------- every supervised token of every row (contract 2)

def learner(sharers, strategy, fusion='parallel', follow=False):
    "A `C2CModel` in training mode whose gates are tossed with the same draw everywhere, so that a row's gradient does not depend on where it lies."
    given = [model('receiver'), model('llama'), model('qwen2')][:1 + sharers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fusers = [Fuser.from_models(given[0], s, hidden_dim=8, intermediate_dim=8, gate_init=.5, gate_noise='gumbel', dropout=0.) for s in given[1:]]
    c2c = C2CModel(given[0], given[1:], fusers, fusion, follow, processor(sharers, strategy))
    for f in fusers: f.draw_u = lambda layers, like: torch.full((layers, 2, *like.shape[:-1], 1), .3)
    return c2c.train()


def summed(c2c, rows):
    "Loss, number of labels and gradients of some rows at once."
    c2c.zero_grad(set_to_none=True)
    plan = c2c.plan(**c2c.processor.pad(rows), align='section')
    loss = c2c.answer_loss(plan, plain=plain_head(c2c.receiver))
    loss.backward()
    return loss.item(), plan.supervised.shape[1], {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in c2c.named_parameters() if p.requires_grad}


def answers_of(chat, turns):
    "Tokens of a chat's answers, each with the token that ends it: counted without the package."
    said = [m['content'] for m in chat if m['role'] == 'assistant']
    return [len(tokenizer()(a, add_special_tokens=False).input_ids) + 1 for a in (said if turns == 'each' else said[-1:])]


@st.composite
def batches(draw):
    sharers = draw(st.integers(1, 2))
    strategy = draw(st.sampled_from(['shared', 'first', 'longest', 'offsets'])) if sharers == 1 else [draw(st.sampled_from(['first', 'longest', 'offsets'])), draw(st.sampled_from(['shared', 'first', 'longest', 'offsets']))]
    return sharers, strategy, draw(st.sampled_from(['parallel', 'sequential'])), draw(st.booleans()), draw(st.sampled_from(['last', 'each'])), draw(st.integers(0, 99)), draw(st.integers(2, 3))


@few
@given(batches())
def test_every_label_of_every_row_counts(drawn):
    "A batch of ragged chats with different numbers of turns teaches what its rows teach alone, and as many tokens as the answers have."
    sharers, strategy, fusion, follow, turns, seed, n = drawn
    c2c, said = learner(sharers, strategy, fusion, follow), chats(n, seed, (1, 3), (1, 4))
    samples, _ = load_samples(make_data('TinyChats', dict(turns=turns)), [dict(chat=c) for c in said])
    rows, report = encode_samples(samples, c2c.processor, follow=follow)
    assert report.kept == len(samples) and not report.problems
    assert rows['supervised'][:] == sum([answers_of(c, turns) for c in said], [])
    rows = random.Random(seed).sample(list(rows), min(4, len(rows)))
    loss, labels, grads = summed(c2c, rows)
    alone = [summed(c2c, [r]) for r in rows]
    assert labels == sum(a[1] for a in alone) == sum(r['supervised'] for r in rows)
    assert loss == pytest.approx(sum(a[0] for a in alone), rel=1e-5)
    for name, g in grads.items():
        total = sum(a[2][name] for a in alone)
        assert (g - total).abs().max() <= 1e-5*max(1, total.abs().max()), name
    assert any(g.abs().max() > 1e-3 for g in grads.values())


@pytest.mark.parametrize('turns', ['last', 'each'])
def test_labels_lie_where_transformers_would_have_them(turns):
    "With all gates closed the loss is the receiver's own, of whole chats without padding, at the answers and the tokens that end them."
    c2c, said = learner(1, 'offsets').eval(), chats(4, 5, (1, 3))
    for p in c2c.fusers.parameters(): p.data.zero_()             # a gate of 0 is closed
    samples, _ = load_samples(make_data('TinyChats', dict(turns=turns)), [dict(chat=c) for c in said])
    rows, _ = encode_samples(samples, c2c.processor)
    with torch.no_grad(): loss = c2c.answer_loss(c2c.plan(**c2c.processor.pad(list(rows)), align='section'), plain=True).item()
    t, expected = tokenizer(), 0.
    for chat in said:
        ids, where = [], []
        for m in chat:
            ids += [t.convert_tokens_to_ids(f"<|{m['role']}|>")]
            new = t(m['content'], add_special_tokens=False).input_ids + [t.eos_token_id]
            if m['role'] == 'assistant' and (turns == 'each' or m is chat[-1]): where += range(len(ids), len(ids) + len(new))
            ids += new
        assert ids == t.apply_chat_template(chat, tokenize=True, return_dict=False)
        with torch.no_grad(): logits = model('receiver')(torch.tensor([ids])).logits[0]
        expected += F.cross_entropy(logits[[i - 1 for i in where]], torch.tensor(ids)[where], reduction='sum').item()
    assert loss == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- interrupted equals uninterrupted (contract 10; kills are in test_train_kill.py)

@pytest.fixture(autouse=True)
def no_figure(monkeypatch): monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run from start to end, with two sharers and all that is random, and what came out."
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as m:
        m.setattr('c2c_nb.train.plot_run', lambda *args: None)
        it = run(recipe(folder, sharers=2))
    return folder, it, outcome(folder)


def test_runs_are_repeatable(whole, tmp_path):
    run(recipe(tmp_path, sharers=2))
    assert_same(outcome(tmp_path), whole[2])
    other = run(recipe(tmp_path/'other', 'training.seed=43', sharers=2))
    assert other.losses == [] and outcome(tmp_path/'other')['log'] != whole[2]['log']


def test_resumed_after_each_step(whole, tmp_path):
    made = recipe(tmp_path, 'output.save_every=1', 'output.keep_last=null', sharers=2)
    for step in range(1, 6):
        with pytest.raises(Stopped): run(made, resume=True, stop_before=step)
        assert max(p.name for p in (tmp_path/'checkpoints').iterdir()) == f'step-{step:08d}'
    run(made, resume=True)
    assert_same(outcome(tmp_path), whole[2] | dict(checkpoints=[f'step-{n:08d}' for n in range(1, 7)]))


def test_a_finished_run_stays_as_it_is(whole):
    folder, it, before = whole
    again = run(recipe(folder, sharers=2), resume=True)
    assert_same(outcome(folder), before)
    assert again.summary['steps'] == 6


# ---------------------------------------------------------------- what stays as it was (contracts 5 and 8)

def state_of(m): return {n: p.clone() for n, p in [*m.named_parameters(), *m.named_buffers()]}


@pytest.mark.parametrize('broken', [False, True])
def test_nothing_else_changes(tmp_path, broken):
    "Models, their modes, random numbers and gradient mode are as before a run, also one that raises in the middle."
    given = [model('receiver'), model('llama'), model('qwen2')]
    before, modes = [state_of(m) for m in given], [[x.training for x in m.modules()] for m in given]
    torch.manual_seed(5); random.seed(5)
    dice, python, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    if broken:
        with pytest.raises(Stopped): run(recipe(tmp_path, sharers=2), stop_before=4)
    else:
        it = run(recipe(tmp_path, sharers=2))
        assert not it.task.c2c.training and not any(f.training for f in it.task.c2c.fusers)
        for f in it.task.c2c.fusers: assert all(p.requires_grad for p in f.parameters())
    assert torch.equal(torch.get_rng_state(), dice) and random.getstate() == python and torch.is_grad_enabled() and torch.get_num_threads() == threads
    for m, old, mode in zip(given, before, modes):
        now = state_of(m)
        assert now.keys() == old.keys() and all(torch.equal(x, old[n]) for n, x in now.items())
        assert [x.training for x in m.modules()] == mode
        assert not any(p.requires_grad or p.grad is not None for p in m.parameters())
        assert not any(x._forward_hooks or x._forward_pre_hooks or x._backward_hooks for x in m.modules())


def test_fusers_change(whole):
    "Or the tests above would show nothing: every parameter of every fuser is trained, by a step that is not the same for all."
    folder, it, _ = whole
    fresh = task(recipe(folder, sharers=2))
    fresh.load()
    for old, new in zip(fresh.c2c.fusers, it.task.c2c.fusers):
        for (name, a), b in zip(old.named_parameters(), new.parameters()): assert not torch.equal(a, b), name


# ---------------------------------------------------------------- refusals

def files_of(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture
def begun(tmp_path):
    "A run that stopped after four of six steps."
    with pytest.raises(Stopped): run(recipe(tmp_path), stop_before=4)
    return tmp_path


@pytest.mark.parametrize('change, named', [('training.learning_rate=1e-3', r'training.learning_rate: 0.003 -> 0.001'), ('data.args.seed=1', r'data.args.seed: not given -> 1'), ('model.projector.args.hidden_dim=9', 'hidden_dim: 8 -> 9'),
    ('training.accumulation=1', r'(?s)training.accumulation: 2 -> 1.*rows_of_a_step: 6 -> 3'), ('model.alignment=first', 'model.alignment: null -> "first"')])
def test_another_recipe_is_not_resumed(begun, change, named):
    before = files_of(begun)
    with pytest.raises(ValueError, match=named) as caught: run(recipe(begun, change), resume=True)
    assert 'step-00000004' in str(caught.value) and 'nothing was changed' in str(caught.value) and 'force' in str(caught.value)
    assert files_of(begun) == before


def test_other_data_are_not_resumed(begun, monkeypatch):
    "The recipe is the same, what the data set gives is not."
    before = files_of(begun)
    monkeypatch.setattr(TinyChats, 'samples', lambda self, row: self.from_chat([dict(m, content=m['content'] + ' old') for m in row['chat']]))
    with pytest.raises(ValueError, match=r'data: \w{16} -> \w{16}'): run(recipe(begun), resume=True)
    assert files_of(begun) == before


def test_other_models_are_not_resumed(begun):
    before = files_of(begun)
    other = task(recipe(begun))
    other.models = [model('receiver'), model('llama', seed=1)]
    with pytest.raises(ValueError, match=r'models: .*sharer 0.* -> .*sharer 0'): Trainer(recipe(begun), True, False, other, progress=False).start()
    assert files_of(begun) == before
    with pytest.raises(ValueError, match='models'): Trainer(recipe(begun), True, False, other, progress=False).start()
    forced = Trainer(recipe(begun), True, True, other, progress=False).start()
    assert forced.step == 4


def test_another_number_of_processes_is_not_resumed(begun):
    before = files_of(begun)
    it = Trainer(recipe(begun), True, False, task(recipe(begun)), progress=False)
    it.identity['processes'] = 2
    with pytest.raises(ValueError, match='processes: 1 -> 2'): it.start()
    assert files_of(begun) == before


@pytest.mark.parametrize('change', ['output.save_every=1', 'output.log_every=2', 'training.workers=2', 'name=another'])
def test_what_may_change(begun, change):
    it = start(recipe(begun, change), resume=True)
    assert it.step == 4


def test_force_goes_on_all_the_same(begun):
    it = run(recipe(begun, 'training.learning_rate=1e-3'), resume=True, force=True)
    assert it.step == it.summary['steps'] == 6 and it.summary['of_steps'] == 6
    log = [json.loads(line) for line in (begun/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in log if 'loss' in r] == [1, 2, 3, 4, 5, 6] and log[-2]['lr'] < 1e-3


def test_a_folder_with_a_run_in_it(begun):
    "It is neither overwritten nor gone on with unless somebody says so."
    before = files_of(begun)
    with pytest.raises(FileExistsError, match=r'holds a run already \(up to step 4\): go on with it \(resume\).*\(force\)'): run(recipe(begun))
    with pytest.raises(ValueError, match='different run'): run(recipe(begun, 'training.seed=1'))
    assert files_of(begun) == before
    it = run(recipe(begun, 'training.seed=1'), force=True)
    assert [r['step'] for r in map(json.loads, (begun/'log.jsonl').read_text().splitlines()) if 'loss' in r] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(FileExistsError): run(recipe(begun, 'training.seed=1'))


def test_resume_without_a_run(tmp_path): assert run(recipe(tmp_path, 'training.steps=1'), resume=True).step == 1


# ---------------------------------------------------------------- what goes wrong on the way

def finite(checkpoint):
    fuser = Fuser.from_pretrained(checkpoint/'fuser')
    return all(torch.isfinite(p).all() for p in fuser.parameters())


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_no_number(tmp_path, what):
    "Step 5 is not finite: it is named, the checkpoint of step 4 is good, and nothing after it was saved."
    made = recipe(tmp_path, 'output.log_every=3')
    it = start(made)
    go_on = it.task.model.forward
    def spoiled(inputs):
        loss = go_on(inputs)
        if it.step != 4: return loss
        if what == 'loss': return loss*math.inf
        loss.register_hook(lambda g: g*math.nan)
        return loss
    it.task.model.forward = spoiled
    with pytest.raises(FloatingPointError, match=rf'(?s)the {what} of step 5 is (inf|nan).*The last good checkpoint is .*step-00000004') as caught: it.fit()
    assert 'learning_rate' in str(caught.value)
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step-00000003', 'step-00000004'] and finite(tmp_path/'checkpoints'/'step-00000004')
    assert not (tmp_path/'summary.json').exists() and not (tmp_path/'fuser').exists()
    clean = recipe(tmp_path/'clean')
    run(clean); run(made, resume=True)
    assert (tmp_path/'fuser'/'model.safetensors').read_bytes() == (tmp_path/'clean'/'fuser'/'model.safetensors').read_bytes()


def test_a_sharer_with_infinite_weights(tmp_path):
    made = recipe(tmp_path)
    it = task(made, fresh=True)
    it.models[1].model.layers[0].self_attn.v_proj.weight.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match='the loss of step 1 is nan.*There is no checkpoint yet'): Trainer(made, task=it, progress=False).start().fit()
    assert not (tmp_path/'checkpoints').exists() or not list((tmp_path/'checkpoints').iterdir())


def test_an_absurd_learning_rate(tmp_path):
    made = recipe(tmp_path, 'training.learning_rate=1e30', 'training.scheduler=constant', 'output.save_every=1')
    with pytest.raises(FloatingPointError, match='step [2-6]'): run(made)
    for p in (tmp_path/'checkpoints').iterdir(): assert finite(p)


def test_a_full_disk(tmp_path, monkeypatch):
    "The checkpoint of step 4 does not fit: that of step 3, which is the best so far, stays, the message says what to do, and with space it goes on to the same weights."
    made = recipe(tmp_path)
    from c2c_nb import checkpoint
    save_file = checkpoint.save_file
    def full(tensors, file, **kwargs):
        if 'step-00000004' in str(file): raise OSError(28, 'No space left on device', str(file))
        save_file(tensors, file, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'save_file', full)
        with pytest.raises(OSError, match=r'no room for the checkpoint of step 4.*checkpoints up to step-00000003 are as they were.*Free some space'): run(made)
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step-00000002', 'step-00000003'] and finite(tmp_path/'checkpoints'/'step-00000003')
    run(made, resume=True); run(recipe(tmp_path/'clean'))
    assert_same(outcome(tmp_path), outcome(tmp_path/'clean'))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    with pytest.raises(Stopped): run(recipe(tmp_path), stop_before=5)
    (tmp_path/'checkpoints'/'step-00000004'/'optimizer.safetensors').write_bytes(b'')
    with pytest.warns(UserWarning, match='passed over 1 damaged checkpoint, step-00000003 is the newest good one'): it = run(recipe(tmp_path), resume=True)
    run(recipe(tmp_path/'clean'))
    assert_same(outcome(tmp_path), outcome(tmp_path/'clean'))


# ---------------------------------------------------------------- bad input is told before a model is loaded

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A receiver and a sharer as folders, a fuser for them and one for others."
    root = tmp_path_factory.mktemp('models')
    for role, t in ('receiver', 'one'), ('llama', 'two'), ('qwen2', 'one'): model(role).save_pretrained(root/role); tokenizer(t).save_pretrained(root/role)
    Fuser.from_models(model('receiver'), model('llama'), hidden_dim=8).save_pretrained(root/'fuser')
    Fuser.from_models(model('llama'), model('receiver'), hidden_dim=8).save_pretrained(root/'other')
    (root/'turns.jsonl').write_text('\n'.join(json.dumps(dict(messages=[dict(role='user', content=w)])) for w in 'abc'))
    (root/'empty.jsonl').write_text('\n'.join(json.dumps(dict(messages=[dict(role='user', content=w), dict(role='assistant', content=' ')])) for w in 'abc'))
    (root/'good.jsonl').write_text('\n'.join(json.dumps(dict(messages=[dict(role='user', content=w), dict(role='assistant', content=w)])) for w in 'abcdef'))
    return root


bad = {
    'a missing file': (['data.type=Chats', 'data.args={data_files: ROOT/god.jsonl}'], r"there is no file .*god.jsonl.*did you mean 'good.jsonl'"),
    'an unknown data set': (['data.type=TinyChat'], "data: there is no data set called 'TinyChat'; did you mean 'TinyChats'"),
    'an unknown argument of a data set': (['data.args={row: 4}'], "there is no argument 'row'; did you mean 'rows'"),
    'an unknown projector': (['model.projector.type=C2CProjecter'], "model.projector.type: .*C2CProjecter.*did you mean 'C2CProjector'|model.projector.type: .*C2CProjecter.*C2CProjector"),
    'an unknown scheduler': (['training.scheduler=cosin'], "training.scheduler is 'cosin'; did you mean 'cosine'"),
    'a layer map with too few layers': (['model.layer_map=[0, 1]'], 'the layer map has 2 entries, the receiver has 3 layers'),
    'a layer map that names layers there are not': (['model.layer_map=[0, 1, 2]'], r'the layer map names sharer layers \[2\], but the sharer has 2 layers'),
    'a fuser for other models': (['model.fusers=[ROOT/other]'], 'the fuser for .*llama is made for a receiver of'),
    'a model that is not there': (['model.receiver=ROOT/recever'], 'model.receiver is .*recever.*no such folder'),
    'a folder that is no model': (['model.sharers=[ROOT/fuser]'], None),
    'an alignment that these tokenizers do not have': (['model.alignment=shared'], "sharer 0 cannot read the receiver's ids"),
    'data without answers': (['data.type=Chats', 'data.args={data_files: ROOT/turns.jsonl}'], 'none of the rows of .*turns.jsonl can be used.*3 left out'),
    'no usable row': (['data.type=Chats', 'data.args={data_files: ROOT/empty.jsonl}'], 'none of the rows of .*empty.jsonl can be used.*3 left out'),
    'no row that is short enough': (['training.max_length=4'], r'(?s)none of the samples can be encoded.*the prompt leaves no room for an answer within 4 tokens'),
    'questions that are not there': (['validation.data={type: Chats, args: {data_files: ROOT/god.jsonl}}'], r"validation.data: there is no file"),
    'questions without options': (['validation.data={type: TinyChats}'], 'TinyChats has no multiple choice questions'),
    'a fuser to train that is frozen': (['training.freeze=[receiver, sharer, fuser]'], 'nothing to train'),
    'a store for rows that change': (['training.store=STORE', 'model.follow_response=true'], 'training.store'),
    'a stream without an end': (['data.args={streaming: true}', 'training.steps=null'], 'training.steps'),
}


@pytest.mark.parametrize('case', bad)
def test_bad_input(folders, tmp_path, monkeypatch, case):
    changes, message = bad[case]
    monkeypatch.setattr('c2c_nb.task.AutoModelForCausalLM.from_pretrained', lambda *args, **kwargs: pytest.fail('a model was loaded'))
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    made = recipe(tmp_path/'run', f'model.receiver={folders}/receiver', f'model.sharers=[{folders}/llama]', *(c.replace('ROOT', str(folders)).replace('STORE', str(tmp_path/'store')) for c in changes))
    with pytest.raises((ValueError, FileNotFoundError), match=message): train(made, progress=False)
    assert not (tmp_path/'run').exists()


def test_good_input(folders, tmp_path, monkeypatch):
    "The same recipe without a fault trains, from folders; and a fuser is gone on with."
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    made = recipe(tmp_path/'run', f'model.receiver={folders}/receiver', f'model.sharers=[{folders}/llama]', f'model.fusers=[{folders}/fuser]', 'data.type=Chats', f'data.args={{data_files: {folders}/good.jsonl}}', 'training.steps=2')
    it = train(made, progress=False)
    assert it.summary['steps'] == 2 and it.task.c2c.fusers[0].config.projector_args == dict(hidden_dim=8)
    C2CModel.from_pretrained(tmp_path/'run'/'fuser')
