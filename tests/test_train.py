"The loop: what it learns from, what it leaves alone, what it refuses, and that nothing is lost when it is interrupted."
import copy, json, math, random, shutil

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, SchedulerType

from c2c_nb.batch import encode_samples
from c2c_nb.data import load_samples, make_data
from c2c_nb.model import C2CModel, plain_head
from c2c_nb.fuser import Fuser
from c2c_nb.projector import C2CProjector
from c2c_nb.task import dynamic_weights
from c2c_nb.train import Trainer, plot_run, read_log, train

from test_parity import aligned_training, check_gradients, golden_model, gradients, models, read_json, toss, training_batch, trainings
from safetensors.torch import load_file
from tiny_train import Stopped, TinyChats, assert_same, chats, model, outcome, processor, recipe, run, start, task, tokenizer

few = settings(derandomize=True, deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), database=None)


# ---------------------------------------------------------------- parity with the official trainer (contract 4)

followed = dict(t04='t04_incl_resp_nogumbel_b1', t05='t05_incl_resp_gumbel_b1_T1')


def check_official(c2c, info, plan):
    "Loss, total gradient norm and the norm of every parameter."
    loss = c2c.answer_loss(plan, plain=plain_head(c2c.receiver)) / plan.supervised.shape[1]
    loss.backward()
    assert loss.item() == pytest.approx(info['loss'], abs=1e-4)
    check_gradients(c2c, info)


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
    draws = toss(c2c, g, plan.cuts[0].active, fused & (mask > 0), case in followed)
    check_official(c2c, info, plan)
    assert next(draws, None) is None or not info['gumbel'], 'all stored draws were used'


def test_official_step_with_two_tokenizers(golden, models):
    "t08: both models read their own templates."
    info, c2c, batch = aligned_training(golden, models)
    check_official(c2c, info, c2c.plan(**batch, align='section'))


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


def test_rows_may_be_read_in_parts(tmp_path):
    "A step is the mean over all labels of its rows, however they are dealt to micro-batches that have more labels or fewer."
    logs = []
    for size, times in (6, 1), (3, 2), (1, 6):
        run(recipe(tmp_path/str(size), f'training.batch_size={size}', f'training.accumulation={times}', 'training.steps=4', 'model.projector.args.dropout=0.', 'model.projector.args.gate_noise=null', 'output.save_every=null', 'validation.every=null'))
        logs.append([r for r in read_log(tmp_path/str(size)) if 'loss' in r])
    for log in logs[1:]:
        for a, b in zip(log, logs[0], strict=True): assert (a['loss'], a['grad_norm']) == pytest.approx((b['loss'], b['grad_norm']), rel=1e-5)
    a, b = (load_file(tmp_path/n/'fuser'/'model.safetensors') for n in '61')
    for n in a: assert (a[n] - b[n]).abs().max() <= 1e-6, n


# ---------------------------------------------------------------- interrupted equals uninterrupted (contract 10; kills are in test_train_kill.py)

@pytest.fixture(autouse=True)
def no_figure(monkeypatch): monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)


def run_once(folder, **kwargs):
    "A run from start to end, without its figure."
    with pytest.MonkeyPatch.context() as m:
        m.setattr('c2c_nb.train.plot_run', lambda *args: None)
        return run(recipe(folder, **kwargs))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run with two sharers and all that is random, and what came out."
    folder = tmp_path_factory.mktemp('whole')
    it = run_once(folder, sharers=2)
    return folder, it, outcome(folder)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "What comes out of the plain recipe."
    folder = tmp_path_factory.mktemp('undisturbed')
    run_once(folder)
    return outcome(folder)


