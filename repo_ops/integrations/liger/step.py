"""The tensors of a call: checked, and read as Liger reads them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import check_shape, check_values
from repo_ops.head.inputs import rounded
from repo_ops.integrations.liger.settings import COUNTED_OVER_RANKS, Settings
from repo_ops.linear_logps import linear_logps
from repo_ops.options import Options
from repo_ops.reduce import NumItems


@dataclass(frozen=True)
class Step:
    """The tensors of one call, beside the head's."""

    mask: Tensor
    """[B, T] bool."""
    advantages: Tensor
    """[B] float32."""
    ref_logps: Tensor | None
    """[B, T]; None where there is no KL."""
    old_logps: Tensor | None
    ratio: Tensor | None
    """[B] or [B, T], the sampler's weight."""
    num_items: NumItems

    @property
    def lengths(self) -> Tensor:
        """[B] live tokens."""
        return self.mask.sum(1)


def live_tokens(attention_mask: Tensor, ids: Tensor) -> Tensor:
    """[B, T] bool."""
    if ids.ndim != 2:
        raise ValueError(f"selected_token_ids: expected shape [B, T], got {list(ids.shape)}")
    check_shape("attention_mask", attention_mask, ids.shape, "selected_token_ids")
    mask = attention_mask != 0
    check_values("attention_mask", (attention_mask == mask).all(), "0 and 1", "a weight goes into the advantages")
    return mask


def constant(logps: Tensor | None) -> Tensor | None:
    """Given log-probabilities as Liger reads them: without a graph, in float32."""
    return None if logps is None else logps.detach().to(torch.float32)


def options_for(hidden: Tensor, options: Options | None) -> Options:
    """`options`, or for None what rounds logits of bfloat16 products as Liger does.

    Not those of float16 ones: a tile of float16 also holds gradients, before a gradient scaler multiplies them.
    """
    if options is not None:
        return options
    (product,) = rounded(Options().rounds_to(hidden.device.type), hidden.new_empty(0))
    return Options(logits_dtype=torch.bfloat16 if product.dtype == torch.bfloat16 else None)


def reference_logps(
    settings: Settings,
    given: Tensor | None,
    head: tuple[Tensor | None, Tensor | None, Tensor | None],
    ids: Tensor,
    mask: Tensor,
    temperature: float,
    options: Options | None,
) -> Tensor | None:
    """[B, T] log-probabilities of the reference, from `given` or from its head; None where nothing reads them."""
    hidden, weight, bias = head
    if given is None and hidden is None:
        raise ValueError(
            "ref_per_token_logps: expected them or ref_input, because use_ref_model is True; got neither; "
            "pass use_ref_model=False"
        )
    if given is not None and hidden is not None:
        warnings.warn("Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=3)
    if not settings.beta or given is not None:
        return constant(given) if settings.beta else None
    if hidden is None or weight is None:
        raise ValueError("ref_weight: expected the head [V, H] of the reference beside ref_input, got None")
    mask_given = None if settings.loss_type == "luspo" else mask
    how: dict[str, Any] = {"temperature": temperature, "options": options_for(hidden, options)}
    with torch.no_grad():
        return linear_logps(hidden, weight, ids, bias=bias, mask=mask_given, **how).logps


def sampler_ratio(ratio: Tensor, mask: Tensor) -> Tensor:
    """[B] or [B, T], from [B], [B, 1] or [B, T]."""
    B, T = mask.shape
    if tuple(ratio.shape) == (B, 1):
        return ratio[:, 0]
    if tuple(ratio.shape) not in ((B,), (B, T)):
        raise ValueError(f"vllm_is_ratio: expected shape [{B}], [{B}, 1] or [{B}, {T}], got {list(ratio.shape)}")
    return ratio


def num_items_of(settings: Settings, mask: Tensor, given: float | Tensor | None) -> NumItems:
    """What the loss divides by: this call's own counts, and for some loss types the step's tokens per process."""
    tokens = mask.sum().to(torch.float32)
    if settings.loss_type in COUNTED_OVER_RANKS:
        initialized = dist.is_available() and dist.is_initialized()
        if given is not None:
            tokens = torch.as_tensor(given, dtype=torch.float32, device=mask.device)
        elif initialized:
            dist.all_reduce(tokens)
        tokens = tokens / (dist.get_world_size() if initialized else 1)
    return NumItems(len(mask), tokens)
