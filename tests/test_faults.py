"Bad input is refused with a message that says what is wrong, and models stay as they were; no kill leaves a fuser that loads but is wrong."
import copy, json, os, pickle, random, select, shutil, signal, time

import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, DeepseekV3Config, DynamicCache, MambaConfig, StaticCache, T5Config)

from c2c_nb.cache import KVGeometry, read_layer
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

from test_contracts import edit, snapshot, weights
from tiny import c2c_of, fuser_for, ids_of, tiny

ids = ids_of(2, 8)
ones = torch.ones_like(ids)


def refused(run, error, *says, models=None):
    "`run` raises `error` whose message has all of `says`; `models` are as before."
    before = None if models is None else snapshot(models)
    with pytest.raises(error) as e: run()
    for text in says: assert text in str(e.value), f'{text!r} is not in: {e.value}'
    if before is not None: assert snapshot(models) == before, 'models are not as they were'
    return str(e.value)


# what is given to a model

bad_calls = dict(
    empty_prompt=(dict(input_ids=ids[:, :0]), 'input_ids has shape (2, 0)', 'empty prompt', 'at least one token'),
    empty_batch=(dict(input_ids=ids[:0]), 'input_ids has shape (0, 8)'),
    one_dimension=(dict(input_ids=ids[0]), 'shape (batch, positions), (8,) was given'),
    a_list=(dict(input_ids=[[1, 2]]), 'input_ids must be a tensor', 'list was given'),
    padded_row=(dict(input_ids=ids, attention_mask=torch.tensor([[1]*8, [0]*8])), 'row 1 of attention_mask is all padding', 'remove it'),
    short_mask=(dict(input_ids=ids, attention_mask=ones[:, 1:]), 'attention_mask has shape (2, 7), (2, 8) was expected'),
    other_batch=(dict(input_ids=ids, attention_mask=ones[:1]), 'attention_mask has shape (1, 8), (2, 8) was expected'),
    mask_is_list=(dict(input_ids=ids, attention_mask=[[1]*8]*2), 'attention_mask must be a tensor', 'list was given'),
    mask_elsewhere=(dict(input_ids=ids, attention_mask=ones.to('meta')), 'attention_mask is on meta, input_ids are on cpu'),
    ids_elsewhere=(dict(input_ids=ids.to('meta')), 'input_ids are on meta, the receiver is on cpu'),
    active_without_sharers=(dict(input_ids=ids, active=ones.bool()), 'active has shape (2, 8), (2, 8, 1) was expected'),
    active_elsewhere=(dict(input_ids=ids, active=ones.bool()[..., None].to('meta')), 'active is on meta'),
    sections_shape=(dict(input_ids=ids, sections=ones[:, :3]), 'sections has shape (2, 3)'),
    sections_fall=(dict(input_ids=ids, sections=torch.arange(8).flip(0).expand(2, -1)), 'sections fall along a row'),
    sections_elsewhere=(dict(input_ids=ids, sections=ones.to('meta')), 'sections is on meta'),
    positions_shape=(dict(input_ids=ids, position_ids=ones[:1]), 'position_ids has shape (1, 8)'),
    sharer_ids_not_a_list=(dict(input_ids=ids, sharer_input_ids=ids), 'sharer_input_ids must be a list', 'Tensor was given'),
    sharer_ids_too_many=(dict(input_ids=ids, sharer_input_ids=[ids, ids]), 'sharer_input_ids must be a list', 'each of the 1 sharers', '2'),
    sharer_ids_length=(dict(input_ids=ids, sharer_input_ids=[ids[:, :5]]), 'sharer_input_ids[0] has shape (2, 5), (2, 8) was expected'),
    sharer_ids_batch=(dict(input_ids=ids, sharer_input_ids=[ids[:1]]), 'sharer_input_ids[0] has shape (1, 8)'),
    sharer_ids_unknown=(dict(input_ids=ids, sharer_input_ids=[ids + 100]), 'its vocabulary has 60'),
    sharer_mask_shape=(dict(input_ids=ids, sharer_attention_mask=[ones[:, 2:]]), 'sharer_attention_mask[0] has shape (2, 6)'),
    sharer_mask_elsewhere=(dict(input_ids=ids, sharer_attention_mask=[ones.to('meta')]), 'sharer_attention_mask[0] is on meta'),
    receiver_ids_unknown=(dict(input_ids=ids + 100, sharer_input_ids=[ids]), 'the ids for the receiver', 'its vocabulary has 60'),
    negative_ids=(dict(input_ids=ids - 50), 'the ids for the receiver go from -44', 'its vocabulary has 60'),
    float_ids=(dict(input_ids=ids.float()), 'input_ids', 'float32'),
    mask_of_biases=(dict(input_ids=ids, attention_mask=torch.where(torch.arange(8) < 2, -1e9, 0.).expand(2, -1)), 'attention_mask holds -1e+09', 'must be 1 for tokens and 0 for padding'),
    mask_of_weights=(dict(input_ids=ids, attention_mask=ones*2), 'attention_mask holds 2'),
    sharer_mask_of_weights=(dict(input_ids=ids, sharer_attention_mask=[ones*.5]), 'sharer_attention_mask[0] holds 0.5'),
    active_for_nobody=(dict(input_ids=ids, active=torch.ones(2, 8, 3, dtype=torch.bool)), 'speaks of 3 sharers, but the model has 1'),
    too_long=(dict(input_ids=ids.repeat(1, 5000)), 'the prompt has 40000 positions, the receiver has 32768', 'shorten'),
    too_far=(dict(input_ids=ids, position_ids=torch.arange(8).expand(2, -1) + 32765), 'the prompt has 32773 positions'),
    sharer_too_long=(dict(input_ids=ids, sharer_input_ids=[ids.repeat(1, 500)], pairing=[ids*0]), 'the prompt has 4000 positions, the sharer 0 has 2048'),
    pairing_without_ids=(dict(input_ids=ids, pairing=[ids]), 'pairing[0] needs sharer_input_ids[0] of shape (2, the sharer'),
    pairing_too_far=(dict(input_ids=ids, sharer_input_ids=[ids[:, :3]], pairing=[ids*0 + 3]), 'pairing[0] goes from 3 to 3', 'columns of sharer_input_ids[0], 0 to 2, or -1'),
    pairing_shape=(dict(input_ids=ids, sharer_input_ids=[ids[:, :3]], pairing=[ids[:, :3]]), 'pairing[0] has shape (2, 3), (2, 8) was expected'),
    pairing_not_a_list=(dict(input_ids=ids, sharer_input_ids=[ids[:, :3]], pairing=ids), 'pairing must be a list', 'Tensor was given'),
    paired_mask=(dict(input_ids=ids, sharer_input_ids=[ids[:, :3]], sharer_attention_mask=[ones], pairing=[ids*0]), 'sharer_attention_mask[0] has shape (2, 8), (2, 3) was expected', 'position of sharer_input_ids[0]'),
)


