"Oracles: enrichment layer by layer, conversion of caches, and what a fuser does of either."
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM

from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.baseline import Alone, CacheEnrichment, FewShot
from c2c_nb.bench import QuestionFile, default_template, make_benchmark
from c2c_nb.cache import KVGeometry, make_cache, read_layer
from c2c_nb.evaluate import Evaluation, prompt_key, read_records
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.oracles import (MEASURES, Conversion, LayerEnrichment, OwnEnrichment, OwnFewShot, conversion_error, explained, fit_mlp, fit_ridge, fused_change, gold_log_probability,
    layer_enrichment, nearer, other_tokens, projected, same_token, split_ids, token_caches)
from c2c_nb.toy import word_tokenizer
from tiny import c2c_of, config_of, fuser_for, tiny

words = [f'w{i}' for i in range(30)] + list('ABCD')
examples = [('w1 w2 w3 ?', 'A'), ('w4 w5 ?', 'C')]


def bare_tokenizer():
    "Words, and no token that begins a text."
    from tokenizers import processors
    t = word_tokenizer(words)
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(single='$A')
    return t


class Words(QuestionFile):
    name, plain = 'words', True


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch): "Evaluations write pictures, which are tested elsewhere and take most of the time."; monkeypatch.setattr(Evaluation, 'save_figures', lambda self: [])


@pytest.fixture
def bench(tmp_path):
    def make(n=20):
        g = torch.Generator().manual_seed(0)
        rows = [dict(id=f'q{i}', question=' '.join(f'w{k}' for k in torch.randint(6, 30, (4 + i % 3,), generator=g)), options=['a', 'b', 'c', 'd'], answer='ABCD'[i % 4]) for i in range(n)]
        file = tmp_path/'words.jsonl'
        file.write_text('\n'.join(map(json.dumps, rows)))
        return Words(data_files=str(file))
    return make


def prompts_of(benchmark):
    qs = benchmark.questions()[0]
    return qs, [default_template().render(q) for q in qs]


# --- splits


@pytest.mark.parametrize('n, share', [(2, .5), (7, .5), (100, .3), (1000, .9)])
def test_splits_are_disjoint_and_whole(n, share):
    ids = [f'{i}' for i in range(n)]
    a, b = split_ids(ids, share)
    assert not set(a) & set(b) and set(a) | set(b) == set(ids) and len(b) == n - round(n*(1 - share)) and a and b
    again = split_ids(ids[::-1] + ids, share)                    # order and repetitions do not matter
    assert set(again[0]) == set(a) and set(again[1]) == set(b)
    if n >= 100: assert set(split_ids(ids, share, 1)[0]) != set(a)


def test_a_split_does_not_follow_the_order():
    a, _ = split_ids([str(i) for i in range(1000)])
    assert 150 < sum(int(i) < 500 for i in a) < 350


@pytest.mark.parametrize('bad', [dict(ids=['a']), dict(ids=['a', 'a']), dict(ids=['a', 'b'], share=0), dict(ids=['a', 'b'], share=1.)])
def test_splits_that_cannot_be(bad):
    with pytest.raises(ValueError, match='give more|between 0 and 1'): split_ids(**bad)


# --- enrichment


@pytest.mark.parametrize('model', ['qwen3', 'llama'])
def test_no_layer_is_the_receiver_and_all_layers_are_the_oracle(bench, tmp_path, model):
    "Without a token that begins the text nothing but positions differs when no layer is enriched, and positions are relative."
    model, tok, b = tiny(model), bare_tokenizer(), bench()
    found = layer_enrichment(model, tok, examples, b, tmp_path/'e', shot='{prompt} {answer} ', progress=False)
    by = found.evaluation.by
    for i in by['receiver']:
        for l in 'ABCD': assert by['no layer'][i]['scores'][l] == pytest.approx(by['receiver'][i]['scores'][l], abs=2e-4)
    assert max(abs(by['all layers'][i]['scores']['A'] - by['receiver'][i]['scores']['A']) for i in by['receiver']) > .01     # the examples do something
    qs, prompts = prompts_of(b)
    for layers, name in ((None, 'all layers'), ([1], 'layer 1'), ([0], 'layer 0')):
        for q, a in zip(qs, CacheEnrichment(model, tok, examples, layers, shot='{prompt} {answer} ').answer(prompts, options=[[f' {l}' for l in q.labels] for q in qs])):
            assert by[name][q.id]['scores']['B'] == pytest.approx(a.scores[' B'], abs=1e-4)
    for q, a in zip(qs, FewShot(model, tok, examples, shot='{prompt} {answer} ').answer(prompts, options=[[f' {l}' for l in q.labels] for q in qs])):
        assert by['few-shot'][q.id]['scores']['B'] == pytest.approx(a.scores[' B'], abs=1e-4)


