"Intervals, paired comparisons and power against known values, against each other, and against simulated evaluations."
import math, re, warnings

import numpy as np, pytest
from scipy.stats import binom

from c2c_nb.hub import wilson
from c2c_nb.stats import by_category, detectable, discordant_share, interval, mean_interval, paired, power, questions_needed


def pair(both, only_a, only_b, neither): return np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither]), np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])


def test_wilson_against_known_values():
    for (k, n), known in {(81, 263): (.2553, .3662), (15, 148): (.0624, .1605), (0, 20): (0, .1611), (1, 29): (.0061, .1718)}.items():          # Newcombe 1998, table I, method 3
        assert interval(k, n) == pytest.approx(known, abs=6e-5)
    assert interval(20, 20) == pytest.approx((1 - .1611, 1), abs=6e-5) and interval(20, 20)[1] == 1. and interval(0, 3)[0] == 0.
    for k in range(0, 41, 5): assert interval(k, 40) == pytest.approx(wilson(k, 40), abs=1e-6)
    assert interval(5, 10, .99)[0] < interval(5, 10, .95)[0] < interval(5, 10, .5)[0]
    for k, n in (-1, 10), (11, 10), (0, 0):
        with pytest.raises(ValueError, match='at least 1 question'): interval(k, n)


def test_wilson_covers():
    k = np.arange(101)
    low, high = np.array([interval(i, 100) for i in k]).T
    covered = [binom.pmf(k, 100, p)[(low <= p) & (p <= high)].sum() for p in np.linspace(.03, .97, 60)]
    assert .945 < np.mean(covered) < .96 and min(covered) > .92


def test_mean_intervals():
    assert mean_interval([1, 0, 1, 1]) == interval(3, 4) and mean_interval([.5]*5) == (.5, .5)
    x = np.random.default_rng(0).beta(2, 3, 500)
    assert mean_interval(x, draws=4000) == pytest.approx([x.mean() + s*1.96*x.std()/math.sqrt(500) for s in (-1, 1)], abs=.003)
    assert mean_interval(x, seed=1) == mean_interval(x, seed=1) != mean_interval(x, seed=2)


def test_mcnemar_against_known_values():
    r = paired(*pair(0, 4, 12, 0))
    assert (r.both, r.only_a, r.only_b, r.neither, r.n) == (0, 4, 12, 0, 16) and r.p == pytest.approx(2*sum(math.comb(16, i) for i in range(5))/2**16)
    r = paired(*pair(10, 6, 6, 10))
    assert r.p == 1 and r.difference == 0 and r.discordant == 12/32
    assert paired([1, 1, 0], [1, 1, 0]).p == 1 and paired([True]*8, [False]*8).p == pytest.approx(2/2**8)
    assert paired([True]*8, [False]*8).difference == 1
    a, b = pair(400, 60, 30, 510)
    assert paired(a, b).p == paired(b, a).p and paired(a, b).difference == -paired(b, a).difference == pytest.approx(.03)


def test_paired_interval_is_the_paired_one():
    a, b = pair(400, 60, 30, 510)
    r, se = paired(a, b), math.sqrt((.09 - .03**2)/1000)
    assert (r.low, r.high) == pytest.approx((.03 - 1.96*se, .03 + 1.96*se), abs=.0015)
    rng = np.random.default_rng(0)
    loose = paired(a, rng.permutation(b))                          # answers of other questions: as if there were two samples
    assert loose.high - loose.low > 2*(r.high - r.low)
    assert paired(a, b) == paired(a, b) and paired(a, b, seed=1).low != r.low
    same = paired(a, a)
    assert (same.low, same.high, same.difference) == (0, 0, 0)


def test_paired_interval_covers():
    rng, inside = np.random.default_rng(1), 0
    for i in range(200):
        at = rng.choice(4, 300, p=[.4, .12, .06, .42])
        a, b = np.isin(at, (0, 1)), np.isin(at, (0, 2))
        r = paired(a, b, seed=i, draws=500)
        inside += r.low <= .06 <= r.high
    assert .90 <= inside/200 <= .985


def test_measures_instead_of_right_and_wrong():
    rng = np.random.default_rng(0)
    b = rng.uniform(size=200)
    r = paired(np.clip(b + .1, 0, 1), b)
    assert r.both is None and r.p < .001 and 0 < r.low < r.difference < r.high
    assert paired(b, b).p == 1
    assert 'cannot be told apart' in paired(rng.permutation(b), b).words()


def test_words_name_the_better_one():
    a, b = pair(400, 60, 30, 510)
    said = paired(a, b).words('C2C', 'the receiver')
    assert said.startswith('C2C is better than the receiver by 3.0 points (95 % interval +1.') and paired(b, a).words('the receiver', 'C2C').startswith('C2C is better than the receiver by 3.0 points (95 % interval +1.')
    assert '| **first right** | 400 | 60 |' in paired(a, b)._repr_markdown_()


