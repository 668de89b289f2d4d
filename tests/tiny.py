"Tiny random models of several architectures, fusers between them and ragged batches, for the tests."
import torch, transformers
from transformers import (AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)

from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.projector import get_projector

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

vocab = 60
ends = dict(pad_token_id=0, eos_token_id=None, bos_token_id=None)
common = dict(vocab_size=vocab, hidden_size=32, intermediate_size=40, num_attention_heads=4, initializer_range=.2, **ends)
configs = dict(
    qwen3=Qwen3Config(**common, num_hidden_layers=3, num_key_value_heads=2, head_dim=8),
    qwen2=Qwen2Config(**common, num_hidden_layers=4, num_key_value_heads=1),
    llama=LlamaConfig(**common, num_hidden_layers=2, num_key_value_heads=4, head_dim=8),
    mistral=MistralConfig(**common, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=3),             # shorter than any prompt here
    gemma3=Gemma3TextConfig(**common, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, sliding_window=3, layer_types=['sliding_attention', 'full_attention']*2),
    gpt2=GPT2Config(vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=.2, resid_pdrop=.1, embd_pdrop=.1, attn_pdrop=.1, **ends),
    gptneox=GPTNeoXConfig(**common, num_hidden_layers=2))
architectures = list(configs)

# every other architecture: kind and keywords of its config, made when it is asked for; a sliding window is 6 positions wide
grouped = common | dict(num_hidden_layers=3, num_key_value_heads=2)
headed = grouped | dict(head_dim=8)
multi = dict(vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=.2, **ends)
window = 6
sliding = dict(sliding_window=window)
alternating = dict(num_hidden_layers=4, layer_types=['sliding_attention', 'full_attention']*2, **sliding)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
local = dict(num_local_experts=4, num_experts_per_tok=2)
kinds = dict(num_hidden_layers=4, layer_types=['linear_attention', 'full_attention']*2)
delta = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2)
mamba = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=4, mamba_d_conv=4, mamba_chunk_size=4)
mixed = dict(num_hidden_layers=6, layer_types=['sliding_attention', 'full_attention']*3, num_kv_shared_layers=2, vocab_size_per_layer_input=vocab, hidden_size_per_layer_input=8, **sliding)
latent = common | dict(num_hidden_layers=2, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
routed = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
decoder = dict(vocab_size=vocab, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, encoder_attention_heads=4, decoder_ffn_dim=40, encoder_ffn_dim=40, d_model=32, **ends)

named = dict(                                                    # families that are proved in full
    qwen3_moe=headed | experts, mistral_6=('mistral', headed | sliding), gemma2=headed | alternating | dict(query_pre_attn_scalar=8), gemma3_6=('gemma3_text', headed | alternating),
    phi3=grouped | sliding, olmo2=grouped, smollm3=grouped | dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], use_sliding_window=False),
    opt=dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=3, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64, init_std=.2, **ends),
    falcon_old=('falcon', common | dict(num_hidden_layers=3, multi_query=True)), falcon_new=('falcon', common | dict(num_hidden_layers=3, num_kv_heads=2, new_decoder_architecture=True)),
    falcon_alibi=('falcon', common | dict(num_hidden_layers=3, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    gpt_oss=headed | alternating | local, bloom=dict(vocab_size=vocab, hidden_size=32, n_layer=3, n_head=4, initializer_range=.2, **ends))
partial = dict(                                                  # layers that share keys and values, or keep a state: some layers cannot be fused
    gemma3n=('gemma3n_text', headed | mixed | dict(altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.]*6)), gemma4=('gemma4_text', headed | mixed | dict(global_head_dim=16)),
    qwen3_next=headed | kinds | delta | experts | dict(linear_num_value_heads=4, linear_conv_kernel_dim=4, shared_expert_intermediate_size=16),
    qwen3_5=('qwen3_5_text', headed | kinds | delta | dict(linear_num_value_heads=4, linear_conv_kernel_dim=4)), olmo_hybrid=grouped | kinds | delta | dict(linear_num_value_heads=2),
    bamba=grouped | mamba | dict(num_hidden_layers=4, attn_layer_indices=[1, 3], mamba_expand=2), falcon_h1=headed | mamba | dict(mamba_d_ssm=64),
    granitemoehybrid=grouped | mamba | dict(num_hidden_layers=4, layer_types=['mamba', 'attention']*2, num_local_experts=0, shared_intermediate_size=40, mamba_expand=2),
    lfm2=grouped | dict(num_hidden_layers=4, layer_types=['conv', 'full_attention']*2, conv_L_cache=3, block_auto_adjust_ff_dim=False),
    nemotron_h={k: v for k, v in headed.items() if k != 'num_hidden_layers'} | dict(layers_block_type=['mamba', 'attention', 'mlp', 'mamba', 'attention'], mamba_num_heads=4, mamba_head_dim=16, n_groups=1,
        ssm_state_size=4, conv_kernel=4, expand=2, chunk_size=4))