def test_runs_are_repeatable(whole, tmp_path):
    run(recipe(tmp_path, sharers=2))
    assert_same(outcome(tmp_path), whole[2])
    run(recipe(tmp_path/'other', 'training.seed=43', 'training.steps=1', sharers=2))
    assert outcome(tmp_path/'other')['log'][0] != whole[2]['log'][0]


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
    it, during = start(recipe(tmp_path, sharers=2)), []
    forward = it.task.model.forward
    it.task.model.forward = lambda inputs: (during.append([m.training for m in (it.task.c2c.fusers, *given)]), forward(inputs))[1]
    if broken:
        step = it.task.before_step
        def fail(n, steps):
            if n == 4: raise Stopped(n)
            step(n, steps)
        it.task.before_step = fail
        with pytest.raises(Stopped): it.fit()
    else: it.fit()
    assert [True, False, False, False] in during and not any(any(models) for _, *models in during)     # frozen models are never in training mode
    assert not it.task.model.training and not it.task.c2c.training and not any(m.training for m in it.task.c2c.fusers.modules())
    assert all(p.requires_grad for p in it.task.c2c.fusers.parameters())
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


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "A run that stopped after four of six steps."
    folder = tmp_path_factory.mktemp('stopped')
    with pytest.raises(Stopped): run(recipe(folder), stop_before=4)
    return folder


@pytest.fixture
def begun(stopped, tmp_path):
    "A copy of it."
    return shutil.copytree(stopped, tmp_path/'begun')


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


def test_a_folder_with_a_run_in_it(tmp_path):
    "It is neither overwritten nor gone on with unless somebody says so."
    begun = tmp_path
    with pytest.raises(Stopped): run(recipe(begun), stop_before=4)
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
def test_no_number(tmp_path, undisturbed, what):
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
    run(made, resume=True)
    assert outcome(tmp_path)['fuser/model.safetensors'] == undisturbed['fuser/model.safetensors']


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


def test_a_full_disk(tmp_path, undisturbed, monkeypatch):
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
    run(made, resume=True)
    assert_same(outcome(tmp_path), undisturbed)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed):
    with pytest.raises(Stopped): run(recipe(tmp_path), stop_before=5)
    (tmp_path/'checkpoints'/'step-00000004'/'optimizer.safetensors').write_bytes(b'')
    with pytest.warns(UserWarning, match='passed over 1 damaged checkpoint, step-00000003 is the newest good one'): it = run(recipe(tmp_path), resume=True)
    assert_same(outcome(tmp_path), undisturbed)


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


# ---------------------------------------------------------------- what is learned, and how

same_chat = 'data.args={repeat: 1, rows: 8}'
quick = 'training.accumulation=1', 'training.learning_rate=0.02', 'model.projector.args.dropout=0.', 'training.gates.noise=logistic', 'output.save_every=null', 'validation.every=null'


@pytest.mark.parametrize('sharers, follow', [(1, True), (2, False)])
def test_the_loss_falls(tmp_path, sharers, follow):
    "A question with one answer is learned; as the answers are written the same way, all are right in the end."
    it = run(recipe(tmp_path, same_chat, *quick, f'model.follow_response={follow}'.lower(), 'training.steps=30', 'training.scheduler=constant', 'output.log_every=5', f'validation.data={{type: TinyChats, args: {{repeat: 1, rows: 4}}}}', 'validation.method=answers', sharers=sharers))
    losses = [r['loss'] for r in read_log(tmp_path) if 'loss' in r]
    assert losses[-1] < .75*losses[0]
    assert it.summary['best']['questions'] == 4 and it.summary['best']['held_out_loss'] < losses[0]


@pytest.mark.parametrize('sharers', [2])
def test_sharers_are_left_out(tmp_path, sharers):
    "By the number of the row and the step alone; never all of them, and never in validation."
    it = start(recipe(tmp_path, 'training.sharer_dropout=0.9', sharers=sharers))
    rows = [it.batches.rows[i] for i in range(6)]
    speaking = lambda plan: torch.stack([c.active.any(1) for c in plan.cuts]).any(0)             # (b, sharers)
    plan = lambda rows, step: it.task.inputs(rows, step)[0][0]
    assert speaking(plan(rows, -1)).all()
    seen = [speaking(plan(rows, step)) for step in range(8)]
    assert all(s.any(1).all() for s in seen) and not torch.equal(seen[0], seen[1])
    share = torch.stack(seen).float().mean().item()
    assert .5 <= share < .65                                     # one of two always stays; with .9 of them gone both are left 1 % of the time
    for step in range(3): assert torch.equal(torch.cat([speaking(plan([r], step)) for r in rows]), seen[step])