@pytest.mark.parametrize('case', bad_calls)
def test_bad_call(case):
    kwargs, *says = bad_calls[case]
    c2c = c2c_of()
    for run in (lambda: c2c.generate(**kwargs, max_new_tokens=2)), (lambda: c2c.prefill(**kwargs)), (lambda: c2c(**kwargs)): refused(run, ValueError, *says, models=c2c)


bad_labels = dict(
    everywhere=(dict(labels=ids), 'get no prediction', 'row 0', 'Set the others to -100'),
    nowhere=(dict(labels=ids*0 - 100), 'labels supervise nothing'),
    shape=(dict(labels=ids[:, 1:]), 'labels has shape (2, 7)'),
    before=(dict(labels=torch.where(torch.arange(8) == 4, ids, -100), active=(torch.arange(8) < 5)[None, :, None].expand(2, -1, 1)), 'get no prediction'),
    padding=(dict(labels=torch.where(torch.arange(8) == 7, ids, -100), attention_mask=(torch.arange(8) < 7).long().expand(2, -1)), 'labels supervise nothing'))


@pytest.mark.parametrize('case', bad_labels)
def test_bad_labels(case):
    kwargs, *says = bad_labels[case]
    c2c = c2c_of()
    refused(lambda: c2c(ids, **kwargs), ValueError, *says, models=c2c)


def test_what_generate_cannot_take():
    c2c = c2c_of()
    for kwargs, says in ((dict(inputs_embeds=torch.zeros(2, 8, 32)), 'use input_ids'), (dict(past_key_values=DynamicCache()), 'use cache'), (dict(inputs=ids), 'use input_ids'), (dict(use_cache=False), 'C2C lives in the cache'), (dict(cache_implementation='static'), 'keeps every position')):
        refused(lambda: c2c.generate(ids, **kwargs), ValueError, says, models=c2c)


def filled(model, rows=2, length=5, cache=None):
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad(): model(ids_of(rows, length), past_key_values=cache)
    return cache


