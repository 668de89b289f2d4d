"The audit: every arm does what it says, for any batch size and after any kill; and the verdict says no more than the tests do."
import json, math, os, random, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from transformers import AutoModelForCausalLM

import c2c_nb.arms as arms_module
from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.arms import Arm, ArmFuser, CannotRun, Mismatched, MismatchedTask, arm_model, check_arms, check_retrained, heard_columns, make_arms, mismatched_row, mismatched_rows, register_arm, row_numbers, special_ids
from c2c_nb.audit import Audit, Harm, audit, audit_recipe, contrasts, fit_rule, harm, judge, prepare_audit, take_over
from c2c_nb.bench import default_template, make_benchmark
from c2c_nb.cache import read_layer
from c2c_nb.cli import c2c_audit
from c2c_nb.evaluate import evaluate, read_records, run_recipe
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.protocol import EvalRecipe
from c2c_nb.recipe import read_recipe, recipe_from_dict, set_values
from c2c_nb.toy import connect, get_world, pretrain
from c2c_nb.trio import team
from test_trio import TinyTrio
from tiny import fuser_for, tiny
from tiny_world import TinyWorld

pytestmark = pytest.mark.filterwarnings('ignore:fuser . was made for tokenizers aligned')     # on purpose
root = Path(__file__).resolve().parents[1]
changed = ['zeros', 'noise', 'shuffled', 'own cache', 'random weights', 'keys only', 'values only']


def golden_pair(golden, sharers=('sharer2',), strategies=('shared',), **kwargs):
    receiver, *theirs = (AutoModelForCausalLM.from_pretrained(golden/m).eval() for m in ('receiver', *sharers))
    tokens = {'sharer1': 'tokB', 'sharer2': 'tokA'}
    processor = C2CProcessor(load_tokenizer(golden/'tokA'), [load_tokenizer(golden/tokens[s]) for s in sharers], list(strategies))
    return C2CModel(receiver, theirs, [Fuser.from_published(golden/f'ckpt_s{s[-1]}'/'final').eval() for s in sharers], processor=processor, **kwargs).eval()


@pytest.fixture(scope='module')
def pair(golden): return golden_pair(golden)


def bench(assets, **kwargs): return make_benchmark('openbookqa', dict(data_files=str(assets/'benchmarks'/'openbookqa'/'main'/'test.jsonl'), limit=8) | kwargs)
def prompts_of(b): return [default_template().render(q) for q in b.questions()[0]]
def asked(c2c, b, folder, names=None, method='options', **kwargs):
    "The records alone, without an audit's figures."
    qs = b.questions()[0]
    return evaluate(dict(make_arms(c2c, names, pool=prompts_of(b), golds=[q.gold for q in qs])), b, folder, method=method, progress=False, **kwargs)


plain = lambda records: sorted(json.dumps({k: v for k, v in r.items() if k not in ('seconds', 'scores')} | dict(extra=r['extra'].get('heard')), sort_keys=True) for r in records)
texts = ['one apple and two pears', 'the cat sat on the mat', 'so what', 'what is it then, my dear old friend?', 'some of the boys went home early']
ragged = [[dict(role='user', content=t)] for t in texts] + [[dict(role='system', content='Be brief.'), dict(role='user', content='Why not?')]]


def told(c2c, system, prompts):
    "What the projectors are told: for every call of a stack the keys and values of sharer and receiver."
    seen = []
    hooks = [s.register_forward_pre_hook(lambda m, args: seen.append([x.clone() for x in args[:4]])) for f in c2c.fusers for s in f.stacks]
    try: system.prefill(system.batch(prompts))
    finally:
        for h in hooks: h.remove()
    return seen


@pytest.fixture(scope='module')
def arms(pair): return make_arms(pair, pool=ragged)


def test_zeros(pair, arms):
    right, seen = (told(pair, arms[n], ragged[:1]) for n in ('matched', 'zeros'))
    assert len(right) == len(seen) and all(not s[0].any() and not s[1].any() for s in seen) and all(r[0].any() for r in right)
    assert all(torch.equal(a, b) for r, s in zip(right, seen) for a, b in zip(r[2:], s[2:])), 'the receiver says what it always says'


@pytest.mark.parametrize('prompts', [ragged[:1], ragged[3:4], ragged[5:]])
def test_noise(pair, arms, prompts):
    "Mean and variance of every layer and section, keys and values apart; otherwise another thing, and another one for each question."
    right, seen, other = told(pair, arms['matched'], prompts), told(pair, arms['noise'], prompts), told(pair, make_arms(pair, ['noise'], pool=ragged, seed=1)['noise'], prompts)
    for r, s, o in zip(right, seen, other):
        for half in (0, 1):
            a, b, c = (x[half].flatten(1) for x in (r, s, o))     # (layers, everything)
            torch.testing.assert_close(a.mean(1), b.mean(1), atol=1e-5, rtol=1e-4); torch.testing.assert_close(a.var(1), b.var(1), atol=1e-6, rtol=1e-3)
            assert abs(torch.corrcoef(torch.stack([a[0], b[0]]))[0, 1]) < .3 and not torch.allclose(b, c)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][:2], told(pair, arms['noise'], prompts)[0][:2])), 'drawn anew, it is the same'


def test_padding_is_neither_counted_nor_moved(pair, arms):
    "In a ragged batch every row hears what it hears alone."
    for name in 'noise', 'shuffled', 'zeros', 'own cache':
        alone = [told(pair, arms[name], [p]) for p in ragged[:5]]
        together = told(pair, arms[name], ragged[:5])
        for k, half in ((k, half) for k in range(len(together)) for half in (0, 1)):
            row = torch.cat([a[k][half] if a[k][half].shape[1] == 1 else a[k][half].unbind(1)[0][:, None] for a in alone], -2)
            torch.testing.assert_close(together[k][half], row, atol=1e-5, rtol=1e-4)


def test_shuffled(pair, arms):
    "The same positions, layer by layer and half by half in the same new order."
    right, seen = (told(pair, arms[n], ragged[3:4]) for n in ('matched', 'shuffled'))
    orders = set()
    for r, s in zip(right, seen):
        for half in (0, 1):
            for a, b in zip(r[half][:, 0].transpose(1, 2).flatten(2), s[half][:, 0].transpose(1, 2).flatten(2)):    # (t, h*d) of every layer
                order = torch.cdist(b, a).argmin(1).tolist()
                assert torch.equal(b, a[order]) and sorted(order) == list(range(len(a)))
                orders.add(tuple(order))
    assert len(orders) == 1 and list(orders)[0] != tuple(range(len(list(orders)[0])))
    assert all(torch.equal(a, b) for r, s in zip(right, seen) for a, b in zip(r[2:], s[2:]))