others = dict(                                                   # many more, proved in short
    qwen2_moe=grouped | experts | dict(shared_expert_intermediate_size=16), llama4=('llama4_text', headed | dict(num_hidden_layers=4, intermediate_size_mlp=40, num_local_experts=2, attention_chunk_size=window)),
    mixtral=headed | sliding | dict(num_local_experts=4), ministral=headed | alternating, ministral3=headed | sliding, gemma=headed, phi=grouped, phimoe=grouped | sliding | dict(num_local_experts=4), olmo=grouped,
    olmo3=grouped | alternating, olmoe=grouped | dict(num_experts=4, num_experts_per_tok=2), gpt_bigcode=multi, gptj=multi | dict(rotary_dim=4), codegen=multi | dict(rotary_dim=4, n_ctx=64),
    gpt_neo=dict(vocab_size=vocab, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[['global', 'local'], 2]], window_size=window, max_position_embeddings=64, initializer_range=.2, **ends),
    mpt=dict(vocab_size=vocab, d_model=32, n_layers=3, n_heads=4, expansion_ratio=2, max_seq_len=64, initializer_range=.2, **ends), stablelm=grouped, cohere=grouped | dict(logit_scale=1.),
    cohere2=headed | alternating | dict(logit_scale=1.), granite=grouped, granitemoe=grouped | dict(num_local_experts=4), starcoder2=grouped | sliding, glm=headed, glm4=headed, glm4_moe=headed | routed,
    exaone4=headed | alternating | dict(sliding_window_pattern=2), nemotron=headed, helium=headed, arcee=headed, apertus=headed, seed_oss=headed, ernie4_5=headed, hunyuan_v1_dense=headed, nanochat=headed, bitnet=headed,
    minimax_m2=headed | local, vaultgemma=headed | alternating | dict(query_pre_attn_scalar=8), diffllama=headed, doge=headed, moshi=headed, persimmon=common | dict(num_hidden_layers=3),
    xglm=dict(vocab_size=vocab, d_model=32, num_layers=3, attention_heads=4, ffn_dim=40, max_position_embeddings=64, init_std=.2, **ends), biogpt=common | dict(num_hidden_layers=3, max_position_embeddings=64),
    ctrl=multi | dict(dff=40), jetmoe=grouped | local | dict(kv_channels=8), bert=common | dict(num_hidden_layers=2, is_decoder=True, max_position_embeddings=64),
    dbrx=dict(vocab_size=vocab, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, attn_config=dict(kv_n_heads=2, clip_qkv=8., rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=32), initializer_range=.2, **ends),
    gemma3_multimodal=('gemma3', dict(text_config=headed | alternating, vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))))
refused = dict(                                                  # each with words of the reason
    mamba=(common | dict(num_hidden_layers=2), 'layer 0 (linear_attention keeps a state of the whole text', 'and 1 more'), mamba2=(dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1, **ends), 'keeps a state of the whole text'),
    falcon_mamba=(common | dict(num_hidden_layers=2), 'keeps a state of the whole text'), rwkv=(dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, **ends), 'puts no keys and values into a transformers cache'),
    jamba=(grouped | dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False), 'layer 0 (linear_attention keeps a state', 'starts from an empty state again', 'in pieces'),
    zamba=(grouped | dict(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2, n_mamba_heads=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False), 'starts from an empty state again'),
    recurrent_gemma=(headed | dict(lru_width=32, attention_window_size=4), 'starts from an empty state again'),
    minimax=(headed | dict(num_hidden_layers=4, layer_types=['linear_attention', 'full_attention']*2, num_local_experts=2, block_size=4), 'MiniMax uses cache of its own'),
    deepseek_v2=(latent | routed | dict(n_group=1, topk_group=1, n_shared_experts=1), 'layer 0 of 2', 'latent attention'), deepseek_v3=(latent | routed | dict(n_group=1, topk_group=1, n_shared_experts=1), 'layer 0 of 2', 'latent attention', 'one shape'),
    minicpm3=(latent, 'latent attention'), glm_moe_dsa=(latent | routed | dict(n_group=1, topk_group=1, n_shared_experts=1, index_head_dim=8, index_n_heads=2, index_topk=4), 'latent attention'),
    openai_gpt=('openai-gpt', multi, 'layer 0', 'puts no keys and values into a transformers cache'), xlnet=(dict(vocab_size=vocab, d_model=32, n_layer=2, n_head=4, d_inner=40, **ends), 'puts no keys and values'),
    bart=(decoder | dict(init_std=.2), 'encoder-decoder'), prophetnet=(dict(vocab_size=vocab, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, **ends), 'encoder-decoder'), whisper=(decoder | dict(init_std=.2), 'encoder-decoder'),
    t5=(dict(vocab_size=vocab, d_model=32, num_layers=2, num_heads=2, d_ff=40), 'encoder-decoder', 'decoder only'), bert_encoder=('bert', common | dict(num_hidden_layers=2, max_position_embeddings=64), 'in pieces', 'is_decoder is False'),
    roberta=(common | dict(num_hidden_layers=2, is_decoder=True, max_position_embeddings=64), 'in pieces', 'counts positions in its own way'))
