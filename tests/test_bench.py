"Benchmarks: real files, documented rows, prompts equal to the official ones, replies read and compared, faults."
import json, threading, time, zipfile
from collections import Counter
from pathlib import Path

import datasets, pytest, yaml
from hypothesis import given, settings, strategies as st

from c2c_nb import extract
from c2c_nb.bench import (CEVAL_SUBJECTS, CMMLU_SUBJECTS, LOCALES, MMLU, MMLU_SUBJECTS, MMMLU, ARCChallenge, ARCEasy, Benchmark, CEval, CMMLU, GPQA, GSM8K, LongBench, MATH500, MMLUPro, MMLURedux, OpenBookQA, QuestionFile, Template, Toy, Wording,
    benchmark_names, default_template, fit_prompt, get_benchmark, make_benchmark, position, read_template, register_benchmark)
from c2c_nb.data import BadRow
from c2c_nb.extract import alike_code, as_number, boxed, extract_choice, extract_math, named_class, named_number, overlap, rouge_l, same_result, same_text, split_words, spoken

FOUR, TEN = list('ABCD'), list('ABCDEFGHIJ')


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "What `datasets` keeps goes to a folder of the test session."
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.getbasetemp()/'datasets'))
    datasets.disable_progress_bars(); datasets.logging.set_verbosity(50)


@pytest.fixture(scope='module', autouse=True)
def no_judge_left():
    yield
    extract._judge.stop()


def write(path, rows) -> str:
    path.write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows) + '\n', encoding='utf-8')
    return str(path)


@pytest.fixture(scope='session')
def text(golden): return json.loads((golden/'eval_text.json').read_text())


def whole(questions, report, n):
    "Every row is a question or has a problem, once; ids are different."
    assert report.rows == n == report.kept + report.left_out and len(questions) == report.kept
    assert len({q.id for q in questions}) == len(questions)
    for q in questions:
        assert q.question.strip() and (q.labels is None) == (q.options is None)
        if q.labels: assert len(q.labels) == len(q.options) and set(q.golds) <= set(q.labels)


# ---------------------------------------------------------------- replies with letters

# where we read a reply otherwise than the official evaluator, and what we read
OTHERWISE = {
    'The correct answer is D/B': None,                                    # hedges
    'The answer is Canada, B': 'B',                                       # the C of Canada
    'The correct answer is not A but B': 'B',                             # negation
    'x + A = B, so the answer is unclear': None,                          # a formula
    'Because of X, D is right. Also A': None,                             # two
    'Answer: Carefully chosen, I pick D': 'D',                            # the C of Carefully
    'a cat and a dog': None,                                              # the article
    'Both A and C are possible': None,                                    # two
    'ABCD': None}                                                         # a word


def test_at_least_as_good_as_the_official_reader(text):
    cases = text['extract_answer_from_content']
    assert len(cases) > 30 and set(OTHERWISE) <= {t for t, _ in cases}
    for reply, official in cases:
        assert extract_choice(reply, FOUR) == OTHERWISE.get(reply, official), reply
    for reply in OTHERWISE: assert dict(cases)[reply] != OTHERWISE[reply]


READ = [
    ('The answer is C. Because A and B are wrong.', 'C'), ('A. foo\nB. bar\nC. baz\n\nThe correct answer is B. bar', 'B'), ('A) is incorrect because... B) is incorrect... C) is correct.', 'C'),
    ('The correct option is not B, it is C', 'C'), ('The answer cannot be A, so it must be D.', 'D'), ("I don't think the answer is A. I think it's B.", 'B'), ('The answer is not A.', None), ("The answer isn't b", None),
    ('The answer is A. Wait, actually the answer is C.', 'C'), ('The answer is either A or B.', None), ('The correct answers are A, C.', None), ('It could be A or B, so I choose B', 'B'), ('A, B and D are wrong. C', 'C'), ('neither A nor B is right, so D', 'D'),
    ('Answer: A cat has four legs. So D.', 'D'), ('The answer is A because of this', 'A'), ('The answer is a cat.', None), ('the answer is b', 'B'), ('**B**', 'B'), ('`B`', 'B'), ('(b)', 'B'), ('B\n\nIf it were C, then ...', 'B'), ('{"answer": "C"}', 'C'),
    ('$\\boxed{\\textbf{(B)}}$', 'B'), ('\\boxed{A \\text{ and } B}', None), ('\\boxed{B. Paris}', 'B'), ('So the answer is -> D', 'D'), ('C++ is the answer', None), ('Hence C is the answer', 'C'), ('The answer is B\n\nThe answer is explained as follows', 'B'),
    ('B\n\nQuestion: next\nA. x\nB. y\nAnswer: C', 'C'), ('Statement A is true, statement B is false. Therefore, the answer is C', 'C'), ('</think> D', 'D'), ('<think>The answer is A', None), ('I am not sure.', None),
    ('答案：A', 'A'), ('答案是Ｂ', 'B'), ('A是错误的，B是错误的，所以选C。', 'C'), ('不是A，而是B', 'B'), ('答案是A和C', None), ('选项C正确', 'C'), ('这道题应该选择D', 'D'), ('本题答案应为（C）', 'C'),
    ('La bonne réponse est la réponse C.', 'C'), ('Réponse : D', 'D'), ("La réponse n'est pas A, mais B.", 'B'), ("A est fausse, donc C", 'C'), ('B est correcte', 'B'), ('Die Antwort ist B', 'B'), ('La respuesta correcta es C', 'C'), ('Jibu sahihi ni C', 'C'), ('答えはBです', 'B'), ('정답은 C입니다', 'C'), ('सही उत्तर B है', 'B'), ('الإجابة الصحيحة هي C', 'C')]


