"Training runs of a second: random models that know 340 tokens, chats that are made up, fusers of width 8."
import copy, functools, json, random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from c2c_nb.align import C2CProcessor
from c2c_nb.data import ChatData, register_dataset
from c2c_nb.recipe import recipe_from_dict, set_values
from c2c_nb.task import FuserTask
from c2c_nb.train import Trainer

words = 'the a cat dog tree sun moon reads sings green blue old 12 7.5 why? yes, no. and then Où 東京'.split()
template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
longer = "{% for m in messages %}[{{ m.role[0] }}]: {{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}[a]: {% endif %}"


@functools.cache
def tokenizer(name='one'):
    "A tokenizer of bytes and a few pieces; the names give other pieces and another template."
    t = Tokenizer(kinds.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [' '.join(words)] if name == 'one' else [' '.join(words[::-1]), 'nine nines are eighty one']
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300 if name == 'one' else 330, special_tokens=['<|end|>', '<|pad|>', '<|user|>', '<|assistant|>'], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|end|>', pad_token='<|pad|>', chat_template=template if name == 'one' else longer)


common = dict(vocab_size=340, hidden_size=32, intermediate_size=40, num_attention_heads=4, initializer_range=.2, max_position_embeddings=512, pad_token_id=1, eos_token_id=0, bos_token_id=None)
roles = dict(receiver=('qwen3', dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=8)), llama=('llama', dict(num_hidden_layers=2, num_key_value_heads=4, head_dim=8)), qwen2=('qwen2', dict(num_hidden_layers=4, num_key_value_heads=1)))


@functools.cache
def model(role, seed=0):
    "A random model; the same object in every test, which is how it is seen that nobody changes it."
    kind, more = roles[role]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **more)).eval()


questions = [[dict(role='user', content=x)] for x in ('why?', 'the cat reads', 'Où and then the old green tree sings')]


def chats(n, seed=0, turns=(1, 4), size=(1, 6)):
    "Made up chats of different lengths, an answer last."
    rng = random.Random(f'{n} {seed}')
    say = lambda: ' '.join(rng.choices(words, k=rng.randint(*size)))
    return [[dict(role=role, content=say()) for _ in range(rng.randint(*turns)) for role in ('user', 'assistant')] for _ in range(n)]


@register_dataset
class TinyChats(ChatData):
    rows:int = 16 # how many
    most:int = 1 # turns of the longest
    seed:int = 0 # of what is said
    repeat:int = 0 # all questions, and all answers, are the same (to see that something is learned)
    def columns(self): return ('chat',)
    def open(self):
        made = [[dict(role='user', content='why?'), dict(role='assistant', content='the moon sings')]]*self.rows if self.repeat else chats(self.rows, self.seed, (1, self.most))
        rows = Dataset.from_dict(dict(chat=made))
        return rows.to_iterable_dataset() if self.streaming else rows
    def samples(self, row): return self.from_chat([dict(m) for m in row['chat']])


def recipe(folder, *values, sharers=1, **more):
    "A recipe of a few steps that takes all that can be random: dropout, tossed gates, and a choice of sharers where there are two."
    made = recipe_from_dict(dict(
        model=dict(receiver='receiver', sharers=[f'sharer{j}' for j in range(sharers)], projector=dict(args=dict(hidden_dim=8, intermediate_dim=8, gate_init=1., gate_noise='gumbel', dropout=.2))),
        data=dict(type='TinyChats'), training=dict(learning_rate=3e-3, steps=6, batch_size=3, accumulation=2, precision='fp32', sharer_dropout=.3 if sharers > 1 else 0., gates=dict(final_temperature=.1), bucket=2),
        validation=dict(share=.2, every=3, batch_size=2), output=dict(folder=str(folder), save_every=2, log_every=1)))
    return set_values(made, list(values)) if values else made


def processor(sharers=1, strategy=None): return C2CProcessor(tokenizer(), [tokenizer('one' if strategy == 'shared' else 'two'), tokenizer()][:sharers], strategy)


def task(made, strategy=None, fresh=False):
    "The task of a recipe with the tiny models; `fresh`: with copies of them, for runs that change the receiver."
    given = [model('receiver'), model('llama'), model('qwen2')][:1 + len(made.model.sharers)]
    return FuserTask(made, [copy.deepcopy(m) for m in given] if fresh else given, processor(len(given) - 1, strategy))


class Stopped(Exception): "What interrupts a run here."


def start(made, resume=False, force=False, **kwargs): return Trainer(made, resume, force, task(made, **kwargs), progress=False).start()


def run(made, resume=False, force=False, stop_before=None, **kwargs):
    "Train; or raise `Stopped` when that step would begin."
    it = start(made, resume, force, **kwargs)
    go_on = it.task.before_step
    def before_step(step, steps):
        if step == stop_before: raise Stopped(step)
        go_on(step, steps)
    it.task.before_step = before_step
    it.summary = it.fit()
    return it


def outcome(folder):
    "All that must be the same after runs that should not differ: weights, the newest checkpoint's files, the log and the summary; without times."
    folder = Path(folder)
    timeless = lambda d: {k: v for k, v in d.items() if k not in ('seconds', 'tokens_per_second')}
    newest = max((folder/'checkpoints').glob('step-*'))
    files = [*folder.glob('fuser*/*.safetensors'), *folder.glob('receiver/*.safetensors'), *newest.rglob('*.safetensors'), newest/'optimizer.json']
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(files)} | dict(state=timeless(json.loads((newest/'state.json').read_text())) | dict(identity=None),
        log=[timeless(json.loads(line)) for line in (folder/'log.jsonl').read_text().splitlines()], summary=timeless(json.loads((folder/'summary.json').read_text())), checkpoints=sorted(p.name for p in (folder/'checkpoints').iterdir()))


def assert_same(ours, theirs):
    "Two outcomes are equal to the bit."
    assert ours.keys() == theirs.keys()
    for name in ours: assert ours[name] == theirs[name], f'{name} differs' if isinstance(ours[name], bytes) else f'{name}: {ours[name]} instead of {theirs[name]}'
