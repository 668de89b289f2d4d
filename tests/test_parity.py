"Ours equals the official implementation: inference, training, projectors, layer maps, temperatures, published checkpoints (contract 4)."
import json, math

import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from c2c_nb.fuser import Fuser, depth_nearest, last_aligned
from c2c_nb.model import C2CModel
from c2c_nb.projector import C2CProjector, exponential_temperature

cases = dict(c01='c01_single', c02='c02_prop_front', c03='c03_prop_back', c04='c04_many_sections', c05='c05_par_both', c06='c06_seq_both', c07='c07_par_mask2',
    c08='c08_par_mixed', c09='c09_seq_mixed', c12='c12_logits_mode', c13='c13_batch2_equal', c14='c14_penalties', c15='c15_eos')
trainings = dict(t01='t01_nogumbel_b1', t02='t02_nogumbel_b2', t03='t03_gumbel_b2_T0.5', t06='t06_par2_nogumbel_b2', t07='t07_seq2_gumbel_b2_T0.3')


def read_json(file): return json.loads(file.read_text())


def close(ours, official, atol): torch.testing.assert_close(ours, official, atol=atol, rtol=0)


@pytest.fixture(scope='module')
def models(golden):
    "Receiver and sharers of the golden data."
    return {n: AutoModelForCausalLM.from_pretrained(golden/n).eval() for n in ('receiver', 'sharer1', 'sharer2')}


def golden_model(golden, models, sharers, fusion):
    return C2CModel(models['receiver'], [models[f'sharer{j}'] for j in sharers], [Fuser.from_published(golden/f'ckpt_s{j}/final') for j in sharers], fusion)


def cuts_of(sections, b, sharers):
    "The official run-length form [[length, mask], ...] as `active` and `sections`."
    number = torch.cat([torch.full((n,), i) for i, (n, m) in enumerate(sections)])
    bits = torch.cat([torch.full((n,), max(m, 0)) for n, m in sections])
    return dict(active=torch.stack([(bits >> (j-1)) & 1 == 1 for j in sharers], -1).expand(b, -1, -1), sections=number.expand(b, -1))


class OfficialPenalties(LogitsProcessor):
    "Presence, frequency, then repetition, all counted with the prompt, as the official loop does."
    def __init__(self, presence_penalty, frequency_penalty, repetition_penalty): self.args = presence_penalty, frequency_penalty, repetition_penalty
    def __call__(self, ids, scores):
        presence, frequency, repetition = self.args
        counts = torch.zeros_like(scores).scatter_add_(1, ids, torch.ones_like(ids, dtype=scores.dtype))
        scores = scores - presence*(counts > 0) - frequency*counts
        return torch.where(counts > 0, torch.where(scores > 0, scores/repetition, scores*repetition), scores)


# inference

def test_c00_the_receiver_alone(golden, models):
    "The stored receiver gives the stored answers here; and so does C2C with a sharer that is nowhere active."
    g, receiver = load_file(golden/'c00_receiver_alone.safetensors'), models['receiver']
    ids = g['input_ids']
    with torch.no_grad(): out = receiver(ids, use_cache=True)
    close(out.logits, g['logits'], 1e-4)
    for i, layer in enumerate(out.past_key_values.layers): close(layer.keys, g['receiver_key'][i], 1e-4); close(layer.values, g['receiver_value'][i], 1e-4)
    c2c = golden_model(golden, models, [1], 'parallel')
    new = c2c.generate(ids, active=torch.zeros(*ids.shape, 1, dtype=torch.bool), max_new_tokens=16, pad_token_id=0)
    assert torch.equal(new, g['sequences'])


