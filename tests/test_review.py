"Faults that a review of training found, each as it was seen."
import json, os
from pathlib import Path

import pytest, torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from c2c_nb.align import C2CProcessor, load_tokenizer, read_chat
from c2c_nb.fuser import Fuser
from c2c_nb.model import C2CModel
from c2c_nb.recipe import set_values
from c2c_nb.train import Trainer, read_log, train
from conftest import root, run_python
from tiny_train import model, recipe, run, start, tokenizer


def test_fuser_of_a_receiver_that_learned(tmp_path):
    "It belongs to the receiver as it was saved with it, and says so; the one it began with is refused."
    import copy
    from c2c_nb.task import FuserTask
    made = recipe(tmp_path/'run', 'training.freeze=[sharer]', 'training.steps=2', 'training.learning_rate=1e-2')
    done = train(made, task=FuserTask(made, [copy.deepcopy(model('receiver')), model('llama')], C2CProcessor(tokenizer('one'), [tokenizer('two')])), progress=False)
    fuser = Fuser.from_pretrained(tmp_path/'run'/'fuser')
    assert fuser.config.receiver['name'] == str(tmp_path/'run'/'receiver')
    learned, sharers = AutoModelForCausalLM.from_pretrained(tmp_path/'run'/'receiver').eval(), list(done.task.c2c.sharers)
    C2CModel(learned, sharers, [fuser])
    with pytest.raises(ValueError, match='receiver'): C2CModel(model('receiver'), sharers, [fuser])


def test_gradients_of_followed_answers_reach_the_receiver(golden):
    "Finite differences agree with the gradient of the receiver's weights."
    receiver, sharer = (AutoModelForCausalLM.from_pretrained(golden/m, dtype=torch.float64).eval() for m in ('receiver', 'sharer2'))
    fuser = Fuser.from_published(golden/'ckpt_s2'/'final').double().eval()
    t = load_tokenizer(golden/'tokA')
    c2c = C2CModel(receiver, [sharer], [fuser], follow_response=True, processor=C2CProcessor(t, [t])).eval()
    receiver.requires_grad_(True)
    batch = c2c.processor([dict(role='user', content='What is the capital of France?')], answers='Paris it is.', follow=True)
    loss = lambda: c2c.answer_loss(c2c.plan(**batch, align='section'))
    loss().backward()
    for name in 'model.layers.0.self_attn.k_proj.weight', 'model.layers.2.self_attn.v_proj.weight':
        w = receiver.get_parameter(name)
        direction = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            values = []
            for sign in 1, -1:
                w.add_(sign*1e-4*direction); values.append(loss().item()); w.sub_(sign*1e-4*direction)
        assert (w.grad*direction).sum().item() == pytest.approx((values[0] - values[1])/2e-4, rel=1e-3, abs=1e-5)      # fused values are rounded to fp32 on the way


@pytest.mark.parametrize('follow', [False, True])
def test_rows_longer_than_a_model(tmp_path, follow):
    "A model with few positions: what does not fit is counted, and the run ends well."
    import copy
    short = copy.deepcopy(model('llama')); short.config.max_position_embeddings = 24
    made = recipe(tmp_path/'run', 'training.steps=2', f'model.follow_response={str(follow).lower()}', 'data.args.rows=40', 'data.args.most=4')
    from c2c_nb.task import FuserTask
    task = FuserTask(made, [model('receiver'), short], C2CProcessor(tokenizer('one'), [tokenizer('two')]))
    assert task.positions == [512, 24]
    done = train(made, task=task, progress=False)
    assert any('would read more than its 24 positions' in p for p in done.reports['samples'].problems)


def test_the_next_step_is_planned_before_validation(tmp_path, monkeypatch):
    "However slow the planning thread is, and however long validation takes, a step is planned with training's soft gates."
    import time
    seen, plain, asked = [], Trainer._bites, Trainer._held_out_loss
    def slow(self, step):
        time.sleep(.2)
        out = plain(self, step); seen.append([p.gates for (p, *_), _, _ in out]); return out
    def long(self): time.sleep(.6); return asked(self)
    monkeypatch.setattr(Trainer, '_bites', slow); monkeypatch.setattr(Trainer, '_held_out_loss', long)
    run(recipe(tmp_path/'run', 'training.steps=3', 'validation.every=1', 'validation.share=0.3'))
    assert len(seen) == 3 and all(g is None for bites in seen for gates in bites for g in gates)


