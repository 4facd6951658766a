"""Advantages from rewards: what every sample of a step is worth beside its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.advantages.base import Estimator
from repo_ops.advantages.estimators import as_estimator, estimator_names, get_estimator, grpo
from repo_ops.advantages.fused import on_kernel, runs_on_kernel
from repo_ops.advantages.overlong import soft_overlong_penalty
from repo_ops.advantages.rows import Rows, Sets, rows_of
from repo_ops.arguments import check_shape, check_values
from repo_ops.terms import across_ranks

__all__ = [
    "Estimator",
    "Rows",
    "Sets",
    "estimator_names",
    "get_estimator",
    "group_advantages",
    "soft_overlong_penalty",
]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    off_policy: Tensor | None = None,
    mode: Literal["split", "mixed"] = "split",
    estimator: str | Estimator | Callable[[Rows], Tensor] = "grpo",
    lengths: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    **hyper: Any,
) -> Tensor:
    """Advantage of each sample among the samples of its prompt.

    For the default equals, with r the rewards of one prompt that are not NaN, on-policy and replayed ones apart,
        (r - r.mean()) / (r.std() + 1e-4)

    A row whose reward is NaN has A = 0 and takes no part in any statistic. Rewards that are all equal have A = 0
    exactly, and so has a sample without others, a single replay among them (estimators that differ say so). Computed in
    float64 (B numbers cost nothing); GRPO's on GPU tensors that are not float64 runs as one Triton kernel in float32.
    No result waits for the device. Values are checked at once on a CPU, by a device-side assertion elsewhere.

    Args:
        rewards: [B] float or integer; NaN marks a sample that could not be scored. [B, K] parts where the estimator
            takes parts ("bnpo").
        group_ids: [B] integer, equal for the samples of one prompt; any values in any order.
        off_policy: [B] bool, True for replayed samples. None: there are none.
        mode: "split": replayed samples are compared among themselves, and so are on-policy ones, whole-batch statistics
            included; "mixed": together. "mixed" needs off_policy, and an estimator for which it means something.
        estimator: a name of `estimator_names()`, an `Estimator`, or a function of `Rows` that returns [B].
        lengths: [B] integer, tokens of each completion. Needed by "opo" and the "reinforce_pp" pair.
        process_group: ranks whose rows together are the step, for groups or batch statistics ("bnpo", "reinforce_pp",
            scale="batch") that span them. Every rank calls, with `group_ids` that mean the same prompt on all; returns
            this rank's rows. Waits for the device. None: this rank's rows are the step.
        hyper: the estimator's hyper-parameters; see its file. One value per row among them has no place in a group.
    Returns:
        [B] float32, float64 for float64 rewards; no graph.
    Raises:
        TypeError, ValueError: a shape, dtype, device, value or name that does not fit; the message names the argument.
    Source: the estimator's file.
    """
    chosen = as_estimator(estimator, hyper)
    _check_rewards(rewards, chosen)
    if process_group is not None:
        return _over_ranks(process_group, rewards, group_ids, off_policy, lengths, hyper, mode=mode, estimator=chosen)
    _check_rows("group_ids", group_ids, rewards, "integer")
    if lengths is not None:
        _check_rows("lengths", lengths, rewards, "integer")
        check_values("lengths", (lengths >= 0).all(), "values >= 0", "give each completion's number of tokens")
    elif getattr(chosen, "needs_lengths", False):
        raise ValueError(
            f"lengths: expected [B] token counts, which estimator {estimator!r} weighs by, got None; pass lengths="
        )
    _check_mode(mode, off_policy, rewards, estimator, chosen)

    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if isinstance(chosen, grpo.Estimator) and runs_on_kernel(chosen, rewards):
        return on_kernel(chosen, rewards, group_ids, off_policy, mode)
    if off_policy is None or mode == "mixed":
        apart = torch.zeros_like(group_ids, dtype=torch.bool)
    else:
        apart = off_policy
    parts = rewards.unbind(1) if rewards.dim() == 2 else (rewards,)
    advantages = [_advantages(chosen, rows_of(part, group_ids, apart, lengths)) for part in parts]
    return torch.stack(advantages).mean(0).to(dtype)


def _over_ranks(
    group: dist.ProcessGroup,
    rewards: Tensor,
    group_ids: Tensor,
    off_policy: Tensor | None,
    lengths: Tensor | None,
    hyper: dict[str, Any],
    **chosen: Any,
) -> Tensor:
    """This rank's part of the advantages of all ranks' rows."""
    if per_row := [name for name, value in hyper.items() if isinstance(value, Tensor)]:
        raise ValueError(f"{per_row[0]}: expected no tensor with process_group, got one; gather the rewards yourself")
    dtype = rewards.dtype
    exact = rewards.to(torch.float64)
    columns = [exact] if rewards.dim() == 1 else [part.contiguous() for part in exact.unbind(1)]
    every = [across_ranks.gathered(column, group) for column in columns]

    def gathered(values: Tensor | None) -> Tensor | None:
        return None if values is None else across_ranks.gathered(values.to(torch.int64), group)

    replayed = gathered(off_policy)
    found = group_advantages(
        every[0] if rewards.dim() == 1 else torch.stack(every, 1),
        across_ranks.gathered(group_ids.to(torch.int64), group),
        off_policy=None if replayed is None else replayed.to(torch.bool),
        lengths=gathered(lengths),
        **chosen,
    )
    before = across_ranks.gathered(torch.tensor([len(rewards)], device=rewards.device), group)
    start = int(before[: dist.get_rank(group)].sum())
    return found[start : start + len(rewards)].to(torch.float64 if dtype == torch.float64 else torch.float32)


def _advantages(estimator: Estimator | Callable[[Rows], Tensor], rows: Rows) -> Tensor:
    if isinstance(estimator, Estimator) and rows.rewards.device.type == "cpu":
        estimator.check(rows)
    advantages = estimator(rows)
    check_shape("estimator's result", advantages, rows.rewards.shape, "rewards")
    return torch.where(rows.scored, advantages.to(torch.float64), 0)


def _check_rewards(rewards: Tensor, estimator: object) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards: expected a tensor, got {type(rewards).__name__}; wrap it in torch.tensor")
    if rewards.is_complex() or rewards.dtype == torch.bool:
        raise TypeError(f"rewards: expected a floating or integer dtype, got {rewards.dtype}; use .float()")
    takes_parts = getattr(estimator, "takes_parts", False)
    if rewards.dim() != 1 and not (rewards.dim() == 2 and takes_parts and rewards.shape[1] > 0):
        wanted = "[B] or [B, K]" if takes_parts else "[B]"
        raise ValueError(f"rewards: expected shape {wanted}, got {list(rewards.shape)}; add the parts up first")
    check_values("rewards", ~rewards.isinf().any(), "finite values, or NaN for no reward", "clip infinite rewards")


def _check_rows(name: str, value: Tensor, rewards: Tensor, kind: Literal["integer", "bool"]) -> None:
    """Refuse what is not [B] of the right kind beside the rewards."""
    check_shape(name, value, rewards.shape[:1], "rewards")
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (integer if kind == "integer" else value.dtype == torch.bool):
        raise TypeError(f"{name}: expected {'an integer' if kind == 'integer' else 'a bool'} dtype, got {value.dtype}")
    if value.device != rewards.device:
        raise ValueError(f"{name}: expected device {rewards.device} like rewards, got {value.device}")


def _check_mode(mode: str, off_policy: Tensor | None, rewards: Tensor, name: object, estimator: object) -> None:
    if mode not in ("split", "mixed"):
        raise ValueError(f"mode: expected 'split' or 'mixed', got {mode!r}")
    if off_policy is not None:
        _check_rows("off_policy", off_policy, rewards, "bool")
    if mode == "split":
        return
    if off_policy is None:
        raise ValueError("off_policy: expected [B] bool with mode='mixed', got None; mark the replayed rows")
    refusal = getattr(estimator, "mixed_refusal", None)
    if refusal is not None:
        raise ValueError(f"mode: expected 'split' with estimator {name!r}, got 'mixed'; {refusal}")
