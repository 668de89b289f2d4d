"A third model: its world's splits and lessons, its tokenizer, who is run, rows with sharers of their own, and the record."
import json, random, re
from dataclasses import replace

import pytest, torch

from c2c_nb import toy, trio
from conftest import root

ROLES = ('receiver', 'sum', 'neg')


@toy.register_world
class TinyTrio(trio.TrioWorld):
    "The world of three, hardly trained."
    name = 'tiny trio'
    def recipe(self, role): return replace(super().recipe(role), steps=4, batch=8)


def digits_of(example): return tuple(int(w) for w in re.search(r'of ([\d ]+) \?', example.prompt)[1].split())


@pytest.fixture(scope='module')
def world(): return TinyTrio(0)


@pytest.fixture(scope='module')
def models(world): return {role: toy.pretrain(world, role)[0].requires_grad_(False) for role in world.roles}


@pytest.fixture(scope='module')
def fusers(world, models):
    "Fusers that say something although they were never trained."
    torch.manual_seed(0)
    fusers = {s: trio.team(world, models, s, seed=i).fusers[0] for i, s in enumerate(('sum', 'neg'))}
    for f in fusers.values():
        for p in f.parameters():
            if p.dim() > 1: p.data.add_(torch.randn_like(p)*.1)
    return fusers


@pytest.fixture
def prompts(world):
    rng = random.Random(0)
    return [world.question(s, world.draw(n, rng), rng.randint(1, 4)).prompt for s, n in (('sum', 4), ('item', 4), ('neg', 2), ('neg', 4), ('sum', 3), ('item', 4))]


def test_splits_are_disjoint_and_the_same_for_all_skills(world):
    lists = {split: {s: {digits_of(q) for q in world.questions(s, split)} for s in world.skills} for split in ('train', 'valid', 'test')}
    for split in lists.values(): assert split['sum'] == split['neg'] == split['item']
    train, valid, test = (lists[s]['sum'] for s in ('train', 'valid', 'test'))
    assert not train & valid and not train & test and not valid & test and len(train | valid | test) == 10_000 and len(test) == 2000


def test_lessons_hold_nothing_that_is_held_out_and_one_skill_only(world):
    rng, held_out = random.Random(1), {digits_of(q) for split in ('valid', 'test') for q in world.questions('sum', split)}
    for role, skill in zip(ROLES, ('item', 'sum', 'neg')):
        lessons = [e for p in (0, .3, .5, .9) for e in world.lessons(role, p, 1000, rng)]
        assert not {digits_of(e) for e in lessons} & held_out
        assert {e.skill for e in lessons} == {skill} and {e.prompt.split()[0] for e in lessons} == {skill}
        assert max(len(digits_of(e)) for e in lessons) == 4


def test_answers_and_hints_are_right(world):
    for skill, sign in ('sum', 1), ('neg', -1):
        tokenizer = world.tokenizer_of(skill)
        for n in 2, 3, 4:
            digits = world.draw(n, random.Random(n))
            q = world.question(skill, digits)
            assert q.answer == str(sign*sum(digits) % 10)
            batch = toy.collate(tokenizer, [q])
            ids, targets = batch['input_ids'][0], batch['targets'][0]
            read = []                                             # digits read so far
            for i, t in zip(ids.tolist(), targets.tolist()):
                word = tokenizer.convert_ids_to_tokens(i).strip('▁')
                if word.isdigit(): read.append(int(word))
                if t >= 0: assert tokenizer.decode(t) == str(sign*sum(read) % 10)
            expected = n - 1 + (2 if skill == 'neg' else 3)       # at every digit but the first, and where the answer may come
            assert read == list(digits) and int((targets >= 0).sum()) == expected and targets[-1] >= 0


def test_the_key_is_reproducible_and_knows_the_second_tokenizer(world, monkeypatch):
    key = TinyTrio(0).key()
    other = TinyTrio(0); other.tokenizer_of('neg')(['neg of 1 2 ? it is', 'item'], padding=True)
    assert world.key() == key == other.key()
    assert len({key, TinyTrio(1).key(), trio.TrioWorld(0).key(), toy.SkillWorld(0).key()}) == 4
    monkeypatch.setattr(trio, 'MERGES', [*trio.MERGES[1::-1], *trio.MERGES[2:]])              # as many pieces, two of them numbered otherwise
    assert TinyTrio(0).key() != key


