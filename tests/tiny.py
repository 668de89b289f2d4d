"Tiny random models of several architectures, fusers between them and ragged batches, for the tests."
import torch, transformers
from transformers import (AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)

from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel

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
_models = {}


def tiny(name:str, seed:int=0):
    "The random model called `name`, in evaluation mode; one for each seed, shared between tests."
    if (name, seed) not in _models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _models[name, seed] = AutoModelForCausalLM.from_config(configs[name]).eval()
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
