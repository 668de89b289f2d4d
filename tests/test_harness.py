"lm-eval runs C2C: closed gates against HFLM, open gates against the systems, chats, cropping, T2T, real benchmarks, the command."
import importlib.util, json, re, sys

import pytest, torch, yaml
from transformers import AutoModelForCausalLM

lm_eval = pytest.importorskip('lm_eval', reason="lm_eval is not installed: pip install 'c2c_nb[harness]'")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tiny
import tiny_train
from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.baseline import C2C, T2T, Alone, T2TPrompts
from c2c_nb.harness import C2CLM, SYSTEMS
from c2c_nb.model import C2CModel
from conftest import root, run_python

pytestmark = pytest.mark.filterwarnings('ignore')
user, bot, system = ((lambda s, r=r: dict(role=r, content=s)) for r in ('user', 'assistant', 'system'))
texts = ['the moon', 'a cat reads green and then the old dog sings', 'x', 'why? 12 yes, 7.5 ', 'sun\n\n', ' '.join(tiny_train.words)*2, 'the moon']
continuations = [' sings', ' the tree', ' no.', '7', ' and then Où 東京', 'y']
chats = [[user('why? the moon sings')], [system('no. yes,'), user('a cat'), bot('reads 12'), user('and then')], [user('Où 東京 7.5'), bot('the dog')]]
_pairs = {}


def pair(gate=1., strategy=None, follow=False):
    "Two random models with tokenizers of their own, or one for both."
    if (key := (gate, strategy, follow)) not in _pairs:
        receiver, sharer = tiny_train.model('receiver'), tiny_train.model('llama')
        t = tiny_train.tokenizer
        processor = C2CProcessor(t('one'), [t('one' if strategy == 'shared' else 'two')], strategy)
        _pairs[key] = C2CModel(receiver, [sharer], [tiny.fuser_for(receiver, sharer, gate=gate)], follow_response=follow, processor=processor).eval()
    return _pairs[key]


def hflm(model, tokenizer, **kwargs): return HFLM(model, backend='causal', tokenizer=tokenizer, **kwargs)
def alone(c2c, **kwargs): return hflm(c2c.receiver, c2c.processor.receiver_tokenizer, **kwargs)
def scoring(pairs): return [Instance('loglikelihood', {}, p, i) for i, p in enumerate(pairs)]
def writing(contexts, **kwargs): return [Instance('generate_until', {}, (c, dict(until=['.'], max_gen_toks=6) | kwargs), i) for i, c in enumerate(contexts)]
def rolling(texts): return [Instance('loglikelihood_rolling', {}, (t,), i) for i, t in enumerate(texts)]


questions = [(t, c) for t in [*texts, ''] for c in continuations]
few = [(t, c) for t in texts for c in continuations[:3]]


def everything(lm):
    "Answers to all kinds of requests."
    torch.manual_seed(0)
    chatted = [lm.apply_chat_template(c, add_generation_prompt=c[-1]['role'] == 'user') for c in chats]
    return (lm.loglikelihood(scoring(questions + [(c, a) for c in chatted for a in continuations])), lm.loglikelihood_rolling(rolling(texts)), lm.generate_until(writing(texts + chatted)),
        lm.generate_until(writing(texts, until=['e', ' th'], max_gen_toks=9)), lm.generate_until(writing(texts[:3], do_sample=True, temperature=.8, top_k=20)))


@pytest.mark.parametrize('size, length', [(1, 512), (4, 512), (4, 24)])
def test_closed_gates_are_hflm_exactly(size, length):
    c2c = pair(gate=-1.)
    kwargs = dict(batch_size=size, max_length=length)
    expected = everything(alone(c2c, **kwargs))
    assert len(set(expected[0])) > 20 and len(set(expected[2])) > 3
    assert everything(C2CLM(c2c=c2c, **kwargs)) == expected
    assert everything(C2CLM(c2c=pair(), system='receiver', **kwargs)) == expected
    sharer = hflm(c2c.sharers[0], c2c.processor.sharer_tokenizers[0], **kwargs)
    assert everything(C2CLM(c2c=c2c, system='sharer', **kwargs)) == everything(sharer) != expected


