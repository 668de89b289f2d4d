"Data sets: nothing is lost, whatever the rows look like; real files; caches; streaming; faults."
import json, os
from collections import Counter
from pathlib import Path

import datasets, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from c2c_nb.data import BadRow, ChatData, Chats, Report, Sample, _Maker, clean_chat, dataset_names, get_dataset, load_questions, load_samples, make_data, nearest, register_dataset
from c2c_nb.sets import ARC, GSM8K, LONGBENCH, MMLU, Dolly, Generated, LongBench, OpenBookQA, OpenHermes, Text, Toy, cut_middle, longbench_part
from conftest import root, run_python


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "What `datasets` keeps goes to a folder of the test session."
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.getbasetemp()/'datasets'))
    datasets.disable_progress_bars(); datasets.logging.set_verbosity(50)


def write(path, rows) -> str:
    path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows) + '\n', encoding='utf-8')
    return str(path)


def lines(path): return [json.loads(line) for line in Path(path).read_text(encoding='utf-8').split('\n') if line.strip()]


def rows_with_problems(report): return sorted(i for rows in report.problems.values() for i in rows)


def whole(samples, report, n):
    "Every row is either kept or has a problem, once."
    assert report.rows == n == report.kept + report.left_out
    assert sorted(set(samples['row'])) == sorted(set(range(n)) - set(rows_with_problems(report))) and len(set(rows_with_problems(report))) == report.left_out
    assert report.samples == len(samples) and samples['row'][:] == sorted(samples['row'])


# ---------------------------------------------------------------- any turns at all

values = st.one_of(st.text(max_size=6), st.none(), st.integers(-2**63, 2**63 - 1), st.sampled_from(['hello', ' hi ', '', ' ']), st.lists(st.text(max_size=2), max_size=2))
turn = st.one_of(st.fixed_dictionaries({'from': st.sampled_from(['human', 'gpt', 'system', 'user', 'assistant', 'GPT', 'function_call', '', None, 7]), 'value': values}), st.none(), st.text(max_size=3), st.just({}))
good = st.fixed_dictionaries({'from': st.sampled_from(['human', 'gpt', 'system']), 'value': st.text('ab c', min_size=1, max_size=4)})
conversations = st.one_of(st.lists(turn, max_size=6), st.lists(good, max_size=8), st.none(), st.text(max_size=3))


@settings(max_examples=400, deadline=None)
@given(conversations, st.sampled_from(['last', 'each']), st.booleans())
def test_any_turns_give_a_chat_or_a_reason(turns, learn, keep):
    data = Chats(messages_field='c', role_field='from', content_field='value', turns=learn, keep_system=keep)
    try: samples = data.samples(dict(c=turns))
    except BadRow as e:
        assert 0 < len(str(e)) < 80
        return
    assert samples
    said = [t['value'] for t in turns if t['from'].lower() in ('gpt', 'assistant')]
    for s in samples:
        roles = [m['role'] for m in s.prompt]
        turns_only = [r for r in roles if r != 'system']
        assert turns_only == ['user', 'assistant']*(len(turns_only)//2) + ['user'], roles
        assert roles.count('system') <= keep and 'system' not in roles[1:]
        assert all(m['content'].strip() for m in s.prompt) and s.answer.strip()
        assert all(piece in said for piece in [s.answer] if '\n\n' not in piece)
    assert len(samples) == (1 if learn == 'last' else 1 + sum(m['role'] == 'assistant' for m in samples[-1].prompt))
    if learn == 'each':                                              # a later prompt contains the earlier sample
        for a, b in zip(samples, samples[1:]): assert b.prompt[:len(a.prompt) + 1] == [*a.prompt, dict(role='assistant', content=a.answer)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(conversations, min_size=1, max_size=12), st.sampled_from(['last', 'each']), st.integers(0, 4), st.integers(1, 12))
def test_nothing_is_lost(tmp_path, rows, learn, least, limit):
    file = write(tmp_path/'rows.jsonl', [dict(c=r) for r in rows] + [dict(c=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]*2)])
    args = dict(data_files=file, messages_field='c', role_field='from', content_field='value', turns=learn, min_turns=least, limit=limit)
    n = min(limit, len(rows) + 1)
    try: samples, report = load_samples(Chats(**args))
    except ValueError as e:
        assert 'none of the rows' in str(e) and limit <= len(rows) or 'have no' in str(e), e
        return
    whole(samples, report, n)
    stream, filled = load_samples(Chats(**args, streaming=True))
    assert filled.rows == 0 and list(stream) == list(samples) and filled == report
    assert list(stream) == list(samples) and filled == report         # a second pass counts from the start


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(1, 8), st.floats(.05, .95), st.one_of(st.none(), st.integers(1, 5)))
def test_texts_are_cut_without_loss(text, size, share, head):
    if head and head >= size: size = head + 1
    try: samples = Text(piece_words=size, prompt_share=share, prompt_words=head).samples(dict(text=text))
    except BadRow: return
    place = 0
    for s in samples:
        assert s.prompt.strip() == s.prompt and s.answer.strip() and not s.end
        assert text.find(s.prompt + s.answer, place) >= 0
        place = text.find(s.prompt + s.answer, place) + len(s.prompt + s.answer)


