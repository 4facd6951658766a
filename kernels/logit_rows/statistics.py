"""Statistics of logit rows: one read of the tile, a few floats a row."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.elementwise import finish_logits, log1p
from repo_ops.kernels.launch import Config, Launch, architecture_of, check_runnable, launch_config
from repo_ops.kernels.logit_rows.tile import RUNTIME, misalignment, tile_arguments


class RowStats(NamedTuple):
    """What a row of logits is reduced to; [C] float32, in nats."""

    logps: Tensor
    """log softmax(z)[target], <= 0."""
    row_max: Tensor
    """max(z)."""
    log_sum: Tensor
    """log(sum(exp(z - max(z)))), >= 0."""
    entropy: Tensor | None = None
    """-sum(p log p), >= 0."""
    sum_p2: Tensor | None = None
    """sum(p^2), in (0, 1]."""
    is_argmax: Tensor | None = None
    """[C] bool, whether no logit is above the target's."""


@triton.jit
def _fold(z, m, s, u, q, ENTROPY: tl.constexpr, SUM_P2: tl.constexpr):
    """One more logit for each lane's running max m, s = sum e^(z-m) - 1, u = sum e^(z-m) (z-m), q = sum e^(2(z-m)).

    One exp a logit: whichever of z and m is larger becomes the max, and the same e^-|z-m| scales the other side. s
    leaves out the 1 of the max itself, so that a peaked row keeps the digits of what lies beside its peak; it starts
    at -1.
    """
    # -inf carries no mass; its distance is made finite because (-inf) - (-inf) and 0 * -inf are NaN. A NaN logit is not
    # lost: it poisons s. e^-200 is 0 in float32.
    d = tl.where(z == float("-inf"), -200.0, z - m)
    d = tl.where(d > 200.0, 200.0, d)
    e = tl.exp(-tl.abs(d))
    rises = d > 0
    if ENTROPY:
        u = tl.where(rises, e * (u - (s + 1.0) * d), u + e * d)
    if SUM_P2:
        q = tl.where(rises, q * e * e + 1.0, q + e * e)
    s = tl.where(rises, (s + 1.0) * e, s + e)
    m = tl.where(rises, z, m)
    return m, s, u, q