def test_batches_of_the_size_that_fits():
    kwargs = dict(batch_size='auto', max_batch_size=3, max_length=24)
    lms = [alone(pair(), **kwargs), C2CLM(c2c=pair(gate=-1.), **kwargs)]
    a, b = [(lm.loglikelihood(scoring(questions[:12])), lm.generate_until(writing(texts[:4]))) for lm in lms]
    assert a == b and set(lms[1].batch_sizes.values()) == {3}
    lm = C2CLM(c2c=pair(), **kwargs)
    near(lm.loglikelihood(scoring(questions)), C2CLM(c2c=pair(), batch_size=2, max_length=24).loglikelihood(scoring(questions)))
    assert set(lm.batch_sizes.values()) == {3}


def near(a, b): assert [g for _, g in a] == [g for _, g in b]; torch.testing.assert_close(torch.tensor([x for x, _ in a]), torch.tensor([x for x, _ in b]), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize('strategy', [None, 'shared', 'longest'])
def test_the_fused_way_is_hflm_where_nothing_is_fused(strategy):
    "Contexts read apart from their continuations, and the sharer's rows laid out, although all gates are closed."
    c2c = pair(gate=-1., strategy=strategy)
    for kwargs in (dict(batch_size=5), dict(batch_size=2, max_length=24)):     # the second cuts contexts
        lm, other = C2CLM(c2c=c2c, **kwargs), alone(c2c, **kwargs)
        lm.fuses = True
        near(lm.loglikelihood(scoring(questions)), other.loglikelihood(scoring(questions)))
        assert lm.generate_until(writing(texts)) == other.generate_until(writing(texts))
        assert lm.loglikelihood_rolling(rolling(texts)) == pytest.approx(other.loglikelihood_rolling(rolling(texts)), abs=2e-4)


@pytest.mark.parametrize('follow', [False, True])
@pytest.mark.parametrize('strategy', [None, 'shared', 'longest'])
def test_open_gates_are_the_system(strategy, follow):
    "What lm-eval hears is what the system C2C says of the same prompts."
    c2c = pair(strategy=strategy, follow=follow)
    lm, reader = C2CLM(c2c=c2c, batch_size=4), C2C(c2c)
    prompts = [t.rstrip() for t in texts]
    found = lm.loglikelihood(scoring([(p, c) for p in prompts for c in continuations]))
    plain = alone(c2c, batch_size=4).loglikelihood(scoring([(p, c) for p in prompts for c in continuations]))
    for i, a in enumerate(reader.answer(prompts, continuations)):
        got = [x for x, _ in found[i*len(continuations):][:len(continuations)]]
        torch.testing.assert_close(torch.tensor(got), torch.tensor([a.extra['logprobs'][c] for c in continuations]), atol=2e-4, rtol=1e-5)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, plain)) > .1
    assert lm.generate_until(writing(prompts, until=[])) == [a.text for a in reader.answer(prompts, max_new_tokens=6)]


@pytest.mark.parametrize('strategy', [None, 'longest'])
def test_chats_are_read_through_the_sharers_template(strategy):
    c2c = pair(strategy=strategy)
    lm, reader = C2CLM(c2c=c2c, batch_size=2), C2C(c2c)
    contexts = [lm.apply_chat_template(c, add_generation_prompt=c[-1]['role'] == 'user') for c in chats]
    assert lm.generate_until(writing(contexts, until=[])) == [a.text for a in reader.answer(chats, max_new_tokens=6)]
    for context, chat in zip(contexts, chats):
        row = lm.row(context, lm.tok_encode(context))
        said = c2c.processor.sharer_tokenizers[0].decode(row['sharer_input_ids'][0])
        assert '<|user|>' not in said and ('[u]:' in said) and (strategy or all(m['content'] in said for m in chat))
        heard = [i for i, a in zip(row['input_ids'], row['active']) if a]
        assert chat[-1]['content'] in (lm.tokenizer.decode(heard)) if chat[-1]['role'] == 'user' else 'the dog' not in lm.tokenizer.decode(heard)
    begun = contexts[0] + 'the dog'                              # what a task appends is the beginning of the answer
    assert lm.generate_until(writing([begun], until=[])) == [reader.answer([[*chats[0], bot('the dog')]], max_new_tokens=6)[0].text]