# ---------------------------------------------------------------- real files

@pytest.mark.parametrize('name', ['sharegpt_en', 'sharegpt_zh', 'glaive_toolcall_en'])
def test_real_chats(assets, name):
    file = assets/'train'/f'{name}.jsonl'
    raw = lines(file)
    for learn in 'last', 'each':
        samples, report = load_samples(Chats(data_files=str(file), turns=learn))
        whole(samples, report, len(raw))
        expect = [sum(t['from'] == 'gpt' for t in r['conversations']) if learn == 'each' else 1 for r in raw if not any(t['from'] == 'function_call' for t in r['conversations'])]
        assert len(samples) == sum(expect)
        for s in samples:
            turns = [t for t in raw[s['row']]['conversations'] if t['from'] != 'system']
            place = len(s['prompt'])
            assert s['answer'] == turns[place]['value'] and [m['content'] for m in s['prompt']] == [t['value'] if t['from'] == 'gpt' else t['value'].strip() for t in turns[:place]]
    kept = load_samples(Chats(data_files=str(file), keep_system=True))[0]
    assert sum(s['prompt'][0]['role'] == 'system' for s in kept) == sum(r['conversations'][0]['from'] == 'system' for i, r in enumerate(raw) if i in set(kept['row']))
    assert load_samples(Chats(data_files=str(file), roles=dict(function_call=None, observation=None)))[1].left_out == 0


def test_real_questions(assets):
    for data, files in (MMLU, ['mmlu/dev', 'mmlu/test', 'mmlu/validation']), (ARC, ['ai2_arc/ARC-Challenge/train', 'ai2_arc/ARC-Challenge/test']), (OpenBookQA, ['openbookqa/main/train', 'openbookqa/main/test']):
        files = [str(assets/'benchmarks'/f'{f}.jsonl') for f in files]
        raw = [r for f in files for r in lines(f)]
        samples, report = load_samples(data(data_files=files))
        questions, same = load_questions(data(data_files=files))
        whole(samples, report, len(raw)); assert same == report and not report.problems
        for r, s, q in zip(raw, samples, questions):
            texts = r['choices'] if data is MMLU else r['choices']['text']
            right = r['answer'] if data is MMLU else r['choices']['label'].index(r['answerKey'])
            assert s['answer'] == f'{"ABCDE"[right]}. {texts[right].strip()}' and q['answer'] == 'ABCDE'[right] and q['options'] == list('ABCDE'[:len(texts)])
            assert s['prompt'] == q['prompt'] and r.get('question', r.get('question_stem')).strip() in s['prompt'][0]['content']
    digits = [dict(question='?', choices=dict(text=['a', 'b', 'c'], label=['1', '2', '3']), answerKey=k) for k in ('3', '4', None)]
    found, report = load_questions(ARC(), digits)
    assert (found[0]['answer'], found[0]['options'], report.problems) == ('C', ['A', 'B', 'C'], {'no right answer': [1, 2]})
    redux = str(assets/'benchmarks'/'mmlu-redux-2.0'/'*.jsonl')
    assert load_questions(MMLU(data_files=redux))[1].rows == 5700