def test_a_receiver_that_learns(tmp_path):
    "It is trained in fp32, saved with the fuser, and resumed to the bit; sharers stay."
    made = recipe(tmp_path, 'training.freeze=[sharer]')
    def given(made):
        it = task(made, fresh=True)
        it.models = [m.to(torch.bfloat16) for m in it.models]
        return it
    it = Trainer(made, task=given(made), progress=False).start()
    it.fit()
    receiver, sharer = it.task.c2c.receiver, it.task.c2c.sharers[0]
    assert {p.dtype for p in receiver.parameters()} == {torch.float32} and {p.dtype for p in sharer.parameters()} == {torch.bfloat16}
    assert all(it.opt.state[p]['exp_avg'].dtype == torch.float32 for g in it.opt.param_groups for p in g['params'] if p in it.opt.state)
    for (name, new), old in zip(receiver.named_parameters(), model('receiver').parameters()): assert not torch.equal(new, old.to(torch.bfloat16).float()) or name.endswith('bias'), name
    for new, old in zip(sharer.parameters(), model('llama').parameters()): assert torch.equal(new, old.to(torch.bfloat16))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path/'receiver')
    assert saved.dtype == torch.float32
    best = tmp_path/'checkpoints'/f'step-{it.best["step"]:08d}'
    assert (tmp_path/'receiver'/'model.safetensors').read_bytes() == (best/'receiver'/'model.safetensors').read_bytes()
    again = recipe(tmp_path/'again', 'training.freeze=[sharer]')
    stopping = given(again)
    stopping.before_step = lambda step, steps, go_on=stopping.before_step: (_ for _ in ()).throw(Stopped()) if step == 4 else go_on(step, steps)
    with pytest.raises(Stopped): Trainer(again, task=stopping, progress=False).start().fit()
    Trainer(again, True, task=given(again), progress=False).start().fit()
    assert_same(outcome(tmp_path/'again'), outcome(tmp_path))


def test_gradient_of_a_receiver_that_learns():
    "With gates that are closed it is the gradient of ordinary training with transformers."
    made = recipe('unused', 'training.freeze=[sharer, fuser]', 'model.projector.args={hidden_dim: 8, intermediate_dim: 8, gate_init: -1., gate_noise: null}', 'validation.share=0')
    it = task(made, fresh=True)
    it.load()
    it.train(True)
    said = chats(3, 7, (1, 2))
    samples, _ = load_samples(make_data('TinyChats'), [dict(chat=c) for c in said])
    it.model(it.send(it.inputs(list(encode_samples(samples, it.processor)[0]), 0)[0], 'cpu')).backward()
    plain, t = copy.deepcopy(model('receiver')).requires_grad_(True).train(), tokenizer()
    for chat in said:
        ids = t.apply_chat_template(chat, tokenize=True, return_dict=False)
        n = answers_of(chat, 'last')[0]
        F.cross_entropy(plain(torch.tensor([ids])).logits[0, -n-1:-1], torch.tensor(ids[-n:]), reduction='sum').backward()
    for (name, a), b in zip(it.c2c.receiver.named_parameters(), plain.parameters()): assert (a.grad - b.grad).abs().max() <= 1e-5*max(1, b.grad.abs().max()), name
    assert not any(p.grad is not None for p in it.c2c.fusers.parameters())


@pytest.mark.parametrize('metric', ['loss', 'accuracy'])
def test_early_stopping_keeps_the_best(tmp_path, monkeypatch, metric):
    "It stops after two looks without a better one; what is saved is the best, though others are newer."
    values = [.5, .4, .2, .3, .2, .1]
    monkeypatch.setattr(Trainer, '_held_out_loss', lambda self: values[self.step - 1] if metric == 'loss' else 1.)
    monkeypatch.setattr('c2c_nb.train.ask', lambda task, questions, *args: [i/len(questions) >= values[it.step - 1] for i in range(len(questions))])
    ask = 'validation.data={type: TinyChats, args: {rows: 20}}', 'validation.method=answers'
    it = start(recipe(tmp_path, 'training.steps=9', 'validation.every=1', 'validation.patience=2', 'output.keep_last=1', 'output.save_every=1', f'validation.metric={metric}', *ask))
    summary = it.fit()
    assert summary['steps'] == 5 and summary['of_steps'] == 9 and summary['stopped_early'] and summary['saved_step'] == summary['best']['step'] == 3
    assert summary['best']['value'] == pytest.approx(.2 if metric == 'loss' else .8)
    points = tmp_path/'checkpoints'
    assert sorted(p.name for p in points.iterdir()) == ['step-00000003', 'step-00000005']
    saved, best, last = (Fuser.from_pretrained(p/'fuser') for p in (tmp_path, points/'step-00000003', points/'step-00000005'))
    assert saved.fingerprint() == best.fingerprint() != last.fingerprint() and saved.config.training['steps'] == 3
    assert it.task.c2c.fusers[0].fingerprint() == best.fingerprint()