def test_a_row_does_not_know_its_neighbours():
    lms = [C2CLM(c2c=pair(), batch_size=n) for n in (1, 3)]
    found = [lm.loglikelihood(scoring(questions)) for lm in lms]
    for other in found[1:]: near(found[0], other)
    assert len({tuple(lm.generate_until(writing(texts))) for lm in lms}) == 1
    order = list(range(len(questions)))[::-1]
    near([found[0][i] for i in order], lms[1].loglikelihood(scoring([questions[i] for i in order])))


def test_long_contexts_are_cut_for_both():
    long = ' '.join(tiny_train.words*4)
    for strategy in (None, 'shared', 'longest'):
        c2c = pair(strategy=strategy)
        lm, s = C2CLM(c2c=c2c, max_length=20), c2c.processor.sharer_tokenizers[0]
        ids = lm.tok_encode(long)[-15:]
        row = lm.row(long, ids)
        assert row['input_ids'] == ids and len(row['pairing'][0]) == 15 and max(row['pairing'][0]) == len(row['sharer_input_ids'][0]) - 1
        read, heard = lm.tokenizer.decode(ids), s.decode(row['sharer_input_ids'][0])
        if strategy != 'longest': assert heard.endswith(read) or read.endswith(heard) and len(read) - len(heard) < 8, (read, heard)
        assert len(row['sharer_input_ids'][0]) < 30 and row['active'][-1] == 0 and sum(row['active']) > 5
        ends = len(lm.tok_encode(' sings'))
        (cut, _), = lm.loglikelihood(scoring([(long, ' sings')]))
        (same, _), = C2CLM(c2c=c2c).loglikelihood(scoring([(lm.tokenizer.decode(lm.tok_encode(long)[-(21 - ends):]), ' sings')]))
        if strategy == 'shared': assert cut == pytest.approx(same, abs=1e-4)
    short = C2CLM(c2c=pair()).row(long, ids, room=512 - 5)       # a sharer that has room for five tokens
    assert len(short['sharer_input_ids'][0]) == 5 and short['pairing'][0][0] == -1 and short['active'][0] == 0 and short['pairing'][0][-1] == 4


def test_t2t_reads_the_sharers_message():
    c2c = pair(gate=-1.)
    p = c2c.processor
    for prompts in (['why? the moon', 'a cat', 'the sun sings 12'], [c for c in chats if c[-1]['role'] == 'user']):
        t2t = T2T(Alone(c2c.receiver, p.receiver_tokenizer), Alone(c2c.sharers[0], p.sharer_tokenizers[0]), message_tokens=8)
        expected = t2t.answer(prompts, max_new_tokens=6)
        for name in ('T2T', 'T2T+C2C'):
            lm = C2CLM(c2c=c2c, system=name, message_tokens=8, batch_size=2)
            contexts = [q if isinstance(q, str) else lm.apply_chat_template(q) for q in prompts]
            assert lm.generate_until(writing(contexts, until=[])) == [a.text for a in expected]
            assert all(a.extra['message'] in lm.told[c] for c, a in zip(contexts, expected)) and any(a.extra['message'] for a in expected)
            told = [lm.told[c] for c in contexts]
            near(lm.loglikelihood(scoring([(c, o) for c in contexts for o in continuations] + [('', ' no.')])), alone(c2c, batch_size=2).loglikelihood(scoring([(c, o) for c in told for o in continuations] + [('', ' no.')])))
    both = C2CLM(c2c=pair(), system='T2T+C2C', message_tokens=8)
    found = both.loglikelihood(scoring([('a cat', ' no.')]))
    assert found == C2CLM(c2c=pair()).loglikelihood(scoring([(both.told['a cat'], ' no.')])) != C2CLM(c2c=pair()).loglikelihood(scoring([('a cat', ' no.')]))


def test_models_and_tokenizers_stay_as_they_were():
    c2c = pair()
    p = c2c.processor
    pads, vocab = [(t.pad_token, t.padding_side) for t in (p.receiver_tokenizer, *p.sharer_tokenizers)], len(p.receiver_tokenizer)
    p.receiver_tokenizer.pad_token = None
    try:
        lm = C2CLM(c2c=c2c)
        assert lm.tokenizer.pad_token is not None and p.receiver_tokenizer.pad_token is None and len(p.receiver_tokenizer) == vocab
        lm.generate_until(writing(texts[:2]))
    finally: p.receiver_tokenizer.pad_token = pads[0][0]
    assert [(t.pad_token, t.padding_side) for t in (p.receiver_tokenizer, *p.sharer_tokenizers)] == pads
    assert lm.asked is None and not c2c.training