def test_the_tokenizers_really_differ(world):
    mine, its = world.tokenizer, world.tokenizer_of('neg')
    assert world.tokenizer_of('sum') is mine and world.tokenizer_of('receiver') is mine
    shared = [str(d) for d in range(10)]
    assert all(mine(d, add_special_tokens=False).input_ids != its(d, add_special_tokens=False).input_ids for d in shared)
    for skill in world.skills:
        text = world.question(skill, (3, 1, 4, 1), 2).prompt
        assert its.tokenize(text) != mine.tokenize(text)
        assert its.unk_token_id not in its(text).input_ids and its.decode(its(text).input_ids, skip_special_tokens=True) == text
    assert its.tokenize('neg of 3 1 ? it is') == ['▁n', 'eg', '▁of', '▁3', '▁1', '▁?', '▁it▁is']
    batch = world.processor('sum', 'neg')(['neg of 3 1 ? it is'])
    heard = batch['sharer_input_ids'][1][0][batch['pairing'][1][0]]
    assert its.convert_ids_to_tokens(heard.tolist()) == ['<s>', 'eg', '▁of', '▁3', '▁1', '▁?', '▁?', '▁it▁is']


@pytest.mark.parametrize('fusion', ['parallel', 'sequential'])
@pytest.mark.parametrize('chosen, runs', [(None, (1, 1)), ([True, False], (1, 0)), ([False, True], (0, 1)), ([False, False], (0, 0))])
def test_sharers_that_are_active_nowhere_are_not_run(world, models, fusers, prompts, chosen, runs, fusion):
    c2c, read, calls = trio.team(world, models, 'sum', 'neg', fusers=fusers, fusion=fusion), world.processor('sum', 'neg'), dict(sum=0, neg=0)
    def count(name):
        def hook(*_): calls[name] += 1
        return hook
    hooks = [models[s].base_model.register_forward_pre_hook(count(s)) for s in calls]
    try: answers = trio.ask(c2c, read, prompts, chosen and [chosen]*len(prompts), max_new_tokens=3)
    finally:
        for h in hooks: h.remove()
    assert tuple(calls.values()) == runs
    if runs == (0, 0): assert answers == toy.reply(models['receiver'], world.tokenizer, prompts, 3)


def logits_of(c2c, read, prompts, chosen=None):
    batch = read(prompts)
    if chosen is not None: batch['active'] = batch['active'] & torch.tensor(chosen)[:, None]
    with torch.no_grad(): return c2c(**batch).logits[:, -1]


@pytest.mark.parametrize('strategy', ['offsets', 'longest'])
@pytest.mark.parametrize('fusion', ['parallel', 'sequential'])
def test_rows_with_sharers_of_their_own_equal_the_single_runs(world, models, fusers, prompts, fusion, strategy):
    both = trio.team(world, models, 'sum', 'neg', fusers=fusers, fusion=fusion)
    readers = {s: world.processor(*s, strategy=strategy) for s in (('sum',), ('neg',), ('sum', 'neg'))}
    chosen = [(True, False), (False, False), (False, True), (True, True), (True, True), (False, True)]
    together, differ = logits_of(both, readers['sum', 'neg'], prompts, chosen), []
    for i, (p, (a, b)) in enumerate(zip(prompts, chosen)):
        sharers = ('sum',)*a + ('neg',)*b
        alone = models['receiver'](**world.tokenizer([p], return_tensors='pt')).logits[:, -1] if not sharers else logits_of(trio.team(world, models, *sharers, fusers=fusers, fusion=fusion), readers[sharers], [p])
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)
        if sharers: differ.append((together[i] - models['receiver'](**world.tokenizer([p], return_tensors='pt')).logits[0, -1]).abs().max().item())
    assert min(differ) > 1e-3                                     # all sharers were heard


def test_both_modes_differ_and_the_order_counts_in_one_of_them(world, models, fusers, prompts):
    made = {(fusion, s): logits_of(trio.team(world, models, *s, fusers=fusers, fusion=fusion), world.processor(*s), prompts)
        for fusion in ('parallel', 'sequential') for s in (('sum', 'neg'), ('neg', 'sum'))}
    torch.testing.assert_close(made['parallel', ('sum', 'neg')], made['parallel', ('neg', 'sum')], atol=1e-5, rtol=0)
    assert (made['sequential', ('sum', 'neg')] - made['sequential', ('neg', 'sum')]).abs().max() > 1e-4
    assert (made['sequential', ('sum', 'neg')] - made['parallel', ('sum', 'neg')]).abs().max() > 1e-4


