"""GRPO's advantages by one Triton kernel, for tensors that live on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from repo_ops.advantages.estimators import grpo
from repo_ops.advantages.rows import numbered


def runs_on_kernel(estimator: grpo.Estimator, rewards: Tensor) -> bool:
    """Whether `on_kernel` computes this: GRPO within groups, on a GPU with Triton, and no float64 to keep."""
    return (
        rewards.is_cuda
        and rewards.dtype != torch.float64
        and type(estimator) is grpo.Estimator  # a subclass computes something else
        and estimator.scale != "batch"
        and estimator.group_of_one == "zero"
        and _has_triton()
    )


def on_kernel(
    estimator: grpo.Estimator, rewards: Tensor, group_ids: Tensor, off_policy: Tensor | None, mode: str
) -> Tensor:
    """[B] float32 advantages of checked arguments; rows are brought side by side and back without a host sync."""
    from repo_ops.kernels.group_advantages import group_advantages

    number = numbered(group_ids)
    order = number.argsort(stable=True)
    # one slot a row, since the number of groups is known on the device only: the slots behind them are empty groups
    sizes = torch.zeros_like(number).index_add_(0, number, torch.ones_like(number))
    sorted_advantages = group_advantages(
        rewards.detach().to(torch.float32)[order],
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        off_policy=None if off_policy is None else off_policy[order],
        mode="mixed" if mode == "mixed" else "split",
        normalize=estimator.normalize and estimator.scale != "none",
        eps=estimator.eps,
        unbiased=estimator.unbiased,
    )
    return torch.empty_like(sorted_advantages).scatter_(0, order, sorted_advantages)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