def test_rendered_requests_are_not_taken_from_an_older_cache():
    c2c = pair()
    a, b, plain = C2CLM(c2c=c2c), C2CLM(c2c=c2c), C2CLM(c2c=c2c, system='receiver')
    assert a.tokenizer_name == a.tokenizer_name != b.tokenizer_name and plain.tokenizer_name == alone(c2c).tokenizer_name


@pytest.mark.parametrize('kwargs, says', [(dict(), 'either fuser=...,.* or'), (dict(fuser='x', c2c=1), 'both were given'), (dict(systm='C2C'), "no argument 'systm'.*system"), (dict(batchsize=3), "no argument 'batchsize'.*batch_size"),
    (dict(pretrained='x'), "no argument 'pretrained'"), (dict(fuser='nowhere/at/all'), 'no folder nowhere/at/all'), (dict(fuser='x', system='c2c'), "no system called 'c2c'.*C2C"), (dict(fuser='x', message_tokens=0), 'message_tokens=0')])
def test_bad_arguments(kwargs, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says): C2CLM(**kwargs)


def test_bad_models():
    c2c = pair()
    for kwargs, says in ((dict(sharer=1), 'sharer=1 was given; there are 1'), (dict(system='T2T', message_tokens=600), 'message_tokens=600 leaves no room'), (dict(dtype='float16'), 'dtype decides how models are loaded')):
        with pytest.raises(ValueError, match=says): C2CLM(c2c=c2c, **kwargs)
    c2c.train()
    try:
        with pytest.raises(ValueError, match='training mode'): C2CLM(c2c=c2c)
    finally: c2c.eval()
    bare = C2CModel(c2c.receiver, list(c2c.sharers), list(c2c.fusers)).eval()
    with pytest.raises(ValueError, match='no processor'): C2CLM(c2c=bare)


def test_without_lm_eval(monkeypatch):
    for name in [m for m in sys.modules if m.partition('.')[0] == 'lm_eval']: monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location('c2c_nb.harness_again', root/'c2c_nb/harness.py')
    with pytest.raises(ImportError, match=re.escape("pip install 'c2c_nb[harness]'")): spec.loader.exec_module(importlib.util.module_from_spec(spec))