def test_the_ranking_has_not_seen_the_questions_that_judge(bench, tmp_path):
    "Ranking by hand from the records of one half; another outcome of the other half would not change it."
    model, tok, b = tiny('qwen3'), bare_tokenizer(), bench()
    found = layer_enrichment(model, tok, examples, b, tmp_path/'e', shot='{prompt} {answer} ', progress=False)
    assert not set(found.choice) & set(found.test) and len(found.choice) == len(found.test) == 10
    records = {(r['system'], r['id']): r for r in read_records(tmp_path/'e')}
    mean = lambda name, ids: np.mean([gold_log_probability(records[name, i]) for i in ids])
    assert found.ranking == sorted(found.layers, key=lambda i: -mean(f'layer {i}', found.choice))
    for n in found.systems:
        assert found.values(n).mean() == pytest.approx(mean(n, found.test)) and found.values(n, half='choice').mean() == pytest.approx(mean(n, found.choice))
    for k in found.ks:
        assert found.best(k) == found.name(found.ranking[:k]) and found.worst(k) == found.name(found.ranking[::-1][:k])
        assert {found.best(k), found.worst(k)} <= set(found.systems)
    assert found.best(len(found.layers)) == found.worst(len(found.layers)) == 'all layers' and found.best(1) == f'layer {found.ranking[0]}'
    for m, f in MEASURES.items(): assert found.values('layer 1', m).tolist() == [f(records['layer 1', i]) for i in found.test]
    gain = found.gain('all layers', 'no layer')
    assert gain.difference == pytest.approx(mean('all layers', found.test) - mean('no layer', found.test)) and gain.n == 10
    told = []
    for seed in range(1, 9):                                     # other halves may rank otherwise, and never as all questions together do unless they happen to agree
        other = layer_enrichment(model, tok, examples, b, tmp_path/'e', seed=seed, ks=[len(found.layers)], shot='{prompt} {answer} ', progress=False)
        by = lambda ids: sorted(found.layers, key=lambda i: -mean(f'layer {i}', ids))
        assert other.ranking == by(other.choice)
        told.append(by(other.choice) != by(other.choice + other.test))
    assert any(told)
    rows = found.rows()
    assert [r[0] for r in rows[1:]] == found.systems and len({len(r) for r in rows}) == 1


def test_it_goes_on_where_it_was_and_refuses_another(bench, tmp_path):
    model, tok, b = tiny('qwen3'), bare_tokenizer(), bench(8)
    ask = lambda where, **more: layer_enrichment(model, tok, **(dict(examples=examples, shot='{prompt} {answer} ', progress=False) | more), benchmark=b, folder=tmp_path/where)
    whole = ask('whole')
    file = tmp_path/'whole'/'records-000.jsonl'
    lines = file.read_text().splitlines()
    (tmp_path/'cut').mkdir()
    for f in 'evaluation.json',: (tmp_path/'cut'/f).write_text((tmp_path/'whole'/f).read_text())
    (tmp_path/'cut'/file.name).write_text('\n'.join(lines[:19]) + '\n' + lines[19][:30])      # killed in the middle of a line
    again = ask('cut')
    same = lambda f: sorted((r['system'], r['id'], r['prediction'], round(r['scores']['A'], 4)) for r in read_records(tmp_path/f))
    assert same('cut') == same('whole') and again.ranking == whole.ranking
    count = len(lines)
    ask('whole')
    assert len(file.read_text().splitlines()) == count            # nothing was asked again
    with pytest.raises(FileExistsError, match='another evaluation'): ask('whole', examples=examples[:1])
    assert len(file.read_text().splitlines()) == count