_models = {}


def config_of(name:str):
    "The config called `name`, and for one that is refused also words of the reason."
    if name in configs: return configs[name]
    entry = (named | partial | others | refused)[name]
    entry = entry if isinstance(entry, tuple) else (entry,)
    kind, keywords, *says = entry if isinstance(entry[0], str) else (name, *entry)
    config = AutoConfig.for_model(kind, **keywords)
    return (config, says) if name in refused else config


def tiny(name:str, seed:int=0):
    "The random model called `name`, in evaluation mode; one for each seed, shared between tests."
    if (name, seed) not in _models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _models[name, seed] = AutoModelForCausalLM.from_config(config_of(name)).eval()
    return _models[name, seed]


def fuser_for(receiver, sharer, seed:int=3, gate:float=1., **kwargs) -> Fuser:
    "A random fuser with all gates open, or closed for a `gate` that is not positive; a list of logits for several layers."
    gates = gate if isinstance(gate, (list, tuple)) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fuser = Fuser.from_models(receiver, sharer, **dict(dict(hidden_dim=16, intermediate_dim=12, gate_init=1. if gates else gate), **kwargs)).eval()
    if gates: set_gates(fuser, gates)
    return fuser


@torch.no_grad()
def set_gates(fuser, logits):
    "Give the gates of keys these logits, those of values the reversed ones."
    for layers, stack in zip(fuser.groups, fuser.stacks):
        stack.projector.key_gate_logit.copy_(torch.tensor([logits[i % len(logits)] for i in layers]))
        stack.projector.value_gate_logit.copy_(torch.tensor([logits[::-1][i % len(logits)] for i in layers]))


def c2c_of(receiver='qwen3', sharers=('llama',), fusion='parallel', gate=1., **kwargs) -> C2CModel:
    "A C2C model of tiny models, sharer j with seed j+1."
    r, ss = tiny(receiver), [tiny(s, j+1) for j, s in enumerate(sharers)]
    return C2CModel(r, ss, [fuser_for(r, s, seed=10+j, gate=gate, **kwargs) for j, s in enumerate(ss)], fusion)


def ids_of(*shape, seed=0, low=1, high=vocab):
    "Random token ids without the pad token."
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def lay_out(rows, where='left', seed=0):
    """One batch from rows of different lengths: dicts of tensors whose first dimension is the position.

    Padding goes left, right, both sides or into the middle; what stands there is rubbish on purpose (other ids, active, any section). Also the mask."""
    g = torch.Generator().manual_seed(seed)
    t = max(len(r['input_ids']) for r in rows) + (2 if where in ('both', 'middle') else 0)
    out = {k: [] for k in rows[0]} | dict(attention_mask=[])
    for row in rows:
        n = len(row['input_ids'])
        spare = t - n
        if where == 'left': slots = range(spare, t)
        elif where == 'right': slots = range(n)
        elif where == 'both': slots = range(spare//2, spare//2 + n)
        else: slots = torch.randperm(t, generator=g)[:n].sort().values.tolist()
        slots = torch.tensor(list(slots))
        mask = torch.zeros(t, dtype=torch.long); mask[slots] = 1
        out['attention_mask'].append(mask)
        for k, x in row.items():
            full = torch.randint(0, 2, (t, *x.shape[1:]), generator=g).to(x.dtype) if x.dtype == torch.bool or 'mask' in k else torch.randint(1, 50, (t, *x.shape[1:]), generator=g).to(x.dtype)
            if k.startswith('sharer_attention_mask'): full.zero_()
            full[slots] = x
            out[k].append(full)
    return {k: torch.stack(v) for k, v in out.items()}


logits_of = dict(output_logits=True, return_dict_in_generate=True)


def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0)


