"Routers: what they learn, where the line is drawn, rows and batches, files and bad input."
import json, math

import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

import tiny_train
from c2c_nb.baseline import Alone, C2C, System, make_systems
from c2c_nb.routing import ConfidenceRouter, MatrixRouter, Routed, draw_threshold, fit_routing, load_router
from test_baseline import chats, model_of, options, pair, texts

few = settings(max_examples=60, deadline=None, derandomize=True)
tok = tiny_train.tokenizer()
reader = lambda: Alone(tiny_train.model('receiver'), tok)
other = lambda: Alone(tiny_train.model('llama'), tiny_train.tokenizer('two'), 'sharer')


def questions(n, seed=0):
    "Prompts about a cat or about the moon, and who is right: the second system knows cats."
    rng = torch.Generator().manual_seed(seed)
    words = tiny_train.words
    pick = lambda: words[int(torch.randint(4, len(words), (1,), generator=rng))]
    cats = [bool(i % 2) for i in range(n)]
    return [f"{pick()} {pick()} {'cat' if c else 'moon'} {'cat' if c else 'moon'}" for c in cats], [not c for c in cats], cats


def test_the_matrix_router_learns_who_knows_what():
    prompts, first, second = questions(240)
    routed = fit_routing(reader(), other(), prompts, first, second, 'made up', share=None, seed=1)
    unseen, _, cats = questions(40, seed=1)
    away = [a.extra['answered_by'] == 'sharer' for a in routed.answer(unseen, max_new_tokens=1)]
    assert sum(a == c for a, c in zip(away, cats)) >= 32                   # 20 by chance
    mixed = fit_routing(reader(), other(), prompts, second, first, 'made up', share=None, seed=1)            # the other way round
    assert sum(a.extra['answered_by'] == 'receiver' for a, c in zip(mixed.answer(unseen, max_new_tokens=1), cats) if c) >= 15
    about = routed.describe()['router']
    assert about['router'] == 'matrix' and about['about'] == dict(split='made up', prompts=240, share=None, seed=1, learned=180, loss=about['about']['loss'])
    assert json.dumps(routed.describe()) == json.dumps(fit_routing(reader(), other(), prompts, first, second, 'made up', share=None, seed=1).describe()) != json.dumps(mixed.describe())


def test_its_score_is_the_formula():
    prompts, first, second = questions(24)
    router = fit_routing(reader(), other(), prompts, first, second, 'x').router
    p = {k: v for k, v in router.state_dict().items()}
    ids = tok(prompts[0], return_tensors='pt')
    with torch.no_grad(): states = tiny_train.model('receiver').base_model(**ids).last_hidden_state.mean(1)[0]
    assert torch.allclose(router.embed([prompts[0], *texts])[0][0], states, atol=1e-5)
    wide = MatrixRouter(Alone(model_of('gpt2'), tok))            # a model that makes something of padding
    assert torch.allclose(wide.embed(texts)[0], torch.cat([wide.embed([t])[0] for t in texts]), atol=1e-5)
    v = p['project.weight'] @ ((states - p['mean'])/p['scale']) + p['project.bias']
    s = [p['weigh.weight'][0] @ (m*v) for m in p['models.weight']]
    assert float(router.judge(prompts[:1], None)[0]) == pytest.approx(float((s[1] - s[0]).sigmoid()), abs=1e-5)


def test_confidence_is_the_best_probability():
    prompts, router = texts, ConfidenceRouter(reader())
    found, own, _ = router.judge(prompts, None)
    for p, d in zip(prompts, found):
        with torch.no_grad(): best = tiny_train.model('receiver')(**tok(p, return_tensors='pt')).logits[0, -1].softmax(-1).max()
        assert own is None and float(d) == pytest.approx(1 - float(best), abs=1e-5)
    found, own, _ = router.judge(prompts, options)
    for a, b, d in zip(own, reader().answer(prompts, options), found): assert a.scores == b.scores and float(d) == pytest.approx(1 - math.exp(max(b.scores.values())), abs=1e-6)


