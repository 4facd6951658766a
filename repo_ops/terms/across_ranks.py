"""Statistics over the micro-batches that the ranks of a process group hold at the same time.

Without a group they are this rank's own. Every rank must call them equally often: an empty micro-batch too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def total(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise sum of `values` over the ranks."""
    if group is None:
        return values
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values


def mean(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """0-d mean of `values` [N] over tokens and ranks; 0 where there are none."""
    sums = torch.stack([values.sum(), values.new_full((), float(len(values)))])
    value, count = total(sums, group).unbind()
    return value / count.clamp_min(1)


def gathered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[sum of N] `values` [N] of all ranks. Waits for the device, as the lengths must be known."""
    if group is None:
        return values
    world = dist.get_world_size(group)
    lengths = values.new_zeros(world, dtype=torch.int64)
    lengths[dist.get_rank(group)] = len(values)
    counts = total(lengths, group).tolist()
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