def test_words_do_not_turn_round_what_cannot_be_told():
    "A difference that may be chance keeps order and sign, its interval with it: nothing below zero reads as a gain."
    a, b = pair(5, 3, 1, 5)
    more, less = paired(a, b), paired(b, a)
    assert more.words('x', 'y').startswith('x and y cannot be told apart here: x minus y is +14.3 points (95 % interval -') and less.words('y', 'x').startswith('y and x cannot be told apart here: y minus x is -14.3 points (95 % interval -')
    spans = [[float(x) for x in re.search(r'interval (\S+) to (\S+),', p.words('x', 'y')).groups()] for p in (more, less)]
    assert spans[0] == [-spans[1][1], -spans[1][0]] and spans[0][0] < 0 < spans[0][1]
    for p in more, less: assert 'better' not in p.words()
    worse = paired(*pair(400, 30, 60, 510)).words('C2C', 'the receiver')
    assert worse.startswith('the receiver is better than C2C by 3.0 points (95 % interval +') and 'by -' not in worse
    assert paired(a, a).words('x', 'y') == 'x and y cannot be told apart here: they have the same marks on all 14 questions'
    tie = paired(*pair(5, 3, 3, 5)).words('x', 'y')
    assert 'x minus y is +0.0 points (95 % interval -' in tie and '-0.0' not in tie


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match='same questions'): paired([1, 0], [1])
    with pytest.raises(ValueError, match='same questions'): paired([], [])
    with pytest.raises(ValueError, match='without a result'): paired([1, float('nan')], [1, 0])
    for difference, discordant in (0, .1), (.2, .1), (.2, 1.1):
        with pytest.raises(ValueError, match='differ by that share'): questions_needed(difference, discordant)
        with pytest.raises(ValueError, match='differ by that share'): power(difference, discordant, 100)
    with pytest.raises(ValueError, match='n=0'): power(.1, .2, 0)
    with pytest.raises(ValueError, match='between 0 and 1'): discordant_share(1.2, .3)


def test_questions_needed_by_the_formula():
    z = 1.959964, .841621
    for delta, d in (.03, .09), (.03, .3), (.1, .15), (.01, .5):
        assert questions_needed(delta, d) == math.ceil((z[0]*math.sqrt(d) + z[1]*math.sqrt(d - delta**2))**2/delta**2 - 1e-3)
    assert questions_needed(.1, .25) == 194                        # (1.96*.5 + .8416*.4899)**2/.01 = 193.85
    assert questions_needed(-.03, .09) == questions_needed(.03, .09) < questions_needed(.03, .09, power=.9) < questions_needed(.03, .09, power=.9, alpha=.01)
    assert discordant_share(.5, .6) == pytest.approx(.5) and discordant_share(.5, .6, 1) == pytest.approx(.1)


def test_exact_power_is_the_sum_over_all_outcomes():
    n, d, delta = 12, .5, .4
    total = 0
    for m in range(n + 1):
        for k in range(m + 1):                                     # k of the m go to the worse system
            p = min(1, 2*sum(math.comb(m, i) for i in range(min(k, m - k) + 1))/2**m)
            if p <= .05: total += binom.pmf(m, n, d)*binom.pmf(k, m, (d - delta)/(2*d))
    assert power(delta, d, n) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize('delta,d', [(.03, .09), (.05, .3), (.1, .15)])
def test_power_agrees_with_simulated_evaluations(delta, d):
    n = questions_needed(delta, d)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [(d + delta)/2, (d - delta)/2, 1 - d], size=4000)
    found = np.minimum(1, 2*binom.cdf(counts[:, :2].min(1), counts[:, :2].sum(1), .5)) <= .05
    assert power(delta, d, n) == pytest.approx(found.mean(), abs=.025) and .74 < power(delta, d, n) < .82
    none = rng.multinomial(n, [d/2, d/2, 1 - d], size=4000)
    assert np.mean(np.minimum(1, 2*binom.cdf(none[:, :2].min(1), none[:, :2].sum(1), .5)) <= .05) < .055


def test_power_grows_and_detectable_is_its_reverse():
    grown = [power(.03, .15, n) for n in (200, 500, 1000, 2000, 5000)]
    assert grown == sorted(grown) and grown[-1] > .99
    for n in 300, 1000, 5627: assert abs(questions_needed(detectable(n, .15), .15) - n) <= 2
    assert detectable(5, .15) is None and detectable(10**9, .15) == 1e-4


def test_by_category():
    rng = np.random.default_rng(0)
    kinds = np.array(['a', 'b', 'c'])[rng.integers(3, size=900)]
    base = rng.uniform(size=900) < .5
    up = base | ((kinds == 'a') & (rng.uniform(size=900) < .3)) | ((kinds == 'b') & (rng.uniform(size=900) < .04))
    table = by_category(list(kinds), dict(base=list(base), up=list(up)), 'base')
    assert [r['category'] for r in table.rows] == ['a', 'b', 'c', 'all'] and sum(r['n'] for r in table.rows[:3]) == table.rows[3]['n'] == 900
    for r in table.rows[:3]:
        at = kinds == r['category']
        assert r['systems']['up'][0] == pytest.approx(up[at].mean()) and r['systems']['base'][1:] == interval(int(base[at].sum()), int(at.sum()))
    d, p = table.rows[0]['differences']['up']
    assert d.p < p < 1e-5 and p == pytest.approx(min(1, 3*d.p)) and table.rows[2]['differences']['up'][1] == 1
    second, p = table.rows[1]['differences']['up']
    assert 0 < second.p < .3 and p == pytest.approx(2*second.p)          # Holm: the second of three
    assert table.rows[3]['differences']['up'][1] == table.rows[3]['differences']['up'][0].p
    lines = table.markdown().split('\n')
    assert len(lines) == 6 and lines[0] == '| category | questions | base | up | up − base |'
    assert len(by_category(['x']*4, dict(only=[1, 0, 1, .5])).rows) == 2
    with pytest.raises(ValueError, match='one for each question'): by_category(['x'], dict(a=[1, 0]))
    with pytest.raises(ValueError, match='none of the systems'): by_category(['x'], dict(a=[1]), 'b')


def test_fast_enough_for_a_whole_benchmark():
    import time
    rng, began = np.random.default_rng(0), time.time()
    paired(rng.uniform(size=5700) < .5, rng.uniform(size=5700) < .5)
    assert time.time() - began < 20
