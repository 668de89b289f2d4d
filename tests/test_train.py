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