@pytest.mark.parametrize('reply,right', READ)
def test_replies_are_read(reply, right): assert extract_choice(reply, FOUR) == right


def test_letters_beyond_d_and_options_by_their_text():
    for letter in TEN:
        for form in '{}', '({})', 'The answer is {}.', 'I think it is {}', '答案是{}', 'Option {} is correct', '\\boxed{{{}}}': assert extract_choice(form.format(letter), TEN) == letter, (form, letter)
    assert extract_choice('The answer is E', FOUR) is None and extract_choice('I am unsure', TEN) is None and extract_choice('I believe that I is right', TEN) == 'I'
    options = ['iron', 'Vitamin D', 'salt', 'None of the above']
    assert extract_choice('The answer is vitamin D.', FOUR, options) == 'B' and extract_choice('None of the above', FOUR, options) == 'D' and extract_choice('salt', FOUR, options) == 'C' and extract_choice('pepper', FOUR, options) is None


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from('The answer is not A but B or C and D . , : ( ) \n ** $ \\boxed{ } a I think 答案 是 不是 <think> </think> = + option wrong correct'.split(' ')), max_size=14).map(' '.join)))
def test_any_reply_gives_a_label_or_none(reply):
    assert extract_choice(reply, TEN) in [*TEN, None]
    found = extract_math(reply)
    assert found is None or found.strip()
    if found: as_number(found)


# ---------------------------------------------------------------- results

def test_results_as_good_as_the_official_graders(text):
    better = {'Answer: (3, 4)', 'Answer: p - q', 'Answer: \\text{Evelyn}'}                              # right, and not seen to be by the official grader
    for key in 'gsm8k_rule_judge', 'math500_rule_judge':
        for reply, gold, (official, _) in text[key]: assert same_result(extract_math(reply), gold) == (official or reply in better), (reply, gold)
    for reply, official in text['math500_regex']: assert extract_math(reply) == (official and official.strip('$'))


def test_results_in_many_forms():
    for reply, gold in [('Answer: $1,250.00', '1250'), ('Answer: −3', '-3'), ('So 5 + 3 = 8\nAnswer: 8 apples', '8'), ('#### 1,450,000', '1450000'), ('It is $\\frac{1}{2}$.', '0.5'), ('Answer: 50%', '50'), ('Answer: x = 5', '5'), ('The answer is $1$ and $-2$.', '-2,1'),
        ('\\boxed{\\dfrac{17}{50}}', '\\frac{17}{50}'), ('Answer: 1+x^2', 'x^2+1'), ('She pays $340 and $20 more, so $360.', '360'), ('I first got 5. The answer is 6. Wait: the answer is 7.', '7'), ('\\boxed{\\text{Evelyn}}', 'Evelyn'), ('答案是：12。', '12'), ('Answer: 2\\sqrt{13}', '\\sqrt{52}')]:
        assert same_result(extract_math(reply), gold), (reply, gold, extract_math(reply))
    for reply, gold in [('Answer: 1', '1,250'), ('Answer: 3', '-3'), ('Answer: east', '\\text{west}'), ('Answer: (4,3)', '(3,4)'), ('nothing', '7'), ('<think>Answer: 7', '7'), ('Answer: x^2-1', 'x^2+1'), ('Answer: 12', '1')]:
        assert not same_result(extract_math(reply), gold), (reply, gold)
    assert boxed('\\boxed{\\{1\\}} \\boxed{x') == [(0, '\\{1\\}')]


def test_right_results_of_math_500_are_found_and_wrong_ones_are_not(assets):
    questions, report = MATH500(data_files=str(assets/'benchmarks/math-500/test.jsonl')).questions()
    whole(questions, report, 500)
    bench, golds = MATH500(), [q.gold for q in questions]
    assert {q.subject for q in questions} >= {'Algebra', 'Geometry', 'Prealgebra'} and all(1 <= q.meta['level'] <= 5 for q in questions)
    for i, q in enumerate(questions):
        assert bench.grade(bench.extract(f'So we get\nAnswer: ${q.gold}$', q), q) is True, q.gold
        if i % 12: continue
        for reply in f'Answer: {q.gold}', f'It is \\boxed{{{q.gold}}}, as wanted.', q.meta['solution']: assert bench.grade(bench.extract(reply, q), q) is True, (reply, q.gold)
        other = golds[(i + 7) % 500]
        assert other == q.gold or bench.grade(other, q) is False, (other, q.gold)