def alone(model, rows, **kwargs):
    "The receiver without any C2C, on a left-padded batch."
    batch = lay_out([dict(input_ids=r) for r in rows])
    return batch, model.generate(**batch, **kwargs)


def ragged_rows(sharers, seed=0, lengths=(9, 6, 3, 8, 7), gaps=True):
    "Five rows of different lengths: all sharers, none, the first alone, any subset by section, sharers with gaps of their own (unless told not to)."
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids, active = ids_of(n, seed=seed + 10*i), torch.ones(n, sharers, dtype=torch.bool)
        sections = (torch.arange(n) == n-1).long()               # the last token alone
        if i == 1: active[:] = False
        if i == 2: active[:, 1:] = False
        if i == 3:
            sections = torch.tensor([0]*2 + [1]*2 + [2]*2 + [5]*(n-6))
            subsets = torch.randint(0, 2, (4, sharers), generator=g).bool()
            active = subsets[[0]*2 + [1]*2 + [2]*2 + [3]*(n-6)]
        if i == 4: sections, active = torch.tensor([0]*3 + [3]*(n-3)), torch.rand(n, sharers, generator=g) < .6
        row = dict(input_ids=ids, active=active, sections=sections)
        for j in range(sharers):
            row[f'sharer_input_ids{j}'] = ids_of(n, seed=seed + 100*j + i)
            mask = torch.ones(n, dtype=torch.long)
            if gaps and i in (0, 4): mask[torch.randint(0, n-1, (2,), generator=g)] = 0
            row[f'sharer_attention_mask{j}'] = mask
        rows.append(row)
    return rows


def call(batch):
    "Keywords of a call from the flat form of `lay_out`."
    out = {k: v for k, v in batch.items() if not k.startswith('sharer_')}
    for name in 'sharer_input_ids', 'sharer_attention_mask':
        found = [batch[k] for k in sorted(batch) if k.startswith(name)]
        if found: out[name] = found
    return out


def one(row): return call({k: v[None] for k, v in row.items()})


def assert_rows_are_alone(c2c, rows, where, steps=4, atol=1e-5):
    "Every row of the batch is what it is in a batch of its own: greedy ids, logits of each step, logits of the last section."
    batch, n_last = call(lay_out(rows, where)), [int((r['sections'] == r['sections'][-1]).sum()) if 'sections' in r else 1 for r in rows]
    with torch.no_grad(): together = c2c(**batch)
    out = c2c.generate(**batch, max_new_tokens=steps, **logits_of)
    for i, row in enumerate(rows):
        with torch.no_grad(): single = c2c(**one(row))
        assert single.logits.shape[1] == n_last[i]
        close(together.logits[i, :n_last[i]], single.logits[0], atol)
        answer = c2c.generate(**one(row), max_new_tokens=steps, **logits_of)
        assert torch.equal(out.sequences[i, -steps:], answer.sequences[0, -steps:]), f'row {i}, padding {where}: other ids than alone'
        for a, b in zip(out.logits, answer.logits): close(a[i], b[0], atol)
        n = len(row['input_ids'])
        assert torch.equal(out.sequences[i, -steps-n:-steps], row['input_ids'])


def looped(fuser, sharer_kv, receiver_kv):
    "The plain way: one projector of the class after the other, in evaluation mode."
    out = list(receiver_kv)
    cls, kwargs = get_projector(fuser.config.projector), fuser.config.projector_args
    for layers, stack in zip(fuser.groups, fuser.stacks):
        for n, i in enumerate(layers):
            j = fuser.layer_map[i]
            p = cls(*fuser.sharer_geometry.layer(j), *fuser.receiver_geometry.layer(i), **kwargs).eval()
            p.load_state_dict(stack.single(n), strict=False)
            out[i] = p(*sharer_kv[j], *receiver_kv[i])
    return out


def kv_for(geometry, b, t, seed):
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(b, h, t, d, generator=g) for _ in range(2)) for h, d in map(geometry.layer, range(geometry.layers))]
