"The records of the lessons are whole, and what their notebooks say agrees with them."
import json, statistics

import pytest
from conftest import root

names = ['lessons_toy', 'lessons_tiny', 'train_speed', 'train_memory']


def record(name): return json.loads((root/'nbs'/'results'/f'{name}.json').read_text())


def prose(notebook) -> str:
    "All text of a notebook, on one line."
    cells = json.loads((root/'nbs'/f'{notebook}.ipynb').read_text())['cells']
    return ' '.join(' '.join(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown')


def says(notebook, *figures):
    "The text holds these figures."
    text = prose(notebook)
    assert not [f for f in figures if f not in text], f"{notebook} does not say {[f for f in figures if f not in text]}"


def right(runs, name, skill='sum', look=-1, what='right') -> float:
    "Share of right answers over all seeds of a run, in percent."
    tests = [r['looks'][look]['test'][skill] for r in runs[name].values()]
    return 100*sum(t[what] for t in tests)/sum(t['of'] for t in tests)


@pytest.mark.parametrize('name', names)
def test_a_record_says_how_it_was_made(name):
    about = record(name)['about']
    for key in 'what', 'device', 'machine', 'python', 'torch', 'transformers', 'command': assert about[key], key
    assert 'seed' in about or 'seeds' in about
    assert 'nbdev_test' in about['command'] and about['command'].endswith('--flags slow')
    notebook = about['command'].split('--path ')[1].split()[0]
    assert (root/notebook).exists() and '#| slow' in (root/notebook).read_text()


@pytest.mark.parametrize('name', ['lessons_toy', 'lessons_tiny'])
def test_runs_have_three_seeds_and_all_their_looks(name):
    r = record(name)
    assert list(r['runs']) == list(r['about']['changes'])
    for run, seeds in r['runs'].items():
        assert len(seeds) >= 3 and sorted(map(int, seeds)) == r['about']['seeds'][run]
        assert all(s['loss'][-1][0] == s['looks'][-1]['step'] == r['about']['recipe']['training']['steps'] for s in seeds.values())


def test_the_embedded_pair():
    runs = record('lessons_toy')['runs']
    shipped = right(runs, 'as shipped')
    assert shipped > 95 and right(runs, 'as shipped', 'item') > 99 and right(runs, 'as shipped', what='mismatched') < 15
    says('07b_lessons', f'{shipped:.1f} %', f"chance ({right(runs, 'as shipped', what='mismatched'):.1f} %)", f"{right(runs, 'as shipped', look=0):.0f} %", f"{right(runs, 'no buckets', look=0):.0f} %", f"{right(runs, 'no buckets'):.1f} %",
        f"{right(runs, 'hard gates'):.1f} %", f"{right(runs, 'from 0, logistic noise'):.1f} %", f"{right(runs, 'from 0'):.1f} %", f"{right(runs, 'learning rate 1e-4'):.1f} %", f"{right(runs, 'learning rate 3e-2'):.0f} %", f"{right(runs, '60 questions'):.1f} %", f"{right(runs, '250 questions'):.0f} %")
    schedules = [right(runs, f'from 0{s}') for s in ('', ', linear', ', always 0.01', ', always 1')]
    says('07b_lessons', f'between {min(schedules):.1f} and {max(schedules):.1f} %')
    assert all(r['looks'][-1]['open'] == 6 for n in runs for r in runs[n].values())               # the text says that all gates open
    assert all(l['gates'] == [[2.]*3]*2 for r in runs['hard gates'].values() for l in r['looks'])


def test_loss_and_accuracy():
    from scipy.stats import spearmanr
    ends = [r['looks'][-1]['test']['sum'] for runs in record('lessons_toy')['runs'].values() for r in runs.values()]
    loss, share = [t['loss'] for t in ends], [t['right']/t['of'] for t in ends]
    good = [(l, s) for l, s in zip(loss, share) if s > .95]
    minus = lambda x: f'{x:.2f}'.replace('-', '−')
    says('07b_lessons', f'all {len(ends)} runs', minus(spearmanr(loss, share)[0]), f'the {len(good)} runs above 95 %', minus(spearmanr(*zip(*good))[0]))


def test_the_real_pair():
    r = record('lessons_tiny')
    at = lambda name, k: statistics.mean(x['looks'][-1]['test'][k] for x in r['runs'][name].values())
    alone, c2c, control = at('as shipped', 'none'), at('as shipped', 'right'), at('other caches', 'other')
    assert c2c < alone - .3                                      # it helps
    says('07b_lessons', f'{alone:.2f}', f'{c2c:.2f}', f'{alone - c2c:.2f}', f'{control - c2c:.3f}')


def test_speed():
    pairs = record('train_speed')['pairs']
    assert all(p['gradients_differ'] < 1e-4 for p in pairs.values())
    for pair in pairs.values(): assert len({tuple(x['tokens'] for x in xs) for xs in pair['ways'].values()}) == 1      # every loop read the same rows
    def ratio(pair, way): return statistics.median(a['cpu']/b['cpu'] for a, b in zip(pairs[pair]['ways']['straightforward'], pairs[pair]['ways'][way]))
    says('07c_train_speed', *(f"{ratio(p, 'the library'):.1f}" for p in pairs))


def test_memory():
    runs = {(r['prompt'], r['autocast']): r for r in record('train_memory')['runs']}
    long, short = sorted({p for p, _ in runs})[::-1]
    for autocast in (False, True): assert runs[long, autocast]['kept'] > runs[short, autocast]['kept']
    slope = {c: (runs[long, c]['kept'] - runs[short, c]['kept'])/(long - short)/4/1e3 for c in (False, True)}
    assert slope[True] < slope[False]
    says('07c_train_speed', f'{slope[False]:.0f} kB', f'{slope[True]:.0f} kB')