def test_a_cache_that_does_not_fit():
    c2c, two = c2c_of(), c2c_of('qwen3', ['llama', 'gpt2'])
    given = lambda cache, text=ids: (lambda: c2c.generate(text, cache=cache, max_new_tokens=2))
    refused(given(filled(c2c.receiver, rows=1)), ValueError, 'made for 1 rows, input_ids has 2', models=c2c)
    refused(given(filled(c2c.receiver, length=8)), ValueError, 'the cache holds 8 positions, input_ids only 8', models=c2c)
    refused(given(((torch.zeros(1),),)), ValueError, 'cache must be a transformers Cache, tuple was given', models=c2c)
    refused(lambda: two.generate(ids, cache=c2c.prefill(ids[:, :5])), ValueError, 'made with 1 sharers, the model has 2', models=two)
    mask = ones.clone(); mask[1, 6:] = 0
    refused(lambda: c2c.generate(ids, mask, cache=filled(c2c.receiver)), ValueError, 'row 1 ends in padding', models=c2c)
    for other in 'qwen2', 'llama', 'gpt2':                       # of a model with other layers or heads
        refused(given(filled(tiny(other))), ValueError, 'cache', models=c2c)


def test_a_cache_of_fixed_size_is_read_right_or_refused():
    receiver, text = tiny('qwen3'), ids_of(1, 5)
    static, dynamic = StaticCache(config=receiver.config, max_cache_len=12), DynamicCache()
    with torch.no_grad(): receiver(text, past_key_values=static); receiver(text, past_key_values=dynamic)
    try: keys, values = read_layer(static, 0)
    except (ValueError, TypeError, IndexError) as e: assert 'DynamicCache' in str(e) or 'static' in str(e).lower()
    else: torch.testing.assert_close(keys, dynamic.layers[0].keys); torch.testing.assert_close(values, dynamic.layers[0].values)


def test_a_sliding_cache_is_continued_right_or_refused():
    "A cache that forgets positions (made with the config of a model with a sliding window): what is new may be longer than the window."
    c2c, text = c2c_of('mistral', ['llama']), ids_of(1, 12)
    expected = c2c.generate(text, cache=filled(c2c.receiver, 1, 6), max_new_tokens=3)
    sliding = filled(c2c.receiver, 1, 6, DynamicCache(config=c2c.receiver.config))
    try: got = c2c.generate(text, cache=sliding, max_new_tokens=3)
    except ValueError as e:
        assert 'does not keep all' in str(e) and 'DynamicCache()' in str(e)
        assert sliding.get_seq_length() == 6, 'the refused cache was changed'
    else: assert torch.equal(got, expected)


def test_padding_that_a_model_cannot_leave_out():
    "A sliding window counts padding between tokens: refused where the row is longer than the window, for a receiver alone."
    mask = ones.clone(); mask[1, 3:5] = 0
    other = dict(input_ids=ids, attention_mask=mask, sharer_attention_mask=[ones])                  # only the sharer has tokens there
    refused(lambda: c2c_of('mistral', ['llama']).generate(**other, max_new_tokens=2), ValueError, 'row 1 has padding between tokens in what the receiver reads', 'sliding window of 3')
    c2c_of('qwen3', ['mistral']).generate(**other, max_new_tokens=2)


def test_ids_at_padding_may_be_anything():
    "A pad id that the sharer's vocabulary does not have is harmless."
    r = tiny('qwen3')
    torch.manual_seed(0)
    s = AutoModelForCausalLM.from_config(type(tiny('llama').config)(**{**tiny('llama').config.to_dict(), 'vocab_size': 50})).eval()
    c2c = C2CModel(r, [s], [fuser_for(r, s)])
    text, mask = ids_of(1, 6, high=50), torch.tensor([[0, 0] + [1]*6])
    assert torch.equal(c2c.generate(torch.cat([torch.full((1, 2), 59), text], 1), mask, max_new_tokens=3)[:, -3:], c2c.generate(text, max_new_tokens=3)[:, -3:])


# what a fuser and a model are made of

def test_models_whose_cache_cannot_be_fused():
    small = dict(hidden_size=32, num_hidden_layers=2, vocab_size=50)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**small))
    latent = DeepseekV3Config(**small, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=2)
    refused(lambda: KVGeometry.of(mamba), ValueError, 'mamba', 'keeps no attention keys and values', 'layer 0')
    refused(lambda: Fuser.from_models(mamba, tiny('llama')), ValueError, 'keeps no attention keys')
    refused(lambda: Fuser.from_models(tiny('qwen3'), mamba), ValueError, 'keeps no attention keys')
    refused(lambda: C2CModel(tiny('qwen3'), [mamba], [fuser_for(tiny('qwen3'), tiny('llama'))]), ValueError, 'keeps no attention keys')
    refused(lambda: KVGeometry.of(latent), ValueError, 'deepseek_v3', 'latent attention', 'one shape')
    refused(lambda: KVGeometry.of(T5Config(d_model=32, num_layers=2, num_heads=2, vocab_size=50)), ValueError, 't5', 'causal language model')


