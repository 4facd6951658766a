"""Row arithmetic on a tile of logits in PyTorch, in place, in blocks of rows that stay in cache.

A tile is read from and written to memory once: the statistics leave e = exp(z - max) behind, and the gradient
p - onehot keeps its row factor 1 / sum(e) apart, to be applied to [C, D] operands of the two
GEMMs that follow instead of to [C, V] logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repo_ops.head.inputs import RowGrads, RowStats, Scaling, Wanted

# two cores' share of a common L2 cache; measured on 2 cores at V = 49152: 4-8 rows 20 ms a 134 MB tile, 1 row 280 ms
BLOCK_BYTES = 1 << 21


def stats_(tile: Tensor, targets: Tensor, scaling: Scaling, wanted: Wanted) -> RowStats:
    """Statistics of each row of `tile` [C, V]; the tile becomes exp(z - row_max), 0 at the target.

    The sum runs over all entries but the target's, so that the log-probability of a nearly certain target is
    -log1p(rest), and 1 - p = -expm1(logp), without cancellation. A 16-bit tile is computed on in float32, a block at a
    time, and stores its exponentials rounded.
    """
    rows, dtype = len(tile), torch.promote_types(tile.dtype, torch.float32)
    logps, row_max, log_sum = (tile.new_empty(rows, dtype=dtype) for _ in range(3))
    entropy, sum_p2 = (tile.new_empty(rows, dtype=dtype) if want else None for want in (wanted.entropy, wanted.sum_p2))
    is_argmax = tile.new_empty(rows, dtype=torch.bool) if wanted.is_argmax else None
    for block in _blocks(tile):
        z = scale_(tile[block].to(dtype), scaling.rows(block))
        where = targets[block, None]
        peak = z.amax(1, keepdim=True)
        # exponentials of a row of nothing but -inf are 0: it may be one rank's shard of a row
        z.sub_(torch.where(peak == -float("inf"), 0.0, peak))
        target = z.gather(1, where)[:, 0]
        # p log p is 0 for a masked vocabulary entry, not 0 * -inf
        shifted = z.clamp_min(torch.finfo(dtype).min) if wanted.entropy else z
        exps = z.exp_().scatter_(1, where, 0.0)
        rest = exps.sum(1)
        target_exp = target.exp()
        certain = target == 0  # the target has the largest logit
        log_sum[block] = torch.where(certain, rest.log1p(), (rest + target_exp).log())
        logps[block] = target - log_sum[block]
        row_max[block] = peak[:, 0]
        if entropy is not None:
            expected = torch.linalg.vecdot(exps, shifted) + torch.where(target_exp > 0, target_exp * target, 0.0)
            entropy[block] = (log_sum[block] - expected / (rest + target_exp)).clamp_min(0.0)
        if sum_p2 is not None:
            sum_p2[block] = (torch.linalg.vecdot(exps, exps) + target_exp.square()) / (rest + target_exp).square()
        if is_argmax is not None:
            is_argmax[block] = certain
        _store(tile[block], exps)
    return RowStats(logps, row_max, log_sum, entropy, None, sum_p2, is_argmax)


def exponentiate_(tile: Tensor, stats: RowStats, scaling: Scaling) -> None:
    """The tile of logits becomes exp(z - row_max), as `stats_` leaves it, from statistics that are already known."""
    for block in _blocks(tile):
        z = scale_(tile[block].to(stats.row_max.dtype), scaling.rows(block))
        _store(tile[block], z.sub_(stats.row_max[block, None]).exp_())


def grads_(
    tile: Tensor,
    targets: Tensor,
    stats: RowStats,
    dlogps: Tensor,
    dentropy: Tensor | None,
    scaling: Scaling,
    out_dtype: torch.dtype,
    owned: Tensor | None = None,
) -> RowGrads:
    """Gradient of sum(dlogps * logps + dentropy * entropy) for a tile that holds exp(z - row_max).

    `owned` [C] bool tells which rows' targets lie in this rank's shard of the vocabulary (None: all).
    Destroys the tile. The target's entry is p - 1 = expm1(logp), in float32, before any rounding.
    """
    totals = stats.log_sum.exp()
    entry_logps = stats.logps if stats.entry_logps is None else stats.entry_logps
    at_target = totals * torch.expm1(entry_logps)
    if owned is not None:
        at_target = torch.where(owned, at_target, totals * entry_logps.exp())
    scale = scaling.inv_temperature * scaling.logit_scale / totals
    where = targets[:, None]
    if dentropy is None and scaling.softcap is None and tile.dtype != torch.float16:
        # not scatter_, which is slow on 16-bit tiles
        tile[torch.arange(len(tile), device=tile.device), targets] = at_target.to(tile.dtype)
        return _in_dtype(tile, -dlogps * scale, out_dtype)
    at_target = -dlogps * at_target
    if dentropy is not None:
        assert stats.entropy is not None
        surprise = torch.where(entry_logps > -float("inf"), entry_logps + stats.entropy, 0.0)
        at_target -= dentropy * totals * entry_logps.exp() * surprise
    for block in _blocks(tile):
        exps = tile[block].to(stats.row_max.dtype)
        # finite where the exponential underflowed, since p log p is 0 there
        shifted = exps.clamp_min(torch.finfo(exps.dtype).tiny).log_()
        target = (entry_logps + stats.log_sum)[block, None]
        shifted.scatter_(1, where[block], target.clamp_min(torch.finfo(exps.dtype).min))
        slope = None if scaling.softcap is None else _softcap_slope(shifted, stats.row_max[block], scaling.rows(block))
        if dentropy is None:
            exps.mul_(-dlogps[block, None])
        else:
            assert stats.entropy is not None
            log_p_plus_h = shifted.add_((stats.entropy - stats.log_sum)[block, None])
            exps.mul_(log_p_plus_h.mul_(-dentropy[block, None]).sub_(dlogps[block, None]))
        exps.scatter_(1, where[block], at_target[block, None])
        if slope is not None:
            exps.mul_(slope)
        if tile.dtype == torch.float16:  # whose largest number an unscaled entry exceeds
            exps.mul_(scale[block, None])
        _store(tile[block], exps)
    return RowGrads(tile.to(out_dtype), None) if tile.dtype == torch.float16 else _in_dtype(tile, scale, out_dtype)


def _in_dtype(tile: Tensor, row_scale: Tensor, dtype: torch.dtype) -> RowGrads:
    if tile.dtype == dtype:
        return RowGrads(tile, row_scale)
    if tile.dtype.itemsize == 2 * dtype.itemsize and tile.is_contiguous():
        return RowGrads(_narrowed(tile, row_scale, dtype), None)
    # float16 would overflow on unscaled rows, whose target entry is as large as V
    return RowGrads(tile.mul_(row_scale[:, None]).to(dtype), None)


def _narrowed(tile: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """row_scale[:, None] * tile in half the bytes, in the first half of the tile's own memory.

    Block by block in ascending order: rows [a, b) are read before they are written to the bytes of rows [a/2, b/2).
    """
    narrow = tile.view(-1).view(dtype)[: tile.numel()].view(tile.shape)
    for block in _blocks(tile):
        narrow[block] = tile[block].mul_(row_scale[block, None]).to(dtype)
    return narrow


def _store(block: Tensor, values: Tensor) -> None:
    if block.dtype != values.dtype:  # else `values` is the block itself
        block.copy_(values)


def _blocks(tile: Tensor) -> Iterator[slice]:
    rows, row_bytes = len(tile), max(1, tile.shape[1] * tile.element_size())
    step = max(4, BLOCK_BYTES // row_bytes) if tile.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scale_(x: Tensor, scaling: Scaling) -> Tensor:
    """x, raw logits [R, V], in place: with bias, scale, softcap and temperature."""
    if scaling.bias is not None:
        x.add_(scaling.bias)
    if scaling.softcap is None:
        factor = scaling.factor()
        return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)
    x.mul_(scaling.logit_scale / scaling.softcap).tanh_()
    return x.mul_(Scaling(None, scaling.inv_temperature, scaling.softcap, None).factor())


def _softcap_slope(shifted: Tensor, row_max: Tensor, scaling: Scaling) -> Tensor:
    """[R, V] d(softcap(x)) / dx = 1 - tanh^2, from z - row_max, in a new tensor."""
    inv = scaling.inv_temperature
    assert scaling.softcap is not None
    capped = (shifted + row_max[:, None]).div_((inv[:, None] if isinstance(inv, Tensor) else inv) * scaling.softcap)
    return capped.square_().neg_().add_(1.0)
