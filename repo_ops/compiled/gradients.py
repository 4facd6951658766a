"""Gradients as an operator takes and returns them: one tensor for each of the head's, empty where none is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from repo_ops.head.gradients import FLOAT16, result_dtype


def gradient_dtype(tensor: Tensor, exact: torch.dtype) -> torch.dtype:
    """Dtype in which the gradient of `tensor` waits for the backward; float16 is rounded there, after its scaling."""
    return result_dtype(tensor, exact, FLOAT16)


def of_leaves(
    outputs: list[Tensor], leaves: list[Tensor | None], arriving: list[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of the leaves that require one, None for the others."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(torch.autograd.grad(outputs, wanted, arriving) if wanted else ())
    return [next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def shaped(grads: list[Tensor | None], tensors: list[Tensor | None], needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients in the shapes of `tensors`, an empty tensor for what is not needed."""
    like = next(t for t in tensors if t is not None)
    return tuple(
        like.new_empty(0, dtype=like.dtype if t is None else t.dtype) if g is None or t is None or not need
        else g.reshape(t.shape)
        for g, t, need in zip(grads, tensors, needs, strict=True)
    )  # fmt: skip


def empty(tensors: list[Tensor | None], needs: list[bool], dtypes: list[torch.dtype | None]) -> list[Tensor]:
    """What `shaped` returns, uninitialised, for fake kernels."""
    like = next(t for t in tensors if t is not None)
    return [
        like.new_empty(0) if t is None else like.new_empty(t.shape if need else 0, dtype=dtype if need else t.dtype)
        for t, need, dtype in zip(tensors, needs, dtypes, strict=True)
    ]


@contextlib.contextmanager
def autograd_on() -> Iterator[None]:
    """Autograd inside an operator, where the dispatcher may have switched its keys off."""
    keys = torch._C.DispatchKey
    allow = torch._C._SetExcludeDispatchKeyGuard
    with allow(keys.AutogradFunctionality, False), allow(keys.ADInplaceOrView, False), torch.enable_grad():
        yield
