"Answers that are fused too (`follow_response`), and sharers with columns of their own (`pairing`)."
import copy, threading

import pytest, torch
from safetensors.torch import load_file
from transformers import DynamicCache

from c2c_nb.cache import clone_cache, read_layer
from c2c_nb.model import C2CModel

from tiny import architectures, c2c_of, fuser_for, ids_of, lay_out, tiny
from test_contracts import assert_rows_are_alone, both_fusions, call, close, logits_of, one, other_sharer, ragged_rows
from test_parity import cuts_of, golden_model, gradients, models, read_json, training_batch


def following(*args, **kwargs):
    c2c = c2c_of(*args, **kwargs)
    c2c.follow_response = True
    return c2c


# parity with the official include_response, whose two sections make its raw cache and ours the same

@pytest.mark.parametrize('case', ['c10_incl_resp', 'c11_incl_resp_long'])
def test_inference(golden, models, case):
    info, g = read_json(golden/'index.json')[case], load_file(golden/f'{case}.safetensors')
    ids = g['input_ids']
    c2c, kw = golden_model(golden, models, [1], 'parallel'), cuts_of(info['sections'], len(ids), [1])
    c2c.follow_response = True
    with torch.no_grad(): close(c2c(ids, **kw).logits, g['last_section_logits'], 1e-4)
    out = c2c.generate(ids, **kw, max_new_tokens=len(g['step_logits']), pad_token_id=0, **logits_of)
    close(torch.stack(out.logits), g['step_logits'], 1e-4)
    assert torch.equal(out.sequences, g['sequences'])


@pytest.mark.parametrize('case', ['t04_incl_resp_nogumbel_b1', 't05_incl_resp_gumbel_b1_T1'])
def test_training(golden, models, case):
    info, g = read_json(golden/'training.json')[case], load_file(golden/f'{case}.safetensors')
    ids, mask, labels, fused = training_batch(golden, case)
    c2c = golden_model(golden, models, [1], 'parallel')
    c2c.follow_response = True
    for stack in c2c.fusers[0].stacks: stack.projector.gate_noise = 'gumbel' if info['gumbel'] else None
    c2c.train()
    if info['gumbel']: c2c.fusers[0].set_temperature(info['gate_temperature'])
    draws = iter([g[k] for k in sorted(g) if k.startswith('u.')])
    c2c.fusers[0].draw_u = lambda layers, like: torch.stack([torch.stack([next(draws), next(draws)]) for _ in range(layers)])
    out = c2c(ids, attention_mask=mask, labels=labels, active=fused[..., None], sections=(~fused).long())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(info['loss'], abs=1e-4)
    assert next(draws, None) is None or not info['gumbel'], 'all stored draws were used'
    ours = gradients(c2c)
    assert sum(x.double().norm().item()**2 for x in ours.values())**.5 == pytest.approx(info['total_grad_norm'], rel=1e-3)
    norm = lambda n: ours[n].norm().item() if n in ours else 0.
    assert not {n for n, v in info['grad_norms'].items() if norm(n) != pytest.approx(v or 0., rel=1e-3, abs=1e-6*info['total_grad_norm'])}


# against the definition, step by step with plain caches

