"""patch_causal_lm: log-probabilities and entropies of the models' own logits, undone without a trace."""

import copy
import inspect

import pytest
import torch
from test_causal_lm import MODELS, build
from transformers import AutoModelForCausalLM

from repo_ops import Options, get_objective, patch_causal_lm, policy_loss


def batch():
    ids = torch.randint(3, 64, (2, 7))
    labels = ids.clone()
    labels[0, :3], labels[1, 5:] = -100, -100  # a prompt, and padding
    return ids, labels


def truth(logits, labels, temperature=1.0):
    """[B, T] log-probabilities, entropies and where they are scored, in the order of the labels; from full logits."""
    log_probs = (logits.double() / temperature).log_softmax(-1)
    logps = log_probs[:, :-1].gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)[:, :-1]
    mask = labels != -100
    mask[:, 0] = False
    first = torch.zeros(len(labels), 1, dtype=torch.float64)
    return (*(torch.where(mask, torch.cat([first, x], 1), 0.0) for x in (logps, entropy)), mask)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", MODELS)
def test_outputs_are_those_of_the_models_logits(model_type):
    model, (ids, labels) = build(model_type), batch()
    logits = model(ids).logits
    undo = patch_causal_lm(model)
    out = model(ids, labels=labels, temperature=0.7)
    logps, entropy, mask = truth(logits, labels, 0.7)
    close(out.logps, logps)
    close(out.entropy, entropy)
    assert torch.equal(out.mask, mask)
    assert "logits" not in out
    assert "loss" not in out
    assert torch.equal(model(ids).logits, logits)
    undo()
    assert "forward" not in model.__dict__
    assert "forward" not in model.get_output_embeddings().__dict__
    assert not model.get_output_embeddings()._forward_hooks
    assert torch.equal(model(ids).logits, logits)


def test_gradients_are_those_of_full_logits():
    model, (ids, labels) = build("gemma2"), batch()
    weights = torch.randn(2, 7)
    logps, entropy, _ = truth(model(ids).logits, labels)
    want = torch.autograd.grad((weights * (logps + 0.1 * entropy)).sum(), list(model.parameters()))
    patch_causal_lm(model)
    out = model(ids, labels=labels)
    got = torch.autograd.grad((weights * (out.logps + 0.1 * out.entropy)).sum(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_shift_labels_and_temperatures_per_sequence_and_token():
    model, (ids, labels) = build("llama"), batch()
    logits = model(ids).logits
    patch_causal_lm(model)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    logps, _, mask = truth(logits, labels)
    out = model(ids, shift_labels=shifted)
    close(out.logps[:, :-1], logps[:, 1:])
    assert torch.equal(out.mask[:, :-1], mask[:, 1:])
    rows = torch.tensor([0.5, 2.0])
    close(model(ids, labels=labels, temperature=rows).logps[1:], truth(logits, labels, 2.0)[0][1:])
    each = 0.5 + torch.rand(2, 7)
    before = torch.cat([each[:, 1:], each[:, :1]], 1)  # a label's temperature divides the logits of the position before
    close(model(ids, labels=labels, temperature=each).logps, truth(logits, labels, before[..., None])[0])


def test_generation_and_copies_are_the_models_own():
    model, (ids, labels) = build("qwen3"), batch()
    settings = {"max_new_tokens": 3, "do_sample": False}
    want = model.generate(ids, **settings)
    patch_causal_lm(model)
    assert torch.equal(model.generate(ids, **settings), want)
    assert {"input_ids", "labels", "shift_labels", "temperature"} <= set(inspect.signature(model.forward).parameters)
    twin = copy.deepcopy(model)  # a reference policy is made this way
    for parameter in twin.parameters():
        parameter.data.zero_()
    uniform = -torch.log(torch.tensor(64.0))
    out = twin(ids, labels=labels)
    torch.testing.assert_close(out.logps, torch.where(out.mask, uniform, 0.0))


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_lora_through_peft(target):
    peft = pytest.importorskip("peft")
    model, (ids, labels) = build("llama"), batch()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    trained = [p for p in model.parameters() if p.requires_grad]
    logps, _, _ = truth(model(input_ids=ids).logits, labels)
    want = torch.autograd.grad(logps.sum(), trained)
    undo = patch_causal_lm(model)
    out = model(input_ids=ids, labels=labels)
    close(out.logps, logps)
    for g, w in zip(torch.autograd.grad(out.logps.sum(), trained), want, strict=True):
        assert w.norm() > 0
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5)
    with model.disable_adapter():
        close(model(input_ids=ids, labels=labels).logps, truth(model(input_ids=ids).logits, labels)[0])
    undo()


@pytest.mark.parametrize("options", [None, Options(operand_dtype=torch.float32)])
def test_under_autocast_logits_stay_float32_and_operands_may(options):
    model, (ids, labels) = build("llama"), batch()
    undo = patch_causal_lm(model, options=options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=labels)
        undo()
        hidden = model.model(ids).last_hidden_state
    operands = [hidden, model.lm_head.weight]
    if options is None:
        operands = [x.bfloat16() for x in operands]
    close(out.logps, truth(operands[0].float() @ operands[1].float().T, labels)[0], 1e-5)


def test_a_router_loss_is_passed_on():
    config = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    from test_causal_lm import SMALL
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL, **config))
    ids, labels = batch()
    want = model(ids).aux_loss
    patch_causal_lm(model)
    torch.testing.assert_close(model(ids, labels=labels).aux_loss, want)