@pytest.mark.parametrize('case', cases)
def test_inference(golden, models, case):
    "Logits, raw logits of every step, ids, and fused caches."
    name = cases[case]
    info, g = read_json(golden/'index.json')[name], load_file(golden/f'{name}.safetensors')
    ids, sharers = g['input_ids'], [1, 2] if case in ('c05', 'c06', 'c07', 'c08', 'c09') else [1]
    c2c, kw = golden_model(golden, models, sharers, 'sequential' if '_seq_' in name else 'parallel'), cuts_of(info['sections'], len(ids), sharers)
    kw['attention_mask'] = g['attention_mask']
    with torch.no_grad(): logits = c2c(ids, **kw).logits
    close(logits, g['last_section_logits'], 1e-4)
    cache, n_last = c2c.prefill(ids, **kw), info['sections'][-1][0]
    n = ids.shape[1] - n_last
    assert cache.get_seq_length() == n
    if 'fused_key' in g:
        for i, layer in enumerate(cache.layers): close(layer.keys, g['fused_key'][i][..., :n, :], 1e-4); close(layer.values, g['fused_value'][i][..., :n, :], 1e-4)
    for j, theirs in zip(sharers, cache.sharers):
        if f'sharer{j}_key' not in g: continue
        for i, layer in enumerate(theirs.layers): close(layer.keys, g[f'sharer{j}_key'][i][..., :layer.keys.shape[-2], :], 1e-4)
    gen = dict(info['gen_kw'])
    penalties = {k: gen.pop(k) for k in list(gen) if k.endswith('penalty')}
    steps = len(g['step_logits'])
    out = c2c.generate(ids, **kw, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, logits_processor=LogitsProcessorList([OfficialPenalties(**penalties)] if penalties else []),
        **(dict(pad_token_id=0) | gen))
    close(torch.stack(out.logits), g['step_logits'], 1e-4)
    ours, official = out.sequences[:, ids.shape[1]:], g['sequences'][:, ids.shape[1]:].clone()
    if case == 'c15':                                            # the official code overwrites the EOS token by padding: ours keeps it
        assert official[0, -1] == gen['pad_token_id'] and ours[0, -1] == gen['eos_token_id'][0]
        official[0, -1] = gen['eos_token_id'][0]
    assert torch.equal(ours, official)