def test_without_keep_best_the_last_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, '_held_out_loss', lambda self: float(self.step))
    summary = run(recipe(tmp_path, 'output.keep_best=false', 'validation.every=2')).summary
    assert summary['best']['step'] == 2 and summary['saved_step'] == 6
    assert sorted(p.name for p in (tmp_path/'checkpoints').iterdir()) == ['step-00000004', 'step-00000006']
    assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() == Fuser.from_pretrained(tmp_path/'checkpoints'/'step-00000006'/'fuser').fingerprint()


schedulers = dict(cosine_with_min_lr='{min_lr: 0.0001}', cosine_warmup_with_min_lr='{min_lr: 0.0001}', warmup_stable_decay='{num_decay_steps: 1}')


again = 'reduce_lr_on_plateau', 'greedy', 'cosine'


@pytest.mark.parametrize('name', [s.value for s in SchedulerType])
def test_every_scheduler(tmp_path, name):
    "Three steps; for those that keep more than a number, again, interrupted after two of them."
    few = f'training.scheduler={name}', f'training.scheduler_args={schedulers.get(name, "{}")}', 'training.steps=3', f'validation.every={1 if name in ("reduce_lr_on_plateau", "greedy") else 3}', f'output.save_every={1 if name in again else 3}', 'data.args.rows=4', 'training.batch_size=1'
    it = run(recipe(tmp_path/'a', *few))
    rates = [r['lr'] for r in read_log(tmp_path/'a') if 'loss' in r]
    assert len(rates) == 3 and all(0 <= r <= 3e-3 for r in rates)
    if name not in again: return
    with pytest.raises(Stopped): run(recipe(tmp_path/'b', *few), stop_before=2)
    run(recipe(tmp_path/'b', *few), resume=True)
    assert_same(outcome(tmp_path/'b'), outcome(tmp_path/'a'))


def test_streams_are_resumed(tmp_path):
    "Rows that come one after the other: the same weights, also over the end of the data; and every row that is not held out is used."
    made = lambda folder: recipe(folder, 'data.args={streaming: true, rows: 13}', 'training.steps=5', 'validation.share=0')
    run(made(tmp_path/'a'))
    for step in 1, 3:                                            # the first has no checkpoint yet
        with pytest.raises(Stopped): run(made(tmp_path/'b'), resume=True, stop_before=step)
    it = run(made(tmp_path/'b'), resume=True)
    assert_same(outcome(tmp_path/'b'), outcome(tmp_path/'a'))
    stream = start(made(tmp_path/'c')).batches
    assert sorted(r['row'] for n in range(3) for bite in stream.read(n) for r in bite) == list(range(13))


def test_gates_have_a_rate_of_their_own(tmp_path):
    "Gates move by about their learning rate in each step, weights hardly at all; and no decay draws gates to zero where nothing else does."
    it = start(recipe(tmp_path, 'training.learning_rate=1e-9', 'training.gates.learning_rate=0.1', 'training.scheduler=constant', 'training.steps=2'))
    assert {g['name']: g['lr'] for g in it.opt.param_groups} == dict(gates=.1, weights=1e-9)
    fuser = it.task.c2c.fusers[0]
    before = {n: p.detach().clone() for n, p in fuser.named_parameters()}
    it.fit()
    for n, p in fuser.named_parameters():
        moved = (p - before[n]).abs().max().item()
        assert moved > .05 if n.endswith('gate_logit') else moved < 1e-6, n