_POINTERS = [
    "tile",
    "targets",
    "bias",
    "inv_temperature",
    "logps",
    "row_max",
    "log_sum",
    "entropy",
    "sum_p2",
    "is_argmax",
]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def row_stats_kernel(
    tile,  # [C, V], row stride row_stride
    targets,  # [C] int64
    bias,  # [V] or None
    inv_temperature,  # [C] float32 or None
    inv_temperature_value,
    logit_scale,
    softcap,  # float or None
    logps,  # [C] float32
    row_max,  # [C] float32
    log_sum,  # [C] float32
    entropy,  # [C] float32 or None
    sum_p2,  # [C] float32 or None
    is_argmax,  # [C] uint8 or None
    V,
    row_stride,
    ALIGNED: tl.constexpr,  # every row starts at a 16-byte boundary
    BLOCK: tl.constexpr,
):
    """Bytes a row: V * itemsize read once, 8 + itemsize more (target, its logit), 12 to 20 written.

    Each of the BLOCK lanes keeps its own running max and sums; they meet once, after the last block, so the loop has no
    cross-thread reduction in it.
    """
    row = tl.program_id(0).to(tl.int64)
    row_start = tile + row * row_stride
    inv_t = inv_temperature_value
    if inv_temperature is not None:
        inv_t = tl.load(inv_temperature + row)

    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.full([BLOCK], -1.0, tl.float32)
    # What is not asked for is carried through the loop as one scalar that nothing changes
    with_entropy: tl.constexpr = entropy is not None
    with_sum_p2: tl.constexpr = sum_p2 is not None
    u = tl.zeros([BLOCK] if with_entropy else [1], tl.float32)
    q = tl.zeros([BLOCK] if with_sum_p2 else [1], tl.float32)

    # Blocks are laid from the 16-byte boundary at or below the row's start, `lead` elements before it, so that all of
    # them but the first and last load 16 bytes a thread whatever V is. Columns below 0 are the row before: masked.
    lanes = tl.arange(0, BLOCK)
    if ALIGNED:
        lead = 0
        first_whole = 0
    else:
        lead = misalignment(row_start)
        first_whole = BLOCK
        columns = lanes - lead
        mask = (columns >= 0) & (columns < V)
        raw = tl.load(row_start + columns, mask=mask, other=0.0)
        z = finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
        m, s, u, q = _fold(z, m, s, u, q, with_entropy, with_sum_p2)
    end = V + lead
    end_whole = tl.maximum(end // BLOCK * BLOCK, first_whole)
    for start in range(first_whole, end_whole, BLOCK):
        raw = tl.load(tl.multiple_of(row_start - lead + start, 16) + lanes)
        columns = start - lead + lanes
        z = finish_logits(raw, bias, columns, None, logit_scale, softcap, inv_t)
        m, s, u, q = _fold(z, m, s, u, q, with_entropy, with_sum_p2)
    columns = end_whole - lead + lanes
    mask = columns < V
    raw = tl.load(row_start + columns, mask=mask, other=0.0)
    z = finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
    m, s, u, q = _fold(z, m, s, u, q, with_entropy, with_sum_p2)

    # Lanes that saw nothing keep max -inf and sum 0
    peak = tl.max(m, axis=0)
    lag = tl.where(m == float("-inf"), -200.0, m - peak)
    scale = tl.exp(lag)
    # Lanes at the peak add exactly 1 each; one of these ones stays outside the sum, for the sake of log1p
    at_peak = lag == 0
    beside = tl.sum(tl.where(at_peak, s, (s + 1.0) * scale), axis=0)
    beside += tl.sum(tl.where(at_peak, 1.0, 0.0), axis=0) - 1.0
    total = 1.0 + beside
    log_total = log1p(beside)

    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    # An id outside the vocabulary reads nothing and answers NaN: loud, and no illegal access
    raw_target = tl.load(row_start + target, mask=known, other=float("nan"))
    z_target = finish_logits(raw_target, bias, target, known, logit_scale, softcap, inv_t)
    below = tl.where(known, z_target - peak, float("nan"))
    # On a GPU the difference is one fused multiply-add of the raw logit, half an ulp off 0 for a target at the peak,
    # where a comparison is exact. The NaN of (-inf) - (-inf) stays.
    below = tl.where((z_target >= peak) & (below == below), 0.0, below)

    tl.store(logps + row, below - log_total)
    tl.store(row_max + row, peak)
    tl.store(log_sum + row, log_total)
    if entropy is not None:
        # a lane whose scale underflowed has lag < -100: its share of the mean is 0, not 0 * large
        mean = tl.sum(tl.where(scale == 0, 0.0, (u + (s + 1.0) * lag) * scale), axis=0) / total
        h = log_total - mean
        tl.store(entropy + row, tl.where(h < 0, 0.0, h))
    if sum_p2 is not None:
        tl.store(sum_p2 + row, tl.sum(q * scale * scale, axis=0) / (total * total))
    if is_argmax is not None:
        tl.store(is_argmax + row, (below == 0).to(tl.uint8))


def row_stats(
    tile: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
) -> RowStats:
    """Log-probability of each row's target, with the row's max and log-sum, in one read of the tile.

    Equals, in float32 whatever the tile's dtype,
        z = (tile + bias) * logit_scale; z = softcap * tanh(z / softcap) if softcap; z = z * inv_temperature[:, None]
        row_max = z.max(1); log_sum = logsumexp(z, 1) - row_max; logps = z[arange(C), targets] - row_max - log_sum
        entropy = -(softmax(z) * log_softmax(z)).sum(1); sum_p2 = (softmax(z) ** 2).sum(1)

    Args:
        tile: [C, V] float32, bfloat16 or float16; rows may lie further apart than V, elements of a row may not. Fastest
            where rows start at 16-byte boundaries: for an odd V, allocate [C, V rounded up to 8] and slice.
        targets: [C] int64 in [0, V). An id outside answers NaN in that row's logps (a check would stop the device).
        bias: [V] of any of the tile's dtypes, added to the tile.
        inv_temperature: 1 / temperature, a float or [C] float32.
        logit_scale: factor before the softcap.
        softcap: bound of the capped logits.
    Returns:
        RowStats of [C] tensors; `entropy`, `sum_p2` and `is_argmax` only where asked for. A row of nothing but -inf is
        NaN.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    """
    check_runnable("tile", tile)
    make = partial(
        stats_launch,
        targets=targets,
        bias=bias,
        inv_temperature=inv_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        with_entropy=with_entropy,
        with_sum_p2=with_sum_p2,
        with_argmax=with_argmax,
        architecture=architecture_of(tile.device),
    )
    config = tune.tuned_config("row_stats", tile, lambda config: make(tile, config=config))
    launch, stats = make(tile, config=config)
    launch.run(tile.device)
    return stats


def new_stats(like: Tensor, rows: int, with_entropy: bool, with_sum_p2: bool, with_argmax: bool) -> RowStats:
    """Uninitialised statistics of `rows` rows, on the device of `like`."""

    def new(dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(rows, dtype=dtype)

    extra = new() if with_entropy else None, new() if with_sum_p2 else None, new(torch.bool) if with_argmax else None
    return RowStats(new(), new(), new(), *extra)


def stats_launch(
    tile: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
    config: Config | None = None,
    architecture: str,
) -> tuple[Launch, RowStats]:
    """The launch behind `row_stats` and the tensors that it fills."""
    rows = tile.shape[0]
    common = tile_arguments(tile, targets, bias, inv_temperature, logit_scale, softcap)
    stats = new_stats(tile, rows, with_entropy, with_sum_p2, with_argmax)
    config = config or launch_config("row_stats", architecture, tile.dtype)
    flags = None if stats.is_argmax is None else stats.is_argmax.view(torch.uint8)
    arguments = {**common, **stats._asdict(), "is_argmax": flags, "BLOCK": config.block}
    return Launch(row_stats_kernel, rows, arguments, config), stats
