"""The head of a Hugging Face causal language model, with everything that stands between it and the logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SOFTCAPS = ("final_logit_softcapping",)
"""Config keys of a final softcap: Gemma 2 and 3 and their kin."""
SCALES: dict[str, Callable[[float, str], float]] = {
    "logit_scale": lambda value, model_type: value,  # Cohere: attribute and config key
    "lm_head_multiplier": lambda value, model_type: value,  # Falcon-H1
    "output_multiplier": lambda value, model_type: value,
    "logits_scaling": lambda value, model_type: value if model_type.startswith("hyperclovax") else 1.0 / value,
}
"""Config keys of a factor on the logits, each with how it is applied: Granite divides, HyperCLOVA X multiplies."""
SUSPICIOUS = re.compile(r"(logits?|lm_head|output).*(scal|mult|cap|temperature)|softcap", re.IGNORECASE)
HARMLESS = re.compile(r"att|router|gate|expert|mlp|vision|image|audio|output_(attentions|hidden|router)")
"""Keys that look like one of the above and concern another part of the model."""


class Lora(NamedTuple):
    """scaling * B(A(dropout(hidden))), added to the logits."""

    a: nn.Linear
    b: nn.Linear
    scaling: float
    dropout: nn.Module


@dataclass(frozen=True, eq=False)
class CausalLMHead:
    """What `linear_logps` and `linear_policy_loss` need of a head beside the hidden states."""

    weight: Tensor
    """[V, D], the parameter itself: tied or not, gradients reach it."""
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    lora: Lora | None = None
    """An active LoRA adapter on the head."""

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """Keyword arguments for `linear_logps` and `linear_policy_loss` on `hidden` [..., D], weight included."""
        adapter = None
        if self.lora is not None:
            low = self.lora.a(self.lora.dropout(hidden).to(self.lora.a.weight.dtype))
            adapter = (self.lora.scaling * low, self.lora.b.weight)
        return {
            "weight": self.weight,
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "adapter": adapter,
        }


def find_head(model: Any) -> CausalLMHead:
    """The head of `model`: weight, bias, scale, softcap, and the LoRA adapter that PEFT put on it.

    Equals model(...).logits = softcap(logit_scale * (hidden @ weight.T + bias)) for the hidden states that the model
    hands to its output embedding.

    Raises:
        TypeError: the model has no output embedding of shape [V, D].
        ValueError: its configuration has a key that seems to scale the logits and is not known here, or an adapter of
            another kind than LoRA sits on the head; guessing would give wrong log-probabilities without an error.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model: expected a causal language model with an output embedding, got {type(model).__name__}")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    logit_scale, softcap = _elementwise(config.to_dict(), getattr(config, "model_type", ""))
    head, lora = _split_lora(head)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(f"model: expected an output embedding with a weight [V, D], got {type(head).__name__}")
    return CausalLMHead(weight, getattr(head, "bias", None), logit_scale, softcap, lora)


def _elementwise(config: dict[str, Any], model_type: str) -> tuple[float, float | None]:
    logit_scale, softcap = 1.0, None
    for key, value in config.items():
        if value is None or isinstance(value, bool | str | dict | list):
            continue
        if key in SOFTCAPS:
            softcap = float(value)
        elif key in SCALES:
            logit_scale *= SCALES[key](float(value), model_type)
        elif SUSPICIOUS.search(key) and not HARMLESS.search(key):
            raise ValueError(
                f"model.config.{key}: expected no unknown key that may scale the logits, got {value}; pass weight, "
                "logit_scale and softcap yourself"
            )
    return logit_scale, softcap


def _split_lora(head: Any) -> tuple[Any, Lora | None]:
    """(the wrapped head, its active adapter) of a PEFT LoRA layer; (head, None) of any other module."""
    base = getattr(head, "base_layer", None)
    if base is None:
        return head, None
    if not hasattr(head, "lora_A") or getattr(head, "merged", False):
        if getattr(head, "merged", False):
            return base, None
        raise ValueError(f"model: expected LoRA or no adapter on the head, got {type(head).__name__}; merge it first")
    active = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return base, None
    if len(active) > 1 or getattr(head, "use_dora", {}).get(active[0]):
        raise ValueError(f"model: expected one plain LoRA adapter on the head, got {active}; merge the others first")
    name = active[0]
    if head.lora_A[name].bias is not None or head.lora_B[name].bias is not None:
        raise ValueError("model: expected a LoRA adapter without bias on the head; set lora_bias=False")
    return base, Lora(head.lora_A[name], head.lora_B[name], float(head.scaling[name]), head.lora_dropout[name])


@torch.no_grad()
def check_head(model: Any, hidden: Tensor, logits: Tensor, *, tolerance: float = 1e-4) -> None:
    """Refuse a head that does not reproduce `logits` [..., V] of the model from `hidden` [..., D].

    Raises:
        ValueError: the largest difference, relative to the largest logit, is above `tolerance`.
    """
    arguments = find_head(model).arguments(hidden)
    found = hidden.float() @ arguments["weight"].float().T
    if arguments["bias"] is not None:
        found = found + arguments["bias"].float()
    if arguments["adapter"] is not None:
        low, b = arguments["adapter"]
        found = found + low.float() @ b.float().T
    found = found * arguments["logit_scale"]
    if arguments["softcap"] is not None:
        found = arguments["softcap"] * torch.tanh(found / arguments["softcap"])
    error = ((found - logits.float()).abs().max() / logits.float().abs().max()).item()
    if not error <= tolerance:
        raise ValueError(f"model: its logits differ from its head's by {error:.1e}, expected <= {tolerance:.0e}")
