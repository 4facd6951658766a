"""LoRA through peft: adapters put into the model in place, switched off for the reference, merged for export.

The model stays a transformers model, so everything that takes one goes on working. The head's adapter, if there is one,
is found by `repo_ops.causal_lm.find_head`.
Source: arXiv:2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add_lora", "has_lora", "lora_layers", "merge_lora", "without_lora"]

ADAPTER = "default"


def add_lora(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] | str = "all-linear") -> None:
    """Puts an adapter scaling * B(A(x)), scaling = alpha / rank, on the target layers and freezes all the rest.

    B is 0, so the model computes what it did. No dropout: it would make the sampler and the learner two policies.

    Args:
        targets: names of linear layers, as their last part ("q_proj", "lm_head"), or "all-linear": all but the head.
    Raises:
        ImportError: peft is missing.
        ValueError: a target that the model does not have, or that is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("lora_rank: needs the package peft; pip install 'repo-ops[lora]'") from None
    if not isinstance(targets, str):
        _check_targets(model, targets)
        targets = list(targets)
    elif targets != "all-linear":
        raise ValueError(f"lora_targets: expected 'all-linear' or a list of layer names, got {targets!r}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with warnings.catch_warnings():  # peft warns of merging an adapter into a tied head, which export_model unties
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and then to what it must be
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for target in targets:
        hit = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not hit:
            linear = sorted({n.split(".")[-1] for n, m in modules.items() if isinstance(m, nn.Linear)})
            raise ValueError(f"lora_targets: expected layers of the model, {', '.join(linear)}, got {target!r}")
        if not all(isinstance(module, nn.Linear) for module in hit):
            raise ValueError(f"lora_targets: expected linear layers, got {target!r}, a {type(hit[0]).__name__}")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; {} of a model without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was called on it."""
    return bool(lora_layers(model))


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model as it was before training, for the time of the block: adapters are there and not used."""
    layers = lora_layers(model).values()
    for layer in layers:
        # enable_adapters(False) would also take requires_grad from the adapters, which FSDP2 has noted by then
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_lora(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` (a state_dict of `model` with whole tensors) under the names of the model without adapters.

    weight + scaling * B @ A, computed in float32 at least and rounded to the weight's dtype once.
    """
    merged = dict(state)
    for name, layer in lora_layers(model).items():
        a, b = (merged.pop(f"{name}.lora_{kind}.{ADAPTER}.weight") for kind in "AB")
        for kind in ("weight", "bias"):
            value = merged.pop(f"{name}.base_layer.{kind}", None)
            if value is not None:
                merged[f"{name}.{kind}"] = value
        weight = merged[f"{name}.weight"]
        wide = weight.double() if weight.element_size() == 8 else weight.float()
        added = layer.scaling[ADAPTER] * (b.to(wide.dtype) @ a.to(wide.dtype))
        merged[f"{name}.weight"] = (wide + (added.T if layer.fan_in_fan_out else added)).to(weight.dtype)
    return merged
