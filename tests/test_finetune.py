"Fine-tuning baselines: what learns, what the loss is, saved and gone on with to the last bit, refused before weights are loaded."
import importlib.util, json, math

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, XLNetConfig

import c2c_nb.finetune as room
from c2c_nb.align import C2CProcessor, load_tokenizer
from c2c_nb.batch import encode_sample
from c2c_nb.finetune import FinetuneTask, choose_parameters
from c2c_nb.recipe import DataRecipe, FinetuneRecipe, OutputRecipe, TrainingRecipe, TrainRecipe, ValidationRecipe
from c2c_nb.task import empty_model
from c2c_nb.toy import word_tokenizer
from c2c_nb.train import train
from conftest import root
from tiny import close, common, config_of, configs, named, others, partial, tiny

needs_peft = pytest.mark.skipif(importlib.util.find_spec('peft') is None, reason="peft is not installed: pip install 'c2c_nb[lora]'")
methods = [pytest.param(m, marks=needs_peft) if m == 'lora' else m for m in room.METHODS]
tokenizer = word_tokenizer('aa bb cc dd ee ff gg hh ii jj'.split())
processor = C2CProcessor(tokenizer, [tokenizer], 'shared')


def recipe_for(folder='run', data=None, **kwargs):
    training = dict(dict(learning_rate=1e-2, steps=6, batch_size=4, precision='fp32', warmup_ratio=0.), **kwargs.pop('training', {}))
    return TrainRecipe(finetune=FinetuneRecipe(**dict(dict(model='tiny'), **kwargs)), data=data or DataRecipe('Toy'), training=TrainingRecipe(**training), validation=ValidationRecipe(share=.1), output=OutputRecipe(str(folder), log_every=1))


def copy_of(name, seed=0):
    model = type(tiny(name, seed))(tiny(name, seed).config)
    model.load_state_dict(tiny(name, seed).state_dict())
    return model.eval()


def task_for(name='qwen3', model=None, **kwargs):
    task = FinetuneTask(recipe_for(**kwargs), model or copy_of(name), processor)
    task.load()
    return task


def rows_of(pairs): return [encode_sample(dict(prompt=p, answer=a, end=True), processor) for p, a in pairs]


rows = rows_of([('aa bb cc', ' dd'), ('ee ff gg hh ii jj', ' aa bb'), ('jj aa', ' cc dd ee ff'), ('bb', ' aa')])


def plain_loss(model, rows):
    "Sum over labels of transformers' own loss, a row at a time."
    total = 0.
    for r in rows:
        ids, labels = torch.tensor([r['input_ids']]), torch.tensor([r['labels']])
        total += model(input_ids=ids, labels=labels).loss*int((labels[:, 1:] != -100).sum())
    return total


def loss_of(task, rows):
    inputs, n, _ = task.inputs(rows, 0)
    return task.model(task.send(inputs, 'cpu')), n


def test_golden_chats(golden):
    "The official features of the golden chats, and transformers' loss over the answers' tokens."
    t, made = load_tokenizer(golden/'tokA'), json.loads((golden/'collator.json').read_text())
    model = AutoModelForCausalLM.from_pretrained(golden/'receiver', dtype=torch.float32)
    task = FinetuneTask(recipe_for(), model, C2CProcessor(t, [t], 'shared'))
    task.load()
    encoded = [encode_sample(dict(prompt=c[:-1], answer=c[-1]['content'], end=True), task.processor) for c in made['chats']]
    for row, feature in zip(encoded, made['chat_features']): assert row['input_ids'] == feature['input_ids'] and row['labels'] == feature['labels']
    with torch.no_grad():
        loss, n = loss_of(task, encoded)
        right = lambda name, pad: torch.tensor([f[name] + [pad]*(max(len(g[name]) for g in made['chat_features']) - len(f[name])) for f in made['chat_features']])
        mask = right('labels', -999) != -999                     # padded on the right; the official collator would lose labels of the longer row
        official = model(input_ids=right('input_ids', 0), attention_mask=mask.long(), labels=right('labels', -100)).loss*n
    assert n == sum(l != -100 for f in made['chat_features'] for l in f['labels'])
    close(loss, official, 1e-4); close(loss, plain_loss(model, encoded), 1e-4)