def test_nats_are_those_of_a_plain_pass(bench, tmp_path):
    model, tok, b = tiny('qwen3'), bare_tokenizer(), bench(4)
    by = layer_enrichment(model, tok, examples, b, tmp_path/'e', measure='nats a token', shot='{prompt} {answer} ', progress=False).values('receiver', half='test')
    qs, prompts = prompts_of(b)
    for q, p in zip(qs, prompts):
        with torch.no_grad(): want = model(input_ids=torch.tensor([tok(p).input_ids])).logits[0, -1].log_softmax(-1)[tok(q.gold).input_ids[0]]
        if q.id in split_ids([q.id for q in qs])[1]: assert float(np.abs(by - float(want)).min()) < 1e-4


def test_a_record_says_the_same_again(bench, tmp_path):
    found = layer_enrichment(tiny('qwen3'), bare_tokenizer(), examples, bench(12), tmp_path/'e', shot='{prompt} {answer} ', progress=False)
    back = LayerEnrichment(**json.loads(json.dumps(found.to_dict())))
    assert back.ranking == found.ranking and back.systems == found.systems and back.test == found.test
    for n in found.systems:
        assert back.values(n, 'accuracy').tolist() == found.values(n, 'accuracy').tolist() and np.abs(back.values(n) - found.values(n)).max() < 1e-3
    assert len(back.plot().axes) == 2 and len(back.plot(measure='accuracy', baseline='receiver').axes) == 2


def test_each_question_has_its_own_examples(bench, tmp_path):
    "The mixed batch is what each question gives with its examples alone, seen and dropped."
    model, tok, b = tiny('qwen3'), bare_tokenizer(), bench(6)
    qs, prompts = prompts_of(b)
    own = {q.id: [(f'w{i} w{i+1}', 'ABCD'[i % 4])] + [('w9', 'B')]*(i % 2) for i, q in enumerate(qs)}
    found = layer_enrichment(model, tok, own, b, tmp_path/'e', shot='{prompt} {answer} ', progress=False)
    for q, p in zip(qs, prompts):
        for cls, name in ((FewShot, 'few-shot'), (CacheEnrichment, 'all layers')):
            a = cls(model, tok, own[q.id], shot='{prompt} {answer} ').answer([p], options=[f' {l}' for l in q.labels])[0]
            assert found.evaluation.by[name][q.id]['scores']['C'] == pytest.approx(a.scores[' C'], abs=1e-4)
    swapped = OwnEnrichment(model, tok, {prompt_key(p): own[q.id] for p, q in zip(prompts, qs[1:] + qs[:1])})
    straight = OwnEnrichment(model, tok, {prompt_key(p): own[q.id] for p, q in zip(prompts, qs)})
    assert swapped.describe() != straight.describe()              # another folder is asked for
    with pytest.raises(ValueError, match='no examples of its own'): straight.answer(['w1 w1 w1'])
    with pytest.raises(ValueError, match='must be a dictionary'): OwnFewShot(model, tok, examples)


def test_chats_and_written_answers(golden, tmp_path):
    "With chat templates, generated answers, and a C2C model for its receiver."
    receiver, t = AutoModelForCausalLM.from_pretrained(golden/'receiver').eval(), load_tokenizer(golden/'tokA')
    file = tmp_path/'q.jsonl'
    file.write_text('\n'.join(json.dumps(dict(id=str(i), question=f'What is {i}?', options=['one', 'two', 'three'], answer='ABC'[i % 3])) for i in range(6)))
    c2c = C2CModel(receiver, [receiver], [fuser_for(receiver, receiver)], processor=C2CProcessor(t, [t]))
    b = QuestionFile(data_files=str(file))
    found = layer_enrichment(c2c, None, [('What is what?', 'A')], b, tmp_path/'e', method='generate', ks=[1], max_new_tokens=3, progress=False)
    assert found.measure == 'accuracy' and list(found.outcomes) == ['accuracy'] and len(found.systems) == 4 + len(found.layers)
    with pytest.raises(ValueError, match='one of the questions'): layer_enrichment(c2c, None, [(prompts_of(b)[1][0][-1]['content'], 'A')], b, tmp_path/'f', progress=False)


@pytest.mark.parametrize('more, says', [(dict(tokenizer=None), 'no tokenizer'), (dict(measure='accurracy'), 'there are accuracy'), (dict(method='generate', measure='log-probability'), "only for method='options'"), (dict(ks=[0]), 'from 1 to'),
    (dict(ks=[9]), 'from 1 to'), (dict(examples=[]), 'at least one'), (dict(examples={'q0': examples}), '7 of 8 questions have no examples')])
