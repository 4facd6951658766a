"""A vocabulary sharded over the ranks of a tensor-parallel group: three small reductions a tile, no gathered logits.

Every rank holds rows [offset, offset + V_local) of the head and the same hidden states. A target lies in one shard; the
others compute their statistics as if it were their first entry, and leave it out when the ranks' statistics are joined.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.head.inputs import RowStats


def sizes(num_local: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """Shard sizes of all ranks, which need not be equal."""
    own = torch.tensor([num_local], device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(n) for n in found]


def localize(targets: Tensor, shard_sizes: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """(ids within this rank's shard, 0 where the target lies elsewhere; bool, where it lies here), [N] each."""
    local = targets - sum(shard_sizes[:rank])
    owned = (local >= 0) & (local < shard_sizes[rank])
    return torch.where(owned, local, 0), owned


def combine(stats: RowStats, owned: Tensor, group: dist.ProcessGroup) -> RowStats:
    """Statistics over the whole vocabulary from those of this rank's shard; log_sum stays relative to the own row_max.

    So exp(z - row_max) / exp(log_sum) is a probability over the whole vocabulary, on every rank.
    """
    peak = stats.row_max.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    shift = stats.row_max - peak
    # a shard whose entries are all -inf has nothing to add, and no statistics of its own
    masked = stats.row_max == -float("inf")
    share = torch.where(masked, 0.0, (stats.log_sum + shift).exp())
    own_target = torch.where(masked, -float("inf"), stats.logps + stats.log_sum + shift)
    target = torch.where(owned, own_target, 0.0)
    sums = [share, target]
    if stats.entropy is not None:
        # sum of e^(z - peak) (z - peak) over the shard
        sums.append(torch.where(share > 0, share * (stats.log_sum - stats.entropy + shift), 0.0))
    if stats.sum_p2 is not None:
        sums.append(torch.where(share > 0, stats.sum_p2 * share.square(), 0.0))
    if stats.is_argmax is not None:
        sums.append((owned & stats.is_argmax & (shift == 0)).to(share.dtype))
    joined = torch.stack(sums)
    dist.all_reduce(joined, group=group)
    log_total = joined[0].log()
    entropy = None if stats.entropy is None else (log_total - joined[2] / joined[0]).clamp_min(0.0)
    row_max, log_sum = torch.where(masked, 0.0, stats.row_max), torch.where(masked, 0.0, log_total - shift)
    entry_logps = torch.where(masked, -float("inf"), stats.logps + stats.log_sum - log_sum)
    sum_p2 = None if stats.sum_p2 is None else joined[2 + (entropy is not None)] / joined[0].square()
    is_argmax = None if stats.is_argmax is None else joined[-1] > 0
    logps = (joined[1] - log_total).clamp_max(0.0)
    return RowStats(logps, row_max, log_sum, entropy, entry_logps, sum_p2, is_argmax)