def test_own_cache(pair, arms):
    "Where both have the same geometry it is the receiver's cache itself; elsewhere it is fitted, and the table says so."
    seen = told(pair, arms['own cache'], ragged[:1])
    (rh, rd), (sh, sd) = pair.fusers[0].receiver_geometry.layer(0), pair.fusers[0].sharer_geometry.layer(pair.fusers[0].layer_map[0])
    assert (rh, rd) != (sh, sd) and str(rh) in arms['own cache'].note
    for sk, sv, rk, rv in seen:
        for s, r in ((sk, rk), (sv, rv)): assert torch.equal(s, r[:, :, torch.arange(sh) % rh][..., torch.arange(sd) % rd])
    model = tiny('qwen3')
    twin = C2CModel(model, [tiny('qwen3', 5)], [fuser_for(model, tiny('qwen3', 5))], processor=pair.processor)
    own = make_arms(twin, ['own cache'], pool=ragged)['own cache']
    assert own.note == ''
    plan = dict(input_ids=torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(0)))
    seen, hook = [], twin.fusers[0].stacks[0].register_forward_pre_hook(lambda m, args: seen.append(args[:4]))
    own.c2c.prefill(**plan); hook.remove()
    assert seen and all(torch.equal(s[0], s[2]) and torch.equal(s[1], s[3]) for s in seen)


def test_own_cache_with_layers_that_share_a_sharer_layer(pair):
    "Two receiver layers that listen to one sharer layer each hear themselves."
    r, s = tiny('qwen2'), tiny('llama', 2)                        # four layers, two layers
    c2c = C2CModel(r, [s], [fuser_for(r, s)], processor=pair.processor)
    assert len(set(c2c.fusers[0].layer_map)) < len(c2c.fusers[0].layer_map)
    seen, hook = [], c2c.fusers[0].stacks[0].register_forward_pre_hook(lambda m, args: seen.append(args[:4]))
    make_arms(c2c, ['own cache'], pool=ragged)['own cache'].c2c.prefill(torch.arange(1, 7)[None]); hook.remove()
    sk, _, rk, _ = seen[0]
    assert sk.shape[0] == 4 and torch.equal(sk[..., :rk.shape[-1]][:, :, :1], rk) and not torch.equal(sk[0], sk[1])


def test_halves(pair):
    "With keys only, values are the receiver's to the bit, and the other way round."
    c2c = C2CModel(pair.receiver, pair.sharers, [fuser_for(pair.receiver, pair.sharers[0])], processor=pair.processor).eval()
    arms = make_arms(c2c, ['keys only', 'values only'], pool=ragged)
    batch = arms['matched'].batch(ragged)
    caches = {n: arms[n].prefill(batch).cache for n in ('receiver', 'matched', 'keys only', 'values only')}
    real = batch['attention_mask'][:, None, :-1, None].bool()
    (rk, rv), (mk, mv), (kk, kv), (vk, vv) = (tuple(x*real for x in read_layer(c, 0)) for c in caches.values())     # what is read over a fused cache differs further up
    assert torch.equal(kv, rv) and torch.equal(vk, rk) and torch.equal(kk, mk) and torch.equal(vv, mv) and not torch.equal(kk, rk) and not torch.equal(vv, rv)
    last = [read_layer(c, len(c.layers) - 1) for c in caches.values()]
    assert not torch.equal(last[0][0], last[2][0]) and not torch.equal(last[0][1], last[3][1])
    fuser = arms['keys only'].c2c.fusers[0]
    assert fuser.open_gates() == [(a, False) for a, _ in c2c.fusers[0].open_gates()] and c2c.fusers[0].open_gates()[0] == (True, True)
    kvs = [tuple(torch.randn(1, *g.layer(i)[:1], 5, g.layer(i)[1]) for _ in range(2)) for g in [fuser.sharer_geometry] for i in range(g.layers)], [tuple(torch.randn(1, *g.layer(i)[:1], 5, g.layer(i)[1]) for _ in range(2)) for g in [fuser.receiver_geometry] for i in range(g.layers)]
    assert all(k is not None and v is None for k, v in fuser(*kvs, gates=[(True, True)]*len(kvs[1])))
    assert arms['keys only'].fuser_costs[0] == arms['values only'].fuser_costs[0] == arms['matched'].fuser_costs[0]/2
    closed = C2CModel(pair.receiver, pair.sharers, [fuser_for(pair.receiver, pair.sharers[0], gate=-1.)], processor=pair.processor).eval()
    assert 'nothing is fused' in make_arms(closed, ['keys only'], pool=ragged)['keys only'].note


def test_random_weights(pair, arms):
    own, new = pair.sharers[0], arms['random weights'].c2c.sharers[0]
    assert type(own) is type(new) and not torch.equal(next(own.parameters()), next(new.parameters())) and arms['random weights'].c2c.fusers[0].stacks is pair.fusers[0].stacks
    again, other = (make_arms(pair, ['random weights'], pool=ragged, seed=s)['random weights'].c2c.sharers[0] for s in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), new.parameters())) and not torch.equal(next(other.parameters()), next(new.parameters()))


shapes = [(('sharer2',), ('shared',)), (('sharer1',), ('offsets',)), (('sharer1',), ('longest',)), (('sharer2', 'sharer1'), ('shared', 'offsets'))]


@pytest.mark.parametrize('sharers,strategies', shapes)
@pytest.mark.parametrize('chat', [True, False])
def test_mismatched(golden, sharers, strategies, chat):
    "The sharer reads as many tokens, of another question; the receiver, the frame and all positions stay."
    c2c = golden_pair(golden, sharers, strategies)
    pool = ragged if chat else texts
    arms = make_arms(c2c, ['mismatched'], pool=pool)
    for p in pool:
        right, other = arms['matched'].encode(p), arms['mismatched'].encode(p)
        assert all(right[k] == other[k] for k in ('input_ids', 'attention_mask', 'active', 'sections', 'pairing'))
        for j in range(len(sharers)):
            a, b = ((r['sharer_input_ids'][j] or r['input_ids']) for r in (right, other))
            columns = heard_columns(right, j)
            assert len(a) == len(b) and {c for c, (x, y) in enumerate(zip(a, b)) if x != y} <= set(columns) and columns
            assert (right['sharer_attention_mask'][j] or right['attention_mask']) == other['sharer_attention_mask'][j]
            paired = {c if right['pairing'][j] is None else right['pairing'][j][c] for c, bits in enumerate(right['active']) if bits >> j & 1} - {-1}
            assert paired <= set(columns), 'what is listened to is exchanged'
            special = special_ids(c2c.processor)[j]
            words = lambda ids, columns: [ids[c] for c in columns if ids[c] not in special]
            heard = arms['mismatched'].read(next(arms['mismatched'].others(p)))
            mine, theirs, said = words(a, columns), words(b, columns), words(heard['sharer_input_ids'][j] or heard['input_ids'], heard_columns(heard, j))
            head, tail = len(os.path.commonprefix([mine, said])), len(os.path.commonprefix([mine[::-1], said[::-1]]))
            assert len(mine) == len(theirs) and theirs[:head] == said[:head] and theirs[len(theirs)-tail:] == said[len(said)-tail:]
            n = min(len(mine), len(said)) - head - tail
            assert theirs[head:head+n] == said[head:head+n] and (len(mine) != len(said) or theirs == said)
            assert [i for i, x in enumerate(a) if x in special] == [i for i, x in enumerate(b) if x in special]
    read, hook = [], c2c.sharers[0].base_model.register_forward_pre_hook(lambda m, args, kwargs: read.append(kwargs['input_ids']), with_kwargs=True)
    for n in 'matched', 'mismatched': arms[n].prefill(arms[n].batch(pool[:1]))
    hook.remove()
    assert len(read) == 2 and read[0].shape == read[1].shape and not torch.equal(*read), 'and it is what the sharer reads'


