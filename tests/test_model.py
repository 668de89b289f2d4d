"C2CModel with its processor: what is saved and found, and what does not go together."
import pytest, torch
from transformers import AutoModelForCausalLM

from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.fuser import Fuser, tokenizer_fingerprint
from c2c_nb.model import C2CModel

from conftest import root, run_python
from fake_hub import fake_hub


@pytest.fixture(scope='module')
def pair(golden):
    "Two models, their tokenizers, and a function that makes a fuser for them."
    r, s = (AutoModelForCausalLM.from_pretrained(golden/n).eval() for n in ('receiver', 'sharer1'))
    a, b = load_tokenizer(golden/'tokA'), load_tokenizer(golden/'tokB')
    def fuser(**kwargs):
        torch.manual_seed(0)
        return Fuser.from_models(r, s, hidden_dim=16, intermediate_dim=12, gate_init=1., **kwargs).eval()
    return r, s, a, b, fuser


chat = [dict(role='user', content='What is the capital of France?')]


@pytest.mark.parametrize('strategy', ['first', 'longest', 'offsets'])
def test_the_processor_is_found_beside_the_fuser(pair, tmp_path, strategy):
    r, s, a, b, fuser = pair
    c2c = C2CModel(r, [s], [fuser(receiver_tokenizer=a, sharer_tokenizer=b, alignment=strategy)], processor=C2CProcessor(a, [b], strategy))
    c2c.save_pretrained(tmp_path/'fuser')
    again = C2CModel.from_pretrained(tmp_path/'fuser')
    assert again.processor.strategies == [strategy]
    assert again.chat(chat, max_new_tokens=5) == c2c.chat(chat, max_new_tokens=5)
    both = C2CModel.from_pretrained([tmp_path/'fuser', tmp_path/'fuser'], fusion='sequential', follow_response=True)
    assert both.processor.strategies == [strategy]*2 and both.fusion == 'sequential' and both.follow_response
    assert isinstance(both.chat(chat, max_new_tokens=3), str)


def test_tokenizers_are_found_by_the_models_names(pair, golden, tmp_path):
    "Without a saved processor; and there may be none."
    r, s, a, b, fuser = pair
    fuser(alignment='longest').save_pretrained(tmp_path/'fuser')
    assert C2CModel.from_pretrained(tmp_path/'fuser').processor.strategies == ['longest']
    bare = AutoModelForCausalLM.from_pretrained(golden/'receiver')
    bare.save_pretrained(tmp_path/'receiver')
    bare = AutoModelForCausalLM.from_pretrained(tmp_path/'receiver')
    Fuser.from_models(bare, s, hidden_dim=16, intermediate_dim=12).save_pretrained(tmp_path/'other')
    found = C2CModel.from_pretrained(tmp_path/'other')
    assert found.processor is None
    with pytest.raises(ValueError, match='chat needs tokenizers'): found.chat(chat)


def test_an_imported_fuser_learns_where_it_belongs(pair, golden, tmp_path):
    r, s, a, b, _ = pair
    imported = Fuser.from_published(golden/'ckpt_s1'/'final')
    imported.config.alignment = None
    assert not (imported.config.receiver or {}).get('weights')
    c2c = C2CModel(r, [s], [imported], processor=C2CProcessor(a, [b], 'longest'))
    c2c.save_pretrained(tmp_path/'fuser')
    again = Fuser.from_pretrained(tmp_path/'fuser')
    assert again.config.alignment == 'longest' and again.config.receiver_tokenizer == tokenizer_fingerprint(a) and again.config.receiver['weights']
    with pytest.raises(ValueError, match='does not fit'): C2CModel(s, [r], [again])


def test_a_padded_batch_does_not_change_a_tokenizer(pair):
    r, s, a, b, fuser = pair
    before = tokenizer_fingerprint(a)
    a.pad_token = a.pad_token or a.eos_token
    a(['one', 'one and two and three'], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(a) == before
    C2CModel(r, [s], [fuser(receiver_tokenizer=a, sharer_tokenizer=b)], processor=C2CProcessor(a, [b]))


def test_another_alignment_than_the_fusers(pair):
    r, s, a, b, fuser = pair
    made = fuser(alignment='longest')
    with pytest.warns(UserWarning, match="aligned by 'longest', the processor aligns them by 'offsets'"): C2CModel(r, [s], [made], processor=C2CProcessor(a, [b], 'offsets'))
    with pytest.raises(ValueError, match='made for 2 sharers, 1 were given'): C2CModel(r, [s], [made], processor=C2CProcessor(a, [b, b], 'longest'))
    with pytest.raises(ValueError, match='sharer tokenizer'): C2CModel(r, [s], [fuser(sharer_tokenizer=b)], processor=C2CProcessor(a, [a]))


def test_a_model_that_cannot_be_found_is_named(pair, tmp_path):
    r, s, a, b, fuser = pair
    made = fuser()
    made.config.sharer['name'] = 'nobody/nothing'
    made.save_pretrained(tmp_path/'fuser')
    with pytest.raises(OSError, match="made for 'nobody/nothing'"): C2CModel.from_pretrained(tmp_path/'fuser')
    with pytest.raises(ValueError, match='2 folders were given for 1 fusers'): C2CModel(r, [s], [made]).save_pretrained(tmp_path/'a', tmp_path/'b')


PUSH = """
from transformers import AutoModelForCausalLM
from c2c_nb.model import C2CModel
c2c = C2CModel.from_pretrained({folder!r})
print('pushed', *c2c.push_to_hub('me/mine', token='hf_test'))
again = C2CModel.from_pretrained('me/mine')
chat = [dict(role='user', content='What is the capital of France?')]
print(again.processor.strategies, again.chat(chat, max_new_tokens=5) == c2c.chat(chat, max_new_tokens=5))
"""


def test_there_and_back_over_the_hub(pair, tmp_path):
    "huggingface_hub's own client carries fuser, card and processor to a hub in a thread; one name brings all of it back."
    r, s, a, b, fuser = pair
    C2CModel(r, [s], [fuser(alignment='offsets')], processor=C2CProcessor(a, [b])).save_pretrained(tmp_path/'fuser')
    with fake_hub() as (hub, address):
        done = run_python(PUSH.format(folder=str(tmp_path/'fuser')), cwd=root, timeout=120, HF_ENDPOINT=address, HF_HUB_OFFLINE='0', TRANSFORMERS_OFFLINE='0', HF_HOME=str(tmp_path/'home'), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1')
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['offsets'] True" and f'pushed {address}/me/mine' in done.stdout
    assert {'README.md', 'config.json', 'model.safetensors', 'processor_config.json', 'receiver_tokenizer/tokenizer.json', 'sharer_tokenizers/0/tokenizer.json'} <= set(hub.repos['me/mine']['main'])