@pytest.mark.parametrize('schedule, steps, expected', [('exponential', None, [1., .1**.25, .1**.5, .1**.75]), ('linear', None, [1., .775, .55, .325]), ('linear', 2, [1., .55, .1, .1]), ('exponential', 2, [1., .1**.5, .1, .1])])
def test_temperatures(tmp_path, schedule, steps, expected):
    "What the gates really have in each step, and what the log says."
    it, seen = start(recipe(tmp_path, 'training.steps=4', f'training.gates.schedule={schedule}', f'training.gates.steps={json.dumps(steps)}')), []
    forward = it.task.model.forward
    it.task.model.forward = lambda inputs: (it.task.c2c.training and seen.append([s.projector.gate_temperature.item() for f in it.task.c2c.fusers for s in f.stacks]), forward(inputs))[1]
    it.fit()
    assert list(dict.fromkeys(x for xs in seen for x in xs)) == pytest.approx(list(dict.fromkeys(expected)))
    assert [r['temperature'] for r in read_log(tmp_path) if 'loss' in r] == pytest.approx(expected)


def test_fp32_weights_of_bf16_models(tmp_path):
    "In bf16 neither gates nor norms near 1 could move by the usual learning rate (steps are 2**-8 there)."
    made = recipe(tmp_path, 'training.precision=bf16', 'training.learning_rate=1e-4', 'training.scheduler=constant', 'training.steps=2', 'model.projector.args.gate_init=1.')
    it = task(made, fresh=True)
    it.models = [m.to(torch.bfloat16) for m in it.models]
    run_ = Trainer(made, task=it, progress=False).start()
    fuser = it.c2c.fusers[0]
    before = {n: p.detach().clone() for n, p in fuser.named_parameters()}
    run_.fit()
    assert {m.dtype for m in (it.c2c.receiver, *it.c2c.sharers)} == {torch.bfloat16}
    for n, p in fuser.named_parameters():
        assert p.dtype == torch.float32 and run_.opt.state[p]['exp_avg'].dtype == run_.opt.state[p]['exp_avg_sq'].dtype == torch.float32
        assert 0 < (p - before[n]).abs().max() < 5e-4, n
    assert {t.dtype for n, t in load_file(tmp_path/'fuser'/'model.safetensors').items()} == {torch.float32}
    assert any('norm' in n for n in before) and any(n.endswith('gate_logit') for n in before)


def test_frozen_work_from_the_disk(tmp_path, whole):
    "With a store the same is learned, to rounding, also where sharers are left out; test_store.py has the rest."
    run(recipe(tmp_path/'a', f'training.store={tmp_path}/store', sharers=2))
    loss = lambda folder: [r['loss'] for r in read_log(folder) if 'loss' in r]
    assert loss(tmp_path/'a') == pytest.approx(loss(whole[0]), rel=1e-5)


def test_log_and_figure(tmp_path):
    "A line for the loss of each step that is asked for, gates and weights of every layer with each look, and a figure at the end."
    run(recipe(tmp_path, 'output.log_every=2'))
    log = read_log(tmp_path)
    assert [r['step'] for r in log if 'loss' in r] == [2, 3, 4, 6] and [r['step'] for r in log if 'validation' in r] == [3, 6]
    look = next(r for r in log if 'validation' in r)
    assert len(look['fusers'][0]['gates']['key']) == 3 and all(0 < w < 1 for w in look['fusers'][0]['weights']['value'])
    plot_run(tmp_path, tmp_path/'figure.png')
    assert (tmp_path/'figure.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('follow', [False, True])
def test_dynamic_weights_of_a_batch(follow):
    "They are the mean over all positions that are fused, row by row: prompts and answers of different lengths do not matter."
    c2c = learner(2, 'offsets', follow=follow).eval()
    samples, _ = load_samples(make_data('TinyChats'), [dict(chat=c) for c in chats(4, 3, (1, 3))])
    rows = list(encode_samples(samples, c2c.processor, follow=follow)[0])
    together, alone = dynamic_weights(c2c, c2c.processor.pad(rows)), [dynamic_weights(c2c, c2c.processor.pad([r])) for r in rows]
    for j in 0, 1:
        n = [sum(a >> j & 1 for a in r['active']) for r in rows]
        for half in 'key', 'value':
            for i in range(3): assert together[j][half][i] == pytest.approx(sum(a[j][half][i]*k for a, k in zip(alone, n))/sum(n), abs=1e-5)