def test_real_sums_and_instructions(assets):
    file = str(assets/'benchmarks'/'gsm8k'/'main'/'test.jsonl')
    samples, report = load_samples(GSM8K(data_files=file))
    whole(samples, report, 1319)
    for r, s in zip(lines(file), samples):
        assert s['answer'].rpartition('#### ')[2] == r['answer'].rpartition('#### ')[2] and '<<' not in s['answer'] and s['prompt'][0]['content'].startswith(r['question'].strip())
    assert load_samples(Dolly(data_files=str(assets/'train'/'dolly_tiny.jsonl')))[1].kept == 3
    whole(*load_samples(Text(data_files=str(assets/'text'/'c4_demo.jsonl'))), 300)
    pieces, report = load_samples(Text(data_files=str(assets/'text'/'wiki_demo.txt'), piece_words=50))
    assert report.rows == report.kept + report.left_out and report.samples > report.kept and set(report.problems) <= {'text: empty', 'too few words'}


def test_longbench(assets):
    files = [str(assets/'benchmarks'/'longbench'/f'{n}.jsonl') for n in ('multifieldqa_zh', 'passage_retrieval_zh')]
    raw = [r for f in files for r in lines(f)]
    parts = {p: load_samples(LongBench(data_files=files, part=p)) for p in ('train', 'eval', 'all')}
    for p in parts: whole(*parts[p], 50)
    import hashlib
    held = [i for i, r in enumerate(raw) if int(hashlib.sha256(r['_id'].encode()).hexdigest(), 16) % 4 == 1]
    assert sorted(parts['eval'][0]['row']) == held and 0 < len(held) < 25
    for s in parts['all'][0]:
        r = raw[s['row']]
        assert s['answer'] == r['answers'][0] and r['context'].strip() in s['prompt'][0]['content'] and r['input'] in s['prompt'][0]['content']
    assert len(LONGBENCH) == 21 and all('{context}' in t for t in LONGBENCH.values())


def test_longbench_is_cut_in_the_middle(assets):
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(assets/'tokenizers'/'qwen3'/'tokenizer.json'))
    data = LongBench(data_files=str(assets/'benchmarks'/'longbench'/'multifieldqa_zh.jsonl'), part='all')
    count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    for most in range(4, 60): assert count(cut_middle('🦊🧬🪐𝔘'*30, tokenizer, most)) <= most             # a character of several tokens cannot be halved
    for s in load_samples(data)[0].take(4):
        text = s['prompt'][0]['content']
        for most in 100, 1001:
            short = data.shorten(Sample(s['prompt'], s['answer']), tokenizer, count(text) - most)
            cut = short.prompt[0]['content']
            assert most - 20 < count(cut) <= most and cut[:20] == text[:20] and cut[-20:] == text[-20:]
            head, _, tail = cut.partition('\n…\n')
            assert text.startswith(head) and text.endswith(tail)


# ---------------------------------------------------------------- forms and dirt