def test_every_architecture():
    "Ragged batches have the loss that their rows have alone: with and without position ids, with scaled and capped logits, tied heads, states."
    seen, task = set(), FinetuneTask(recipe_for(), tiny('qwen3'), processor)
    for name in [*configs, *named, *partial, *others]:
        model = tiny(name)
        causal = room._Causal(model, model).eval()
        with torch.no_grad():
            inputs, n, _ = task.inputs(rows, 0)
            loss, alone = causal(inputs), plain_loss(model, rows)
        assert abs(float(loss - alone)) < 2e-4*max(1, float(alone)), name
        seen |= {('positions', 'position_ids' in causal.keywords), ('plain', causal.plain)}
    assert seen == {(k, v) for k in ('positions', 'plain') for v in (True, False)}


def test_without_padding():
    "A batch of one length has no mask."
    task = task_for()
    inputs, n, tokens = task.inputs([rows[0]]*2, 0)
    assert inputs[1] is None and n == 4 and tokens == 2*len(rows[0]['input_ids'])
    close(task.model(inputs), plain_loss(task.base, [rows[0]]*2), 1e-4)


@pytest.mark.parametrize('tied', [False, True])
def test_what_learns(tied):
    "All; the last layers with norm and head; the last parameters."
    config = type(configs['qwen3'])(**common, num_hidden_layers=5, num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied)
    model = empty_model(config)
    def chosen(method, share):
        model.requires_grad_(False); choose_parameters(model, method, share)
        return [n for n, p in model.named_parameters() if p.requires_grad], [n for n, p in model.named_parameters() if not p.requires_grad]
    assert chosen('full', .6)[1] == []
    for share, first in (.6, 2), (.5, 2), (.2, 4), (1., 0), (.01, 4):
        learned, frozen = chosen('layers', share)
        assert {int(n.split('.')[2]) for n in learned if '.layers.' in n} == set(range(first, 5))
        assert [n for n in learned if '.layers.' not in n] == (['model.embed_tokens.weight', 'model.norm.weight'] if tied else ['model.norm.weight', 'lm_head.weight'])
        assert all(int(n.split('.')[2]) < first for n in frozen if '.layers.' in n)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    for share in .6, .1, 1.:
        learned, frozen = chosen('parameters', share)
        assert frozen + learned == list(sizes)                   # the last ones
        n = sum(sizes[x] for x in learned)
        assert share*sum(sizes.values()) <= n < share*sum(sizes.values()) + sizes[learned[0]] + 1e-6
    with pytest.raises(ValueError, match="did you mean 'layers'"): choose_parameters(model, 'layer')


def test_norms_and_towers():
    "OPT lists its last norm before its layers; a tower for pictures has layers of its own; what comes before the layers stays."
    for name, norm in ('opt', 'model.decoder.final_layer_norm.weight'), ('gemma3_multimodal', 'model.language_model.norm.weight'), ('bloom', 'transformer.ln_f.weight'), ('gpt2', 'transformer.ln_f.weight'), ('bert', 'cls.predictions.transform.LayerNorm.weight'):
        model = empty_model(config_of(name))
        model.requires_grad_(False); choose_parameters(model, 'layers', .5)
        learned = {n for n, p in model.named_parameters() if p.requires_grad}
        assert norm in learned and not any('vision' in n or 'wpe' in n or 'embeddings_layernorm' in n or 'embeddings.LayerNorm' in n for n in learned), name
    config = config_of('gemma3_multimodal')
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers
    model = empty_model(config)
    model.requires_grad_(False); choose_parameters(model, 'layers', .5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if 'vision' in n)