def test_refusals():
    model, (ids, labels) = build("llama"), batch()
    undo = patch_causal_lm(model)
    with pytest.raises(RuntimeError, match="its forward is patched already"):
        patch_causal_lm(model)
    with pytest.raises(ValueError, match="logits_to_keep: expected none beside labels"):
        model(ids, labels=labels, logits_to_keep=3)
    with pytest.raises(ValueError, match="temperature: expected labels"):
        model(ids, temperature=2.0)
    with pytest.raises(ValueError, match=r"labels: expected shape \[2, 7\]"):
        model(ids, labels=labels[:, :5])
    with pytest.raises(ValueError, match="targets: expected ids from 0 to 63"):
        model(ids, labels=labels.clamp_min(0) + 64)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # what accelerate does
    with pytest.raises(RuntimeError, match="was wrapped after patch_causal_lm; undo that first"):
        undo()
    model.forward = ours
    undo()
    with pytest.raises(RuntimeError, match="undone already"):
        undo()
    for other in (model.model, "Qwen/Qwen3-0.6B"):
        with pytest.raises(TypeError, match="expected a causal language model"):
            patch_causal_lm(other)


def test_a_forward_that_goes_around_its_head_is_refused():
    class Around(type(build("llama"))):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            from transformers.modeling_outputs import CausalLMOutputWithPast

            return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)

    model, (ids, labels) = Around(build("llama").config), batch()
    patch_causal_lm(model)
    with pytest.raises(RuntimeError, match="expected the forward of Around to call its output embedding"):
        model(ids, labels=labels)


def collate(rows):
    """Trainer keeps `labels` for the loss function; the forward gets them as `shift_labels`."""
    labels = torch.stack([row["labels"] for row in rows])
    shifted = torch.cat([labels[:, 1:], torch.full((len(rows), 1), -100)], 1)
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": labels, "shift_labels": shifted}


def sft(outputs, labels, num_items_in_batch=None):
    return -outputs.logps.sum() / num_items_in_batch


def grpo(outputs, labels, num_items_in_batch=None):
    advantages = torch.tensor([1.0, -0.5])[: len(labels)]
    objective = get_objective("dapo")
    return policy_loss(
        outputs.logps, advantages, objective=objective, mask=outputs.mask, num_items=num_items_in_batch
    ).loss


@pytest.mark.parametrize("loss", [sft, grpo])
def test_trainer_with_compute_loss_func(loss, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = build("llama").train()
    rows = [
        dict(zip(("input_ids", "labels"), pair, strict=True)) for _ in range(4) for pair in zip(*batch(), strict=True)
    ]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    parameters = {}
    for patched in (False, True):
        twin = copy.deepcopy(model)
        if patched:
            patch_causal_lm(twin)
        trainer = Trainer(twin, arguments, train_dataset=rows, data_collator=collate, compute_loss_func=None)
        trainer.compute_loss_func = loss if patched else (lambda outputs, *a, **k: loss(eager(outputs, a[0]), *a, **k))
        trainer.train()
        parameters[patched] = [p.detach().clone() for p in twin.parameters()]
        assert all(
            torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
        )
    for a, b, start in zip(parameters[False], parameters[True], model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        assert not torch.equal(a, start)


def eager(outputs, labels):
    """The same outputs from full logits, in the order of shift_labels."""
    from types import SimpleNamespace

    logps, entropy, mask = truth(outputs.logits, labels)
    return SimpleNamespace(logps=logps[:, 1:].float(), entropy=entropy[:, 1:].float(), mask=mask[:, 1:])