def test_a_fuser_for_other_models():
    r, s, other = tiny('qwen3'), tiny('llama'), tiny('gpt2')
    fuser = fuser_for(r, s)
    before = [[p.requires_grad for p in m.parameters()] for m in (r, s, other)]
    with torch.no_grad():
        refused(lambda: C2CModel(r, [other], [fuser]), ValueError, 'this fuser does not fit these models', 'sharer: the fuser was made for KVGeometry(layers=2, kv_heads=4, head_dim=8)', 'train a fuser for this pair')
        refused(lambda: C2CModel(s, [r], [fuser]), ValueError, 'receiver: the fuser was made for', 'sharer: the fuser was made for')
    refused(lambda: C2CModel(r, [], []), ValueError, 'no sharers were given')
    refused(lambda: C2CModel(r, [s], []), ValueError, '1 sharers but 0 fusers')
    refused(lambda: C2CModel(r, [s], [fuser], fusion='both'), ValueError, "fusion='both'", 'parallel', 'sequential')
    refused(lambda: C2CModel(r, s, [fuser]), (ValueError, TypeError), 'list')
    assert before == [[p.requires_grad for p in m.parameters()] for m in (r, s, other)]


def test_a_fuser_that_cannot_be():
    r, s = tiny('qwen3'), tiny('llama')
    for kwargs, error, *says in (
            (dict(layer_map='nearest'), ValueError, "layer_map='nearest'", 'last_aligned, depth_nearest'), (dict(layer_map=[0, 1]), ValueError, 'the layer map has 2 entries, the receiver has 3 layers'),
            (dict(layer_map=[0, 1, 2]), ValueError, 'names sharer layers [2]', 'the sharer has 2 layers'), (dict(layer_map=[0, -1, 1]), ValueError, 'names sharer layers [-1]'), (dict(layer_map=[None]*3), ValueError, 'the layer map is empty'),
            (dict(key_space='plain'), ValueError, "key_space='plain'", 'unrotated'), (dict(projector='Nonesuch'), KeyError, "no projector called 'Nonesuch'", 'C2CProjector'), (dict(num_layers=1), ValueError, 'at least 2'),
            (dict(gate_noise='uniform'), ValueError, "gate_noise='uniform'", 'logistic'), (dict(hiden_dim=3), TypeError, 'hiden_dim')):
        refused(lambda: fuser_for(r, s, **kwargs), error, *says)
    refused(lambda: Fuser({}), TypeError, 'a FuserConfig is needed, dict was given')
    refused(lambda: Fuser.from_models('qwen3', s), (ValueError, TypeError), 'model')


def test_keys_without_rotation_need_a_rotation():
    "A model without RoPE is refused before anything is run."
    r, s = tiny('gpt2'), tiny('llama')
    def run(): C2CModel(r, [s], [fuser_for(r, s, key_space='unrotated')]).generate(ids, max_new_tokens=2)
    refused(run, ValueError, 'gpt2', 'no rotary position embedding', "key_space='cache'")


def test_types_may_be_mixed():
    "Published fusers are in bf16; models may be in any type. The answer has the receiver's type."
    r, s = tiny('qwen3'), tiny('llama', 1)
    for fuser_type in torch.bfloat16, torch.float32:
        for model_type in torch.float32, torch.float16, torch.bfloat16:
            c2c = C2CModel(copy.deepcopy(r).to(model_type), [copy.deepcopy(s).to(model_type)], [fuser_for(r, s).to(fuser_type)])
            cache = c2c.prefill(ids)
            assert cache.layers[0].keys.dtype == model_type
            reference = C2CModel(r, [s], [fuser_for(r, s)]).prefill(ids)
            assert (cache.layers[-1].values.float() - reference.layers[-1].values).abs().max() < (1e-5 if fuser_type == model_type == torch.float32 else .3)


# NaN and inf

def sick(value, where='v_proj', layer=0):
    model = copy.deepcopy(tiny('llama', 1))
    with torch.no_grad(): model.model.layers[layer].self_attn.get_submodule(where).weight[0, 0] = value
    return model


@pytest.mark.filterwarnings('ignore:this fuser')
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('where', ['k_proj', 'v_proj'])
def test_nan_in_a_sharer_is_refused(value, where):
    r, s = tiny('qwen3'), sick(value, where)
    c2c = C2CModel(r, [s], [fuser_for(r, tiny('llama', 1))], strict=False)
    half = 'keys' if where == 'k_proj' else 'values'
    labels = ids.clone(); labels[:, :5] = -100
    active = (torch.arange(8) < 4)[None, :, None].expand(2, -1, 1)
    for run in (lambda: c2c.generate(ids, max_new_tokens=2)), (lambda: c2c.prefill(ids)), (lambda: c2c(ids)), (lambda: c2c(ids, labels=labels, active=active)):
        refused(run, ValueError, f'sharer 0 has NaN or inf in the {half} of layer 0', models=c2c)


