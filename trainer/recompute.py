"""Activation checkpointing: a layer keeps its input alone and is computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from repo_ops.trainer.distributed import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["recompute_layers"]


def recompute_layers(model: PreTrainedModel) -> None:
    """Makes every layer of the model recompute, in place. Call it before the model is sharded.

    transformers' own switch works in train mode only, and the policy stays in eval mode.
    """
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # in eval mode nothing in a layer is random
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