tasks = dict(
    openbook=dict(dataset_path='json', test_split='test', fewshot_split='test', output_type='multiple_choice', doc_to_text='{{question_stem}}', doc_to_choice='{{choices.text}}', doc_to_target="{{choices.label.index(answerKey)}}",
        num_fewshot=1, metric_list=[dict(metric=m, aggregation='mean', higher_is_better=True) for m in ('acc', 'acc_norm')]),
    arc=dict(dataset_path='json', test_split='test', output_type='multiple_choice', doc_to_text='Question: {{question}}\nAnswer:', doc_to_choice='{{choices.text}}', doc_to_target='{{choices.label.index(answerKey)}}',
        metric_list=[dict(metric=m, aggregation='mean', higher_is_better=True) for m in ('acc', 'acc_mutual_info')]),
    gsm=dict(dataset_path='json', test_split='test', output_type='generate_until', doc_to_text='Question: {{question}}\nAnswer:', doc_to_target="{{answer.split('#### ')[1]}}", generation_kwargs=dict(until=['Question:', '\n'], max_gen_toks=12, do_sample=False),
        metric_list=[dict(metric='exact_match', aggregation='mean', higher_is_better=True)]),
    story=dict(dataset_path='json', test_split='test', output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{question}}', metric_list=[dict(metric='word_perplexity')]))
files = dict(openbook='openbookqa/main/test.jsonl', arc='ai2_arc/ARC-Challenge/test.jsonl', gsm='gsm8k/main/test.jsonl', story='gsm8k/main/test.jsonl')


@pytest.fixture(scope='module')
def real(assets, tmp_path_factory):
    "Task files over real benchmarks, and the real tiny pair with a fuser that was not trained, open and closed; each saved."
    folder = tmp_path_factory.mktemp('harness')
    for name, task in tasks.items():
        (folder/f'{name}.jsonl').write_text(''.join((assets/'benchmarks'/files[name]).read_text().splitlines(True)[:8]))
        (folder/f'{name}.yaml').write_text(yaml.safe_dump(dict(task=f'local_{name}', dataset_kwargs=dict(data_files=dict(test=str(folder/f'{name}.jsonl')), cache_dir=str(folder/'datasets')), **task)))
    receiver, sharer = (AutoModelForCausalLM.from_pretrained(assets/'models'/m).eval() for m in ('stories260K', 'aidreams260K'))
    tokenizers = [load_tokenizer(assets/'models'/m) for m in ('stories260K', 'aidreams260K')]
    for t, template in zip(tokenizers, (tiny_train.template, tiny_train.longer)): t.chat_template = template
    for name, gate in (('open', 1.), ('closed', -1.)):
        c2c = C2CModel(receiver, [sharer], [tiny.fuser_for(receiver, sharer, gate=gate)], processor=C2CProcessor(tokenizers[0], [tokenizers[1]])).eval()
        c2c.save_pretrained(str(folder/name))
    return folder, receiver, tokenizers[0]


def run(folder, model, names=('openbook', 'arc', 'gsm', 'story'), **kwargs):
    out = lm_eval.simple_evaluate(model, tasks=[f'local_{n}' for n in names], task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0, **kwargs)
    answers = {t: [s['resps'] for s in sorted(samples, key=lambda s: s['doc_id'])] for t, samples in out['samples'].items()}
    return out['results'], answers, out['config']


@pytest.mark.parametrize('chat', [False, True])
def test_real_benchmarks(real, chat, monkeypatch):
    "Closed gates equal HFLM on the receiver in every answer; all systems run; C2C says something else."
    monkeypatch.setattr('lm_eval.evaluator.add_env_info', lambda found: None)      # it asks pip what is installed, every time
    folder, receiver, tokenizer = real
    how = dict(apply_chat_template=True, fewshot_as_multiturn=True) if chat else {}
    expected = run(folder, hflm(receiver, tokenizer, batch_size=5), **how)
    found = run(folder, 'c2c', model_args=dict(fuser=str(folder/'closed')), batch_size=5, device='cpu', **how)
    assert found[:2] == expected[:2] and [len(a) for a in found[1].values()] == [8]*4
    assert run(folder, 'c2c', model_args=f"fuser={folder/'open'},system=receiver", batch_size=5, device='cpu', **how)[:2] == expected[:2]
    names = ('openbook', 'gsm')
    others = {s: run(folder, 'c2c', names, model_args=f"fuser={folder/'open'},system={s},message_tokens=6", batch_size=5, device='cpu', limit=4, **how) for s in SYSTEMS if s != 'receiver'}
    for name, (results, answers, config) in others.items():
        assert config['c2c']['system'] == name and all(len(a) == 4 for a in answers.values())
        assert answers['local_openbook'] != expected[1]['local_openbook'][:4], name
    assert len({str(a) for _, a, _ in others.values()}) == 4


def test_the_command(real, tmp_path):
    folder = real[0]
    args = ['--model', 'c2c', '--model_args', f"fuser={folder/'open'},system=C2C", '--tasks', 'local_openbook,local_gsm', '--include_path', str(folder), '--batch_size', '4', '--device', 'cpu', '--limit', '5', '--output_path', str(tmp_path), '--log_samples']
    program = 'import sys; from c2c_nb.harness import c2c_lm_eval; sys.argv = ["c2c_lm_eval", *{!r}]; c2c_lm_eval()'
    done = run_python(program.format(args), cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r'\|local_openbook *\|.*\|acc ', done.stdout) and 'exact_match' in done.stdout
    saved, = tmp_path.rglob('results_*.json')
    config = json.loads(saved.read_text())
    assert config['config']['c2c']['system'] == 'C2C' and len(config['config']['c2c']['fusers']) == 1 and config['n-samples']['local_gsm']['effective'] == 5
    here = run(folder, 'c2c', ('openbook', 'gsm'), model_args=dict(fuser=str(folder/'open')), batch_size=4, device='cpu', limit=5)[0]
    assert {t: config['results'][t][m] for t, m in (('local_openbook', 'acc,none'), ('local_gsm', 'exact_match,none'))} == {t: here[t][m] for t, m in (('local_openbook', 'acc,none'), ('local_gsm', 'exact_match,none'))}


def test_lm_eval_knows_the_name(): assert get_model('c2c') is C2CLM
