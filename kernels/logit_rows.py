"""Statistics and gradients of logit rows, one read of the tile each.

The tile [C, V] is a chunk of logits that a GEMM wrote. `row_stats` reads it once and returns a few floats a row;
`row_grads_` reads it again and overwrites it with d loss / d logits. Nothing of size [C, V] is allocated.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.launch import (
    Config,
    Launch,
    architecture_of,
    check_positive,
    check_runnable,
    check_vector,
    launch_config,
)

_HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *_HALF)


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
def _tanh(y):
    # 1 - 2/(e^2y + 1) loses the digits of a small y, so those take an odd polynomial (own fit, relative error 8e-8)
    s = y * y
    p = -0.0059058466 * s + 0.0208053645
    p = p * s - 0.0537866764
    p = p * s + 0.1333195865
    p = p * s - 0.3333329856
    small = y + y * s * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
    large = tl.where(y < 0, -large, large)
    return tl.where(tl.abs(y) < 0.6, small, large)


@triton.jit
def _finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_temperature):
    """z of a block; -inf where masked."""
    x = raw.to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask).to(tl.float32)
    if softcap is not None:
        z = _tanh(x * (logit_scale / softcap)) * (softcap * inv_temperature)
    else:
        z = x * (logit_scale * inv_temperature)
    if mask is not None:
        z = tl.where(mask, z, float("-inf"))
    return z


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


@triton.jit
def _log1p(x):
    """log(1 + x) of a scalar x >= 0; below 0.5, where 1 + x drops digits of x, as 2 atanh(x / (2 + x))."""
    t = x / (2.0 + x)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 / 9.0))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def _one_minus_exp(x):
    """1 - e^x of a scalar x <= 0; above -0.35, where e^x drops digits of x, as its series to x^8."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0)
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * series)
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * series)
    series = -x * (1.0 + x / 2.0 * series)
    return tl.where(x > -0.35, series, 1.0 - tl.exp(x))


