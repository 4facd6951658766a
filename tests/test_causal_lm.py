"""The head that is found in a model reproduces its logits, or the model is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from repo_ops import linear_logps
from repo_ops.causal_lm import check_head, find_head

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "phi": {},  # a head with a bias
}


def build(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **MODELS[model_type]}))
    for parameter in model.parameters():  # biases start at 0, where dropping one would not show
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def hidden_and_logits(model, ids):
    seen = {}
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("hidden", inputs[0]))
    logits = model(ids).logits
    hook.remove()
    return seen["hidden"], logits


@pytest.mark.parametrize("model_type", MODELS)
def test_log_probabilities_are_those_of_the_models_logits(model_type):
    model, ids = build(model_type), torch.randint(3, 64, (2, 7))
    hidden, logits = hidden_and_logits(model, ids)
    check_head(model, hidden, logits)
    found = linear_logps(hidden[:, :-1], targets=ids[:, 1:], **find_head(model).arguments(hidden[:, :-1]))
    expected = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.logps.double(), expected, atol=1e-5, rtol=0)


def test_an_unknown_key_that_may_scale_the_logits_is_refused():
    model = build("llama")
    model.config.logit_multiplier = 2.0
    with pytest.raises(ValueError, match=r"model\.config\.logit_multiplier: expected no unknown key"):
        find_head(model)


def test_check_head_refuses_a_model_whose_logits_come_about_otherwise():
    model, ids = build("llama"), torch.randint(3, 64, (2, 7))
    hidden, logits = hidden_and_logits(model, ids)
    with pytest.raises(ValueError, match="its logits differ from its head's"):
        check_head(model, hidden, 2 * logits)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="expected a causal language model"):
        find_head(build("llama").model)


# unsloth #9331: a fused loss read the head's own weight, and its adapter never trained
def test_a_lora_adapter_on_the_head_trains_as_in_the_model():
    peft = pytest.importorskip("peft")
    model = build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"]))
    base = model.get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0, where A has no gradient
            parameter.data.normal_()
    ids = torch.randint(3, 64, (2, 7))
    hidden, logits = hidden_and_logits(base, ids)
    check_head(base, hidden, logits)
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden, weights = hidden[:, :-1].detach(), torch.randn(2, 6)
    found = linear_logps(hidden, targets=ids[:, 1:], **find_head(base).arguments(hidden)).logps
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    mine = torch.autograd.grad((found * weights).sum(), trained)
    true = torch.autograd.grad((expected * weights).sum(), trained)
    assert len(mine) == 2
    for a, b in zip(mine, true, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