def test_forced_changes_count(tmp_path):
    "A run that goes on with another learning rate has that learning rate."
    run(recipe(tmp_path/'run', 'training.steps=8', 'output.save_every=2', 'output.keep_last=10'))
    import shutil
    for n in range(3, 9): shutil.rmtree(tmp_path/'run'/'checkpoints'/f'step-{n:08d}', ignore_errors=True)
    changed = recipe(tmp_path/'run', 'training.steps=8', 'output.save_every=2', 'output.keep_last=10', 'training.learning_rate=1e-6', 'training.weight_decay=0.5')
    again = start(changed, resume=True, force=True)
    assert again.step == 2 and all(g['lr'] <= 1e-6 and g['weight_decay'] == .5 for g in again.opt.param_groups)


def test_force_throws_away_runs_only(tmp_path):
    (tmp_path/'mine'/'model').mkdir(parents=True); (tmp_path/'mine'/'model'/'weights').write_text('precious')
    with pytest.raises((FileExistsError, ValueError), match='something else'): Trainer(recipe(tmp_path/'mine'), force=True, progress=False)
    assert (tmp_path/'mine'/'model'/'weights').read_text() == 'precious'


def test_the_recipe_decides_not_the_launcher(tmp_path):
    "What `accelerate launch` sets in the environment changes neither precision nor the size of gradients; spread models are refused."
    def losses(folder, **env):
        code = f"from tiny_train import recipe, run\nrun(recipe({str(folder)!r}, 'training.steps=2', 'output.log_every=1'))"
        done = run_python(code, root/'tests', PYTHONPATH=f'{root}{os.pathsep}{root/"tests"}', **env)
        return done.stderr if done.returncode else [(r['loss'], r['grad_norm']) for r in read_log(folder) if 'loss' in r]
    plain = losses(tmp_path/'a')
    assert len(plain) == 2 and isinstance(plain, list)
    assert losses(tmp_path/'b', ACCELERATE_MIXED_PRECISION='bf16', ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4') == plain
    assert 'which does not fit this loop' in losses(tmp_path/'c', ACCELERATE_USE_FSDP='true')


def test_closed_for_ever_is_refused(tmp_path):
    with pytest.raises(ValueError, match='nothing can be learned'): start(recipe(tmp_path/'run', 'training.gates.noise=null', 'model.projector.args.gate_init=-1'))


def test_what_stands_between_prompt_and_answer(assets):
    "gpt-oss begins its answers with a channel: it is learned with the answer."
    t = load_tokenizer(assets/'tokenizers'/'qwen3')
    t.chat_template = (assets/'chat_templates'/'gpt-oss.jinja').read_text()
    row = C2CProcessor(t, [t]).encode([dict(role='user', content='Hi')], 'Hello.')
    said = t.decode([i for i in row['labels'] if i != -100])
    whole = t.apply_chat_template([dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')], tokenize=False)
    assert whole.endswith(said) and '<|message|>Hello.' in said


def test_none_of_the_checkpoints_is_good(tmp_path):
    run(recipe(tmp_path/'run', 'training.steps=2', 'output.save_every=1'))
    for f in (tmp_path/'run'/'checkpoints').glob('*/state.json'): f.write_text('{}')
    before = (tmp_path/'run'/'log.jsonl').read_bytes()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='none of the checkpoints'): start(recipe(tmp_path/'run', 'training.steps=2', 'output.save_every=1'), resume=True)
    assert (tmp_path/'run'/'log.jsonl').read_bytes() == before


def test_a_batch_is_planned_on_the_cpu_for_models_elsewhere():
    "As in training on a GPU; what reads at once says that the ids are in the wrong place."
    import copy
    there = [copy.deepcopy(m).to('meta') for m in (model('receiver'), model('llama'))]
    c2c = C2CModel(*there[:1], there[1:], [Fuser.from_models(*there, hidden_dim=8).to('meta').train()], strict=False, processor=C2CProcessor(tokenizer('one'), [tokenizer('two')]))
    batch = c2c.processor([dict(role='user', content='why?')], answers='the moon sings')
    plan = c2c.plan(**batch, align='section')
    assert plan.ids.device.type == 'cpu' and plan.supervised.shape[1] and plan.to('meta').ids.device.type == 'meta'
    with pytest.raises(ValueError, match='the receiver is on meta'): c2c(batch['input_ids'])