@triton.jit
def _misalignment(row_start):
    """Elements between the 16-byte boundary at or below a row's first element and that element."""
    bytes_each: tl.constexpr = row_start.dtype.element_ty.primitive_bitwidth // 8
    return ((row_start.to(tl.int64) % 16) // bytes_each).to(tl.int32)


# V, strides and floats are run-time values and no pointer is specialised on its alignment: another vocabulary, another
# temperature or another slice of targets runs the same binary. Only ALIGNED, dtypes and which options are None do not.
_STATS_RUNTIME = ["V", "row_stride", "inv_temperature_value", "logit_scale", "softcap"]
_STATS_POINTERS = [
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


@triton.jit(do_not_specialize=_STATS_RUNTIME, do_not_specialize_on_alignment=_STATS_POINTERS)
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
        lead = _misalignment(row_start)
        first_whole = BLOCK
        columns = lanes - lead
        mask = (columns >= 0) & (columns < V)
        raw = tl.load(row_start + columns, mask=mask, other=0.0)
        z = _finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
        m, s, u, q = _fold(z, m, s, u, q, with_entropy, with_sum_p2)
    end = V + lead
    end_whole = tl.maximum(end // BLOCK * BLOCK, first_whole)
    for start in range(first_whole, end_whole, BLOCK):
        raw = tl.load(tl.multiple_of(row_start - lead + start, 16) + lanes)
        columns = start - lead + lanes
        z = _finish_logits(raw, bias, columns, None, logit_scale, softcap, inv_t)
        m, s, u, q = _fold(z, m, s, u, q, with_entropy, with_sum_p2)
    columns = end_whole - lead + lanes
    mask = columns < V
    raw = tl.load(row_start + columns, mask=mask, other=0.0)
    z = _finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
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
    log_total = _log1p(beside)

    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    # An id outside the vocabulary reads nothing and answers NaN: loud, and no illegal access
    raw_target = tl.load(row_start + target, mask=known, other=float("nan"))
    z_target = _finish_logits(raw_target, bias, target, known, logit_scale, softcap, inv_t)
    below = tl.where(known, z_target - peak, float("nan"))
    # The scalar path may round once less than the block path (fused multiply-add), so the difference can be +1 ulp
    below = tl.where(below > 0, 0.0, below)

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


@triton.jit
def _block_gradient(
    raw, columns, mask, bias, target, miss, dlogp, dent, peak, log_total, h, logit_scale, softcap, inv_t,
    DENTROPY: tl.constexpr,
):  # fmt: skip
    """d loss / d raw of a block, float32."""
    z = _finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
    log_p = (z - peak) - log_total
    p = tl.exp(log_p)
    # the target's 1 - p comes ready from its log-probability: float32(p) - 1 keeps few digits near p = 1, and a p
    # rounded to bfloat16 none from 0.998 on
    g = dlogp * tl.where(columns == target, miss, -p)
    if DENTROPY:
        # p log p -> 0 with p; the product 0 * -inf is not formed
        g -= dent * tl.where(p == 0, 0.0, p * (log_p + h))
    g *= inv_t * logit_scale
    if softcap is not None:
        # 1 - tanh^2 as 4 e^-2y / (1 + e^-2y)^2: no cancellation where tanh is near 1
        x = raw.to(tl.float32)
        if bias is not None:
            x += tl.load(bias + columns, mask=mask).to(tl.float32)
        e = tl.exp(-2.0 * tl.abs(x * (logit_scale / softcap)))
        g *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    return g


_GRADS_POINTERS = [
    "tile",
    "out",
    "targets",
    "bias",
    "inv_temperature",
    "logps",
    "row_max",
    "log_sum",
    "entropy",
    "dlogps",
    "dentropy",
]


@triton.jit(do_not_specialize=[*_STATS_RUNTIME, "out_stride"], do_not_specialize_on_alignment=_GRADS_POINTERS)
def row_grads_kernel(
    tile,  # [C, V], row stride row_stride
    out,  # [C, V] over the same bytes, row stride out_stride
    targets,  # [C] int64
    bias,  # [V] or None
    inv_temperature,  # [C] float32 or None
    inv_temperature_value,
    logit_scale,
    softcap,  # float or None
    logps,  # [C] float32
    row_max,  # [C] float32
    log_sum,  # [C] float32
    entropy,  # [C] float32 or None, with dentropy
    dlogps,  # [C] float32
    dentropy,  # [C] float32 or None
    V,
    row_stride,
    out_stride,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bytes a row: V * itemsize read, V * itemsize of `out` written; a row without gradient is written only.

    Narrowing in place. With a float32 tile and half-precision output, block k reads the row's bytes [4kB, 4(k+1)B) and
    writes [2kB, 2(k+1)B), B = BLOCK. Written bytes lie at or before the block just read, never in a later one, and the
    only overlap with bytes that another thread may not have read yet is inside the current block. The barrier between
    load and store closes it: when a thread stores, all threads of the program have loaded this block and every one
    before it. A thread that runs ahead into block k+1 reads above 4(k+1)B, where no store of block k can land. Programs
    own whole rows. A row that starts `lead` elements off shifts both ranges alike.
    """
    row = tl.program_id(0).to(tl.int64)
    row_start = tile + row * row_stride
    out_start = out + row * out_stride
    narrow: tl.constexpr = tile.dtype.element_ty != out.dtype.element_ty
    out_type: tl.constexpr = out.dtype.element_ty
    has_dentropy: tl.constexpr = dentropy is not None

    dlogp = tl.load(dlogps + row)
    live = dlogp != 0
    dent = 0.0
    h = 0.0
    if has_dentropy:
        dent = tl.load(dentropy + row)
        h = tl.load(entropy + row)
        live = live | (dent != 0)

    lanes = tl.arange(0, BLOCK)
    if ALIGNED:
        lead = 0
        first_whole = 0
    else:
        lead = _misalignment(row_start)
        first_whole = BLOCK
    end_whole = tl.maximum((V + lead) // BLOCK * BLOCK, first_whole)

    if live:
        inv_t = inv_temperature_value
        if inv_temperature is not None:
            inv_t = tl.load(inv_temperature + row)
        peak = tl.load(row_max + row)
        log_total = tl.load(log_sum + row)
        target = tl.load(targets + row).to(tl.int32)
        miss = _one_minus_exp(tl.load(logps + row))
        if not ALIGNED:
            columns = lanes - lead
            mask = (columns >= 0) & (columns < V)
            raw = tl.load(row_start + columns, mask=mask, other=0.0)
            if narrow:
                tl.debug_barrier()
            g = _block_gradient(
                raw, columns, mask, bias, target, miss, dlogp, dent, peak, log_total, h, logit_scale, softcap, inv_t,
                has_dentropy,
            )  # fmt: skip
            tl.store(out_start + columns, g.to(out_type), mask=mask)
        for start in range(first_whole, end_whole, BLOCK):
            columns = start - lead + lanes
            raw = tl.load(tl.multiple_of(row_start - lead + start, 16) + lanes)
            if narrow:
                tl.debug_barrier()
            g = _block_gradient(
                raw, columns, None, bias, target, miss, dlogp, dent, peak, log_total, h, logit_scale, softcap, inv_t,
                has_dentropy,
            )  # fmt: skip
            if narrow and not ALIGNED:
                # half-size elements counted from an unaligned start: no 16-byte promise can be made
                tl.store(out_start + columns, g.to(out_type))
            else:
                tl.store(tl.multiple_of(out_start - lead + start, 16) + lanes, g.to(out_type))
        columns = end_whole - lead + lanes
        mask = columns < V
        raw = tl.load(row_start + columns, mask=mask, other=0.0)
        if narrow:
            tl.debug_barrier()
        g = _block_gradient(
            raw, columns, mask, bias, target, miss, dlogp, dent, peak, log_total, h, logit_scale, softcap, inv_t,
            has_dentropy,
        )  # fmt: skip
        tl.store(out_start + columns, g.to(out_type), mask=mask)
    else:
        for start in range(0, V, BLOCK):
            columns = start + lanes
            tl.store(out_start + columns, tl.zeros([BLOCK], out_type), mask=columns < V)


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


def row_grads_(
    tile: Tensor,
    targets: Tensor,
    stats: RowStats,
    dlogps: Tensor,
    dentropy: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """d loss / d tile, written over the tile.

    Equals the gradient of (dlogps * logps + dentropy * entropy).sum() with respect to the tile:
        (dlogps * (onehot - p) - dentropy * p * (log p + H)) * inv_temperature * logit_scale * (1 - tanh^2 if softcap)

    Args:
        tile: the tile that `row_stats` read; destroyed.
        targets, bias, inv_temperature, logit_scale, softcap: as given to `row_stats`.
        stats: what `row_stats` returned; with `entropy` where `dentropy` is given. Of vocabulary shards: the merged
            ones, logps too (1 - p of the target comes from it); a target of no column, -1 say, adds no onehot.
        dlogps: [C] float32. A row with dlogps == 0 and dentropy == 0 is not read and becomes exact zeros.
        dentropy: [C] float32 or None.
        out_dtype: the tile's dtype (default), or bfloat16 or float16 for a float32 tile.
    Returns:
        [C, V] view of the tile's memory in `out_dtype`. Narrowed rows lie in the front half of their own bytes, so
        their stride is twice the tile's. A logit of -inf gets 0, except a target's own, whose 1 - p is 1.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    """
    check_runnable("tile", tile)
    make = partial(
        grads_launch,
        targets=targets,
        stats=stats,
        dlogps=dlogps,
        dentropy=dentropy,
        bias=bias,
        inv_temperature=inv_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        out_dtype=out_dtype,
        architecture=architecture_of(tile.device),
    )
    # candidates are timed on other memory, since each run destroys its tile
    config = tune.tuned_config("row_grads", tile, lambda config: make(_copy_of(tile), config=config))
    launch, grads = make(tile, config=config)
    launch.run(tile.device)
    return grads


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
    common = _common_arguments(tile, targets, bias, inv_temperature, logit_scale, softcap)
    stats = new_stats(tile, rows, with_entropy, with_sum_p2, with_argmax)
    config = config or launch_config("row_stats", architecture, tile.dtype)
    flags = None if stats.is_argmax is None else stats.is_argmax.view(torch.uint8)
    arguments = {**common, **stats._asdict(), "is_argmax": flags, "BLOCK": config.block}
    return Launch(row_stats_kernel, rows, arguments, config), stats


def grads_launch(
    tile: Tensor,
    targets: Tensor,
    stats: RowStats,
    dlogps: Tensor,
    dentropy: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    architecture: str,
) -> tuple[Launch, Tensor]:
    """The launch behind `row_grads_` and the view that it fills."""
    rows, vocabulary = tile.shape
    common = _common_arguments(tile, targets, bias, inv_temperature, logit_scale, softcap)
    if rows > 1 and tile.stride(0) < vocabulary:
        raise ValueError(
            f"tile: expected rows that do not overlap, got row stride {tile.stride(0)} below V = {vocabulary}"
        )
    if dentropy is not None and stats.entropy is None:
        raise ValueError(
            "stats: expected entropy where dentropy is given, got None; call row_stats with with_entropy=True"
        )
    out = _output_view(tile, tile.dtype if out_dtype is None else out_dtype)
    vectors = {
        "logps": stats.logps,
        "row_max": stats.row_max,
        "log_sum": stats.log_sum,
        "entropy": stats.entropy if dentropy is not None else None,
        "dlogps": dlogps,
        "dentropy": dentropy,
    }
    checked = {name: check_vector(name, value, rows, (torch.float32,), tile.device) for name, value in vectors.items()}
    config = config or launch_config("row_grads", architecture, tile.dtype)
    arguments = {**common, **checked, "out": out, "out_stride": out.stride(0), "BLOCK": config.block}
    return Launch(row_grads_kernel, rows, arguments, config), out


def _copy_of(tile: Tensor) -> Tensor:
    return torch.empty_strided(tile.shape, tile.stride(), dtype=tile.dtype, device=tile.device).copy_(tile)


def _output_view(tile: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == tile.dtype:
        return tile
    if tile.dtype != torch.float32 or out_dtype not in _HALF:
        raise ValueError(
            f"out_dtype: expected {tile.dtype} (or bfloat16, float16 for a float32 tile), got {out_dtype};"
            " the gradient is written into the tile's own bytes"
        )
    return tile.view(out_dtype)[:, : tile.shape[1]]


def _common_arguments(
    tile: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor | float,
    logit_scale: float,
    softcap: float | None,
) -> dict[str, Any]:
    """Checked arguments that both kernels take, by the kernels' parameter names."""
    if tile.dim() != 2 or tile.shape[1] < 1:
        raise ValueError(f"tile: expected shape [C, V] with V >= 1, got {list(tile.shape)}")
    if tile.dtype not in FLOATS:
        raise TypeError(
            f"tile: expected float32, bfloat16 or float16, got {tile.dtype}; float64 takes the PyTorch backend"
        )
    if tile.shape[1] > 1 and tile.stride(1) != 1:
        raise ValueError(f"tile: expected contiguous rows, got column stride {tile.stride(1)}; call .contiguous()")
    rows, vocabulary = tile.shape
    temperatures, temperature = None, 1.0
    if isinstance(inv_temperature, Tensor):
        temperatures = check_vector("inv_temperature", inv_temperature, rows, (torch.float32,), tile.device)
    else:
        temperature = check_positive("inv_temperature", inv_temperature) or 1.0
    bias = check_vector("bias", bias, vocabulary, FLOATS, tile.device)
    # where every row starts at a 16-byte boundary, the first block needs no mask and narrowed stores are 16 bytes wide
    starts = [tile.data_ptr(), tile.stride(0) * tile.element_size(), 0 if bias is None else bias.data_ptr()]
    return {
        "tile": tile,
        "targets": check_vector("targets", targets, rows, (torch.int64,), tile.device),
        "bias": bias,
        "inv_temperature": temperatures,
        "inv_temperature_value": temperature,
        "logit_scale": float(logit_scale),
        "softcap": check_positive("softcap", softcap),
        "V": vocabulary,
        "row_stride": tile.stride(0),
        "ALIGNED": all(start % 16 == 0 for start in starts),
    }