def test_one_chat_in_every_form(tmp_path):
    want = [dict(role='user', content='Hi'), dict(role='assistant', content='Yo'), dict(role='user', content='1?')], '2'
    forms = dict(
        sharegpt=dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yo'}, {'from': 'human', 'value': '1?'}, {'from': 'gpt', 'value': '2'}]),
        messages=dict(id=1, messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Yo'), dict(role='user', content='1?'), dict(role='assistant', content='2')]),
        odd=dict(talk=[dict(author='customer', message='Hi'), dict(author='bot', message='Yo'), dict(author='Customer', message='1?'), dict(author='bot', message='2')]),
        pair=dict(prompt=[dict(role='user', content='Hi'), dict(role='assistant', content='Yo'), dict(role='user', content='1?')], completion=[dict(role='assistant', content='2')]))
    for name, row in forms.items():
        args = dict(prompt_field='prompt', answer_field='completion') if name == 'pair' else {}
        for streaming in False, True:
            s = next(iter(load_samples(Chats(data_files=write(tmp_path/f'{name}.jsonl', [row]), streaming=streaming, **args))[0]))
            assert (s['prompt'], s['answer'], s['end']) == (*want, True), name
    table = datasets.Dataset.from_list([forms['messages']])
    table.to_parquet(str(tmp_path/'m.parquet')); table.save_to_disk(str(tmp_path/'saved')); datasets.DatasetDict(train=table).save_to_disk(str(tmp_path/'dict'))
    (tmp_path/'folder').mkdir(); write(tmp_path/'folder'/'train.jsonl', [forms['messages']])
    (tmp_path/'q.csv').write_text('question,answer\n"Hi, you",Yo\n'); (tmp_path/'q.tsv').write_text('question\tanswer\nHi, you\tYo\n')
    for args in dict(data_files=str(tmp_path/'m.parquet')), dict(path=str(tmp_path/'saved')), dict(data_files=str(tmp_path/'saved')), dict(path=str(tmp_path/'dict')), dict(path=str(tmp_path/'folder')), dict(data_files={'train': [str(tmp_path/'messages.jsonl')]}), dict(data_files=str(tmp_path/'mess*.jsonl')):
        for streaming in False, True: assert next(iter(load_samples(Chats(**args, streaming=streaming))[0]))['answer'] == '2', args
    for f in 'q.csv', 'q.tsv': assert load_samples(Chats(data_files=str(tmp_path/f)))[0][0]['prompt'] == [dict(role='user', content='Hi, you')]
    with pytest.raises(ValueError, match="no split 'test'; known are train"): load_samples(Chats(path=str(tmp_path/'dict'), split='test'))


def test_a_folder_in_place_of_a_hub_name(assets):
    assert load_samples(OpenBookQA(path=str(assets/'benchmarks'/'openbookqa'), config='main', split='test'))[1].rows == 500
    with pytest.raises(ValueError, match='train'): load_samples(OpenBookQA(path=str(assets/'benchmarks'/'openbookqa'), config='main', split='exam'))


def test_dirt_is_counted_with_its_index(tmp_path):
    h, g = lambda x: {'from': 'human', 'value': x}, lambda x: {'from': 'gpt', 'value': x}
    chats = [[h('a'), g('b')], None, [], [h(3), g('b')], [h('a'), g(None)], [h('a')], [g('a'), h('b')], [h('a'), g('b'), h('c')], [h('a'), {'from': 'observation', 'value': 'x'}, g('b')], 'text', [h('a'), g(' ')], [h(dict(a=1)), g('b')]]
    file = write(tmp_path/'dirt.jsonl', [dict(conversations=c) for c in chats] + [dict(other=1)])
    samples, report = load_samples(OpenHermes(data_files=file))
    whole(samples, report, 13)
    assert report.problems == {'no turns': [1, 2, 9, 12], 'a turn: int instead of a text': [3], 'a turn: nothing': [4], 'no answer': [5], 'begins with an answer': [6], "role 'observation'": [8], 'a turn: empty': [10], 'a turn: dict instead of a text': [11]}
    assert samples['row'][:] == [0, 7]
    tools = [dict(messages=[dict(role='user', content='a'), dict(role='assistant', content=None, tool_calls=[dict(name='f')])]), dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')])]
    assert load_samples(Chats(data_files=write(tmp_path/'tools.jsonl', tools)))[1].problems == {'tool calls': [0]}


def test_min_turns_and_limit_count_rows_of_the_source():
    chat = lambda n: dict(messages=[dict(role=r, content='x') for r in ['system'] + ['user', 'assistant']*n])
    rows = [chat(1), chat(2), chat(3), chat(1)]
    _, report = load_samples(Chats(min_turns=4, keep_system=True), rows)
    assert report.problems == {'fewer than 4 turns': [0, 3]}
    assert load_samples(Chats(min_turns=4, turns='each'), rows)[1].problems == {'fewer than 4 turns': [0, 3]}          # not the places among the samples
    samples, report = load_samples(Chats(min_turns=4, turns='each', limit=3), rows)
    assert (report.rows, report.kept, len(samples)) == (3, 2, 5) and samples['row'][:] == [1, 1, 2, 2, 2]


def test_generated_leaves_out_what_was_cut_off(tmp_path):
    rows = [dict(input_text='a', model_response='b', model_reasoning='c', is_finished=True), dict(input_text='a', model_response='b', model_reasoning=None, is_finished=False)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path/'made'))
    data = make_data('LLMGeneratedChatDataset', dict(data_path=str(tmp_path/'made'), num_samples=2, max_word_count=100))
    assert load_samples(data)[1].problems == {'unfinished answer': [1]} and data.max_tokens == 100
    assert load_samples(make_data('generated', dict(path=str(tmp_path/'made'), unfinished=True)))[1].kept == 2


def test_toy_is_what_the_world_asks():
    from c2c_nb.toy import get_world
    for world, args in ('skill', {}), ('facts', {}), ('trio', {}):
        w = get_world(world, 3)
        known = {(e.prompt, e.answer) for s in w.skills for e in w.questions(s, 'valid')}
        samples, report = load_samples(Toy(world=world, seed=3, split='valid', limit=100))
        assert {(s['prompt'], s['answer'].strip()) for s in samples} <= known and not any(samples['end']) and report.kept == 100
        counts = Counter(e for e in Toy(world=world, seed=3, split='valid', limit=100).open()['skill'])
        assert max(counts.values()) - min(counts.values()) <= 1 and set(counts) == set(w.skills)
    assert load_samples(Toy(seed=1, limit=20))[0]['prompt'][:] != load_samples(Toy(seed=2, limit=20))[0]['prompt'][:]
    with pytest.raises(KeyError, match='registered are'): load_samples(Toy(world='nowhere'))
    with pytest.raises(ValueError, match="no split 'exam'"): load_samples(Toy(split='exam'))


# ---------------------------------------------------------------- names and arguments

def test_official_names_and_arguments():
    for name, args, want in (('OpenHermesChatDataset', dict(split='train', num_samples=500000, max_word_count=2048, min_conversation_turns=2), dict(limit=500000, max_tokens=2048, min_turns=2)),
            ('MMLUChatDataset', dict(split='test', num_samples=None), dict(split='test', limit=None)), ('MMLUCotChatDataset', dict(num_samples=3), dict(limit=3, split='train')),
            ('OpenBookChatDataset', dict(split='train'), dict(split='train', hub_config='main')), ('longbenchchatdataset', dict(dataset_name='qasper', filter_mod4=False, use_longbench_e=False), dict(task='qasper', part='all', extended=False))):
        data = make_data(name, args)
        assert {k: getattr(data, k) for k in want} == want
    with pytest.warns(UserWarning, match="language='en' has no effect"): make_data('LongBenchChatDataset', dict(dataset_name='qasper', language='en'))
    with pytest.raises(ValueError, match="no argument 'num_samples'"): make_data('OpenHermes', dict(num_samples=3))          # official keywords belong to official names
    with pytest.raises(ValueError, match="did you mean 'limit'"): make_data('OpenHermes', dict(limits=3))
    with pytest.raises(KeyError, match="did you mean 'OpenHermes'"): make_data('OpenHermse')
    with pytest.raises(ValueError, match='use a dict'): make_data('OpenHermes', [1])
    assert {'OpenHermes', 'MMLU', 'MMLUCoT', 'OpenBookQA', 'ARC', 'LongBench', 'Dolly', 'GSM8K', 'Generated', 'Chats', 'Toy', 'Text'} <= set(dataset_names())


def test_names_are_there_before_the_sets_are_imported():
    done = run_python("from c2c_nb.data import *\nprint(get_dataset('openhermeschatdataset').__name__)\n@register_dataset\nclass GSM8K(ChatData): pass\nassert get_dataset('gsm8k') is GSM8K", cwd=root)
    assert done.returncode == 0 and done.stdout.strip() == 'OpenHermes', done.stderr[-2000:]


@pytest.mark.parametrize('args', [dict(limit=0), dict(limit='5'), dict(limit=True), dict(turns='first'), dict(min_turns=-1), dict(min_turns=None), dict(streaming='yes'), dict(split=''), dict(max_tokens=0), dict(data_files='a', path='b'), dict(data_files=[]), dict(data_files=3), dict(roles=['a']), dict(roles=dict(tool='robot')), dict(answer_field='a')], ids=str)
def test_values_that_make_no_sense(args):
    with pytest.raises(ValueError, match='Chats: '): Chats(**args)


def test_templates_are_checked():
    with pytest.raises(ValueError, match="{quesion} is not there, did you mean 'question'"): GSM8K(template='{quesion}')
    with pytest.raises(ValueError, match='no template'): GSM8K(template='{')
    with pytest.raises(ValueError, match='no template'): Dolly(template=None)
    with pytest.raises(ValueError, match='is not there'): MMLU(template='{question.__class__}')
    with pytest.raises(ValueError, match="did you mean 'hotpotqa'"): LongBench(task='hotpot')
    with pytest.raises(ValueError, match='which task'): LongBench()
    with pytest.raises(ValueError, match='part='): LongBench(task='qasper', part='test')
    with pytest.raises(ValueError, match='leave nothing'): Text(prompt_words=5, piece_words=5)
    sample = load_samples(GSM8K(template='{{Q}} {question}'), [dict(question='{a} {question}', answer='{b}\n#### {c}')])[0][0]
    assert sample['prompt'][0]['content'] == '{Q} {a} {question}' and sample['answer'] == '{b}\n#### {c}'       # braces in a row are texts


# ---------------------------------------------------------------- faults

def test_what_is_not_there(tmp_path, monkeypatch):
    file = write(tmp_path/'rows.jsonl', [dict(question='a', answer='b')])
    with pytest.raises(FileNotFoundError, match="did you mean 'rows.jsonl'"): Chats(data_files=str(tmp_path/'row.jsonl')).check()
    with pytest.raises(FileNotFoundError, match='nor a folder'): load_samples(Chats(data_files=str(tmp_path/'no'/'row.jsonl')))
    with pytest.raises(FileNotFoundError, match=r'there is no file .*\*.jsonl'): load_samples(Chats(data_files=str(tmp_path/'x*.jsonl')))
    with pytest.raises(FileNotFoundError, match='cannot be the name of a hub'): load_samples(Chats(path=str(tmp_path/'nothing')))
    with pytest.raises(ValueError, match="no column 'instruction', which Dolly reads; .*question, answer"): load_samples(Dolly(data_files=file))
    with pytest.raises(ValueError, match="no column 'quetsion', which Chats reads; did you mean 'question'"): load_samples(Chats(data_files=file, prompt_field='quetsion', answer_field='answer'))
    with pytest.raises(ValueError, match='train'): load_samples(Chats(data_files=dict(train=file), split='test'))
    with pytest.raises(ValueError, match='different kinds'): load_samples(Chats(data_files=[file, str(write(tmp_path/'t.txt', ['x']))]))
    for streaming in False, True:
        with pytest.raises(ValueError, match='none of the rows .* can be used(.|\n)*no result behind'): load_samples(GSM8K(data_files=file, streaming=streaming))
        with pytest.raises(ValueError, match='is empty|has no rows'): load_samples(Chats(data_files=write(tmp_path/'empty.jsonl', []).replace('\n', ''), streaming=streaming))
        with pytest.raises(ValueError, match='cannot be read.*row 1'): list(load_samples(Chats(data_files=write(tmp_path/'broken.jsonl', [dict(question='a', answer='b'), '{"question": ']), streaming=streaming))[0])
        big = '{"messages": [{"role": "user", "content": -9223372036854775809}]}'                                             # more than `datasets` can read
        with pytest.raises(ValueError, match='big.jsonl cannot be read'): list(load_samples(Chats(data_files=write(tmp_path/'big.jsonl', ['{"messages": [{"role": "user", "content": "a"}]}', big]), streaming=streaming))[0])
    with pytest.raises((ConnectionError, FileNotFoundError), match='cannot be had from the hub.*data_files'): load_samples(OpenHermes())


def test_an_error_in_a_data_set_names_the_row(tmp_path):
    class Faulty(ChatData):
        def samples(self, row): return [Sample([dict(role='user', content='a')], row['a']*2 if row['a'] else 1/0)]
    with pytest.raises(ZeroDivisionError) as e: load_samples(Faulty(), [dict(a='x'), dict(a='')])
    assert 'in row 1 of Faulty' in e.value.__notes__[0]
    class Empty(ChatData):
        def samples(self, row): return [] if row['a'] else [Sample([dict(role='user', content='a')], 'b')]
    assert load_samples(Empty(), [dict(a='x'), dict(a='')])[1].problems == {'no sample': [0]}
    class Mixed(ChatData):
        def samples(self, row): return [Sample('text', 'b')]
    with pytest.raises(TypeError, match='set plain = True'): load_samples(Mixed(), [dict(a='x')])
    class Ends(ChatData):
        def samples(self, row): return [Sample([dict(role='assistant', content='a')], 'b')] if row['a'] else [Sample([dict(role='user', content='a')], 'b')]
    assert load_samples(Ends(), [dict(a='x'), dict(a='')])[1].problems == {'the prompt does not end with a question': [0]}


# ---------------------------------------------------------------- the cache

CACHED = """
import os, sys, datasets
sys.path.insert(0, {folder!r})
import counted
from c2c_nb.data import load_samples
samples, report = load_samples(counted.Counted(data_files={file!r}, **{args!r}))
print(len(samples), report.problems, samples[0]['answer'])
"""
MODULE = """
from pathlib import Path
from c2c_nb.data import BadRow, ChatData, register_dataset
@register_dataset
class Counted(ChatData):
    mark:str = ''
    def columns(self): return 'a',
    def samples(self, row):
        with open({log!r}, 'a') as f: f.write('x')
        if not row['a']: raise BadRow('nothing')
        return self.from_pair('say', WORD + self.mark + row['a'])
"""


def test_the_second_process_finds_the_samples(tmp_path):
    file, log = write(tmp_path/'rows.jsonl', [dict(a='x'), dict(a='y'), dict(a=None)]), tmp_path/'log'
    module = tmp_path/'counted.py'
    def run(made, word="'w'", **args):
        module.write_text(MODULE.format(log=str(log)) + f'WORD = {word}\n')
        before = len(log.read_text()) if log.exists() else 0
        done = run_python(CACHED.format(folder=str(tmp_path), file=file, args=args), cwd=root, HF_DATASETS_CACHE=str(tmp_path/'cache'), PYTHONHASHSEED=str(before % 7))
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(log.read_text()) - before == made, done.stdout
        return done.stdout.strip()
    first = run(3)
    assert first == "2 {'nothing': [2]} wx"
    assert run(0) == first                                           # nothing is made again, and the report is whole
    assert run(3, mark='!') == "2 {'nothing': [2]} w!x"              # other arguments
    assert run(3, word="'v'") == "2 {'nothing': [2]} vx"             # another text of the module, outside of the class
    assert run(0) == first
    os.utime(file, (1, 1)); write(tmp_path/'rows.jsonl', [dict(a='z'), dict(a=None)])
    assert run(2) == "1 {'nothing': [1]} wz"                         # another file of that name


def test_a_class_without_a_file_is_known_by_its_code():
    code = "\nfrom c2c_nb.data import *\nfrom c2c_nb.data import _code_key\nWORD = {word!r}\ndef helper(x): return {{'a', 'b', x}} and WORD + x\nclass Mine(ChatData):\n    def samples(self, row): return self.from_pair('say', helper(row['a']) if row['a'] in {{'p', 'q', 'r'}} else super().where())\nprint(_code_key(Mine))"
    keys = [run_python(code.format(word=word), cwd=root, PYTHONHASHSEED=seed).stdout.strip() for word, seed in (('w', '1'), ('w', '2'), ('v', '1'))]
    assert keys[0] and keys[0] == keys[1] != keys[2]


def test_a_folder_that_cannot_be_written(tmp_path):
    datasets.Dataset.from_list([dict(question='a', answer='b')]).save_to_disk(str(tmp_path/'saved'))
    before = sorted(p.name for p in (tmp_path/'saved').iterdir())
    (tmp_path/'saved').chmod(0o500)
    try: assert load_samples(Chats(path=str(tmp_path/'saved')))[1].kept == 1
    finally: (tmp_path/'saved').chmod(0o700)
    if os.getuid(): assert sorted(p.name for p in (tmp_path/'saved').iterdir()) == before


def test_a_stream_survives_another_process():
    import pickle
    maker = _Maker(GSM8K(limit=3), 'samples', Report())
    again = pickle.loads(pickle.dumps(maker))
    assert again.data == maker.data and again.report == Report()
    out = again(dict(question=['a', 'b'], answer=['1\n#### 1', None]), [0, 1])
    assert out['row'] == [0] and 'problem' not in out and again.report.problems == {'answer: nothing': [1]}


def test_report_adds_up():
    a, b = Report(), Report()
    a.keep(2); a.add('x', 1); b.add('x', 2); b.add('y', 3); b.keep()
    c = a.merge(b)
    assert (c.rows, c.kept, c.samples, c.left_out, c.problems) == (5, 2, 3, 3, {'x': [1, 2], 'y': [3]}) and a.problems == {'x': [1]}
    c.reject('too long', 0, samples=2)
    assert (c.rows, c.kept, c.samples, c.left_out) == (5, 1, 1, 4)
    assert '| too long | 1 | 0 |' in c._repr_markdown_() and '5 rows: 1 kept' in repr(c)
    assert nearest('lerning_rate', ['learning_rate', 'seed']) == "did you mean 'learning_rate'? Known are learning_rate, seed"
