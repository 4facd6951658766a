"""Group-relative advantages, one program a group."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels.launch import Launch, architecture_of, check_runnable, check_vector, launch_config


@triton.jit
def _members(rewards, off_policy, start, end, lanes, OFF: tl.constexpr):
    """Rewards of a block, and which of them count: in the group, of the wanted kind, not NaN."""
    member = start + lanes
    inside = member < end
    reward = tl.load(rewards + member, mask=inside, other=0.0)
    if off_policy is not None:
        kind = tl.load(off_policy + member, mask=inside, other=0)
        if OFF:
            inside = inside & (kind != 0)
        else:
            inside = inside & (kind == 0)
    return member, reward, inside, inside & (reward == reward)


@triton.jit
def _write_advantages(
    rewards, off_policy, advantages, begin, end, eps,
    OFF: tl.constexpr, NORMALIZE: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        member, reward, inside, valid = _members(rewards, off_policy, start, end, lanes, OFF)
        counts += tl.where(valid, 1.0, 0.0)
        sums += tl.where(valid, reward, 0.0)
        least = tl.minimum(least, tl.where(valid, reward, float("inf")))
        most = tl.maximum(most, tl.where(valid, reward, float("-inf")))
    count = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count, 1.0)
    # Equal rewards by comparison, not by variance: their float mean may miss them by an ulp, which eps = 1e-6 would
    # turn into an advantage of 0.06. Covers groups of one and of none.
    varies = tl.min(least, axis=0) < tl.max(most, axis=0)

    deviation = 1.0
    if NORMALIZE:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            member, reward, inside, valid = _members(rewards, off_policy, start, end, lanes, OFF)
            squares += tl.where(valid, (reward - mean) * (reward - mean), 0.0)
        degrees = count
        if UNBIASED:
            degrees = count - 1.0
        variance = tl.sum(squares, axis=0) / tl.maximum(degrees, 1.0)
        deviation = tl.where(varies, tl.sqrt(variance) + eps, 1.0)
    scale = tl.where(varies, 1.0 / deviation, 0.0)

    for start in range(begin, end, BLOCK):
        member, reward, inside, valid = _members(rewards, off_policy, start, end, lanes, OFF)
        tl.store(advantages + member, tl.where(valid, (reward - mean) * scale, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["eps", "B"],
    do_not_specialize_on_alignment=["rewards", "cu_groups", "off_policy", "advantages"],
)
def group_advantages_kernel(
    rewards,  # [B] float32
    cu_groups,  # [groups + 1] int32 or int64
    off_policy,  # [B] uint8, or None: one statistic for all members
    advantages,  # [B] float32
    eps,
    B,
    NORMALIZE: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bytes a member: 4 written; 4 read a sweep (1 more with off_policy), two sweeps or three with NORMALIZE.

    Off- and on-policy members take a round of their own each. A group of up to BLOCK members is read from L1 after its
    first sweep.
    """
    group = tl.program_id(0)
    begin = tl.load(cu_groups + group).to(tl.int64)
    end = tl.minimum(tl.load(cu_groups + group + 1).to(tl.int64), B)
    _write_advantages(rewards, off_policy, advantages, begin, end, eps, False, NORMALIZE, UNBIASED, BLOCK)
    if off_policy is not None:
        _write_advantages(rewards, off_policy, advantages, begin, end, eps, True, NORMALIZE, UNBIASED, BLOCK)


def group_advantages(
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    off_policy: Tensor | None = None,
    mode: Literal["split", "mixed"] = "split",
    normalize: bool = True,
    eps: float = 1e-4,
    unbiased: bool = True,
) -> Tensor:
    """Each reward less its group's mean, over its group's standard deviation if `normalize`.

    Equals, for every group (and every kind of member apart in mode "split"), with r its rewards that are not NaN,
        A = (r - r.mean()) / (r.std(unbiased=unbiased) + eps), or r - r.mean()
    with A = 0 for NaN rewards and for groups whose rewards are all equal, groups of one among them.

    Args:
        rewards: [B] float32, the members of a group side by side.
        cu_groups: [groups + 1] int32 or int64, ascending from 0 to B; empty groups are allowed.
        off_policy: [B] bool, True for replayed members; None where there are none.
        mode: "split": on- and off-policy members have a mean and deviation each; "mixed": one for the whole group.
        normalize: divide by the standard deviation.
        eps: added to the standard deviation, in units of reward, >= 0.
        unbiased: divide squares by count - 1, not by count.
    Returns:
        [B] float32.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    Source: GRPO arXiv:2402.03300 section 4.1.2; Dr.GRPO arXiv:2503.20783 (no division); RePO arXiv:2506.09340 (split).
    """
    check_runnable("rewards", rewards)
    launch, advantages = advantages_launch(
        rewards,
        cu_groups,
        off_policy=off_policy,
        mode=mode,
        normalize=normalize,
        eps=eps,
        unbiased=unbiased,
        architecture=architecture_of(rewards.device),
    )
    launch.run(rewards.device)
    return advantages


def advantages_launch(
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    off_policy: Tensor | None = None,
    mode: str = "split",
    normalize: bool = True,
    eps: float = 1e-4,
    unbiased: bool = True,
    architecture: str,
) -> tuple[Launch, Tensor]:
    """The launch behind `group_advantages` and the tensor that it fills."""
    if mode not in ("split", "mixed"):
        raise ValueError(f'mode: expected "split" or "mixed", got {mode!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    B = rewards.numel()
    flags = check_vector("off_policy", off_policy, B, (torch.bool,), rewards.device)
    starts = check_vector("cu_groups", cu_groups, max(cu_groups.numel(), 1), (torch.int32, torch.int64), rewards.device)
    assert starts is not None
    advantages = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    config = launch_config("group_advantages", architecture, rewards.dtype)
    arguments = {
        "rewards": check_vector("rewards", rewards, B, (torch.float32,), rewards.device),
        "cu_groups": starts,
        "off_policy": flags.view(torch.uint8) if flags is not None and mode == "split" else None,
        "advantages": advantages,
        "eps": float(eps),
        "B": B,
        "NORMALIZE": normalize,
        "UNBIASED": unbiased,
        "BLOCK": config.block,
    }
    return Launch(group_advantages_kernel, starts.numel() - 1 if B > 0 else 0, arguments, config), advantages