def test_gsm8k_with_separators_and_negatives(assets, text):
    questions, report = GSM8K(data_files=str(assets/'benchmarks/gsm8k/main/test.jsonl')).questions()
    whole(questions, report, 1319)
    golds = {q.gold for q in questions}
    assert {'1450000', '114200', '-10', '-3'} <= golds and not any(',' in g for g in golds)
    bench = GSM8K()
    for q in questions:
        for reply in f"{q.meta['solution']}\n#### {q.gold}", f'Answer: {float(q.gold):,.2f}', f'The answer is ${int(q.gold):,}.': assert bench.grade(bench.extract(reply, q), q) is True, (reply, q.gold)
    for raw, official in text['gsm8k_truth']:
        try: gold = bench.parse(dict(question='q', answer=raw), '').gold
        except BadRow as e: assert official is None and str(e) == 'no result behind ####'
        else: assert gold == ('1250' if '1,250' in raw else official)                                  # the official one stops at the comma


def test_comparison_in_threads_and_with_a_time_limit(monkeypatch):
    out = []
    threads = [threading.Thread(target=lambda: out.append((same_result('1+x', 'x+1'), same_result('2x', 'x+1')))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert out == [(True, False)]*4
    judge = extract._Judge(seconds=1.)
    judge.start()
    began = time.time()
    with pytest.warns(UserWarning, match='counts as wrong'): assert judge('x+1', '9^{9^{9^{9}}}') is False
    assert time.time() - began < 15 and judge('x+1', '1+x') is True                                   # a new process
    judge.stop()
    monkeypatch.setattr(extract.sys, 'executable', 'false')
    with pytest.raises(RuntimeError, match='cannot be started'): judge.start()


def test_without_math_verify_it_is_said_before_the_first_question(monkeypatch, tmp_path):
    monkeypatch.setattr(extract, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'c2c_nb\[eval\]'): GSM8K(data_files=write(tmp_path/'g.jsonl', [dict(question='q', answer='#### 1')])).questions()
    with pytest.raises(ModuleNotFoundError): same_result('x+1', '1+x')
    assert same_result('1,250', '1250')


# ---------------------------------------------------------------- texts

def test_measures_by_hand():
    assert overlap('a b c d'.split(), 'b d e'.split()) == pytest.approx(2*2/7) and overlap([], ['x']) == 0 and overlap([], []) == 1
    assert rouge_l('police killed the gunman'.split(), 'police kill the gunman'.split()) == pytest.approx(2*3/8)            # the example of Lin 2004, 3.1
    assert rouge_l('the gunman kill police'.split(), 'police kill the gunman'.split()) == pytest.approx(2*2/8)
    assert rouge_l([], ['x']) == 0 and rouge_l(['x'], ['x']) == 1
    assert split_words("The cat's HAT, an end. 厦门大学") == ['cats', 'hat', 'end', '厦', '门', '大', '学'] and split_words('厦门大学', cut=lambda t: [t[:2], t[2:]]) == ['厦门', '大学']
    assert named_class('Definition of something', 'Definition of something', ['Definition of something', 'something', 'Date']) == 1 and named_class('Date or Food', 'Food', ['Date', 'Food']) == .5 and named_class('Food', 'Date', ['Date', 'Food']) == 0
    assert named_number('Paragraph 7, or 8, or 7', 'Paragraph 7') == pytest.approx(2/3) and named_number('12', '1') == 0
    assert alike_code('# comment\n\nx = 1\ny = 2', 'x = 1') == 1 and alike_code('abcd', 'bcde') == pytest.approx(6/8) and alike_code('', 'x') == 0
    assert same_text('The Paris.', 'paris') and not same_text('Paris', 'Rome')
    assert spoken('<think>a</think>b') == 'b' and spoken(None) == ''


def test_longbench_samples(assets):
    folder = assets/'benchmarks/longbench'
    questions, report = LongBench(data_files=str(folder), part='all').questions()
    whole(questions, report, 50)
    assert Counter(q.subject for q in questions) == {'multifieldqa_zh': 30, 'passage_retrieval_zh': 20}
    bench = LongBench()
    assert [bench.max_new_tokens(questions[0]), bench.max_new_tokens(questions[-1]), bench.max_new_tokens(questions[0], 'cot')] == [64, 32, 1024]
    for q in questions: assert bench.grade(q.gold[0], q) == 1 and bench.grade(None, q) == 0 and bench.grade('nothing at all', q) < .2
    retrieval = questions[-1]
    assert bench.grade('段落0', retrieval) == 0 and bench.grade(f'{retrieval.gold[0]} 或段落999', retrieval) == .5
    parts = [LongBench(data_files=str(folder), part=p).questions()[0] for p in ('eval', 'train')]
    assert sorted(q.id for q in parts[0] + parts[1]) == sorted(q.id for q in questions) and len(parts[0]) < len(parts[1])
    prompt = default_template().render(questions[0])[0]['content']
    assert questions[0].question in prompt and questions[0].meta['context'] in prompt


@pytest.mark.parametrize('task,reply,answers,extra,score', [
    ('hotpotqa', 'Paris, France', ['Lyon', 'paris'], {}, 2/3), ('gov_report', 'a b c', ['b c d'], {}, 2*2/(2 + 3)), ('trec', 'Date\nFood', ['Date'], dict(all_classes=['Date', 'Food']), 1.), ('trec', 'Date or Food', ['Date'], dict(all_classes=['Date', 'Food']), .5),
    ('passage_count', 'There are 7', ['7'], {}, 1.), ('lcc', 'return x\n', ['return y'], {}, 14/16), ('samsum', 'Ann calls Bob.\nMore words', ['Ann calls Bob'], {}, 1.)])
def test_longbench_measures(task, reply, answers, extra, score, tmp_path):
    row = dict(input='', context='text', answers=answers, length=9000, dataset=f'{task}_e', language='en', all_classes=None, _id='x') | extra
    bench = LongBench(data_files=write(tmp_path/'rows.jsonl', [row]), part='all')
    (q,), _ = bench.questions()
    assert q.subject == task and q.category == 'over 8k words' and bench.grade(bench.extract(reply, q), q) == pytest.approx(score)
    assert 'text' in default_template().render(q)[0]['content']


# ---------------------------------------------------------------- the real files

def test_mmlu_redux_whole(assets):
    folder = assets/'benchmarks/mmlu-redux-2.0'
    rows = {p.stem: [json.loads(x) for x in p.read_text().split('\n') if x.strip()] for p in sorted(folder.glob('*.jsonl'))}
    flat = [r for s in rows for r in rows[s]]
    assert len(flat) == 5700 and len({r['error_type'] for r in flat}) == 7
    questions, report = MMLURedux(data_files=str(folder)).questions()
    whole(questions, report, 5700)
    n = Counter(r['error_type'] for r in flat)
    assert {k: len(v) for k, v in report.problems.items()} == {'error_type no_correct_answer': n['no_correct_answer'], 'error_type expert': n['expert'], 'error_type wrong_groundtruth without a correction': 5, 'question: empty': 1}
    for reason, places in report.problems.items():                                     # the index is the row's
        for i in places:
            subject, row = report.place(i).split(': row ')
            assert flat[i] is rows[subject][int(row)] and (flat[i]['error_type'] in reason or not (flat[i]['question'] or '').strip())
    by_row = [q for q in questions]
    left = {i for v in report.problems.values() for i in v}
    for i, q in zip([i for i in range(5700) if i not in left], by_row):
        r = flat[i]
        assert q.question == r['question'] and q.options == r['choices'] and q.subject in rows and q.category == MMLU_SUBJECTS[q.subject]
        if r['error_type'] == 'wrong_groundtruth': assert q.gold == ('ABCD'[int(r['correct_answer'])] if r['correct_answer'].isdigit() else r['correct_answer'])
        elif r['error_type'] == 'multiple_correct_answers' and r['correct_answer'] in ('A,C', '0 1 3'): assert q.gold == (['A', 'C'] if 'A' in r['correct_answer'] else ['A', 'B', 'D'])
        elif r['error_type'] != 'multiple_correct_answers': assert q.gold == 'ABCD'[r['answer']]
    def golds(errors):
        bench, out = MMLURedux(errors=errors), []
        for r in flat:
            try: out.append(bench.parse(r, 'virology'))
            except BadRow: pass
        return out
    assert len(golds('official')) == 5700 - n['no_correct_answer'] - n['expert'] - 1 and not any(isinstance(q.gold, list) for q in golds('official'))
    assert {q.meta['error_type'] for q in golds('clean')} == {'ok', 'wrong_groundtruth'}


def test_mmlu_redux_truth(text):
    skipped = [None, None]
    for row, official in text['mmlu_redux_truth']:
        row = dict(question='q', choices=['w', 'x', 'y', 'z'], correct_answer=None) | row
        def gold(errors):
            try: return MMLURedux(errors=errors).parse(row, 'virology').gold
            except BadRow: return None
        assert gold('official') == official
        if row['error_type'] == 'wrong_groundtruth' and row['correct_answer'] is None: assert gold('repair') is None                # a key known to be wrong
        elif row['error_type'] == 'multiple_correct_answers': assert gold('repair') == ['A', 'B']
        else: assert gold('repair') == official


def test_arc_openbookqa_and_mmlu(assets):
    folder = assets/'benchmarks'
    arc, report = ARCChallenge(data_files=str(folder/'ai2_arc/ARC-Challenge/test.jsonl')).questions()
    whole(arc, report, 1172)
    assert Counter(len(q.options) for q in arc) == {4: 1165, 3: 4, 5: 3} and arc[0].id == 'noid-test-00000'
    book, report = OpenBookQA(data_files=str(folder/'openbookqa/main/test.jsonl')).questions()
    whole(book, report, 500)
    mmlu, report = MMLU(data_files=str(folder/'mmlu/test.jsonl')).questions()
    whole(mmlu, report, 513)
    assert len({q.subject for q in mmlu}) == 57 and {q.category for q in mmlu} == set(MMLU_SUBJECTS.values())


def test_selection_does_not_change_ids(assets):
    where = dict(data_files=str(assets/'benchmarks/mmlu/test.jsonl'))
    everything, _ = MMLU(**where).questions()
    some, report = MMLU(**where, subjects=['virology', 'anatomy'], limit=[2, 8], interval=2).questions()
    of = {s: [q for q in everything if q.subject == s] for s in ('anatomy', 'virology')}
    assert some == [q for s in of for q in of[s][2:8:2]] and report.rows == 6
    two = MMLU(**where, limit=2).questions()[0]
    assert len(two) == 2*57 and {q.id for q in two} <= {q.id for q in everything}


def test_same_question_twice_has_two_ids(tmp_path):
    row = dict(question='Again?', subject='anatomy', choices=['a', 'b'], answer=1)
    file = write(tmp_path/'m.jsonl', [row, dict(row, answer=7), row])
    questions, report = MMLU(data_files=file).questions()
    assert questions[1].id == questions[0].id + '-2' and report.problems == {'the right answer is not among the options': [1]}
    assert MMLU(data_files=file, limit=[2, 3]).questions()[0] == questions[1:]


def test_toy_questions_of_every_world():
    for world in 'skill', 'facts':
        questions, report = Toy(world=world, limit=20).questions()
        whole(questions, report, report.rows)
        q, bench = questions[0], Toy(world=world)
        assert default_template().render(q) == q.question and default_template('cot').render(q) == q.question
        assert bench.grade(bench.extract(f' {q.gold} </s>', q), q) is True and bench.extract('nonsense', q) is None
    one = Toy(subjects=['item'], limit=5).questions()[0]
    assert {q.subject for q in one} == {'item'} and len(one) == 5


# ---------------------------------------------------------------- sets of which there is no file here, in their documented form

def lettered(upper, **more): return dict(zip(['Question', 'A', 'B', 'C', 'D', 'Answer'] if upper else ['question', 'A', 'B', 'C', 'D', 'answer'], ['问题', '甲', '乙', '丙', '丁', 'C'])) | more


def test_mmlu_pro(tmp_path):
    rows = [dict(question_id=i, question='Pick', options=[f'opt{k}' for k in range(n)], answer='ABCDEFGHIJ'[n - 1], answer_index=n - 1, cot_content='', category=c, src='x') for i, (n, c) in enumerate([(10, 'law'), (3, 'law'), (10, 'health')])]
    questions, report = MMLUPro(data_files=write(tmp_path/'p.jsonl', rows)).questions()
    assert [(q.id, q.gold, q.subject, q.category) for q in questions] == [('0', 'J', 'law', 'law'), ('1', 'C', 'law', 'law'), ('2', 'J', 'health', 'health')]
    assert [q.id for q in MMLUPro(data_files=str(tmp_path/'p.jsonl'), subjects=['health']).questions()[0]] == ['2']


def test_mmmlu(tmp_path):
    for locale in 'SW-KE', 'ZH-CN': write(tmp_path/f'mmlu_{locale}.jsonl', [lettered(True, Subject='anatomy')])
    questions, _ = MMMLU(data_files=str(tmp_path/'*.jsonl')).questions()
    assert [(q.subject, q.gold, q.category, q.meta['mmlu_subject']) for q in questions] == [('SW_KE', 'C', 'other', 'anatomy'), ('ZH_CN', 'C', 'other', 'anatomy')]
    assert [q.subject for q in MMMLU(data_files=str(tmp_path), subjects=['ZH_CN']).questions()[0]] == ['ZH_CN']
    assert len(LOCALES) == 14 and [d.config for _, d in MMMLU().sources()] == LOCALES


def test_chinese_exams(tmp_path, monkeypatch):
    write(tmp_path/'law_val.jsonl', [lettered(False, id=0, explanation=''), lettered(False, id=1, explanation='') | dict(answer='')])
    write(tmp_path/'legal_professional_val.jsonl', [lettered(False, id=0, explanation='')])
    questions, report = CEval(path=str(tmp_path)).questions()
    assert [(q.subject, q.category, q.gold) for q in questions] == [('law', 'humanities', 'C'), ('legal_professional', 'humanities', 'C')] and report.problems == {'no answer given': [1]}
    assert len(CEVAL_SUBJECTS) == 52 and len(CMMLU_SUBJECTS) == 67 and CEval().split == 'val'
    with zipfile.ZipFile(tmp_path/'cmmlu.zip', 'w') as z: z.writestr('test/agronomy.csv', ',Question,A,B,C,D,Answer\n0,问题,甲,乙,丙,丁,D\n1,数,1,2,3,4,A\n')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)                # `datasets` takes any address for one on the network
    questions, _ = CMMLU(data_files=f"zip://test/agronomy.csv::{tmp_path/'cmmlu.zip'}").questions()
    assert [(q.subject, q.gold, q.options) for q in questions] == [('agronomy', 'D', ['甲', '乙', '丙', '丁']), ('agronomy', 'A', ['1', '2', '3', '4'])]
    (subject, reader), = CMMLU(subjects=['agronomy']).sources()
    assert (subject, reader.data_files) == ('agronomy', 'zip://test/agronomy.csv::hf://datasets/haonan-li/cmmlu@main/cmmlu_v1_0_1.zip')


def test_gpqa_is_shuffled_as_officially(text, tmp_path):
    case = text['prompts']['gpqa']
    questions, _ = GPQA(data_files=write(tmp_path/'g.jsonl', [case['example'] | {'Record ID': 'rec1', 'High-level domain': 'Physics', 'Subdomain': 'particles'}])).questions()
    q = questions[0]
    assert (q.options, q.gold, q.id, q.subject) == (case['prepared']['choices'], 'ABCD'[case['prepared']['answer']], 'rec1', 'Physics')
    revised = GPQA().parse(case['example'] | {'Extra Revised Question': 'What particle?', 'Extra Revised Correct Answer': 'a muon'}, '')
    assert revised.question == 'What particle?' and revised.options[FOUR.index(revised.gold)] == 'a muon' and set(revised.options) == {'a muon', 'pion', 'kaon', 'electron'}


def test_arc_easy_with_numeric_keys(tmp_path):
    q = ARCEasy(data_files=write(tmp_path/'a.jsonl', [dict(id='i', question='Ice is', choices=dict(text=['gas', 'solid', 'hot'], label=['1', '2', '3']), answerKey='2'), dict(id='j', question='Ice', choices=dict(text=['a', 'b'], label=['A', 'B']), answerKey='E')])).questions()
    assert (q[0][0].labels, q[0][0].gold, q[1].problems) == (['A', 'B', 'C'], 'B', {'the right answer is not among the options': [1]})


def test_from_the_hub_each_benchmark_asks_for_its_own_place():
    places = {n: get_benchmark(n)(**({} if n != 'questions' else dict(path='me/mine'))).sources()[0][1] for n in benchmark_names() if n != 'toy'}
    assert {n: (d.path, d.config, d.split) for n, d in places.items() if d.data_files is None} == {
        'arc-challenge': ('allenai/ai2_arc', 'ARC-Challenge', 'test'), 'arc-easy': ('allenai/ai2_arc', 'ARC-Easy', 'test'), 'c-eval': ('ceval/ceval-exam', 'computer_network', 'val'), 'gpqa': ('Idavidrein/gpqa', 'gpqa_diamond', 'train'), 'gsm8k': ('openai/gsm8k', 'main', 'test'),
        'math-500': ('HuggingFaceH4/MATH-500', None, 'test'), 'mmlu': ('cais/mmlu', 'all', 'test'), 'mmlu-pro': ('TIGER-Lab/MMLU-Pro', None, 'test'), 'mmlu-redux': ('edinburgh-dawg/mmlu-redux-2.0', 'abstract_algebra', 'test'), 'mmmlu': ('openai/MMMLU', 'AR_XY', 'test'), 'openbookqa': ('allenai/openbookqa', 'main', 'test'), 'questions': ('me/mine', None, 'test')}
    assert places['longbench'].data_files == 'zip://data/narrativeqa.jsonl::hf://datasets/THUDM/LongBench@main/data.zip'
    assert [d.data_files.split('::')[0] for _, d in LongBench(extended=True).sources()][:2] == ['zip://data/qasper_e.jsonl', 'zip://data/multifieldqa_en_e.jsonl'] and len(LongBench(extended=True).sources()) == 13
    with pytest.raises((ConnectionError, FileNotFoundError), match='cais/mmlu'): MMLU().questions()
    official = {'mmlu-redux', 'mmmlu', 'gpqa', 'math-500', 'gsm8k', 'openbookqa', 'ai2-arc', 'mmlu-pro', 'ceval', 'longbench'}
    for name in official: assert get_benchmark(name).official == name


# ---------------------------------------------------------------- prompts

NAMES = {'mmlu-redux': 'mmlu-redux', 'mmmlu': 'mmmlu', 'gpqa': 'gpqa', 'gsm8k': 'gsm8k', 'math-500': 'math-500', 'openbookqa': 'openbookqa', 'ai2-arc': 'arc-challenge', 'mmlu-pro': 'mmlu-pro', 'ceval': 'c-eval'}


def as_template(text) -> dict:
    "The official prompts as a template file holds them: what differs from question to question taken out."
    variants = {}
    escape = lambda t: t.replace('{', '{{').replace('}', '}}')
    for key, prompt in text['build_prompt'].items():
        choice = escape(prompt).replace('What is 1+1?', '{question}').replace('A. 1\nB. 2\nC. 3\nD. 4\n', '{options}')
        math = text['prompts']['gsm8k']
        assert '{question}' in choice and '{options}' in choice
        variants[key] = dict(choice=choice, math=escape(math['prompt'][key]).replace(math['example']['question'], '{question}'))
    return dict(name='official', option='{label}. {option}\n', separator='', cue='The correct answer is', variants=variants)


@pytest.mark.parametrize('ending', ['yaml', 'json'])
def test_official_prompts_by_a_template_file(text, tmp_path, ending):
    file = tmp_path/f'official.{ending}'
    file.write_text(yaml.safe_dump(as_template(text), allow_unicode=True) if ending == 'yaml' else json.dumps(as_template(text)), encoding='utf-8')
    seen = 0
    for official, case in text['prompts'].items():
        bench = get_benchmark(official)
        assert bench.name == NAMES[official]
        q = bench().parse(case['example'], 'virology')
        assert q.gold == (case['true_answer'] if official != 'ai2-arc' else 'A')                    # numeric keys are dropped there
        for variant, prompt in case['prompt'].items():
            template = read_template(file, variant)
            assert template.render(q) == [dict(role='user', content=prompt)] and template.wording(q).cue == 'The correct answer is'
            seen += 1
    assert seen == 9*4


def test_our_own_prompts_are_ours(text, assets):
    arc = ARCChallenge(data_files=str(assets/'benchmarks/ai2_arc/ARC-Challenge/test.jsonl'), limit=2).questions()[0]
    for variant in 'plain', 'cot', 'direct':
        prompt = default_template(variant).render(arc[0])[0]['content']
        assert arc[0].question in prompt and all(f'{l}. {o}' in prompt for l, o in zip(arc[0].labels, arc[0].options))
    theirs = [s.strip() for p in text['build_prompt'].values() for s in p.split('\n') if len(s.split()) > 4]
    assert not any(s in default_template(v).render(arc[0])[0]['content'] for s in theirs for v in ('plain', 'cot'))
    chat = default_template().render(arc[0], examples=[arc[1]])
    assert [m['role'] for m in chat] == ['user', 'assistant', 'user'] and chat[1]['content'] == arc[1].gold


def test_a_reply_in_the_form_asked_for_is_read(assets):
    "What each variant asks a model to write is what is read."
    for bench, file in (ARCChallenge, 'ai2_arc/ARC-Challenge'), (GSM8K, 'gsm8k/main'):
        b = bench(data_files=str(assets/f'benchmarks/{file}/test.jsonl'), limit=40)
        for q in b.questions()[0]:
            for reply in q.gold, f'Answer: {q.gold}', f'First 3, then 4 (not A, or B).\nAnswer: {q.gold}': assert b.grade(b.extract(reply, q), q) is True, (reply, q.gold)


@pytest.mark.parametrize('content,message', [
    ('choice: "{questoin}"', "did you mean 'question'"), ('choice: "{question"', 'expected'), ('choyce: "{question}"', "did you mean 'choice'"), ('mmlu-redus: "{question}"', "did you mean 'mmlu-redux'"), ('', 'no table'), ('- a', 'no table'), ('choice: [1]', "a table with 'user'"),
    ('choice: {system: "x"}', "with 'user'"), ('choice: {user: "{question}", sistem: "x"}', "did you mean 'system'"), ('variants: {plain: {choice: "{question}"}}\nchoice: "x"', "no key 'choice' beside"), ('variants: {a: {choice: "x"}, b: {choice: "x"}}', 'say which one'), ('choice: "{0}"', 'names {0}'), ('option: "{labels}"\nchoice: "x"', 'option of a template'), ('a: [', 'cannot be read'), ('variants: 3', "'variants' has to be")])
def test_templates_that_cannot_be_meant(content, message, tmp_path):
    (tmp_path/'t.yaml').write_text(content)
    with pytest.raises(ValueError, match=message): read_template(tmp_path/'t.yaml')


def test_templates_not_there(tmp_path):
    (tmp_path/'mine.yaml').write_text('variants: {plain: {choice: "{question}"}, cot: {choice: "{question}!"}}')
    with pytest.raises(FileNotFoundError, match="did you mean 'mine.yaml'"): read_template(tmp_path/'mien.yaml')
    with pytest.raises(ValueError, match="did you mean 'cot'"): read_template(tmp_path/'mine.yaml', 'cott')
    with pytest.raises(ValueError, match="did you mean 'plain'"): default_template('plane')
    q = GSM8K().parse(dict(question='q', answer='#### 1'), '')
    with pytest.raises(KeyError, match='no wording for gsm8k'): read_template(tmp_path/'mine.yaml').render(q)


def test_braces_in_questions_are_left_alone():
    q = MMLU().ask('What is {x}?', 0, ['{labels}', '{1}'], 'anatomy')
    prompt = default_template().render(q)[0]['content']
    assert 'What is {x}?' in prompt and 'A. {labels}' in prompt and 'B. {1}' in prompt


def test_long_prompts_are_cut_in_the_middle():
    from c2c_nb.toy import word_tokenizer
    tokenizer = word_tokenizer([f'w{i}' for i in range(100)] + ['…'])
    chat = [dict(role='system', content='s'), dict(role='user', content=' '.join(f'w{i}' for i in range(100)))]
    cut = fit_prompt(chat, tokenizer, 20)
    assert cut[0] == chat[0] and cut[1]['content'].startswith('w0 w1 ') and cut[1]['content'].endswith(' w98 w99') and len(cut[1]['content'].split()) <= 20 and fit_prompt(chat, tokenizer, 500) == chat
    assert fit_prompt('w1 w2', tokenizer, 5) == 'w1 w2'


# ---------------------------------------------------------------- one's own, and what can be wrong

def test_a_file_in_whatever_columns(tmp_path):
    make = lambda rows, **kw: QuestionFile(data_files=write(tmp_path/'q.jsonl', rows), **kw)
    for rows, kw in [([dict(question='q', options=['x', 'y'], answer='B')], {}), ([dict(Question='q', choices=['x', 'y'], Answer=1)], {}), ([dict(question='q', A='x', B='y', answer='b')], {}), ([dict(q='q', one='x', two='y', key='y')], dict(question_field='q', options_field=['one', 'two'], answer_field='key')), ([dict(question='q', choices=dict(text=['x', 'y']), answer='y')], {})]:
        (q,), report = make(rows, **kw).questions()
        assert (q.question, q.options, q.gold, q.labels) == ('q', ['x', 'y'], 'B', ['A', 'B']), rows
    (q,), _ = make([dict(problem='q', answer=1250)], answers='math').questions()
    b = QuestionFile(path='x', answers='math')
    assert (q.kind, q.gold, b.kind, b.grade(b.extract('Answer: 1,250', q), q)) == ('math', '1250', 'math', True)
    (q,), _ = make([dict(question='q', answer=['The Seine', 'Seine'])], answers='text').questions()
    b = QuestionFile(path='x', answers='text')
    assert b.grade(b.extract('seine.', q), q) is True and b.grade('Rhine', q) is False
    assert default_template().render(q)[0]['content'].startswith('q\n')


def test_register_your_own(tmp_path):
    @register_benchmark
    class Capitals(Benchmark):
        "Capitals."
        continent:str = 'Europe'
        def columns(self): return 'country', 'capital'
        def parse(self, row, subject):
            if row['continent'] != self.continent: raise BadRow('another continent')
            return self.ask(f"Capital of {row['country']}?", 0, [row['capital'], 'Atlantis'], row['continent'])
    file = write(tmp_path/'c.jsonl', [dict(country='France', capital='Paris', continent='Europe'), dict(country='Peru', capital='Lima', continent='America')])
    questions, report = make_benchmark('capitals', dict(data_files=file)).questions()
    assert (questions[0].gold, report.problems) == ('A', {'another continent': [1]}) and 'capitals' in benchmark_names()
    assert make_benchmark('Capitals', dict(data_files=file, continent='America')).describe()['continent'] == 'America'
    with pytest.raises(TypeError, match='not a subclass'): register_benchmark(dict)
    from c2c_nb import bench
    bench._benchmarks.pop('capitals')


def test_wrong_names_and_values(tmp_path):
    with pytest.raises(KeyError, match="did you mean 'mmlu-redux'"): get_benchmark('mmlu-redus')
    with pytest.raises(ValueError, match="did you mean 'subjects'"): make_benchmark('mmlu', dict(subject=['x']))
    for kw, message in [(dict(limit=0), 'limit=0'), (dict(limit=[3, 3]), 'limit='), (dict(limit=True), 'limit=True'), (dict(interval=0), 'interval=0'), (dict(subjects=[]), 'subjects='), (dict(split=''), 'split='), (dict(data_files='a.jsonl', path='b'), 'both data_files'), (dict(data_files=''), 'data_files=')]:
        with pytest.raises(ValueError, match=message): MMLU(**kw)
    with pytest.raises(ValueError, match="errors='none'"): MMLURedux(errors='none')
    with pytest.raises(ValueError, match="part='test'"): LongBench(part='test')
    with pytest.raises(ValueError, match='where the questions are'): QuestionFile()
    with pytest.raises(ValueError, match="did you mean 'virology'"): MMLURedux(subjects=['virologie']).sources()
    with pytest.raises(FileNotFoundError, match='no file'): MMLU(data_files=str(tmp_path/'none.jsonl')).questions()


def test_rows_that_cannot_be_used(tmp_path):
    file = write(tmp_path/'virology.jsonl', [dict(question='q', answers=['x'], answer=0)])
    with pytest.raises(ValueError, match="no column 'choices'.*answers"): MMLU(data_files=file).questions()
    file = write(tmp_path/'m.jsonl', [dict(question='', choices=['x', 'y'], answer=0, subject='anatomy'), dict(question='q', choices=['x'], answer=0, subject='anatomy'), dict(question='q', choices=['x', 'y'], answer=5, subject='anatomy'), dict(question='q', choices=['x', ''], answer=0, subject='anatomy'), dict(question='q', choices=['x', 'y'], answer=None, subject='anatomy')])
    with pytest.raises(ValueError, match='not one question is left. 5 rows: 0 questions; 5 left out'): MMLU(data_files=file).questions()
    file = write(tmp_path/'n.jsonl', [dict(question='q', choices=['x', 'y'], answer=0, subject='anatomy')])
    with pytest.raises(ValueError, match="no subject 'virology' here"): MMLU(data_files=file, subjects=['virology']).questions()
    with pytest.raises(ValueError, match='not one question'): MMLU(data_files=file, limit=[3, 9]).questions()

    class Broken(MMLU):
        def parse(self, row, subject): return row['nothing']
    with pytest.raises(KeyError) as e: Broken(data_files=file).questions()
    assert 'row 0' in e.value.__notes__[0]


def test_positions():
    assert [position(a, 4) for a in (0, '3', 'D', 'd', ' B ', 4, '-1', 'E', None, True, 1.5, '')] == [0, 3, 3, 3, 1, None, None, None, None, None, None, None]