@pytest.mark.filterwarnings('ignore:this fuser')
@pytest.mark.parametrize('how', ['closed gates', 'inactive', 'one half closed', 'layer not mapped'])
def test_nan_passes_where_nobody_listens(how):
    r, s = tiny('qwen3'), sick(float('nan'), layer=1)             # values of the last layer alone are ill
    healthy = tiny('llama', 1)
    kwargs = {'closed gates': dict(gate=-1.), 'inactive': dict(), 'one half closed': dict(), 'layer not mapped': dict(layer_map=[0, 0, None])}[how]
    fuser = fuser_for(r, healthy, **kwargs)
    if how == 'one half closed':
        with torch.no_grad(): fuser.stacks[0].projector.value_gate_logit.fill_(-1.)
    active = {'active': torch.zeros(2, 8, 1, dtype=torch.bool)} if how == 'inactive' else {}
    ours, expected = (C2CModel(r, [x], [fuser], strict=False).generate(ids, **active, max_new_tokens=3) for x in (s, healthy))
    assert torch.equal(ours, expected)


def test_a_fuser_that_overflows_is_named():
    r, s = tiny('qwen3'), tiny('llama', 1)
    fuser = fuser_for(r, s)
    with torch.no_grad(): fuser.stacks[0].projector.key_proj_out.bias[1, 0] = float('inf')
    c2c = C2CModel(r, [s], [fuser])
    refused(lambda: c2c.generate(ids, max_new_tokens=2), ValueError, "although all sharers' caches are finite", "Look at the fuser's weights", models=c2c)


# saved fusers

@pytest.fixture
def saved(tmp_path):
    "A saved fuser that a test may damage."
    fuser_for(tiny('qwen3'), tiny('llama', 1)).save_pretrained(tmp_path/'fuser')
    return tmp_path/'fuser'


def change(folder, **new):
    file = folder/'config.json'
    config = json.loads(file.read_text())
    for k, v in new.items():
        if v is ...: del config[k]
        else: config[k] = v
    file.write_text(json.dumps(config))


def cut(file, n): file.write_bytes(file.read_bytes()[:n])


def flip(file):
    data = bytearray(file.read_bytes()); data[-500] ^= 64; file.write_bytes(data)


damages = dict(
    no_weights=(FileNotFoundError, lambda d: weights(d).unlink(), 'holds no model.safetensors', 'not a saved fuser'),
    no_config=(FileNotFoundError, lambda d: (d/'config.json').unlink(), 'holds no config.json', 'not a saved fuser'),
    truncated=(ValueError, lambda d: cut(weights(d), -100), 'truncated'),
    truncated_header=(ValueError, lambda d: cut(weights(d), 50), 'truncated'),
    empty_weights=(ValueError, lambda d: cut(weights(d), 0), 'truncated'),
    not_safetensors=(ValueError, lambda d: weights(d).write_bytes(b'x'*5000), 'is not a safetensors file'),
    flipped_bit=(ValueError, lambda d: flip(weights(d)), 'fingerprint'),
    not_json=(ValueError, lambda d: (d/'config.json').write_text('{"a":'), 'is not valid JSON', 'damaged'),
    not_a_dictionary=(ValueError, lambda d: (d/'config.json').write_text('[1]'), 'not the config of a fuser'),
    a_models_config=(ValueError, lambda d: (d/'config.json').write_text('{"model_type": "qwen3"}'), 'not the config of a fuser'),
    newer=(ValueError, lambda d: change(d, format_version=99), 'format version 99', 'upgrade c2c_nb'),
    version_text=(ValueError, lambda d: change(d, format_version='2'), 'config.json'),
    unknown_key=(ValueError, lambda d: change(d, colour='red'), 'colour', 'another version'),
    missing_key=(ValueError, lambda d: change(d, receiver_geometry=...), 'receiver_geometry', 'config.json'),
    bad_geometry=(ValueError, lambda d: change(d, receiver_geometry=dict(layers=3)), 'config.json'),
    no_geometry=(ValueError, lambda d: change(d, receiver_geometry=None), 'config.json'),
    bad_map=(ValueError, lambda d: change(d, layer_map=[0, 'x', 1]), 'config.json'),
    map_is_text=(ValueError, lambda d: change(d, layer_map='last_aligned'), 'config.json'),
    map_is_none=(ValueError, lambda d: change(d, layer_map=None), 'config.json'),
    unknown_argument=(ValueError, lambda d: change(d, projector_args=dict(hiden_dim=3)), 'config.json', 'hiden_dim'),
    arguments_are_a_list=(ValueError, lambda d: change(d, projector_args=[3]), 'config.json'),
    wider=(ValueError, lambda d: change(d, projector_args=dict(hidden_dim=32, intermediate_dim=12, gate_init=1.)), ''),
    unknown_projector=((KeyError, ValueError), lambda d: change(d, projector='Nonesuch'), 'Nonesuch', 'C2CProjector'),
    integers=(ValueError, lambda d: edit(d, **{'key_in.weight': load_file(weights(d))['stacks.0.projector.key_in.weight'].int()}), ''),
)