def by_hand(c2c, ids, steps, sections=None, state=None):
    "Greedy ids, logits and what is left, of the definition, for one row and any sharers in parallel: raw pass, fuse, pass over the fused cache with the token's own keys and values replaced. `state`: what an earlier turn left."
    sections = [len(ids) - 1] if sections is None else sections
    receiver, (raw, fused, theirs, start) = c2c.receiver, state or (DynamicCache(), DynamicCache(), [DynamicCache() for _ in c2c.sharers], 0)
    def add(start, stop, own):
        out = [[k, v] for k, v in own]
        for j, fuser in enumerate(c2c.fusers):
            kv = fuser([read_layer(theirs[j], i, start, stop) for i in range(len(theirs[j].layers))], own)
            for i, new in enumerate(kv):
                for h in (0, 1):
                    if new[h] is not None: out[i][h] = out[i][h] + (new[h] - own[i][h])
        return out
    def put(start, kv):
        for layer, (k, v) in zip(fused.layers, kv): layer.keys, layer.values = torch.cat([layer.keys[:, :, :start], k], 2), torch.cat([layer.values[:, :, :start], v], 2)
    class Instead(DynamicCache):
        def update(self, k, v, i, *a, **kw): return super().update(*self.instead[i], i, *a, **kw)
    with torch.no_grad():
        text, logits = ids[None], []
        for stop in sections:
            receiver.base_model(text[:, start:stop], past_key_values=fused)
            for s, c in zip(c2c.sharers, theirs): s.base_model(text[:, start:stop], past_key_values=c)
            put(start, add(start, stop, [read_layer(fused, i, start, stop) for i in range(len(fused.layers))]))
            start = stop
        receiver.base_model(text[:, raw.get_seq_length():start], past_key_values=raw)
        for _ in range(steps):
            stop = text.shape[1]
            receiver.base_model(text[:, start:stop], past_key_values=raw)
            for s, c in zip(c2c.sharers, theirs): s.base_model(text[:, start:stop], past_key_values=c)
            kv = add(start, stop, [read_layer(raw, i, start, stop) for i in range(len(raw.layers))])
            last = Instead(); last.layers = fused.layers; last.instead = kv
            logits.append(receiver(text[:, start:stop], past_key_values=last).logits[:, -1])
            fused.layers = last.layers
            start, text = stop, torch.cat([text, logits[-1].argmax(-1, keepdim=True)], 1)
    return text[0, len(ids):].tolist(), torch.cat(logits), (raw, fused, theirs, start)


@pytest.mark.parametrize('receiver', architectures)
def test_any_receiver(receiver):
    c2c, ids = following(receiver, [other_sharer.get(receiver, 'qwen3')]), ids_of(9)
    expected, logits, _ = by_hand(c2c, ids, 4)
    out = c2c.generate(ids[None], max_new_tokens=4, **logits_of)
    assert out.sequences[0, 9:].tolist() == expected
    close(torch.cat(out.logits), logits)
    plain = c2c_of(receiver, [other_sharer.get(receiver, 'qwen3')]).generate(ids[None], max_new_tokens=4, **logits_of)
    assert not torch.equal(plain.logits[-1], out.logits[-1])


def test_the_raw_cache_was_never_fused():
    "However the prompt is cut, what the answer is fused from is the receiver's own (the official result depends on the cuts)."
    c2c, ids = following('qwen3', ['llama', 'gpt2']), ids_of(9)
    expected, logits, _ = by_hand(c2c, ids, 3, [3, 6, 8])
    out = c2c.generate(ids[None], sections=torch.tensor([[0]*3 + [1]*3 + [2]*2 + [3]]), max_new_tokens=3, **logits_of)
    close(torch.cat(out.logits), logits)
    assert out.sequences[0, 9:].tolist() == expected
    cache = c2c.prefill(ids[None], sections=torch.tensor([[0]*3 + [1]*3 + [2]*2 + [3]]))
    c2c.generate(ids[None], cache=cache, max_new_tokens=3)
    own = DynamicCache()
    with torch.no_grad(): c2c.receiver.base_model(out.sequences[:, :-1], past_key_values=own)
    for a, b in zip(cache.raw.layers, own.layers): close(a.keys, b.keys)


# the contracts hold here too

@pytest.mark.parametrize('receiver', ['qwen3', 'mistral', 'gemma3', 'gpt2'])
def test_1_closed_gates_change_nothing(receiver):
    c2c, ids = following(receiver, ['llama'], gate=0.), ids_of(2, 8)
    ours = c2c.generate(ids, max_new_tokens=4, **logits_of)
    theirs = c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **logits_of)
    assert torch.equal(ours.sequences, theirs.sequences) and all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))


@pytest.mark.parametrize('receiver,where', [('qwen3', 'left'), ('qwen3', 'middle'), ('mistral', 'right'), ('gemma3', 'left'), ('gptneox', 'both')])
def test_2_rows_are_independent(receiver, where):
    assert_rows_are_alone(following(receiver, [other_sharer[receiver]]), ragged_rows(1), where, steps=3)


@both_fusions
def test_2_rows_are_independent_with_several_sharers(fusion):
    "Every row hears its own sharers in the answer too; the row in which nobody is active answers as without C2C."
    c2c, rows = following('qwen2', ['llama', 'gptneox', 'mistral'], fusion, gate=[1., -1., .5]), ragged_rows(3, seed=2)
    assert_rows_are_alone(c2c, rows, 'left', steps=3)
    ids = rows[1]['input_ids'][None]
    out = c2c.generate(**call(lay_out(rows, 'left')), max_new_tokens=3)[1, -3:]
    assert torch.equal(out, c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)[0, -3:])


