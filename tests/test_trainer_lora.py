"""LoRA: what is trained, the reference beneath it, the merged export; and layers that are computed again."""

import copy
from pathlib import Path

import pytest
import torch
from test_trainer_learner import batch, run_backward, small_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import repo_ops
from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.learner import Learner, count_items
from repo_ops.trainer.lora import add_lora, merge_lora, without_lora
from repo_ops.trainer.models import load_model
from repo_ops.trainer.models.export import export_model

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, **sizes, tie_word_embeddings=tied)).eval()


def gpt2(tied: bool) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, **sizes, tie_word_embeddings=tied)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model: torch.nn.Module) -> None:
    """Gives the adapters values as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


# GPT-2 keeps its weights transposed, and its layers have biases
@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["v_proj", "lm_head"]), (llama, "all-linear"), (gpt2, "all-linear")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_start_as_nothing_can_be_switched_off_and_merge(make, targets, tied: bool, tmp_path: Path) -> None:
    model = make(tied)
    before = logits(model)
    add_lora(model, rank=3, alpha=6, targets=targets)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    disturb(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    with without_lora(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    _, tokenizer = load_model("tiny")
    export_model(model, tokenizer, tmp_path, Ranks())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.tie_word_embeddings is (tied and "lm_head" not in targets)
    torch.testing.assert_close(logits(plain), adapted, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)  # exporting left it alone


def test_an_adapter_is_added_to_bfloat16_weights_before_they_are_rounded() -> None:
    model = llama(tied=False).bfloat16()
    add_lora(model, rank=3, alpha=6, targets=["v_proj"])
    disturb(model)
    layer = model.model.layers[0].self_attn.v_proj
    exact = layer.weight.double() + 2 * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    merged = merge_lora(model, model.state_dict())["model.layers.0.self_attn.v_proj.weight"]
    assert merged.dtype == torch.bfloat16
    # float32 sums differ from the exact ones by far less than a bfloat16 step: nearly all round alike
    assert (merged == exact.bfloat16()).float().mean() > 0.99


def test_the_reference_is_the_model_without_its_adapters() -> None:
    objective = repo_ops.get_objective("repo", beta=0.3)
    model = small_model().double()  # products of weights, once in one order and once in another
    add_lora(model, rank=3, alpha=6, targets=["q_proj", "up_proj", "lm_head"])
    disturb(model.double())
    learner = Learner(model, objective, temperature=0.8, max_tokens=9)
    assert learner.reference is learner.backbone  # no copy
    loss, gradients = run_backward_of_adapters(learner)
    # the same policy with a frozen copy of the model beneath: merged weights, gradients of B and A by the chain rule
    beneath = small_model().double()
    merged = copy.deepcopy(beneath)
    merged.config.tie_word_embeddings = False
    merged.lm_head.weight = torch.nn.Parameter(beneath.lm_head.weight.detach().clone())
    merged.load_state_dict(merge_lora(model, model.state_dict()))
    plain = Learner(merged, objective, temperature=0.8, max_tokens=9)
    assert plain.reference is not None
    plain.reference.model.load_state_dict({**beneath.state_dict(), "lm_head.weight": beneath.lm_head.weight})
    expected, of_weights = run_backward(plain, batch())
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        layer = model.get_submodule(name.split(".lora_")[0])
        of_weight = of_weights[name.split(".lora_")[0] + ".weight"]
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        by_hand = 2 * (b.T @ of_weight if ".lora_A." in name else of_weight @ a.T)
        torch.testing.assert_close(gradient, by_hand, rtol=1e-6, atol=1e-9, msg=name)


def run_backward_of_adapters(learner: Learner) -> tuple[float, dict[str, torch.Tensor]]:
    live = [s for s in batch() if learner.is_live(s)]
    loss, _ = learner.backward(live, learner.pack(live), count_items(batch()))
    found = {n: p.grad for n, p in learner.backbone.model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in learner.backbone.model.parameters() if not p.requires_grad)
    return float(loss), found


@pytest.mark.parametrize("adapted", [False, True])
def test_recomputed_layers_have_the_same_gradients(adapted: bool) -> None:
    losses, gradients, calls = [], [], []
    for recompute in (False, True):
        model, seen = small_model(), [0]
        if adapted:
            add_lora(model, rank=3, alpha=6, targets=["q_proj", "lm_head"])
            disturb(model)
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda *_, seen=seen: seen.__setitem__(0, seen[0] + 1))
        learner = Learner(model, repo_ops.get_objective("repo"), recompute=recompute)
        seen[0] = 0
        live = [s for s in batch() if learner.is_live(s)]
        loss, _ = learner.backward(live, learner.pack(live), count_items(batch()))
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(seen[0])
    assert calls == [1, 2]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    for again, once in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=0)