@pytest.mark.parametrize('case', damages)
def test_damaged_fuser(saved, case):
    error, damage, *says = damages[case]
    damage(saved)
    message = refused(lambda: Fuser.from_pretrained(saved), error, *says)
    assert str(saved) in message or 'Nonesuch' in message, f'the message does not say where: {message}'


def test_no_fuser_at_all(tmp_path, saved):
    refused(lambda: Fuser.from_pretrained(tmp_path/'nothing'), FileNotFoundError, 'there is no folder')
    refused(lambda: Fuser.from_pretrained(tmp_path), FileNotFoundError, 'holds no config.json')
    refused(lambda: Fuser.from_pretrained(saved/'config.json'), FileNotFoundError, 'is a file')
    refused(lambda: Fuser.from_published(tmp_path/'nothing'), FileNotFoundError, 'there is no folder')
    refused(lambda: C2CModel.from_pretrained(saved), ValueError, 'does not say which receiver it was made for', 'load the models yourself')


@pytest.mark.parametrize('content', ['notes.txt', '{"model_type": "qwen3"}', '3', '["layer_map"]', '{', '{"layer_map": 1}'])
def test_folders_of_others_are_not_overwritten(tmp_path, content):
    "An existing folder that does not hold a fuser: nothing is written, nothing removed."
    folder = tmp_path/'folder'; folder.mkdir()
    (folder/('config.json' if content != 'notes.txt' else content)).write_text(content)
    refused(lambda: fuser_for(tiny('qwen3'), tiny('llama')).save_pretrained(folder), FileExistsError, str(folder), 'nothing was written')
    assert [p.read_text() for p in folder.iterdir()] == [content] and [p.name for p in tmp_path.iterdir()] == ['folder']


def test_where_a_fuser_may_be_saved(tmp_path):
    fuser = fuser_for(tiny('qwen3'), tiny('llama'))
    (tmp_path/'file').write_text('x')
    refused(lambda: fuser.save_pretrained(tmp_path/'file'), FileExistsError, 'is a file')
    (tmp_path/'empty').mkdir()
    for folder in tmp_path/'empty', tmp_path/'new'/'deep', tmp_path/'a.b c':
        fuser.save_pretrained(folder)
        assert Fuser.from_pretrained(folder).fingerprint() == fuser.fingerprint()
    (tmp_path/'empty'/'notes.txt').write_text('mine')
    fuser.save_pretrained(tmp_path/'empty')
    assert (tmp_path/'empty'/'notes.txt').read_text() == 'mine'
    assert not [p for p in tmp_path.rglob('.*')]


def test_a_failing_save_keeps_what_was_there(tmp_path, monkeypatch):
    first, second = (fuser_for(tiny('qwen3'), tiny('llama'), seed=s) for s in (1, 2))
    first.save_pretrained(tmp_path/'fuser')
    def full(*args, **kwargs): raise OSError('no space left on device')
    monkeypatch.setattr('c2c_nb.fuser.save_file', full)
    refused(lambda: second.save_pretrained(tmp_path/'fuser'), OSError, 'no space')
    refused(lambda: second.save_pretrained(tmp_path/'other'), OSError, 'no space')
    assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() == first.fingerprint() and [p.name for p in tmp_path.iterdir()] == ['fuser']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('fresh', [False, True], ids=['over an older one', 'new folders'])