def test_2_the_right_sharers_for_each_row():
    "Where `active` leaves the last section out, a row's answer listens to whom the row has heard."
    c2c, ids = following('qwen3', ['llama', 'gpt2']), ids_of(3, 8)
    active = torch.zeros(3, 8, 2, dtype=torch.bool)
    active[0, :7, 0] = active[1, :7, 1] = True
    out = c2c.generate(ids, active=active, max_new_tokens=4)
    for row, j in (0, 0), (1, 1):
        single = C2CModel(c2c.receiver, [c2c.sharers[j]], [c2c.fusers[j]], follow_response=True)
        assert torch.equal(single.generate(ids[row:row+1], max_new_tokens=4)[0], out[row])
    assert torch.equal(c2c.receiver.generate(ids[2:], attention_mask=torch.ones(1, 8).long(), max_new_tokens=4)[0], out[2])


def test_6_every_way_to_generate():
    "Beams, several answers, sampling and assistants are those of transformers: equal to what a beam of one, a batch of equal rows, and plain greedy decoding give."
    c2c, ids = following('qwen3', ['llama', 'gpt2']), ids_of(1, 8)
    greedy = c2c.generate(ids, max_new_tokens=6)
    assert torch.equal(c2c.generate(ids, max_new_tokens=6, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(c2c.generate(ids, max_new_tokens=6, assistant_model=tiny('qwen3', 5)), greedy)
    mask = torch.ones_like(ids); mask[:, :2] = 0
    assert torch.equal(c2c.generate(ids, mask, max_new_tokens=6, prompt_lookup_num_tokens=3), c2c.generate(ids, mask, max_new_tokens=6))
    torch.manual_seed(1); a = c2c.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    torch.manual_seed(1); b = c2c.generate(ids.repeat(3, 1), max_new_tokens=5, do_sample=True)
    assert torch.equal(a, b)
    beams = c2c.generate(ids, max_new_tokens=5, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    for seq, score in zip(beams.sequences, beams.sequences_scores):        # the score of a beam is that of its own tokens, read alone
        with torch.no_grad(): logits = c2c(seq[None], sections=torch.tensor([[0]*7 + [1]*6])).logits[0]
        own = logits[:-1].log_softmax(-1).gather(1, seq[8:, None]).sum()
        assert own.item()/5 == pytest.approx(score.item(), abs=1e-4)


def test_6_a_prompt_of_one_token():
    "There is nothing before the answer: beams, samples, rows beside longer ones."
    c2c, ids = following('qwen3', ['llama']), ids_of(1, 6)
    for kw in dict(num_beams=2), dict(), dict(prompt_lookup_num_tokens=2):
        assert c2c.generate(ids[:, :1], max_new_tokens=3, **kw).shape == (1, 4)
    assert_rows_are_alone(c2c, [dict(input_ids=ids_of(n, seed=n)) for n in (1, 5, 2)], 'left', steps=3)


def test_7_a_followed_conversation_goes_on():
    "Prefill, answer, and a second turn on the same cache, against the definition."
    c2c, ids = following('qwen3', ['llama', 'gpt2']), ids_of(1, 8)
    cache, (expected, _, state) = c2c.prefill(ids), by_hand(c2c, ids[0], 3)
    first = c2c.generate(ids, cache=cache, max_new_tokens=3)
    assert first[0, 8:].tolist() == expected
    assert cache.fused.shape[1] == cache.get_seq_length() == cache.raw.get_seq_length() == cache.sharers[0].get_seq_length()
    more = torch.cat([first, ids_of(1, 4, seed=5)], 1)
    expected, logits, state = by_hand(c2c, more[0], 3, state=state)
    out = c2c.generate(more, cache=cache, max_new_tokens=3, **logits_of)
    close(torch.cat(out.logits), logits)
    assert out.sequences[0, more.shape[1]:].tolist() == expected
    for a, b in zip(cache.raw.layers, state[0].layers): close(a.keys, b.keys)


def test_7_a_cache_made_without_following_goes_on():
    "It holds no raw keys and values: the receiver reads the text once more, unfused."
    c2c, ids = following('qwen3', ['llama']), ids_of(1, 8)
    expected = c2c.generate(ids, max_new_tokens=4, **logits_of)
    out = c2c.generate(ids, cache=c2c_of('qwen3', ['llama']).prefill(ids), max_new_tokens=4, **logits_of)
    for a, b in zip(out.logits, expected.logits): close(a, b)
    assert torch.equal(out.sequences, expected.sequences)


def test_8_nothing_is_left_behind():
    c2c, ids = following('qwen3', ['llama']), ids_of(1, 8)
    receiver = c2c.receiver
    before = {k: (v if not isinstance(v, dict) else list(v)) for k, v in receiver.__dict__.items()}
    rng, forward = torch.get_rng_state(), type(receiver).forward
    c2c.generate(ids, max_new_tokens=3)
    with pytest.raises(RuntimeError, match='enough'):
        def stop(ids, scores): raise RuntimeError('enough')
        c2c.generate(ids, max_new_tokens=3, logits_processor=[stop])
    assert {k: (v if not isinstance(v, dict) else list(v)) for k, v in receiver.__dict__.items()} == before
    assert torch.equal(rng, torch.get_rng_state()) and type(receiver).forward is forward and 'forward' not in receiver.__dict__
    expected, found = c2c.generate(ids, max_new_tokens=5), []
    other = ids_of(1, 8, seed=9)
    expected_other = c2c.generate(other, max_new_tokens=5)
    def ask(x): found.append((x, c2c.generate(x, max_new_tokens=5)))
    threads = [threading.Thread(target=ask, args=(x,)) for x in (ids, other)*4]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 8 and all(torch.equal(y, expected if x is ids else expected_other) for x, y in found)


def test_the_loss_of_an_answer_is_that_of_its_steps():
    "Teacher forcing reads the answer at once, generating token by token: the same logits."
    c2c, ids = following('mistral', ['llama']), ids_of(1, 8)
    out = c2c.generate(ids, max_new_tokens=4, **logits_of)
    with torch.no_grad(): logits = c2c(out.sequences, sections=torch.tensor([[0]*7 + [1]*5])).logits
    close(logits[0, :-1], torch.cat(out.logits))


# sharers with columns of their own

def test_paired_columns_are_those_of_the_sharer():
    "1:1 pairing is no pairing; a sharer that reads every token twice, paired with the second, is the same as one whose mask says so."
    c2c, rows = c2c_of('qwen3', ['llama', 'gpt2'], 'sequential'), ids_of(2, 9)
    same = torch.arange(9).expand(2, -1)
    plain = c2c.generate(rows, sharer_input_ids=[rows, rows.flip(1)], max_new_tokens=4, **logits_of)
    for pairing in [same, None], [None, same], [same, same]:
        out = c2c.generate(rows, sharer_input_ids=[rows, rows.flip(1)], pairing=pairing, max_new_tokens=4, **logits_of)
        assert torch.equal(out.sequences, plain.sequences)
        for a, b in zip(out.logits, plain.logits): close(a, b)


def paired_rows(sharers, seed=0):
    "Rows whose sharers have texts of their own lengths, with pairings that do not fall and begin with nothing."
    g, rows = torch.Generator().manual_seed(seed), []
    for row in ragged_rows(sharers, seed):
        n = len(row['input_ids'])
        row = {k: v for k, v in row.items() if not k.startswith('sharer')}
        own = []
        for j in range(sharers):
            m = int(torch.randint(2, 12, (1,), generator=g))
            pair = torch.randint(-1, m, (n,), generator=g).sort().values
            own.append((ids_of(m, seed=seed + 31*j + n), pair))
        rows.append((row, own))
    return rows


def paired_batch(rows, where):
    "One batch: receiver rows padded anywhere, the sharers' texts on the left."
    batch = call(lay_out([row for row, _ in rows], where))
    n, t = len(rows[0][1]), batch['input_ids'].shape[1]
    batch |= dict(sharer_input_ids=[], sharer_attention_mask=[], pairing=[])
    for j in range(n):
        texts = [own[j][0] for _, own in rows]
        width = max(map(len, texts))
        batch['sharer_input_ids'].append(torch.stack([torch.cat([ids_of(width - len(x), seed=3), x]) for x in texts]))
        batch['sharer_attention_mask'].append(torch.stack([(torch.arange(width) >= width - len(x)).long() for x in texts]))
        pair = torch.full((len(rows), t), -1)
        for i, ((_, own), mask) in enumerate(zip(rows, batch['attention_mask'])):
            pair[i, mask.bool()] = torch.where(own[j][1] < 0, -1, own[j][1] + width - len(own[j][0]))
        batch['pairing'].append(pair)
    return batch


@pytest.mark.parametrize('follow', [False, True], ids=['', 'follow'])
@pytest.mark.parametrize('fusion,where', [('parallel', 'left'), ('sequential', 'right'), ('parallel', 'middle')])
def test_2_paired_rows_are_independent(follow, fusion, where):
    c2c, rows = c2c_of('qwen3', ['llama', 'gpt2'], fusion), paired_rows(2)
    c2c.follow_response = follow
    together, steps = c2c.generate(**paired_batch(rows, where), max_new_tokens=3, **logits_of), 3
    with torch.no_grad(): logits = c2c(**paired_batch(rows, where)).logits
    heard = False
    for i, row in enumerate(rows):
        single = c2c.generate(**paired_batch([row], where='left'), max_new_tokens=steps, **logits_of)
        assert torch.equal(single.sequences[0, -steps:], together.sequences[i, -steps:])
        for a, b in zip(together.logits, single.logits): close(a[i], b[0])
        with torch.no_grad(): own = c2c(**paired_batch([row], where='left')).logits
        close(logits[i, :own.shape[1]], own[0])
        ids = row[0]['input_ids'][None]
        alone = c2c.receiver.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, **logits_of)
        heard |= not torch.equal(alone.logits[0], single.logits[0])
    assert heard


def test_7_a_paired_text_goes_on():
    "A text that grows on both sides: in two calls as in one, also where the sharer's last tokens change when more text follows."
    c2c, ids, theirs = c2c_of('qwen3', ['llama']), ids_of(1, 12), ids_of(1, 8, seed=4)
    pair = torch.tensor([[-1, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 7]])
    active = torch.tensor([[1]*5 + [0] + [1]*5 + [0]]).bool()[..., None]
    once = c2c.prefill(ids, sharer_input_ids=[theirs], pairing=[pair], active=active)
    first = theirs[:, :5].clone(); first[:, 3:] = 1              # the sharer's last two tokens will become others; nobody has listened to them yet
    cache = c2c.prefill(ids[:, :6], sharer_input_ids=[first], pairing=[pair[:, :6]], active=active[:, :6])
    cache = c2c.prefill(ids, sharer_input_ids=[theirs], pairing=[pair], active=active, cache=cache)
    for a, b in zip(cache.layers, once.layers): close(a.keys, b.keys); close(a.values, b.values)
    for a, b in zip(cache.sharers[0].layers, once.sharers[0].layers): close(a.keys, b.keys)


def test_another_text_on_a_cache_is_refused():
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 12)
    cache = c2c.prefill(ids[:, :8])
    other = ids.clone(); other[:, 3] = (other[:, 3] + 1) % 50 + 1
    with pytest.raises(ValueError, match=r'another text: it differs from input_ids at position 3'): c2c.prefill(other, cache=cache)
    cache.crop(3 - cache.get_seq_length())
    assert torch.equal(c2c.generate(other, cache=cache, max_new_tokens=3), c2c.generate(other, sections=torch.tensor([[0]*3 + [1]*8 + [2]]), max_new_tokens=3))


# found in review

def test_a_receiver_with_hooks_or_compiled_is_followed_once_per_pass():
    c2c, ids = following('qwen3', ['llama']), ids_of(1, 8)
    c2c.receiver, runs = copy.deepcopy(c2c.receiver), []
    expected = c2c.generate(ids, max_new_tokens=3)
    handle = c2c.receiver.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(c2c.generate(ids, max_new_tokens=3), expected) and len(runs) == 3
    handle.remove()
    c2c.receiver.compile(backend='eager', dynamic=True)
    assert torch.equal(c2c.generate(ids, max_new_tokens=3), expected)


def test_a_row_whose_last_token_is_unheard_is_followed():
    "A sharer that has nothing at the last prompt token hears the answer all the same."
    c2c, ids = following('qwen3', ['llama']), ids_of(1, 8)
    mask = torch.ones(1, 8).long(); mask[:, -1] = 0
    pair = torch.arange(8)[None].clone(); pair[:, -1] = -1
    for kw in dict(sharer_attention_mask=[mask]), dict(sharer_input_ids=[ids], pairing=[pair]):
        cache = c2c.new_cache()
        c2c.generate(ids, cache=cache, max_new_tokens=4, **kw)
        assert cache.fused[0, :, 0].tolist() == [True]*7 + [False] + [True]*3


def test_sharers_that_are_active_nowhere_are_not_run_for_an_answer():
    c2c, ids = following('qwen3', ['llama', 'gpt2']), ids_of(1, 8)
    active = torch.ones(1, 8, 2, dtype=torch.bool); active[..., 1] = False
    cache = c2c.new_cache()
    c2c.generate(ids, cache=cache, active=active, max_new_tokens=4)
    assert [s.get_seq_length() for s in cache.sharers] == [11, 0]


def test_guidance_has_a_cache_of_its_own():
    for c2c in c2c_of('qwen3', ['llama']), following('qwen3', ['llama']): assert c2c.generate(ids_of(1, 8), guidance_scale=1.5, max_new_tokens=3).shape == (1, 11)


def test_beams_leave_a_given_cache_alone():
    for c2c in c2c_of('qwen3', ['llama']), following('qwen3', ['llama']):
        ids, cache = ids_of(1, 8), c2c.new_cache()
        c2c.prefill(ids, cache=cache)
        c2c.generate(ids, cache=cache, num_beams=3, num_return_sequences=3, max_new_tokens=3)
        assert cache.get_seq_length() == 7 and cache.layers[0].keys.shape[0] == 1


def test_a_given_cache_is_filled_also_where_nothing_is_fused():
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(1, 8)
    cache = c2c.new_cache()
    out = c2c.generate(ids, cache=cache, active=torch.zeros(1, 8, 1, dtype=torch.bool), max_new_tokens=3)
    assert cache.get_seq_length() == 10 and torch.equal(cache.ids, out[:, :10])
    closed = c2c_of('qwen3', ['llama'], gate=0.)
    cache = closed.new_cache()
    closed.generate(ids, cache=cache, max_new_tokens=3)
    assert cache.get_seq_length() == 10


def test_forward_notes_what_it_read():
    c2c, x = c2c_of('qwen3', ['llama']), ids_of(1, 8)
    cache = c2c.new_cache()
    with torch.no_grad(): c2c(x, sections=torch.tensor([[0]*4 + [1]*4]), cache=cache)
    z = torch.cat([x, ids_of(1, 2, seed=7)], 1); z[:, 6] = z[:, 6] % 50 + 1
    with pytest.raises(ValueError, match='differs from input_ids at position 6'): c2c.generate(z, cache=cache, max_new_tokens=2)


@pytest.mark.parametrize('follow', [False, True], ids=['', 'follow'])
def test_a_row_that_ended_goes_on(follow):
    "EOS within a batch: the padding behind it is left out of the next turn."
    c2c, ids = c2c_of('qwen3', ['llama']), ids_of(2, 8)
    c2c.follow_response = follow
    eos = c2c.generate(ids, max_new_tokens=6)[0, 8].item()
    cache, own = c2c.new_cache(), c2c.new_cache()
    out = c2c.generate(ids, cache=cache, max_new_tokens=6, eos_token_id=eos, pad_token_id=0)
    assert out[0, 8] == eos and (out[0, 9:] == 0).all() and (out[1, 9:] != 0).any()
    more = torch.cat([out, ids_of(2, 3, seed=8)], 1)
    mask = torch.ones_like(more); mask[0, 9:14] = 0
    together = c2c.generate(more, mask, cache=cache, max_new_tokens=2, **logits_of)
    c2c.generate(ids[:1], cache=own, max_new_tokens=3)
    own.crop(9 - own.get_seq_length())                            # the row alone, up to and with its EOS token
    single = c2c.generate(torch.cat([out[:1, :9], more[:1, 14:]], 1), cache=own, max_new_tokens=2, **logits_of)
    for a, b in zip(together.logits, single.logits): close(a[:1], b)