def test_bad_enrichments(bench, tmp_path, more, says):
    with pytest.raises(ValueError, match=says): layer_enrichment(**(dict(model=tiny('qwen3'), tokenizer=bare_tokenizer(), examples=examples, benchmark=bench(8), folder=tmp_path/'e', progress=False) | more))
    assert not (tmp_path/'e').exists()


def test_an_example_from_the_questions_is_refused(bench, tmp_path):
    b = bench(8)
    with pytest.raises(ValueError, match='one of the questions'): layer_enrichment(tiny('qwen3'), bare_tokenizer(), [*examples, (prompts_of(b)[1][3], 'A')], b, tmp_path/'e', progress=False)


# --- fits


@pytest.mark.parametrize('noise, least, most', [(0., .9999, 1.), (1., .4, .6)])
def test_ridge_recovers_a_linear_map(noise, least, most):
    g = torch.Generator().manual_seed(0)
    w, x, new = torch.randn(12, 5, generator=g)/12**.5, torch.randn(2000, 12, generator=g), torch.randn(1000, 12, generator=g)
    y = lambda x: x @ w + 7 + noise*torch.randn(len(x), 5, generator=g)
    fit = fit_ridge(5*x + 2, y(x), torch.arange(2000) % 4 == 0)
    found = explained(t := y(new), fit(5*new + 2), t.mean(0), torch.arange(1000)//10)
    assert least <= found['r2'] <= most and found['low'] <= found['r2'] <= found['high']


@pytest.mark.parametrize('fit', [fit_ridge, fit_mlp])
def test_noise_says_nothing(fit):
    "More inputs than the fit can bear, and nothing in them: the rows that were held out keep it from making things up."
    g = torch.Generator().manual_seed(0)
    x, y, new, want = (torch.randn(n, d, generator=g) for n, d in ((300, 80), (300, 6), (500, 80), (500, 6)))
    r2 = explained(want, fit(x, y, torch.arange(300) % 4 == 0)(new), y.mean(0), torch.arange(500)//5)['r2']
    assert -.25 < r2 < .05


def test_the_network_bends_and_leaves_the_dice_alone():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=g)
    y, held, state = x[:, :1]*x[:, 1:2], torch.arange(2000) % 4 == 0, torch.get_rng_state()
    r2 = lambda fit: explained(y[:500], fit(x[500:], y[500:], held[500:])(x[:500]), y[500:].mean(0), torch.arange(500)//5, 0)['r2']
    assert r2(fit_ridge) < .2 and r2(fit_mlp) > .9
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(fit_mlp(x, y, held, steps=30)(x), fit_mlp(x, y, held, steps=30)(x)) and torch.is_grad_enabled()
    with torch.no_grad(): assert r2(lambda *a: fit_mlp(*a, steps=300)) > .8     # also where no gradients are wanted


def test_explained_by_hand():
    y, guess, text = torch.tensor([[1.], [3.], [5.], [7.]]), torch.tensor([[1.], [3.], [5.], [5.]]), torch.tensor([4, 4, 9, 9])
    found = explained(y, guess, y.mean(0), text)
    assert found['r2'] == pytest.approx(1 - 4/20) and found['error'] == pytest.approx((4/84)**.5) and found['low'] <= .8 <= found['high']
    assert explained(y, y, y.mean(0), text)['r2'] == 1 and explained(y, y.mean(0).expand_as(y), y.mean(0), text, 0)['r2'] == 0
    assert explained(y, y + 9, y.mean(0), text, 0)['r2'] < 0


# --- caches and their conversion


def texts_of(n, seed=0, least=6, most=14):
    g = torch.Generator().manual_seed(seed)
    return [' '.join(f'w{k}' for k in torch.randint(0, 30, (int(torch.randint(least, most, (1,), generator=g)),), generator=g)) for _ in range(n)]


def test_token_caches_are_those_of_single_texts():
    "Rows of a padded batch against each text read alone, with a second tokenizer that numbers words otherwise."
    receiver, sharer, t = tiny('qwen3'), tiny('llama', 1), word_tokenizer(words)
    other = word_tokenizer(words[::-1])
    texts = texts_of(5)
    bare = bare_tokenizer()                                      # its positions are one less, so that pairing matters
    for processor, tok2 in ((C2CProcessor(t, [t]), t), (C2CProcessor(t, [other], 'offsets'), other), (C2CProcessor(t, [other], 'first'), other), (C2CProcessor(t, [bare], 'offsets'), bare)):
        c = token_caches(receiver, sharer, texts, processor, batch_size=3)
        assert c.text.unique().tolist() == list(range(5))
        for n, text in enumerate(texts):
            for model, tok, kvs in ((receiver, t, c.receiver), (sharer, tok2, c.sharer)):
                cache = make_cache(model.config)
                with torch.no_grad(): model.base_model(input_ids=torch.tensor([tok(text).input_ids]), past_key_values=cache, use_cache=True)
                for i in range(len(kvs)):
                    for x, y in zip(kvs[i], read_layer(cache, i)): torch.testing.assert_close(x[c.text == n], y[0, :, int(tok is not bare):].transpose(0, 1).flatten(1), atol=1e-5, rtol=0)
            assert c.back[c.text == n].tolist() == list(range(len(text.split())))[::-1] and c.ids[c.text == n].tolist() == t(text).input_ids[1:]


def test_rotation_is_undone():
    "In the first layer a token has the same key wherever it stands, without rotation and only so."
    model, t = tiny('qwen3'), word_tokenizer(words)
    for space, same in (('unrotated', True), ('cache', False)):
        c = token_caches(model, model, ['w1 w2 w1 w1', 'w3 w1'], C2CProcessor(t, [t]), space)
        k = c.receiver[0][0][c.ids == t('w1').input_ids[1]]
        assert torch.allclose(k, k[:1].expand_as(k), atol=1e-5) is same
    with pytest.raises(ValueError, match="'cache' or 'unrotated'"): token_caches(model, model, ['w1 w2'], C2CProcessor(t, [t]), 'turned')
    with pytest.raises(ValueError, match='no rotary'): token_caches(tiny('gpt2'), model, ['w1 w2'], C2CProcessor(t, [t]), 'unrotated')


def test_a_model_converts_into_itself():
    "R² of 1 from a model's own cache; values and rotated keys of a stranger do not come out so, and the mean is 0."
    receiver, sharer, t = tiny('qwen3'), tiny('llama', 1), word_tokenizer(words)
    texts, processor = texts_of(60), C2CProcessor(t, [t])
    own = conversion_error(receiver, receiver, texts, processor, methods=('ridge',), draws=0)
    assert min(r['r2'] for r in own.of(method='ridge')) > .999
    found = conversion_error(sharer, receiver, texts + texts[:5], processor, steps=60, draws=49)
    assert {r['r2'] for r in found.of(method='mean')} == {0.} and found.about['texts'] == 60
    assert min(r['r2'] for r in found.of(method='ridge')) < .95 and max(r['r2'] for r in found.of(method="another text's cache")) < .1
    layers = [i for i, j in enumerate(found.about['layer_map']) if j is not None]
    assert len(found.rows) == len(layers)*3*5 and set(found.maps) == {(s, h, i, m) for s, h in (('cache', 'keys'), ('unrotated', 'keys'), ('cache', 'values')) for i in layers for m in ('ridge', 'mlp')}
    assert found.of(half='values', layer=0, method='same token')[0]['r2'] > .99 > found.of(half='values', layer=len(layers) - 1, method='same token')[0]['r2']
    assert len(found.table()) == 1 + 3*len(layers) and len(found.plot().axes) == 3


def test_fits_have_not_seen_the_texts_that_judge(monkeypatch):
    "What a fit is given has none of the test texts' tokens."
    import c2c_nb.oracles as oracles
    receiver, t = tiny('qwen3'), word_tokenizer(words)
    texts, given = texts_of(30), []
    monkeypatch.setitem(oracles.CONVERTERS, 'spy', lambda x, y, held, **_: (given.append((y, held)), lambda x: x)[1])
    found = conversion_error(receiver, receiver, texts, p := C2CProcessor(t, [t]), spaces=('cache',), methods=('spy',), draws=0)
    y, held = given[1]                                           # values of the first layer
    judged = token_caches(receiver, receiver, found.about['test'], p)
    last = token_caches(receiver, receiver, [x for x in texts if x not in found.about['test']], p)
    assert len(y) == found.about['tokens'] == len(last.ids) and len(judged.ids) == found.about['judged_tokens'] and 0 < held.sum() < len(held)
    torch.testing.assert_close(y, last.receiver[0][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize('more, says', [(dict(methods=('rigde',)), 'there are ridge, mlp'), (dict(texts=['w1 w2']*30), '1 different texts'), (dict(spaces=('upside down',)), "'cache' or 'unrotated'")])
def test_bad_conversions(more, says):
    t = word_tokenizer(words)
    with pytest.raises(ValueError, match=says): conversion_error(tiny('llama', 1), tiny('qwen3'), **(dict(texts=texts_of(12), processor=C2CProcessor(t, [t])) | more))


def test_real_pair(assets):
    "Two tokenizers, two depths: aligned by offsets; the sharer says more than nothing and less than everything."
    models = [AutoModelForCausalLM.from_pretrained(assets/'models'/n).eval() for n in ('stories260K', 'aidreams260K')]
    toks = [load_tokenizer(assets/'models'/n) for n in ('stories260K', 'aidreams260K')]
    lines = [l.strip() for l in (assets/'text'/'wiki_demo.txt').read_text().splitlines() if len(l) > 200][:24]
    found = conversion_error(models[1], models[0], [l[:160].rpartition(' ')[0] for l in lines], C2CProcessor(toks[0], [toks[1]], 'offsets'), methods=('ridge',), draws=49)
    assert found.about['layer_map'] == [0, 0, 1, 2, 3] and .02 < np.mean([r['r2'] for r in found.of(method='ridge')]) < .9
    with pytest.raises(ValueError, match='layer map'): fused_change(C2CModel(models[0], [models[0]], [fuser_for(models[0], models[0])], processor=C2CProcessor(toks[0], [toks[0]])), ['once upon a time there was'], conversion=found)


# --- fusers


def toy_model(gate=1., **kwargs):
    c2c, t = c2c_of(gate=gate, **kwargs), word_tokenizer(words)
    c2c.processor = C2CProcessor(t, [t])
    return c2c.eval(), t


def test_nearer_by_hand():
    r, t = torch.randn(5, 3), torch.randn(5, 3)
    assert nearer(r, t, t) == pytest.approx((1, 1)) and nearer(r, (r + t)/2, t) == pytest.approx((.75, 1)) and nearer(r, 2*r - t, t) == pytest.approx((-3, -1))
    assert nearer(r, r, t)[0] == 0 and np.isnan(nearer(r, r, t)[1]) and all(map(np.isnan, nearer(r, t, r)))


@pytest.mark.parametrize('key_space', ['cache', 'unrotated'])
def test_change_by_hand(key_space):
    "Size of the change and the projector's word against single texts and single projectors."
    c2c, t = toy_model(key_space=key_space)
    prompts = texts_of(4)
    change = fused_change(c2c, prompts)
    total, size, said = {}, {}, {}
    for p in prompts:
        ids = torch.tensor([t(p).input_ids])
        with torch.no_grad():
            own = make_cache(c2c.receiver.config); c2c.receiver.base_model(input_ids=ids, past_key_values=own, use_cache=True)
            fused = c2c.prefill(input_ids=ids)
        n = ids.shape[1] - 1
        for i in range(len(c2c.fusers[0].layer_map)):
            for h, (a, b) in enumerate(zip(read_layer(own, i, 1, n), read_layer(fused, i, 1, n))):
                total[i, h] = total.get((i, h), 0) + (a - b).square().sum(); size[i, h] = size.get((i, h), 0) + a.square().sum()
    for r in change.rows:
        key = r['layer'], ['keys', 'values'].index(r['half'])
        assert r['change'] == pytest.approx(float((total[key]/size[key]).sqrt()), rel=1e-4) and r['change'] > .01 and r['open']
    assert change.about['tokens'] == sum(len(p.split()) - 1 for p in prompts)


def test_closed_gates_change_nothing():
    c2c, t = toy_model(gate=-1.)
    e = CacheEnrichment(c2c.receiver, t, examples, shot='{prompt} {answer} ')
    rows = fused_change(c2c, texts_of(4), enriched=e).rows
    assert all(r['change'] < 1e-5 and not r['open'] for r in rows) and max(abs(r['enriched_nearer']) for r in rows if r['layer']) < 1e-4


def test_the_projectors_word_is_the_change_where_nothing_weighs_it():
    "Without weights and gates, the fused cache is the receiver's own plus what was said; without the residual it is what was said."
    for residual in True, False:
        c2c, t = toy_model_of(dict(weights=False, gate=False, residual=residual))
        rows = fused_change(c2c, texts_of(4)).rows
        for r in rows: assert (r['change'] == pytest.approx(r['projected_size'], rel=1e-4)) is residual
        if not residual: assert all(r['projected_cosine'] < .9 for r in rows)


def toy_model_of(args):
    r, s, t = tiny('qwen3'), tiny('llama', 1), word_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = Fuser.from_models(r, s, hidden_dim=16, intermediate_dim=12, **args).eval()
    return C2CModel(r, [s], [f], processor=C2CProcessor(t, [t])).eval(), t


def test_an_enriched_cache_is_recognised(monkeypatch):
    "A 'fused' cache that is the enriched one has arrived at it, wherever the two readings stand; and not at another question's."
    import c2c_nb.oracles as oracles
    from c2c_nb.cache import rope_table, rotate_keys, unrotate_keys, write_layer
    c2c, t = toy_model()
    prompts = [' '.join(p.split()[:6]) for p in texts_of(4)]
    own = {prompt_key(p): [(f'w{3*i} w{3*i+1} w{3*i+2}', 'A')] for i, p in enumerate(prompts)}
    e = OwnEnrichment(c2c.receiver, t, own, shot='{prompt} {answer} ')
    none = copy.copy(e); none.layers = []
    config = c2c.receiver.config
    with torch.no_grad():
        b = e.batch(prompts); far, near = e.prefill(b), none.prefill(b)
        plain = Alone(c2c.receiver, t); here = plain.prefill(plain.batch(prompts))
    for i in range(config.num_hidden_layers):
        (k, v), (k0, v0), (kr, vr) = (read_layer(p.cache, i) for p in (far, near, here))
        away, home = (rope_table(config, p.position_ids[:, :-1], i) for p in (far, here))
        write_layer(here.cache, i, kr + rotate_keys(unrotate_keys(k - k0, *away), *home), vr + v - v0)
    monkeypatch.setattr(oracles.C2C, 'prefill', lambda self, batch: here)
    for r in fused_change(c2c, prompts, enriched=e).rows:
        if r['layer'] == 0: assert np.isnan(r['enriched_nearer']); continue
        assert r['enriched_nearer'] == pytest.approx(1, abs=1e-3) and r['enriched_cosine'] == pytest.approx(1, abs=1e-3) and r['other_nearer'] < .9 and r['other_cosine'] < .95


def test_the_mapped_layer_is_converted():
    "What is given to a map is the sharer's cache of the layer that the layer map names, and what it gives is the target."
    r, s, t = tiny('qwen3'), tiny('llama', 1), word_tokenizer(words)
    deep = KVGeometry.of(s).layers - 1
    fuser = fuser_for(r, s, layer_map=[deep, *[0]*(KVGeometry.of(r).layers - 1)])
    c2c, prompts, given = C2CModel(r, [s], [fuser], processor=C2CProcessor(t, [t])).eval(), texts_of(3), {}
    own = token_caches(r, s, prompts, c2c.processor)
    keep = lambda i, h: lambda x: (given.__setitem__((i, h), x), own.receiver[i][h][own.back > 0] + 1)[1]
    maps = {('cache', half, i, 'mlp'): keep(i, h) for i in range(len(fuser.layer_map)) for h, half in enumerate(('keys', 'values'))}
    rows = fused_change(c2c, prompts, conversion=Conversion([], dict(layer_map=fuser.layer_map), maps)).rows
    for (i, h), x in given.items(): torch.testing.assert_close(x, own.sharer[fuser.layer_map[i]][h][own.back > 0], atol=1e-5, rtol=0)
    assert len(given) == len(maps) and all(np.isfinite(r['sharer_cosine']) for r in rows)


def test_bad_changes():
    c2c, t = toy_model()
    with pytest.raises(ValueError, match='another receiver'): fused_change(c2c, texts_of(2), enriched=CacheEnrichment(tiny('llama', 5), t, examples))
    with pytest.raises(ValueError, match='longer ones'): fused_change(c2c, ['w1 w2'], skip=5)
    with pytest.raises(ValueError, match='no maps called'): fused_change(c2c, texts_of(2), conversion=Conversion([], dict(layer_map=c2c.fusers[0].layer_map)))