def test_killed_while_saving(tmp_path, fresh):
    "Killed (-9) at any moment, a fuser loads and is one of those that were saved, or it says that it is damaged. Saving again helps."
    fusers, rng, outcomes = [fuser_for(tiny('qwen3'), tiny('llama', 1), seed=s, hidden_dim=96, intermediate_dim=96) for s in (1, 2)], random.Random(0), []
    known = {f.fingerprint() for f in fusers}
    for moment in range(12):
        parent = tmp_path/str(moment)
        fusers[0].save_pretrained(parent/'0')
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                for n in range(1, 1000): fusers[n % 2].save_pretrained(parent/(str(n) if fresh else '0')); os.write(write, b'.')
            finally: os._exit(1)
        try:
            assert select.select([read], [], [], 60)[0], 'the child saves nothing'
            time.sleep(rng.random()*.05)
        finally: os.kill(child, signal.SIGKILL); os.waitpid(child, 0); os.close(read); os.close(write)
        for folder in sorted(p for p in parent.iterdir() if not p.name.startswith('.')):
            try: outcomes.append(Fuser.from_pretrained(folder).fingerprint())
            except ValueError as e: assert not fresh and 'different saves' in str(e), str(e); outcomes.append('refused')
            assert outcomes[-1] in known | {'refused'}, 'a wrong fuser was loaded'
            fusers[1].save_pretrained(folder)
            assert Fuser.from_pretrained(folder).fingerprint() == fusers[1].fingerprint()
    assert len(set(outcomes)) > 1


@pytest.mark.parametrize('stop', ['save_file', 'fsync', 'first replace', 'second replace'])
def test_interrupted_between_the_steps_of_saving(tmp_path, monkeypatch, stop):
    "The same at each step, one by one: after it nothing is done any more, not even cleaning up."
    first, second = (fuser_for(tiny('qwen3'), tiny('llama', 1), seed=s) for s in (1, 2))
    first.save_pretrained(tmp_path/'fuser')
    class Killed(BaseException): pass
    def die(*args, **kwargs): raise Killed
    real, count = os.replace, iter(range(10))
    def replace(*args):
        if next(count) == ('first replace', 'second replace').index(stop): raise Killed
        return real(*args)
    if stop == 'save_file': monkeypatch.setattr('c2c_nb.fuser.save_file', die)
    elif stop == 'fsync': monkeypatch.setattr('c2c_nb.fuser.os.fsync', die)
    else: monkeypatch.setattr('c2c_nb.fuser.os.replace', replace)
    monkeypatch.setattr('c2c_nb.fuser.shutil.rmtree', lambda *args, **kwargs: None)
    with pytest.raises(Killed): second.save_pretrained(tmp_path/'fuser')
    monkeypatch.undo()
    try: assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() in (first.fingerprint(), second.fingerprint())
    except ValueError as e: assert 'different saves' in str(e)
    second.save_pretrained(tmp_path/'fuser')
    assert Fuser.from_pretrained(tmp_path/'fuser').fingerprint() == second.fingerprint()


# published checkpoints

class Evil:
    "Runs code when it is unpickled."
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)


@pytest.fixture
def published(golden, tmp_path):
    "A copy of a published checkpoint that a test may damage."
    shutil.copytree(golden/'ckpt_s1'/'final', tmp_path/'run'/'final', copy_function=shutil.copyfile)
    for p in (tmp_path/'run').rglob('*'): p.chmod(0o755 if p.is_dir() else 0o644)
    return tmp_path/'run'/'final'


def state(d, change=lambda x: x, i=3):
    file = d/f'projector_{i}.pt'
    torch.save(change(torch.load(file, weights_only=True)), file)


def describe(d, change):
    for i in range(6):
        file = d/f'projector_{i}.json'
        file.write_text(json.dumps(change(json.loads(file.read_text()))))


def mapping(d, table): (d/'projector_config.json').write_text(json.dumps(table))