def test_sharers_may_be_chosen_by_position(world, models, fusers):
    c2c, batch = trio.team(world, models, 'sum', 'neg', fusers=fusers), world.processor('sum', 'neg')(['neg of 3 1 4 1 ? it is'])
    before = c2c.receiver(input_ids=batch['input_ids'][:, :-1]).past_key_values
    active = batch['active'].clone(); active[:, :4] = False; active[:, 6:, 1] = False
    cache = c2c.prefill(**(batch | dict(active=active)))
    changed = [(a.values - b.values).abs().amax((0, 1, 3)) > 1e-6 for a, b in zip(cache.layers, before.layers)]
    for c in changed: assert c.tolist() == active[0, :-1].any(-1).tolist()


def test_two_fusers_are_trained_at_once_and_nothing_else_is(world, models):
    c2c = trio.team(world, models, 'sum', 'neg')
    start = {n: p.clone() for n, p in c2c.named_parameters()}
    state = torch.get_rng_state()
    train = lambda c2c: toy.train_fuser(c2c, world, steps=2, batch=8, read=world.processor('sum', 'neg'), progress=False)
    history = train(c2c)
    changed = {n.split('.')[0] + n.split('.')[1] for n, p in c2c.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {'fusers0', 'fusers1'} and torch.equal(state, torch.get_rng_state()) and len(history) == 2
    assert train(trio.team(world, models, 'sum', 'neg')) == history


def test_the_tally_counts(world):
    right = {}
    for s in world.skills: right |= {q.prompt: q.answer for q in world.questions(s, 'test')}
    assert trio.tally(world, lambda ps: [right[p] for p in ps], limit=50) == {s: [50, 50, 0] for s in world.skills}
    adder = trio.tally(world, lambda ps: [right[re.sub(r'.* of', 'sum of', p)] for p in ps], limit=400)
    assert adder['sum'] == [400, 400, 0] and adder['neg'][0] + adder['neg'][2] == 400 and 40 < adder['neg'][0] < 130   # a sum is its own negative twice in ten
    assert trio.tally(world, lambda ps: [right[p] for p in ps], limit=400, batch=150) == {s: [400, 400, 0] for s in world.skills}


def test_the_demo_is_for_two_models():
    with pytest.raises(ValueError, match="'trio' has 3 models"): toy.run_demo('trio', progress=False)


def test_the_record_is_whole_and_what_the_notebook_shows():
    record = json.loads((root/'nbs/results/trio.json').read_text())
    about, rows = record['about'], record['rows']
    assert {'device', 'machine', 'python', 'torch', 'transformers', 'command'} <= set(about) and about['seeds'] == [0, 1, 2]
    subsets = ['receiver model', 'sum model', 'neg model', 'apart: neg, longest', 'apart: mismatched sum', 'apart: mismatched neg', 'apart: neg+sum, sequential', 'tuned: sum+neg, sequential']
    assert set(subsets) | {f'{how}: {who}' for how in ('apart', 'tuned', 'modest', 'joint') for who in ('sum', 'neg', 'sum+neg, parallel')} <= set(rows)
    for name, seeds in rows.items():
        assert set(seeds) == set(record['cpu_seconds']) == {'0', '1', '2'}
        for counts in seeds.values():
            assert set(counts) == {'sum', 'neg', 'item'}, name
            for right, n, foreign in counts.values(): assert n >= 1000 and right + foreign <= n
    cells = {c['id']: c for c in json.loads((root/'nbs/05c_trio.ipynb').read_text())['cells']}
    shown = {}
    for line in ''.join(cells['record-table']['outputs'][0]['data']['text/markdown']).splitlines()[2:]:
        name, *cols = (x.strip() for x in line.strip('|').split('|'))
        shown[name] = [float(c.split()[0]) for c in cols[:3]]
    assert shown == {name: [round(100*sum(c[s][0] for c in seeds.values())/sum(c[s][1] for c in seeds.values()), 1) for s in ('sum', 'neg', 'item')] for name, seeds in rows.items()}
    assert 'image/png' in cells['record-plot']['outputs'][-1]['data']
