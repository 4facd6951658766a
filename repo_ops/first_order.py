"""Gradients that were formed without a graph, and say so where somebody differentiates them again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The `backward` of an autograd function, run without a graph; a second derivative through it is an error.

    PyTorch's own once_differentiable leaves the graph out where the incoming gradient is a constant, as it is of a sum:
    a gradient penalty would then add nothing, and say nothing.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, *arriving)
        # grad mode is on in a backward only under create_graph=True
        return _Final.apply(torch.zeros((), requires_grad=True), *grads) if torch.is_grad_enabled() else grads

    return wrapped


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "repo_ops: expected one differentiation of a fused head, got a second one; its gradients have no graph, so "
            "compute logits and log_softmax in plain PyTorch where second derivatives are needed"
        )