published_damages = dict(
    malicious=(ValueError, lambda d: torch.save({'key_in.weight': Evil(d/'pwned')}, d/'projector_3.pt'), 'projector_3.pt', 'could run code', 'not loaded'),
    malicious_object=(ValueError, lambda d: torch.save(Evil(d/'pwned'), d/'projector_0.pt'), 'projector_0.pt', 'could run code'),
    old_pickle=(ValueError, lambda d: (d/'projector_2.pt').write_bytes(pickle.dumps(Evil(d/'pwned'))), 'projector_2.pt'),
    truncated=(ValueError, lambda d: cut(d/'projector_3.pt', 2000), 'projector_3.pt cannot be read', 'truncated'),
    empty=(ValueError, lambda d: cut(d/'projector_3.pt', 0), 'projector_3.pt cannot be read'),
    text=(ValueError, lambda d: (d/'projector_3.pt').write_text('version https://git-lfs.github.com/spec/v1'), 'projector_3.pt'),
    a_list=(ValueError, lambda d: torch.save([torch.zeros(1)], d/'projector_3.pt'), 'does not hold a state dict'),
    numbered=(ValueError, lambda d: torch.save({1: torch.zeros(1)}, d/'projector_3.pt'), 'projector_3.pt'),
    foreign=(ValueError, lambda d: torch.save({'weight': torch.zeros(1)}, d/'projector_3.pt'), 'do not fit', 'missing', 'unexpected: weight'),
    misshapen=(ValueError, lambda d: state(d, lambda s: s | {'key_in.bias': torch.zeros(5)}), 'key_in.bias has shape (5,)'),
    integers=(ValueError, lambda d: state(d, lambda s: {k: v.long() for k, v in s.items()}), 'projector_3.pt'),
    no_projector=(FileNotFoundError, lambda d: (d/'projector_3.pt').unlink(), 'projector_3.pt is missing', 'incomplete'),
    no_description=(FileNotFoundError, lambda d: (d/'projector_3.json').unlink(), 'projector_3.json is missing'),
    no_map=(FileNotFoundError, lambda d: (d/'projector_config.json').unlink(), 'projector_config.json is missing'),
    one_more=(ValueError, lambda d: shutil.copy(d/'projector_3.pt', d/'projector_9.pt'), 'projector_9.pt', 'does not name'),
    other_description=(ValueError, lambda d: (d/'projector_3.json').write_text('{}'), '2 different descriptions'),
    no_class=(ValueError, lambda d: describe(d, lambda c: {}), 'projector_'),
    description_is_a_list=(ValueError, lambda d: describe(d, lambda c: []), 'projector_'),
    no_arguments=(ValueError, lambda d: describe(d, lambda c: c | dict(init_args={})), 'final', 'init_args'),
    unknown_argument=(ValueError, lambda d: describe(d, lambda c: c | dict(init_args=c['init_args'] | dict(colour=1))), 'colour'),
    unknown_class=((KeyError, ValueError), lambda d: describe(d, lambda c: c | {'class': 'AllInOneProjector'}), 'AllInOneProjector', 'C2CProjector'),
    map_not_json=(ValueError, lambda d: (d/'projector_config.json').write_text('{'), 'projector_config.json is not valid JSON'),
    map_is_a_list=(ValueError, lambda d: mapping(d, []), 'has no layer map for sharer 1'),
    map_is_empty=(ValueError, lambda d: mapping(d, {'0': {'1': {}}}), 'projector_'),
    map_of_text=(ValueError, lambda d: mapping(d, {'0': {'1': {'0': 'ab'}}}), 'projector_config.json'),
    map_incomplete=(ValueError, lambda d: mapping(d, {'0': {'1': {'0': [[0]]}}}), 'projector_config.json'),
    another_sharer=(ValueError, lambda d: mapping(d, {'0': {'2': {'0': [[0, 0]]}}}), 'no layer map for sharer 1'),
    several_sources=(ValueError, lambda d: mapping(d, {'0': {'1': {str(i): [[0, i], [1, i]] for i in range(6)}}}), 'several sharer layers'),
)


@pytest.mark.parametrize('case', published_damages)
def test_damaged_published_checkpoint(published, case):
    error, damage, *says = published_damages[case]
    damage(published)
    refused(lambda: Fuser.from_published(published), error, *says)
    assert not (published/'pwned').exists(), 'code in a pickle was run'


def test_other_files_beside_a_published_checkpoint(published):
    "Files that are no part of the format do not disturb."
    shutil.copy(published/'projector_3.pt', published/'projector_old.pt')
    (published/'README.md').write_text('hello')
    (published.parent/'config.json').write_text('[]')
    assert len(Fuser.from_published(published).layer_map) == 6


def test_a_saved_fuser_is_not_a_published_one_and_back(published, saved):
    refused(lambda: Fuser.from_pretrained(published), FileNotFoundError, 'from_published')
    refused(lambda: Fuser.from_published(saved), FileNotFoundError, 'projector_config.json is missing')


def test_what_a_receiver_or_sharer_cannot_do():
    c2c = c2c_of('lfm2', ['llama'])
    refused(lambda: c2c.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=3), ValueError, 'cannot go back', 'leave assistant_model')
    r = copy.deepcopy(tiny('qwen3')); r.gradient_checkpointing_enable(); r.train()
    s = tiny('llama', 1)
    refused(lambda: C2CModel(r, [s], [fuser_for(r, s)]).prefill(ids), ValueError, 'kept nothing in its cache', 'gradient_checkpointing_disable')
    c2c = c2c_of('qwen3', ['gpt2'])
    c2c.follow_response = True                                   # the sharer has 64 positions
    refused(lambda: c2c.generate(ids_of(1, 62), max_new_tokens=6), ValueError, 'the sharer 0 has 64', models=c2c)
    assert c2c.generate(ids_of(1, 62), max_new_tokens=2).shape == (1, 64)