@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('name', ['qwen3', 'gpt2', 'qwen3_moe'])
def test_saved_and_restored(tmp_path, method, name):
    "What learned comes back to the last bit, loads with transformers or peft, and the rest is as it was."
    lora = dict(lora_dropout=0.) if (method, name) == ('lora', 'qwen3_moe') else {}      # peft has no dropout for experts
    task = task_for(name, method=method, share=.5, lora=lora)
    before = {n: p.clone() for n, p in task.base.named_parameters()}
    opt = torch.optim.AdamW(task.groups()[0]['params'], lr=1e-2)
    task.train(True); torch.manual_seed(0)
    for _ in range(2): loss_of(task, rows)[0].backward(); opt.step(); opt.zero_grad()
    task.train(False)
    moved = {n for n, p in task.base.named_parameters() if n not in before or not torch.equal(p, before[n])}
    assert moved == {n for n, p in task.base.named_parameters() if p.requires_grad and p.abs().sum() > 0} and all(p.dtype == torch.float32 for p in task.groups()[0]['params'])
    task.save(tmp_path, dict(steps=2))
    with torch.no_grad(): said = task.next_tokens(['aa bb', 'cc'])
    other = task_for(name, method=method, share=.5, lora=lora, training=dict(seed=7))
    with torch.no_grad(): assert not torch.equal(other.next_tokens(['aa bb', 'cc']), said)
    other.restore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(task.net.state_dict().values(), other.net.state_dict().values()))
    if method == 'lora':
        from peft import PeftModel
        loaded, known = PeftModel.from_pretrained(copy_of(name), tmp_path/'model').eval(), json.loads((tmp_path/'model'/'adapter_config.json').read_text())
        assert (known['r'], known['lora_alpha'], known['lora_dropout'], known['bias']) == (16, 32, lora.get('lora_dropout', .1), 'none') and not (tmp_path/'model'/'model.safetensors').exists()
    else: loaded = AutoModelForCausalLM.from_pretrained(tmp_path/'model').eval()
    assert loaded.dtype == torch.float32
    batch = load_tokenizer(tmp_path/'model')(['aa bb', 'ff bb'], return_tensors='pt')
    with torch.no_grad(): close(loaded(input_ids=batch['input_ids']).logits, task.net(input_ids=batch['input_ids']).logits)
    assert json.loads((tmp_path/'model'/'training.json').read_text()) == dict(steps=2)