def test_inference_aligned(golden, models):
    "Two tokenizers, padding inside the texts. The official code forgets it while decoding; what it should have given is stored too."
    info, g = read_json(golden/'index.json')['c16_aligned'], load_file(golden/'c16_aligned.safetensors')
    c2c, ids = golden_model(golden, models, [1], 'parallel'), g['input_ids.0']
    kw = dict(attention_mask=g['attention_mask.0'], sharer_input_ids=[g['input_ids.1']], sharer_attention_mask=[g['attention_mask.1']], position_ids=g['position_ids'], **cuts_of(info['sections'], 1, [1]))
    with torch.no_grad(): close(c2c(ids, **kw).logits, g['last_section_logits'], 1e-4)
    out = c2c.generate(ids, **kw, max_new_tokens=16, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    close(torch.stack(out.logits), g['step_logits_pad_masked'], 1e-4)
    assert torch.equal(out.sequences[:, ids.shape[1]:], g['sequences_pad_masked'][:, ids.shape[1]:])
    assert not torch.equal(out.sequences[:, ids.shape[1]:], g['sequences'][:, ids.shape[1]:])


# training

def training_batch(golden, case):
    "A stored batch: ids, mask, labels, and where the official code fuses."
    data = read_json(golden/'collator.json')
    if '_b1' in case:
        f = {k: [v] for k, v in data['chat_features'][0].items()}
        ids, labels = torch.tensor(f['input_ids']), torch.tensor(f['labels'])
        return ids, torch.ones_like(ids), labels, torch.tensor(f['kv_cache_index'])[..., 0] > 0
    f = data['chat_batch']
    where = torch.cat([torch.tensor(x) for x in f['kv_cache_index']], 1)
    return torch.tensor(f['input_ids']), torch.tensor(f['attention_mask']).long(), torch.tensor(f['labels']), where[..., 0] > 0


def gradients(c2c):
    "Gradients by the official names, projectors of a second sharer after those of the first."
    out = {}
    for s, fuser in enumerate(c2c.fusers):
        first = s*fuser.receiver_geometry.layers
        for layers, stack in zip(fuser.groups, fuser.stacks):
            for name, p in stack.projector.named_parameters():
                if p.grad is not None: out |= {f'projector_{first + i}.{name}': g for i, g in zip(layers, p.grad)}
    return out


def toss(c2c, g, active, where, followed=False):
    "Let the gates be tossed with the stored draws, put where the rows lie in our layout; an iterator over those left."
    draws = iter([g[k] for k in sorted(g) if k.startswith('u.')])
    def recorded(layers, like):
        u = torch.stack([torch.stack([next(draws), next(draws)]) for _ in range(layers)])
        if followed: return u
        out = torch.full((layers, 2, *like.shape[:-1], 1), .5)
        for row in range(len(where)): out[:, :, row, :, active[row].any(-1)] = u[:, :, row][:, :, :, where[row].nonzero()[:, 0]]
        return out
    for fuser in c2c.fusers: fuser.draw_u = recorded
    return draws


def check_gradients(c2c, info):
    "The total norm, and that of every parameter; the gradients."
    ours = gradients(c2c)
    norm = lambda n: ours[n].norm().item() if n in ours else 0.
    assert math.sqrt(sum(x.double().norm().item()**2 for x in ours.values())) == pytest.approx(info['total_grad_norm'], rel=1e-3)
    assert set(ours) <= set(info['grad_norms'])
    assert not {n: (norm(n), v) for n, v in info['grad_norms'].items() if norm(n) != pytest.approx(v or 0., rel=1e-3, abs=1e-6*info['total_grad_norm'])}
    return ours


def aligned_training(golden, models):
    "Case t08: what is stored of it, the model, and the batch."
    info, f = read_json(golden/'training.json')['t08_aligned_nogumbel_b1'], read_json(golden/'collator.json')['aligned_features'][0]
    c2c = golden_model(golden, models, [1], 'parallel')
    for stack in c2c.fusers[0].stacks: stack.projector.gate_noise = None
    c2c.train()
    ids, fused = [torch.tensor(x)[None] for x in f['input_ids']], torch.tensor(f['kv_cache_index'])[None, :, 0] > 0
    masks, n = [(~torch.tensor(x)[None]).long() for x in f['model_padding_mask']], fused.shape[1]
    sections = torch.cat([torch.zeros(1, 1, dtype=torch.long), (fused[:, 1:] != fused[:, :-1]).long().cumsum(1)], 1)
    return info, c2c, dict(input_ids=ids[0], attention_mask=masks[0], labels=torch.tensor(f['labels'])[None], sharer_input_ids=[ids[1]], sharer_attention_mask=[masks[1]], active=fused[..., None], sections=sections, position_ids=torch.arange(n)[None])


@pytest.mark.parametrize('case', trainings)
def test_training(golden, models, case):
    "Loss, gradient norm of every parameter, and of t01 every gradient."
    name, sharers = trainings[case], [1, 2] if case in ('t06', 't07') else [1]
    info, g = read_json(golden/'training.json')[name], load_file(golden/f'{name}.safetensors')
    ids, mask, labels, fused = training_batch(golden, name)
    c2c = golden_model(golden, models, sharers, 'sequential' if '_seq' in name else 'parallel')
    kw = dict(attention_mask=mask, labels=labels, active=fused[..., None].expand(-1, -1, len(sharers)), sections=(~fused).long())
    for module in c2c.fusers.modules():
        if isinstance(module, C2CProjector): module.gate_noise = 'gumbel' if info['gumbel'] else None
    c2c.train()
    if info['gumbel']:
        for fuser in c2c.fusers: fuser.set_temperature(info['gate_temperature'])
    draws = toss(c2c, g, c2c.plan(ids, **kw, align='section').cuts[0].active, fused & (mask > 0))
    out = c2c(ids, **kw)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(info['loss'], abs=1e-4)
    assert next(draws, None) is None or not info['gumbel'], 'all stored draws were used'
    ours = check_gradients(c2c, info)
    for n, x in ((k.removeprefix('grad.'), x) for k, x in g.items() if k.startswith('grad.')):
        close(ours[n] if n in ours else torch.zeros_like(x), x, 1e-3*max(x.abs().max().item(), 1e-3))
    if 'last_section_logits' in g: assert out.logits.shape[-1] == g['last_section_logits'].shape[-1]


def test_training_aligned(golden, models):
    "Loss and gradient norms of a chat whose models read their own templates."
    info, c2c, batch = aligned_training(golden, models)
    out = c2c(**batch)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(info['loss'], abs=1e-4)
    check_gradients(c2c, info)


# projectors

@pytest.mark.parametrize('layer', range(6))
def test_projector_u01(golden, layer):
    g = load_file(golden/'u01_projector.safetensors')
    inputs = [g[n] for n in ('source_key', 'source_value', 'target_key', 'target_value')]
    p = C2CProjector(2, 12, 2, 16, hidden_dim=32, intermediate_dim=48, dropout=0.).eval()
    p.load_state_dict(torch.load(golden/f'ckpt_s1/final/projector_{layer}.pt', weights_only=True))
    with torch.no_grad():
        for half, x in zip(('key', 'value'), p(*inputs)): close(x, g[f'eval.{layer}.{half}'], 1e-5)
        if layer: return
        p.train()
        for temperature in '1.0', '0.1':
            p.gate_temperature.fill_(float(temperature))
            for half, x in zip(('key', 'value'), p(*inputs, u=torch.stack([g['u_key'], g['u_value']]))): close(x, g[f'train_T{temperature}.0.{half}'], 1e-5)


@pytest.mark.parametrize('level,parts', [(3, C2CProjector.ablations['project']), (2, C2CProjector.ablations['residual']), (4, C2CProjector.ablations['weights']), (1, dict(weights=False)),
    (0, C2CProjector.ablations['full'])])
def test_projector_u02(golden, level, parts):
    g, args = load_file(golden/'u02_other_projectors.safetensors'), read_json(golden/f'unit_ablation/ablation{level}.json')['init_args']
    p = C2CProjector(2, 12, 2, 16, hidden_dim=args['hidden_dim'], intermediate_dim=args['intermediate_dim'], **parts).eval()
    p.load_state_dict(torch.load(golden/f'unit_ablation/ablation{level}.pt', weights_only=True))
    with torch.no_grad(): fused = p(*(g[n] for n in ('source_key', 'source_value', 'target_key', 'target_value')))
    for half, x in zip(('key', 'value'), fused): close(x, g[f'ablation{level}.{half}'], 1e-5)


# tables

@pytest.mark.parametrize('key,ours', [('last_aligned', last_aligned), ('k_nearest', depth_nearest)])
def test_layer_maps(golden, key, ours):
    tables = [t for t in read_json(golden/'eval_text.json')[key] if t[2] == 1]
    assert tables
    for r, s, _, table in tables: assert ours(r, s) == [table[str(i)][0] for i in range(r)], (r, s)


def test_temperatures(golden):
    table = read_json(golden/'eval_text.json')['gate_temperature_schedule_1_0.001_1929']
    for step, value in table: assert exponential_temperature(step, 1., .001, 1929) == pytest.approx(value, rel=1e-5)


# published checkpoints

@pytest.mark.parametrize('name,sharer,dtype', [('ckpt_s1', 'sharer1', torch.float32), ('ckpt_s2', 'sharer2', torch.float32), ('sft_run', None, torch.bfloat16)])
def test_published_checkpoint(golden, models, tmp_path, name, sharer, dtype):
    "Imported tensor for tensor, usable, and an ordinary fuser from then on."
    folder = golden/name/'final'
    fuser = Fuser.from_published(folder)
    assert not fuser.training and fuser.dtype == dtype
    n = len(list(folder.glob('projector_*.pt')))
    assert len(fuser.layer_map) == n and fuser.config.training['imported_from'] == f'{name}/final'
    assert fuser.layer_map == [pairs[0][0] for _, pairs in sorted(((int(t), p) for t, p in read_json(folder/'projector_config.json')['0']['1'].items()))]
    stack = fuser.stacks[0]
    for i in range(n):
        state = torch.load(folder/f'projector_{i}.pt', weights_only=True)
        for k, x in stack.single(i).items(): assert torch.equal(x, state[k]), (i, k)
        assert fuser.open_gates()[i] == (state['key_gate_logit'].item() > 0, state['value_gate_logit'].item() > 0)
    fuser.save_pretrained(tmp_path/'converted')
    assert Fuser.from_pretrained(tmp_path/'converted').fingerprint() == fuser.fingerprint()
    if sharer: fuser.check(models['receiver'], models[sharer])
    with torch.no_grad():
        r, s = fuser.receiver_geometry, fuser.sharer_geometry
        kv = lambda geometry: [(torch.randn(1, h, 3, d).to(dtype), torch.randn(1, h, 3, d).to(dtype)) for h, d in map(geometry.layer, range(geometry.layers))]
        assert all(x is None or torch.isfinite(x).all() for pair in fuser(kv(s), kv(r)) for x in pair)


@pytest.mark.parametrize('part', ['checkpoint-2', 'final'])
def test_published_run_folders(golden, part):
    "A run's intermediate checkpoint and its final one are both importable, and the recipe's model names are kept."
    fuser = Fuser.from_published(golden/'sft_run', part)
    recipe = golden/'sft_run'/'config.json'
    if recipe.exists() and isinstance(read_json(recipe)['model'].get('base_model'), str): assert fuser.config.receiver['name'] == read_json(recipe)['model']['base_model']