def test_whole_messages_are_exchanged(golden):
    "Tokens that no position of the receiver listens to belong to the message, too; the template does not."
    c2c = golden_pair(golden, ('sharer1',), ('offsets',))
    processor, t = c2c.processor, c2c.processor.sharer_tokenizers[0]
    row = processor.encode(ragged[5])
    ids = row['sharer_input_ids'][0]
    heard = t.decode([ids[c] for c in heard_columns(row, 0)])
    assert heard.replace(' ', '') == 'Bebrief.Whynot?', heard


def test_which_other_question(pair):
    "The nearest in length, the same in every run; never the same text; with gold='other' never one with the same answer."
    pool = [[dict(role='user', content=x)] for x in ('a b c d', 'e f g h', 'i j k l', 'a b c d', 'm n o p q r s t u v', 'w x')]
    golds = ['A', 'A', 'B', 'A', 'C', 'C']
    m = Mismatched(pair, None, 'x', pool)
    size = {i: m.size(m.read(i)) for i in range(len(pool))}
    for i, p in enumerate(pool):
        others = list(m.others(p))
        assert sorted(others) == [k for k in range(len(pool)) if pool[k] != p] and [abs(size[k] - size[i]) for k in others] == sorted(abs(size[k] - size[i]) for k in others)
        assert others == list(Mismatched(pair, None, 'x', pool).others(p))
        assert {golds[k] for k in Mismatched(pair, None, 'x', pool, golds, 'other').others(p)} == {'A', 'B', 'C'} - {golds[i]}
    heads = {s: [next(Mismatched(pair, None, 'x', pool, seed=s).others(p)) for p in pool] for s in range(6)}
    assert len(set(map(tuple, heads.values()))) > 1
    assert Mismatched(pair, None, 'x', pool).describe() != Mismatched(pair, None, 'x', pool, seed=1).describe() != Mismatched(pair, None, 'x', pool[1:], seed=1).describe()
    with pytest.raises(ValueError, match='at least 2'): Mismatched(pair, None, 'x', pool[:1])
    with pytest.raises(ValueError, match='needs golds'): Mismatched(pair, None, 'x', pool, gold='other')
    with pytest.raises(ValueError, match='same right answer'): Mismatched(pair, None, 'x', pool[:3], ['A']*3, 'other').answer(pool[:1], options=['A', 'B'])


@pytest.mark.parametrize('method', ['generate', 'options'])
def test_any_batch_size(pair, assets, tmp_path, method):
    "The same records whatever the batch, of every arm."
    runs = [asked(pair, bench(assets), tmp_path/str(size), method=method, batch_size=size, max_new_tokens=2) for size in ((1, 3, 8) if method == 'options' else (2, 8))]
    assert all(plain(r.records) == plain(runs[0].records) for r in runs)
    by = runs[0].by
    assert list(by) == ['receiver', 'sharer', 'matched', 'mismatched', *changed] and all(len(v) == 8 for v in by.values())
    if method == 'options':
        scores = {n: [[list(r[i]['scores'].values()) for i in sorted(r)] for r in (run.by[n] for run in runs)] for n in by}
        for n, (a, b, c) in scores.items():
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0); torch.testing.assert_close(torch.tensor(a), torch.tensor(c), atol=1e-4, rtol=0)
        kinds = [n for n in by if n != 'sharer']
        assert not [(x, y) for k, x in enumerate(kinds) for y in kinds[:k] if torch.allclose(torch.tensor(scores[x][0]), torch.tensor(scores[y][0]), atol=1e-3)], 'every arm is another thing'
        assert all(r['extra']['heard'] for r in by['mismatched'].values()) and not any('heard' in r['extra'] for r in by['matched'].values())


def test_several_sharers_and_followed_answers(golden, assets, tmp_path):
    "Two sharers, one of them with a tokenizer of its own; and a model that follows the response, where shuffling is not possible."
    two = golden_pair(golden, ('sharer2', 'sharer1'), ('shared', 'offsets'))
    a, b = audit(two, bench(assets, limit=3), tmp_path/'two', ['noise', 'shuffled', 'own cache'], progress=False), asked(two, bench(assets, limit=3), tmp_path/'one', ['noise', 'shuffled', 'own cache'], batch_size=1)
    assert plain(a.evaluation.records) == plain(b.records) and [t.sharer for t in a.take_over] == ['sharer 0', 'sharer 1']
    follow = golden_pair(golden, follow_response=True)
    names, more = ['noise', 'shuffled', 'values only'], dict(method='generate', max_new_tokens=2)
    a, b = audit(follow, bench(assets, limit=3), tmp_path/'follow', names, progress=False, **more), asked(follow, bench(assets, limit=3), tmp_path/'alone', names, batch_size=1, **more)
    assert plain(a.evaluation.records) == plain(b.records) and 'follows the response' in a.left_out['shuffled'] and 'shuffled' in a.report() and 'shuffled' not in a.marks
    systems = make_arms(follow, ['noise'], pool=prompts_of(bench(assets)))
    for n in 'noise', 'mismatched':
        one, three = systems[n].answer(prompts_of(bench(assets))[:1], options=['A', 'B'])[0], systems[n].answer(prompts_of(bench(assets))[:3], options=['A', 'B'])[0]
        assert one.scores == pytest.approx(three.scores, abs=1e-4)


