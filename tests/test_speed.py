"Timing leaves nothing behind, counts what is done, and the record keeps the project's bar."
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.speed import Timing, time_stages
from conftest import root


def model(cls, config, layers, **kwargs):
    return cls(config(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, **kwargs)).eval()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    receiver, sharers = model(Qwen3ForCausalLM, Qwen3Config, 3, eos_token_id=None), [model(LlamaForCausalLM, LlamaConfig, n, eos_token_id=2) for n in (2, 4)]
    return C2CModel(receiver, sharers, [Fuser.from_models(receiver, s, hidden_dim=16, intermediate_dim=16, gate_init=1.).eval() for s in sharers])


def hooks(c2c): return [h for m in c2c.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_two_sharers_two_sections_and_padding(pair):
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    sections = torch.tensor([[0]*4 + [1]*3 + [2]*2, [0]*2 + [1]*3 + [2]*4])
    timing = time_stages(pair, ids, mask, new_tokens=3, repeats=2, sections=sections)
    assert {s: [len(x) for x in repeats] for s, repeats in timing.seconds['cpu'].items()} == {s: [2, 2] if 'further' in s else [1, 1] for s in timing.seconds['wall']}
    assert all(x > 0 for s in ('receiver prefill', 'sharer prefill', 'fusion', 'last section', 'products') for repeat in timing.seconds['wall'][s] for x in repeat)
    both, (first, second) = timing.work['products']['flops'], [sum(p.numel() for p in f.parameters() if p.dim() == 3) for f in pair.fusers]
    assert both % (2*(first + second)) == 0                      # every cut runs both fusers on the same positions


def test_a_failing_answer_leaves_no_hooks(pair, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('broken on purpose')
    monkeypatch.setattr(pair.sharers[1].model.layers[2], 'forward', broken)
    with pytest.raises(RuntimeError, match='on purpose'): time_stages(pair, torch.randint(3, 50, (1, 5)), new_tokens=2, repeats=1)
    assert hooks(pair) == []


def test_a_receiver_that_would_stop_is_held(pair):
    pair.receiver.generation_config.eos_token_id = list(range(3, 49))
    pair.receiver.generation_config.max_length = 6
    timing = time_stages(pair, torch.randint(3, 50, (1, 5)), new_tokens=6, repeats=1, warmup=0)
    assert [len(x) for x in timing.seconds['wall']['further token']] == [5]
    assert hooks(pair) == []


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_the_record_keeps_the_bar(device):
    file = root/f'nbs/results/speed_{device}.json'
    if device == 'cuda' and not file.exists(): pytest.skip('not measured on a GPU yet')
    timing = Timing.load(file)
    assert {'command', 'seed', 'name', 'torch', 'transformers', 'threads'} <= set(timing.about) and timing.about['prompt'] == 128
    if device == 'cpu':
        assert timing.ratios()['first token'][1] <= 1.1
        assert timing.ratios()['further token'][1] <= 1.03