@few
@given(rows=st.lists(st.tuples(st.sampled_from([.1, .2, .3, .4, .5]), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_no_line_does_better(rows):
    d, first, second = (list(x) for x in zip(*rows))
    difficulty = torch.tensor(d, dtype=torch.double)
    right = lambda line: sum(b if x > line else a for x, a, b in rows)
    line = draw_threshold(difficulty, first, second)
    best = max(map(right, [-1., *(x + .05 for x in set(d))]))
    assert right(line) == best
    assert not any(right(other) == best and sum(x > other for x in d) < sum(x > line for x in d) for other in [-1., *(x + .05 for x in set(d))])


@few
@given(d=st.lists(st.floats(0, 1), min_size=1, max_size=20, unique=True), share=st.floats(0, 1))
def test_a_share_is_a_share(d, share):
    line = draw_threshold(torch.tensor(d, dtype=torch.double), [True]*len(d), [True]*len(d), share)
    assert abs(sum(x > line for x in d) - share*len(d)) <= .5 + 1e-6


@pytest.mark.parametrize('kind', ['matrix', 'confidence'])
@pytest.mark.parametrize('prompts', [chats, texts], ids=['chats', 'texts'])
def test_rows_do_not_know_their_neighbours(kind, prompts):
    given, first, second = questions(24)
    c2c = pair('qwen3')
    routed = fit_routing(Alone(c2c.receiver, tok), C2C(c2c), given, first, second, 'x', kind)
    routed.router.threshold = float(routed.router.judge(prompts, None)[0].sort().values[1:3].mean())     # some stay, some go
    assert len({a.extra['answered_by'] for a in routed.answer(prompts, max_new_tokens=2)}) == 2
    written = routed.answer(prompts, max_new_tokens=4)
    for p, a, row, b in zip(prompts, written, options, routed.answer(prompts, options)):
        one, scored = routed.answer([p], max_new_tokens=4)[0], routed.answer([p], [row])[0]
        assert (a.text, a.extra['answered_by']) == (one.text, one.extra['answered_by']) and b.extra['answered_by'] == scored.extra['answered_by']
        assert a.extra['difficulty'] == pytest.approx(one.extra['difficulty'], abs=1e-5) and b.scores == pytest.approx(scored.scores, abs=1e-4)
        theirs = (routed.first if a.extra['answered_by'] == 'receiver' else routed.second).answer([p], max_new_tokens=4)[0]
        assert a.text == theirs.text and a.flops > theirs.flops and a.seconds['router'] > 0


def test_what_stays_is_not_answered_twice():
    "With options, the confidence router's own answers are kept, and cost once."
    class Never(System):
        name = 'never'
        def respond(self, *_): raise AssertionError('nobody should be asked')
    first = reader()
    routed = Routed(first, Never(), ConfidenceRouter(first, threshold=1.))
    for a, b in zip(routed.answer(texts, options), first.answer(texts, options)):
        assert (a.scores, a.flops) == (b.scores, b.flops) and set(a.seconds) == {'router'}
    with pytest.raises(AssertionError, match='nobody'): Routed(first, Never(), ConfidenceRouter(first, threshold=-1.)).answer(texts, options)
    copies = Routed(reader(), Never(), ConfidenceRouter(first, threshold=1.)).answer(texts, options)     # another reader than the first system: asked again
    assert all(a.flops > b.flops for a, b in zip(copies, first.answer(texts, options)))


@pytest.mark.parametrize('kind', ['matrix', 'confidence'])
def test_a_saved_router_is_the_same(tmp_path, kind):
    prompts, first, second = questions(24)
    routed, file = fit_routing(reader(), other(), prompts, first, second, 'x', kind), tmp_path/'deep'/'router.safetensors'
    routed.router.save(file)
    back = load_router(file, reader())
    assert back.describe() == routed.router.describe() and torch.equal(back.judge(texts, None)[0], routed.router.judge(texts, None)[0])
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match='fit one for this model'): load_router(file, other())
    with pytest.raises(FileNotFoundError, match='fit_routing'): load_router(tmp_path/'none', reader())
    save_file(dict(x=torch.zeros(1)), tmp_path/'else'); (tmp_path/'rubbish').write_bytes(b'no')
    for name in 'else', 'rubbish':
        with pytest.raises(ValueError, match='is no router'): load_router(tmp_path/name, reader())
    c2c = pair('qwen3')
    system = make_systems(c2c, {'by router': dict(kind='routing', router=str(file), second='C2C')})['by router']
    assert system.name == 'by router' and isinstance(system.second, C2C) and len(system.answer(texts, max_new_tokens=1)) == 4


@pytest.mark.parametrize('change, words', [(dict(kind='matrx'), "did you mean 'matrix'"), (dict(first_right=[True]), '1 and 24 marks'), (dict(first_right=[True]*24, second_right=[True]*24), 'at least one of each'), (dict(share=1.5), 'from 0 to 1'), (dict(kind='confidence', lr=1.), 'it has no lr'), (dict(first=System()), 'whose model reads')])
def test_bad_fits(change, words):
    prompts, first, second = questions(24)
    with pytest.raises(ValueError, match=words): fit_routing(**dict(dict(first=reader(), second=other(), prompts=prompts, first_right=first, second_right=second, split='x'), **change))


def test_fitting_leaves_the_random_state_alone():
    prompts, first, second = questions(24)
    torch.manual_seed(3); before = torch.get_rng_state()
    fit_routing(reader(), other(), prompts, first, second, 'x')
    assert torch.equal(torch.get_rng_state(), before)