@needs_peft
def test_adapters():
    "On all linear layers but the head, in fp32 also where the model is not; other adapters are not taken for these."
    from peft import get_peft_model_state_dict
    base = copy_of('qwen3').bfloat16()
    task = task_for(model=base, method='lora')
    on = {n.split('.lora_')[0].rsplit('.', 1)[1] for n, p in task.net.named_parameters() if p.requires_grad}
    assert on == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert {p.dtype for p in task.groups()[0]['params']} == {torch.float32} and base.dtype == torch.bfloat16
    assert task.describe()['memory']['what stays as it is'] == round(2e-9*tiny('qwen3').num_parameters(), 3)
    for precise in False, True:
        with torch.autocast('cpu', torch.bfloat16, enabled=not precise): loss_of(task, rows)[0].backward()
    assert any(p.grad.abs().sum() > 0 for p in task.groups()[0]['params']) and all(p.grad is None for n, p in task.base.named_parameters() if 'lora_' not in n)
    one, two = (task_for(method='lora', training=dict(seed=s)) for s in (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(get_peft_model_state_dict(one.net).values(), get_peft_model_state_dict(two.net).values()))


@needs_peft
def test_other_adapters(tmp_path):
    task_for(method='lora', lora=dict(target_modules=['q_proj'])).save(tmp_path, {})
    with pytest.raises(ValueError, match='other adapters'): task_for(method='lora').restore(tmp_path)
    with pytest.raises(ValueError, match='does not fit peft.s LoraConfig'): task_for(method='lora', lora=dict(rank=4))
    with pytest.raises(ValueError, match='no_such'): FinetuneTask(recipe_for(method='lora', lora=dict(target_modules=['no_such'])), tiny('qwen3'), processor).describe()


@pytest.mark.parametrize('method', [pytest.param('lora', marks=needs_peft), 'layers'])
def test_resumed(tmp_path, monkeypatch, method):
    "A run that stopped in the middle ends with the same weights, to the last bit, as one that did not."
    monkeypatch.setattr(TrainRecipe, 'check', lambda self, *args, **kwargs: self)        # the name of a model that is at hand
    monkeypatch.setattr('c2c_nb.train.plot_run', lambda *args: None)
    file = tmp_path/'chats.jsonl'
    file.write_text(''.join(json.dumps(dict(prompt=p, answer=a)) + '\n' for p, a in [('aa bb cc', ' dd'), ('ee ff', ' gg'), ('hh ii jj aa', ' bb cc'), ('dd', ' ee')]*4))
    def run(folder, stop_at=None, resume=False):
        recipe = recipe_for(tmp_path/folder, DataRecipe('Chats', dict(data_files=str(file), prompt_field='prompt', answer_field='answer')), method=method, share=.5)
        recipe.output.save_every, recipe.output.keep_best = 3, False
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        task = FinetuneTask(recipe, copy_of('gpt2'), processor)  # with dropout
        def stop(step, steps):
            if step == stop_at: raise KeyboardInterrupt
        task.before_step = stop
        try: train(recipe, resume=resume, task=task, progress=False)
        except KeyboardInterrupt: assert stop_at is not None
        return {n: p.clone() for n, p in task.base.named_parameters()}
    whole = run('whole')
    run('cut', stop_at=4)
    again = run('cut', resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)
    name = 'adapter_model.safetensors' if method == 'lora' else 'model.safetensors'
    assert (tmp_path/'whole'/'model'/name).read_bytes() == (tmp_path/'cut'/'model'/name).read_bytes()


def test_bad_recipes(monkeypatch, tmp_path):
    "All of it known before a weight is loaded."
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', lambda *args, **kwargs: pytest.fail('weights were loaded'))
    make = lambda **kwargs: FinetuneTask(recipe_for(**kwargs), tiny('qwen3'), processor)
    with pytest.raises(ValueError, match="finetune.method is 'loar'; did you mean 'lora'"): make(method='loar')
    for share in 0., -1., 1.2, math.nan:
        with pytest.raises(ValueError, match='finetune.share is'): make(method='layers', share=share)
    with pytest.raises(ValueError, match="finetune.dtype is 'bfloat16', but what is trained is kept in fp32"): make(dtype='bfloat16')
    with pytest.raises(ValueError, match='there is no model'): FinetuneTask(recipe_for(model=str(tmp_path/'nothing')))
    with pytest.raises(ValueError, match='without a processor'): FinetuneTask(recipe_for(), tiny('qwen3'))
    tokenizer.save_pretrained(tmp_path)
    for config, message in (T5Config(), 'is_encoder_decoder=True'), (config_of('bert_encoder')[0], 'is_decoder=False'), (AutoConfig.for_model('vit'), 'ViTConfig is no causal language model'):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message): FinetuneTask(recipe_for(model=str(tmp_path))).describe()


def test_peft_missing(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'peft', None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'c2c_nb\[lora\]'"): FinetuneTask(recipe_for(method='lora'), tiny('qwen3'), processor)


def test_model_that_looks_ahead():
    "A model that sees the answer has nothing to learn, whatever its config says."
    xlnet = AutoModelForCausalLM.from_config(XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=40)).eval()
    task = FinetuneTask(recipe_for(), xlnet, processor)
    with pytest.raises(ValueError, match='looks at the tokens that come after'): task.load()


def test_embedded_world(tmp_path, monkeypatch):
    "The receiver of a world, by its name."
    import tiny_world
    from c2c_nb.toy import get_world
    made = []
    def build(world, progress):
        torch.manual_seed(0)
        made.append(tuple(AutoModelForCausalLM.from_config(world.config(r)).eval() for r in world.roles))
        return made[-1]
    monkeypatch.setattr('c2c_nb.task.build_models', build)
    recipe = recipe_for(tmp_path/'run', DataRecipe('Toy', dict(limit=64)), model=None, world='tiny', world_args=dict(seed=3), attn_implementation='eager')
    task = FinetuneTask(recipe)
    about = task.describe()
    assert about['model'].startswith('tiny-3/receiver') and not made                             # nothing was made for it
    task.load()
    assert len(made) == 1 and task.base is made[0][0]
    assert task.base.config._attn_implementation == 'eager' and task.processor.receiver_tokenizer.get_vocab() == get_world('tiny').tokenizer.get_vocab()
    assert len(task.answer(['sum of 1 2 ? it is'], 1)) == 1
    assert sum(p.numel() for p in task.net.parameters()) == int(about['learned'].split()[0].replace(',', ''))