def test_threads_and_errors_leave_nothing(pair, arms):
    "Two threads draw what one draws; after an error no row is left over."
    batches = [arms['noise'].batch(ragged[:3]), arms['noise'].batch(ragged[3:])]
    keys = lambda b: read_layer(arms['noise'].prefill(b).cache, 1)[0]
    alone, found = [keys(b) for b in batches], {}
    def work(i):
        for _ in range(4): found.setdefault(i, []).append(keys(batches[i]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(len(found[i]) == 4 and all(torch.equal(x, alone[i]) for x in found[i]) for i in range(2))
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError): arms['noise'].c2c.prefill(torch.zeros(1, 0, dtype=torch.long))
    keys(batches[0])
    assert arms_module._texts.get() is None and torch.equal(state, torch.random.get_rng_state())


def test_row_numbers():
    ids, mask = torch.tensor([[9, 9, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert row_numbers(ids, mask) == row_numbers(ids[:, 2:]) == row_numbers(torch.cat([ids + 0, ids[:, :0]], 1), mask) != row_numbers(ids[:, 3:])
    active = torch.tensor([[0, 0, 1, 1, 0]]).bool()[..., None]
    assert row_numbers(ids, mask, active) == row_numbers(ids[:, 2:4])


def marks(n=200, **right): return {k: [i < m for i in range(n)] for k, m in right.items()}


@pytest.mark.parametrize('right,kind,says,not_says', [
    (dict(receiver=80, matched=140, mismatched=80), 'content', ['100 % of the gain', '60 answers were won, 0 lost'], ['another question\'s cache helps too']),
    (dict(receiver=80, matched=140, mismatched=110), 'content and presence', ['50 % of the gain', "another question's cache helps too"], []),
    (dict(receiver=80, matched=140, mismatched=60), 'content', ['whole gain', 'does harm: -10.0'], ['133 %']),
    (dict(receiver=80, matched=140, mismatched=138), 'presence', ['cannot be told by 200 questions', 'of 30.0 that were gained', 'questions would be needed'], ['% of the gain']),
    (dict(receiver=80, matched=140, mismatched=160), 'misled', ["worse than another question's"], []),
    (dict(receiver=120, matched=100, mismatched=60), 'harmful', ['worse than alone'], []),
    (dict(receiver=80, matched=81, mismatched=60), 'heard, no gain', ['does harm'], ['of the gain']),
    (dict(receiver=80, matched=84, mismatched=82), 'undecided', ['questions would be needed'], ['helps too']),
    (dict(receiver=80, matched=90, mismatched=85), 'unclear', [], ['of the gain']),
    (dict(receiver=80, matched=140, mismatched=80, retrained=138), 'heard, not needed', ['trained and asked with other questions', 'cannot be told apart'], []),
    (dict(receiver=80, matched=140, mismatched=80, retrained=90), 'content', ['does worse than this one'], []),
    (dict(receiver=80, matched=140, mismatched=80, zeros=139, noise=90), 'content', ['Not to be told apart from the right cache: zeros.'], ['noise']),
    (dict(receiver=80, matched=80, mismatched=80), 'undecided', ['the same marks on all 200 questions'], ['would be needed', 'by no more than 0.0'])])
def test_verdict(right, kind, says, not_says):
    v = judge(contrasts(marks(**right), draws=500))
    text = repr(v)
    assert v.kind == kind and all(s in text for s in says) and not any(s in text for s in not_says), text


def test_verdict_is_careful():
    "With few questions nothing is claimed; Holm's correction can take a claim away; where no question differs, the bound is not zero."
    assert judge(contrasts(marks(10, receiver=4, matched=7, mismatched=4), draws=200)).kind == 'undecided'
    few = contrasts(marks(receiver=80, matched=87, mismatched=80, a=80, b=80), draws=200)
    assert few['gain'].paired.p < .05 and few['gain'].p == pytest.approx(few['gain'].paired.p*3) and few['a'].p == pytest.approx(2*few['a'].paired.p)
    near = contrasts(marks(receiver=80, matched=86, mismatched=80), draws=200)
    assert near['gain'].paired.p < .05 < near['gain'].p and judge(near).kind == 'undecided'
    same = judge(contrasts(marks(receiver=80, matched=140, mismatched=140), draws=200))
    assert same.kind == 'presence' and 'by no more than 1.9 points' in repr(same)
    measures = contrasts(dict(receiver=[.2, .3]*30, matched=[.6, .5]*30, mismatched=[.2, .4]*30), draws=500)
    assert judge(measures).kind in ('content', 'content and presence')
    assert measures['gain'].paired.difference == pytest.approx(measures['content'].paired.difference + measures['presence'].paired.difference)


def line(said, gold='A', sure=None, error=None):
    return dict(error=error, prediction=said, correct=said == gold, score=float(said == gold), scores=None if sure is None else {'A': math.log(sure), 'B': math.log(1 - sure)})


def test_errors_taken_over_are_counted():
    by = dict(sharer={}, receiver={}, matched={}, mismatched={})
    def ask(n, **said):
        for _ in range(n):
            i = f"q{len(by['sharer'])}"
            for k, v in said.items(): by[k][i] = line(v)
    ask(30, sharer='B', receiver='A', matched='B', mismatched='A')    # taken over
    ask(10, sharer='B', receiver='C', matched='D', mismatched='D')    # wrong, but not like the sharer
    ask(5, sharer='B', receiver='B', matched='B', mismatched='B')     # everybody's error
    ask(20, sharer='A', receiver='B', matched='A', mismatched='B')    # the sharer is right
    ask(7, sharer=None, receiver='A', matched=None, mismatched=None)  # the sharer says nothing: nothing to take over
    t = take_over(by)
    assert (t.n, t.of, t.same) == (45, 72, dict(matched=35, mismatched=5, receiver=5))
    assert [c.b for c in t.contrasts] == ['mismatched', 'receiver'] and all(c.better() and c.paired.only_a == 30 and c.paired.only_b == 0 for c in t.contrasts) and 'Errors are taken over' in t.words()
    rng = random.Random(0)
    few = {k: {f'q{i}': line(rng.choice('BCD' if k == 'sharer' else 'ABCD')) for i in range(7)} for k in by}
    once = take_over(few)
    assert all(take_over({k: {i: v[i] for i in random.Random(s).sample(list(v), 7)} for k, v in few.items()}) == once for s in range(8)), 'in whatever order the records were written'
    none = take_over({k: {i: line('A') for i in v} for k, v in by.items()})
    assert none.n == 0 and 'no wrong answer' in none.words()
    for i in by['mismatched']: by['mismatched'][i] = by['matched'][i]
    assert 'more often than with no cache' in take_over(by).words()
    for i in by['receiver']: by['receiver'][i] = by['matched'][i]
    assert 'cannot be told' in take_over(by).words()
    assert harm(by, 'sharer', 'matched') == Harm('sharer', 72, 20, 0, 0)


def test_harm_is_counted():
    before, after = 'AAAABBBBBB', 'AABBAAABBB'
    by = dict(receiver={str(i): line(x) for i, x in enumerate(before)}, matched={str(i): line(x) for i, x in enumerate(after)})
    h = harm(by)
    assert h == Harm('matched', 10, right=4, lost=2, won=3) and h.share[0] == .2 and h.kept[0] == .5 and h.kept[1] < .5 < h.kept[2]
    assert harm(dict(receiver={'1': line('B')}, matched={'1': line('A')})).kept is None


def test_rule_is_fitted_and_tested_apart():
    rng = random.Random(0)
    by = dict(receiver={}, matched={})
    for i in range(300):
        sure = rng.random() < .5                                  # where the receiver is sure it is right, and the sharer wrong
        by['receiver'][f'q{i}'] = line('A' if sure else 'B', sure=.99 if sure else .45)
        by['matched'][f'q{i}'] = line('B' if sure else 'A')
    rule = fit_rule(by)
    assert len(rule.fit) == len(rule.test) == 150 and not set(rule.fit) & set(rule.test) and set(rule.fit) | set(rule.test) == set(by['receiver'])
    n = sum(by['receiver'][i]['correct'] for i in rule.test)
    assert rule.right == dict(receiver=n, matched=150 - n, rule=150) and rule.skipped == n and rule.lost == dict(matched=n, rule=0) and .01 < rule.threshold < .45
    assert fit_rule(by).fit == rule.fit and fit_rule(by, seed=1).fit != rule.fit and len(fit_rule(by, .2).fit) == 60
    for i in rule.test: by['receiver'][i] = line('B', sure=.99)   # what is tested on decides nothing
    assert fit_rule(by).threshold == rule.threshold
    assert fit_rule({k: {i: r | dict(scores=None) for i, r in v.items()} for k, v in by.items()}) is None
    with pytest.raises(ValueError, match='between 0 and 1'): fit_rule(by, 1.)


def test_rule_as_a_system(pair, assets, tmp_path):
    "The rule as counted from the records is what its system does."
    b = bench(assets, limit=24)
    found = audit(pair, b, tmp_path/'a', ['zeros'], batch_size=12, progress=False)
    asked = [q for q in b.questions()[0] if q.id in found.rule.test]
    answers = found.rule.system(pair).answer([default_template().render(q) for q in asked], options=[q.labels for q in asked])
    assert sum(a.choice == q.gold for a, q in zip(answers, asked)) == found.rule.right['rule'] and sum(a.extra['answered_by'] == 'receiver' for a in answers) == found.rule.skipped


def test_retrained(golden, assets, tmp_path):
    "Trained with other questions' caches, it says so; it is given such caches; another pair's fuser, or the same, is refused."
    pair = golden_pair(golden)
    pair.save_pretrained(tmp_path/'own')
    recipe = set_values(read_recipe('toy'), ['model.world=null', 'model.receiver=r', 'model.sharers=[s]', f'output.folder={tmp_path}/run'])
    task = MismatchedTask(recipe, [pair.receiver, pair.sharers[0]], pair.processor)
    rows = [pair.processor.encode(p, 'yes') for p in ragged[:4]]
    task.load()
    (plan, *_), labels, _ = task.inputs([r | dict(length=len(r['input_ids'])) for r in rows], 0)
    ids = [[i for i, m in zip(r, k) if m] for r, k in zip(plan.sharer_ids[0].tolist(), plan.sharer_masks[0].tolist())]
    for k, (row, heard) in enumerate(zip(rows, ids)):
        nxt, special = rows[(k+1) % 4], task.special[0]
        own, want = ([i for i in r['input_ids'][:-2] if i not in special] for r in (row, nxt))
        got = [i for i in heard if i not in special]
        head = len(os.path.commonprefix([own, want]))
        assert got != own[:len(got)] and got[:head+3] == want[:head+3] and labels > 0
    lonely = mismatched_rows(rows[:1], task.special)[0]
    assert len({lonely['sharer_input_ids'][0][c] for c in heard_columns(rows[0], 0)} - task.special[0]) == 1, 'alone, a row hears nothing of itself but one word'
    task.model.eval(); (tmp_path/'run').mkdir(); task.save(tmp_path/'run', dict(steps=0))
    fuser = Fuser.from_pretrained(tmp_path/'run'/'fuser')
    assert fuser.config.training == dict(steps=0, caches='mismatched')
    arms = make_arms(pair, ['retrained'], pool=ragged, retrained=tmp_path/'run')
    assert arms['retrained'].note == '' and arms['retrained'].c2c.fusers[0].fingerprint() == fuser.fingerprint() and arms['retrained'].encode(ragged[0]) == arms['mismatched'].encode(ragged[0]) != arms['matched'].encode(ragged[0])
    assert task.fingerprints()['caches'] == 'mismatched'          # a run is not resumed as another one
    fuser.config.training = None
    assert 'does not say of itself' in make_arms(pair, ['retrained'], pool=ragged, retrained=fuser)['retrained'].note
    with pytest.raises(ValueError, match='very fuser'): make_arms(pair, ['retrained'], pool=ragged, retrained=pair.fusers[0])
    with pytest.raises(ValueError, match='does not fit'): make_arms(pair, ['retrained'], pool=ragged, retrained=fuser_for(tiny('qwen3'), tiny('llama', 1)))
    with pytest.raises(FileNotFoundError, match='no fuser in'): make_arms(pair, ['retrained'], pool=ragged, retrained=golden)
    with pytest.raises(ValueError, match='very fuser'): check_retrained(tmp_path/'own', tmp_path/'own')
    check_retrained(tmp_path/'own', tmp_path/'run')
    for bad, says in (('training.store=memory', 'right text'), ('training.batch_size=1', 'at least 2')):
        with pytest.raises(ValueError, match=says): MismatchedTask(set_values(recipe, [bad]))


def test_names_and_reasons(pair, assets, tmp_path):
    assert check_arms(['own-cache', 'ZEROS']) == ['matched', 'mismatched', 'own cache', 'zeros']
    for args, says in ((dict(arms=['noize']), "did you mean 'noise'"), (dict(gold='none'), "'any' other question"), (dict(method='logits'), "'generate' or 'options'")):
        with pytest.raises(ValueError, match=says): audit(pair, bench(assets), tmp_path/'x', progress=False, **args)
    with pytest.raises(ValueError, match='another question to hear'): audit(pair, bench(assets, limit=1), tmp_path/'x', progress=False)
    with pytest.raises(ValueError, match='no setting'): make_arms(pair, ['zeros'], pool=ragged, sede=1)
    assert not (tmp_path/'x').exists()
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'notes.txt').write_text('x')
    with pytest.raises(FileExistsError, match='something else'): audit(pair, bench(assets), tmp_path/'mine', ['zeros'], progress=False)
    assert [f.name for f in (tmp_path/'mine').iterdir()] == ['notes.txt']


def test_an_arm_of_ones_own(pair, assets, tmp_path):
    class Ones(ArmFuser):
        def hear(self, sharer_kv, receiver_kv, spots): return [kv and tuple(map(torch.ones_like, kv)) for kv in sharer_kv]
    @register_arm('ones', 'ones')
    def ones(c2c, processor, name, generation=None, template_kwargs=None): return Arm(arm_model(c2c, [Ones(f) for f in c2c.fusers], processor), processor, name, 'ones')
    @register_arm('never', 'nothing')
    def never(c2c, processor, name): raise CannotRun('it is never possible')
    try: found = audit(pair, bench(assets, limit=3), tmp_path/'a', ['ones', 'never'], progress=False)
    finally: del arms_module._arms['ones'], arms_module._arms['never']
    assert list(found.marks) == ['receiver', 'sharer', 'matched', 'mismatched', 'ones'] and found.left_out == dict(never='it is never possible')
    assert 'never: it is never possible' in found.report() and 'never: it is never possible' in repr(found) and json.loads((tmp_path/'a'/'audit.json').read_text())['not_run'] == found.left_out
    assert (tmp_path/'a'/'audit.png').read_bytes()[:4] == b'\x89PNG' and found.verdict.headline in (tmp_path/'a'/'audit.md').read_text()
    assert not [f for f in (tmp_path/'a').iterdir() if f.name.startswith('.')]


driver = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
from test_audit import *
golden, assets, out = map(Path, sys.argv[2:5])
audit(golden_pair(golden), bench(assets), out, batch_size=2, progress=False)
'''


def test_killed(pair, golden, assets, tmp_path):
    "Killed in the middle and started again, it ends with the records and the report of one that was not."
    whole = audit(pair, bench(assets), tmp_path/'whole', batch_size=3, progress=False)
    p = subprocess.Popen([sys.executable, '-c', driver, str(root/'tests'), str(golden), str(assets), str(tmp_path/'e')], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': ''})
    for _ in range(2400):
        if len(read_records(tmp_path/'e')) >= 10 or p.poll() is not None: break
        time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()
    some = read_records(tmp_path/'e')
    assert 0 < len(some) < len(whole.evaluation.records) and not (tmp_path/'e'/'audit.json').exists()
    again = audit(pair, bench(assets), tmp_path/'e', batch_size=8, progress=False)
    assert list(again.left_out) == ['retrained'] and plain(again.evaluation.records) == plain(whole.evaluation.records) and again.report() == whole.report()
    with pytest.raises(FileExistsError, match='another evaluation'): audit(pair, bench(assets), tmp_path/'e', seed=1, progress=False)


def shell(*args, cwd):
    code = 'import sys\nfrom c2c_nb.cli import c2c_audit\nif __name__ == "__main__": sys.argv[0] = "c2c_audit"; sys.exit(c2c_audit())'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=cwd, env={**os.environ, 'PYTHONPATH': str(root), 'CUDA_VISIBLE_DEVICES': ''}, timeout=300)


def test_command(pair, golden, assets, tmp_path, monkeypatch, capsys):
    "From a shell: table, verdict, files; and what is wrong is said before the models are loaded."
    pair.save_pretrained(tmp_path/'fuser')
    other = golden_pair(golden, ('sharer1',), ('offsets',)); other.save_pretrained(tmp_path/'other')
    args = [str(tmp_path/'fuser'), 'openbookqa', str(tmp_path/'out'), '--args', f'data_files={assets}/benchmarks/openbookqa/main/test.jsonl', 'limit=4', '--quiet']
    done = shell(*args, '--arms', 'zeros', 'own cache', cwd=golden)     # where its models are
    assert done.returncode == 0, done.stderr
    assert 'own cache' in done.stdout and 'Nothing can be told by 4 questions' in done.stdout and len(read_records(tmp_path/'out')) == 24
    assert {'audit.md', 'audit.json', 'audit.png', 'evaluation.json'} <= {f.name for f in (tmp_path/'out').iterdir()}
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'notes.txt').write_text('x')
    monkeypatch.chdir(tmp_path)                                   # where its models are not
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *a, **k: pytest.fail('a model was loaded'))
    (tmp_path/'evaluation').mkdir(); (tmp_path/'evaluation'/'evaluation.json').write_text(json.dumps(dict(systems=dict(receiver='x', C2C='y'))))
    good = dict(what=['fuser', 'openbookqa', 'out'], args=[f'data_files={assets}/benchmarks/openbookqa/main/test.jsonl', 'limit=4'], quiet=True)
    named = lambda *what: dict(what=list(what))
    for change, says, early in ((dict(method='logits'), 'known are generate, options', True), (named('fuser', 'openbookqa', 'mine'), 'something else', True), (named('fuser', 'openbookqa', 'evaluation'), 'an evaluation that is no audit', True), (named('fuser', 'openbookqa', 'mine/notes.txt'), 'is a file', True), (named('mine', 'openbookqa', 'out'), 'no model was saved there', True),
            (named('fuser', 'openbookqa'), '2 names were given', True), (dict(gold='same'), "'any' or 'other'", True), (dict(batch_size=0), 'batch_size is 0', True), (dict(set=['model.fusers=[]']), 'names none', True), (dict(set=['modle.fusers=[]']), "did you mean 'model'", True), (dict(set=['cue=So']), 'another audit', False),
            (dict(arms=['zeroes']), "did you mean 'zeros'", False), (dict(retrained=['other']), 'another pair', False), (dict(retrained=['fuser', 'other']), '2 retrained fusers', False), (dict(retrained=['mine']), 'no fuser in', False), (dict(imports=['no_such_room']), 'cannot be imported', False), (named('fuser', 'openbokqa', 'new'), "did you mean 'openbookqa'", False)):
        with pytest.raises(SystemExit) as e: c2c_audit(**good | change)
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and ('Loading' in err) != early, err
    settings = (root/'settings.ini').read_text()
    assert 'c2c_audit=c2c_nb.cli:c2c_audit' in settings


@pytest.mark.parametrize('arm', ['zeros', 'noise', 'own cache', 'random weights'])
def test_a_gain_that_needs_no_content(arm):
    "A wrong cache misleads, but none at all does as well as the right one: then it is not the content that helps."
    marks = lambda **right: {k.replace('_', ' '): [i < n for i in range(400)] for k, n in right.items()}
    found = contrasts(marks(receiver=160, matched=240, mismatched=165) | {arm: [i < 241 for i in range(400)]}, draws=99)
    assert judge(found).kind == 'heard, not needed' and arm in judge(found).headline
    assert judge(contrasts(marks(receiver=160, matched=240, mismatched=165) | {arm: [i < 165 for i in range(400)]}, draws=99)).kind == 'content'


def test_the_control_is_validated_as_it_is_trained(pair, tmp_path):
    "With other questions' caches, also where questions are asked."
    recipe = set_values(read_recipe('toy'), ['model.world=null', 'model.receiver=r', 'model.sharers=[s]', 'validation.data=null', f'output.folder={tmp_path}/run'])
    from c2c_nb.task import FuserTask
    prompts, said = ['The old dog sees the moon', 'A green tree and the cat sing', 'The blue sun sees an old cat'], []
    for kind in FuserTask, MismatchedTask:
        task = kind(recipe, [pair.receiver, pair.sharers[0]], pair.processor)
        task.load()
        batch = task.read(prompts)
        said.append(batch)
    assert torch.equal(said[0]['input_ids'], said[1]['input_ids'])
    theirs = [b['input_ids'] if b['sharer_input_ids'][0] is None else b['sharer_input_ids'][0] for b in said]
    assert not torch.equal(*theirs)


# ---------------------------------------------------------------- by recipe

@pytest.fixture
def base(golden, assets, tmp_path):
    "The golden pair and its published checkpoint, asked a few real questions."
    return recipe_from_dict(dict(model=dict(receiver=str(golden/'receiver'), sharers=[str(golden/'sharer2')], fusers=[str(golden/'ckpt_s2'/'final')], alignment='shared'),
        benchmarks=dict(openbookqa=dict(data_files=str(assets/'benchmarks'/'openbookqa'/'main'/'test.jsonl'), limit=6)), method='options', output=dict(folder=str(tmp_path/'out'))), cls=EvalRecipe)


def no_models(monkeypatch):
    fail = lambda *a, **k: pytest.fail('a model was loaded')
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', fail); monkeypatch.setattr('c2c_nb.evaluate.build_models', fail)


def test_a_recipe_is_audited_as_by_hand(base, pair, assets, tmp_path):
    "A published fuser: the same records; template, cue, generation and template's keywords reach every arm; run again, nothing is asked."
    said = dict(generation=dict(repetition_penalty=1.3), template_kwargs=dict(enable_thinking=False))
    r = set_values(base, ['variant=direct', 'cue=I say', 'seed=3', 'max_length=40', *(f'model.{k}={json.dumps(v)}' for k, v in said.items())])
    found = audit_recipe(r, ['zeros', 'noise'], gold='other', progress=False)['openbookqa']
    assert found.seed == 3 and found.evaluation.folder == tmp_path/'out' and list(found.marks) == ['receiver', 'sharer', 'matched', 'mismatched', 'zeros', 'noise']
    direct = default_template('direct')
    worded = replace(direct, wordings={k: replace(w, cue='I say') for k, w in direct.wordings.items()})
    by_hand = lambda folder, **more: audit(pair, bench(assets, limit=6), tmp_path/folder, ['zeros', 'noise'], progress=False, **dict(template=worded, method='options', gold='other', seed=3, max_length=40) | said | more)
    assert plain(by_hand('hand').evaluation.records) == plain(found.evaluation.records) and len(found.evaluation.records) == 36
    assert any(r['cut'] for r in found.evaluation.records)
    before, summary = (tmp_path/'out'/'records-000.jsonl').read_bytes(), json.loads((tmp_path/'out'/'summary.json').read_text())
    by_hand('out')                                                # it is the very audit, in every system's description
    with pytest.raises(FileExistsError, match='system matched, system mismatched, system noise, system receiver, system sharer, system zeros'): by_hand('out', generation=None)
    with pytest.raises(FileExistsError, match='template'): by_hand('out', template=direct)
    written = read_recipe(tmp_path/'out', EvalRecipe)
    assert written == set_values(r, ['systems=[receiver, sharer, C2C]']) and summary['recipe'] == written.to_dict()
    again = audit_recipe(written, ['zeros', 'noise'], gold='other', progress=False)
    assert (tmp_path/'out'/'records-000.jsonl').read_bytes() == before and repr(again) == repr(found) and again.recipe.notes == []


def test_other_questions_have_the_cue_too(base):
    "What is heard instead is another question as it was asked: with the cue, and never the same one."
    for cue in 'I say', None:
        found = audit_recipe(set_values(base, [f'output.folder={base.output.folder}-{cue}'] + [f'cue={cue}']*(cue is not None)), ['mismatched'], progress=False)['openbookqa'].evaluation.by
        prompts = {i: r['prompt'] for i, r in found['receiver'].items()}
        heard = {i: r['extra']['heard'] for i, r in found['mismatched'].items()}
        assert len(set(prompts.values())) == 6 and all(heard[i] in set(prompts.values()) - {prompts[i]} for i in prompts)


def test_a_cue_is_heard_as_it_is_read(pair, base):
    "The sharer reads the other question up to the cue, and the cue itself stays in its place."
    done = prepare_audit(set_values(base, ['cue=the cat says']), ['mismatched'])
    qs = done.questions['openbookqa'][0]
    from c2c_nb.audit import _asked
    pool = _asked('openbookqa', qs, done.template, 'options', 'any')
    arms = make_arms(pair, ['mismatched'], pool=pool)
    for p in pool:
        assert p[-1] == dict(role='assistant', content='the cat says')
        right, other = (arms[n].encode(p) for n in ('matched', 'mismatched'))
        a, b = ((r['sharer_input_ids'][0] or r['input_ids']) for r in (right, other))
        tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
        read = pair.processor.receiver_tokenizer.decode(a[len(a)-tail:])
        assert a != b and read.replace(' ', '').endswith('thecatsays'), read


def test_several_sharers_by_recipe(golden, base, tmp_path):
    "Two published fusers, one of them between two tokenizers, and a retrained one for each."
    two = golden_pair(golden, ('sharer2', 'sharer1'), ('shared', 'offsets'))
    r = set_values(base, [f'model.sharers=[{golden}/sharer2, {golden}/sharer1]', f'model.fusers=[{golden}/ckpt_s2/final, {golden}/ckpt_s1/final]', 'model.alignment=[shared, offsets]', 'benchmarks.openbookqa.limit=3'])
    other = []
    for j, f in enumerate(two.fusers):
        new = fuser_for(two.receiver, two.sharers[j]); new.config.training = dict(caches='mismatched'); new.save_pretrained(tmp_path/f'm{j}'); other.append(str(tmp_path/f'm{j}'))
    found = audit_recipe(r, ['noise', 'retrained'], other, progress=False)['openbookqa']
    made = audit(two, make_benchmark('openbookqa', r.benchmarks['openbookqa']), tmp_path/'hand', ['noise', 'retrained'], retrained=other, method='options', progress=False)
    assert plain(found.evaluation.records) == plain(made.evaluation.records) and [t.sharer for t in found.take_over] == ['sharer 0', 'sharer 1'] and found.left_out == {}
    for wrong, says in ((other[:1], '1 retrained fusers were given for 2'), (other[::-1], 'does not fit')):
        with pytest.raises(ValueError, match=says): audit_recipe(set_values(r, [f'output.folder={tmp_path}/x']), ['retrained'], wrong, progress=False)


@pytest.mark.parametrize('name', ['tiny', 'tiny trio'])
def test_embedded_world_by_recipe(name, tmp_path, monkeypatch):
    "An embedded pair, and a receiver with two sharers, of which one has a tokenizer of its own: their models are made, not loaded."
    world = get_world(name)
    models = {role: pretrain(world, role)[0].requires_grad_(False) for role in world.roles}
    monkeypatch.setattr('c2c_nb.evaluate.build_models', lambda world: list(models.values()))     # a few steps, here instead of in children
    c2c = connect(world, *models.values()) if name == 'tiny' else team(world, models, *world.roles[1:])
    folders = [str(tmp_path/f'f{j}') for j in range(len(c2c.fusers))]
    for f, folder in zip(c2c.fusers, folders): f.save_pretrained(folder)
    r = set_values(read_recipe('embedded_pair', EvalRecipe), [f'model.world={name}', f'model.fusers={json.dumps(folders)}', f'benchmarks.toy={{world: {name}, limit: 3}}', f'output.folder={tmp_path}/out'])
    found = audit_recipe(r, ['zeros', 'own cache'], choose=True, progress=False)
    assert found.recipe.method == 'options' and found.recipe.notes == []
    n = len(found['toy'].ids)
    assert n == 3*len(world.skills) and list(found['toy'].marks) == ['receiver', *(['sharer'] if name == 'tiny' else ['sharer 0', 'sharer 1']), 'matched', 'mismatched', 'zeros', 'own cache'] and all(len(v) == n for v in found['toy'].marks.values())
    assert not any(x['error'] for x in found['toy'].evaluation.records)


def test_several_benchmarks_in_a_recipe(base, tmp_path, monkeypatch, capsys):
    "A folder each and a table of them; nothing joins what is there already."
    file = base.benchmarks['openbookqa']['data_files']
    r = set_values(base, [f'benchmarks={{easy: {{type: openbookqa, data_files: {file}, limit: 3}}, openbookqa: {{data_files: {file}, limit: 4}}}}'])
    (tmp_path/'two.yaml').write_text(r.to_yaml())
    c2c_audit(what=[str(tmp_path/'two.yaml')], arms=['zeros'], quiet=True)
    said = capsys.readouterr().out
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'easy', 'openbookqa', 'recipe.yaml', 'table.md', 'summary.json'} and 'easy\n\narm' in said and 'openbookqa\n\narm' in said
    assert [len(read_records(tmp_path/'out'/n)) for n in ('easy', 'openbookqa')] == [15, 20] and (tmp_path/'out'/'easy'/'audit.md').is_file()
    table, summary = (tmp_path/'out'/'table.md').read_text(), json.loads((tmp_path/'out'/'summary.json').read_text())
    assert table.startswith('| benchmark | questions | receiver | C2C | gain |') and '| easy | 3 |' in table and summary['benchmarks']['openbookqa']['questions'] == 4 and summary['benchmarks']['easy']['verdict']['kind'] == 'undecided'
    no_models(monkeypatch)
    with pytest.raises(FileExistsError, match='another audit.*asked.*questions'): audit_recipe(set_values(r, ['benchmarks.easy.limit=4']), ['zeros'])
    with pytest.raises(SystemExit): c2c_audit(what=[str(tmp_path/'two.yaml')], set=['benchmarks.openbookqa.limit=3'], arms=['zeros'], quiet=True)
    assert 'holds another audit' in capsys.readouterr().err
    with pytest.raises(FileExistsError, match='something else'): audit_recipe(base)      # one alone would lie in the folder itself


def test_an_evaluation_is_no_audit(base, tmp_path, monkeypatch, capsys):
    "Not in one folder, with one benchmark or several, from Python or from a shell; nothing is changed."
    file = base.benchmarks['openbookqa']['data_files']
    one = set_values(base, ['systems=[receiver, C2C]', f'output.folder={tmp_path}/one', 'benchmarks.openbookqa.limit=3'])
    two = set_values(one, [f'benchmarks={{easy: {{type: openbookqa, data_files: {file}, limit: 3}}, openbookqa: {{data_files: {file}, limit: 3}}}}', f'output.folder={tmp_path}/two'])
    for r in one, two: run_recipe(r, progress=False)
    other = set_values(two, [f'benchmarks={{a: {{type: openbookqa, data_files: {file}, limit: 3}}, b: {{type: openbookqa, data_files: {file}, limit: 4}}}}'])
    no_models(monkeypatch)
    state = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    before = state()
    for r in one, two, other:
        with pytest.raises(FileExistsError, match='an evaluation that is no audit'): audit_recipe(r)
    for what in 'one', 'two':
        with pytest.raises(SystemExit) as e: c2c_audit(what=[str(tmp_path/what)], quiet=True)
        err = capsys.readouterr().err
        assert e.value.code == 2 and 'an evaluation that is no audit' in err and 'output.folder' in err and 'Loading' not in err
    assert state() == before


def test_dry_run(base, tmp_path, monkeypatch, capsys):
    "Recipe, arms, questions and the first prompt; no model, no file. Which method it is depends on who says what."
    no_models(monkeypatch)
    r = set_values(base, ['systems=[receiver, T2T]', 'method=generate'])
    (tmp_path/'r.yaml').write_text(r.to_yaml())
    args = [f"data_files={base.benchmarks['openbookqa']['data_files']}", 'limit=5']
    def said(*what, **kwargs): c2c_audit(what=list(what), dry_run=True, quiet=True, **kwargs); return capsys.readouterr().out
    text = said(str(tmp_path/'r.yaml'), arms=['own-cache', 'retrained'])
    for part in ('# systems (receiver, T2T) has no effect on an audit', 'kind: evaluation', 'openbookqa: 6 questions', 'arms of C2C, as far as these models allow: matched, mismatched, own cache\n', 'no retrained fuser was given', '"role": "user"', 'method: generate'): assert part in text, part
    every = said(str(tmp_path/'r.yaml'), method='options', seed=5, batch_size=3, variant='direct', dtype='float32')
    assert all(s in every for s in ('method: options', 'seed: 5', 'batch_size: 3', 'variant: direct', 'dtype: float32', *changed))
    three = (base.model.fusers[0], 'openbookqa', str(tmp_path/'new'))
    assert 'method: options' in said(*three, args=args) and 'method: generate' in said(*three, args=args, method='generate') and 'method: generate' in said(*three, args=args, set=['method=generate']) and '# systems' not in said(*three, args=args)
    assert 'method: options' in (cued := said(*three, args=args, set=['cue=I say'])) and '"content": "I say"' in cued
    (tmp_path/'arm_of_mine.py').write_text('from c2c_nb.arms import register_arm\n@register_arm("of mine", "x")\ndef f(c2c, processor, name): raise AssertionError\n')
    try: assert 'mismatched, of mine' in said(*three, args=args, arms=['of mine'], imports=[str(tmp_path/'arm_of_mine.py')])
    finally: arms_module._arms.pop('of mine', None)
    math = tmp_path/'open.jsonl'; math.write_text('\n'.join(json.dumps(dict(question=f'What is {i} and {i}?', answer=str(2*i))) for i in range(3)))
    assert 'method: generate' in said(base.model.fusers[0], 'questions', str(tmp_path/'new'), args=[f'data_files={math}', 'answers=math'])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != '__pycache__') == ['arm_of_mine.py', 'open.jsonl', 'r.yaml']
    c2c_audit(what=[], list=True)
    assert 'paper' in capsys.readouterr().out.split()


def test_an_official_file_is_audited(base, golden, tmp_path):
    "Its one system has no effect; its fuser, options and cue have."
    file = dict(model=dict(model_name='Rosetta', rosetta_config=dict(base_model=base.model.receiver, teacher_model=dict(x=base.model.sharers[0]), checkpoints_dir=base.model.fusers, is_do_alignment=False)), output=dict(output_dir=str(tmp_path/'official')),
        eval=dict(dataset='openbookqa', gpu_ids=[0], answer_method='logits', use_cot=False, use_template=False, limit=4, response_text='The correct answer is'))
    (tmp_path/'official.json').write_text(json.dumps(file))
    r = set_values(read_recipe(tmp_path/'official.json', EvalRecipe), [f"benchmarks.openbookqa.data_files={base.benchmarks['openbookqa']['data_files']}"])
    found = audit_recipe(r, ['zeros'], progress=False)
    assert any('systems (C2C) has no effect' in n for n in found.recipe.notes) and len(found['openbookqa'].evaluation.records) == 20 and found.recipe.cue == 'The correct answer is'
    whole = dict(file, model=dict(model_name=base.model.receiver))
    (tmp_path/'alone.json').write_text(json.dumps(whole))
    with pytest.raises(ValueError, match='names none'): prepare_audit(read_recipe(tmp_path/'alone.json', EvalRecipe))


@pytest.mark.parametrize('values, settings, message', [(['model.fusers=[]'], {}, 'names none'), ([], dict(arms=['noize']), "did you mean 'noise'"), ([], dict(gold='same'), "'any' other question"), ([], dict(share=1.), 'between 0 and 1'), (['benchmarks.openbookqa.limit=1'], {}, 'another question to hear'),
    (['benchmarks.openbookqa.limit=2'], dict(gold='other'), 'same right answer'), (['benchmarks=[openbokqa]'], {}, "did you mean 'openbookqa'"), (['variant=cots'], {}, "did you mean 'cot'"), ([], dict(retrained='/nowhere/at/all'), None), ([], dict(retrained=['a/b', 'c/d']), '2 retrained fusers'), (['model.sharers=[a/b, c/d]'], {}, '2 sharers'), (['method=generate', 'cue=So'], {}, "it is for 'options'")])
def test_mistakes_come_before_the_models(base, tmp_path, values, settings, message, monkeypatch):
    no_models(monkeypatch)
    r = set_values(base, values)
    if message is None: message, settings = 'no fuser in', dict(retrained=str(tmp_path))
    if 'same right' in message:                                   # two questions with one answer
        rows = [json.dumps(dict(question=f'Which {i}?', options=['yes', 'no'], answer='A')) for i in range(2)]
        (tmp_path/'same.jsonl').write_text('\n'.join(rows)); r = set_values(base, [f'benchmarks={{questions: {{data_files: {tmp_path}/same.jsonl}}}}'])
    with pytest.raises((ValueError, OSError), match=message): audit_recipe(r, **settings)
    assert not Path(base.output.folder).exists()
