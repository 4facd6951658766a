"""Each program sums over a share of the vocabulary; a second, small kernel joins the shares of a row in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from repo_ops.kernels.elementwise import log1p
from repo_ops.kernels.tiled_logps.fold import fold_tile
from repo_ops.kernels.tiled_logps.product import add_product

# Only dtypes, which options are None, and the flags make another binary; see logit_rows/tile.py.
_RUNTIME = [
    "inv_temperature_value", "logit_scale", "softcap", "N", "V", "D", "R",
    "hidden_stride", "weight_stride", "adapter_hidden_stride", "adapter_weight_stride",
]  # fmt: skip
_POINTERS = [
    "hidden", "weight", "adapter_hidden", "adapter_weight", "targets", "rows", "bias", "inv_temperature",
    "partial",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def tiled_logps_kernel(
    hidden,  # [M, D], row stride hidden_stride
    weight,  # [V, D], row stride weight_stride
    adapter_hidden,  # [M, R] or None
    adapter_weight,  # [V, R], with adapter_hidden
    targets,  # [N] int64
    rows,  # [N] int64, rows of hidden, or None: 0 to N - 1
    bias,  # [V] or None
    inv_temperature,  # [N] float32 or None
    inv_temperature_value,
    logit_scale,
    softcap,  # float or None
    partial,  # [1 + shares * fields, N] float32: the target's logit; then of each share m, r, and u and q if asked for
    N,
    V,
    D,
    R,
    hidden_stride,
    weight_stride,
    adapter_hidden_stride,
    adapter_weight_stride,
    EVEN: tl.constexpr,  # D is a multiple of DEPTH
    ALIGNED: tl.constexpr,  # every row of hidden and weight starts at a 16-byte boundary
    ADAPTER_EVEN: tl.constexpr,
    ADAPTER_ALIGNED: tl.constexpr,
    ADAPTER_DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_P2: tl.constexpr,
):
    """Bytes a program: for each of its SHARE / COLUMNS tiles (BLOCK + COLUMNS) * D * itemsize read, mostly from L2.

    Written: 8 to 16 a row and share, and 4 a row. From memory the weight is read once for each GROUP of row blocks,
    whose programs run side by side and go through the same tiles, and their hidden states stay in L2.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK)
    shares = tl.cdiv(V, SHARE)
    group = program // (GROUP * shares)
    first = group * GROUP
    width = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * shares)
    block = first + within % width
    share = within // width

    row = block * BLOCK + tl.arange(0, BLOCK)
    is_row = row < N
    row = tl.minimum(row, N - 1).to(tl.int64)
    target = tl.load(targets + row)
    # as int32, where an id from elsewhere must not come to lie in the vocabulary
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    inv_t = tl.zeros([BLOCK], tl.float32) + inv_temperature_value
    if inv_temperature is not None:
        inv_t = tl.load(inv_temperature + row)
    position = row
    if rows is not None:
        position = tl.load(rows + row)

    m = tl.full([BLOCK], float("-inf"), tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    z_target = tl.zeros([BLOCK], tl.float32)
    u = tl.zeros([BLOCK] if ENTROPY else [1], tl.float32)
    q = tl.zeros([BLOCK] if SUM_P2 else [1], tl.float32)

    begin = share * SHARE
    end = tl.minimum(begin + SHARE, V)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # the last tile reads the last entry again instead of past it, so that no load needs a mask for it
        entry = tl.minimum(column, V - 1).to(tl.int64)
        acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
        if bias is not None:
            # before the products: afterwards it would take registers that the accumulator needs
            acc += tl.load(bias + entry).to(tl.float32)[None, :]
        acc = add_product(
            acc, hidden, position * hidden_stride, weight, entry * weight_stride, D, EVEN, ALIGNED, UPCAST, DEPTH
        )
        if adapter_hidden is not None:
            acc = add_product(
                acc, adapter_hidden, position * adapter_hidden_stride,
                adapter_weight, entry * adapter_weight_stride, R,
                ADAPTER_EVEN, ADAPTER_ALIGNED, UPCAST, ADAPTER_DEPTH,
            )  # fmt: skip
        m, r, u, q, z_target = fold_tile(
            acc, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )

    tl.store(partial + row, z_target, mask=is_row & (target >= begin) & (target < end))
    fields: tl.constexpr = 2 + ENTROPY + SUM_P2
    at = partial + (1 + share.to(tl.int64) * fields) * N + row
    tl.store(at, m, mask=is_row)
    tl.store(at + N, r, mask=is_row)
    if ENTROPY:
        tl.store(at + 2 * N.to(tl.int64), u, mask=is_row)
    if SUM_P2:
        tl.store(at + (2 + ENTROPY) * N.to(tl.int64), q, mask=is_row)


_JOIN_POINTERS = ["partial", "targets", "logps", "row_max", "log_sum", "entropy", "sum_p2", "is_argmax"]


@triton.jit(do_not_specialize=["N", "V", "shares"], do_not_specialize_on_alignment=_JOIN_POINTERS)
def join_shares_kernel(
    partial,  # as tiled_logps_kernel leaves it
    targets,  # [N] int64
    logps,  # [N] float32
    row_max,  # [N] float32
    log_sum,  # [N] float32
    entropy,  # [N] float32 or None
    sum_p2,  # [N] float32 or None
    is_argmax,  # [N] uint8 or None
    N,
    V,
    shares,
    BLOCK: tl.constexpr,
):
    """Bytes a row: 8 to 16 a share read, 12 once; 12 to 21 written."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < N
    with_entropy: tl.constexpr = entropy is not None
    with_sum_p2: tl.constexpr = sum_p2 is not None
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    at = partial + row
    z_target = tl.load(at, mask=is_row, other=float("-inf"))
    at += N
    for _ in range(0, shares):
        other = tl.load(at, mask=is_row, other=float("-inf"))
        at += N
        other_sum = tl.load(at, mask=is_row, other=0.0)
        at += N
        peak = tl.maximum(m, other)
        origin = tl.where(peak == float("-inf"), 0.0, peak)
        lag = m - origin
        other_lag = other - origin
        scale = tl.exp(lag)
        other_scale = tl.exp(other_lag)
        if with_entropy:
            other_u = tl.load(at, mask=is_row, other=0.0)
            at += N
            u = scale * (u + r * tl.maximum(lag, -200.0))
            u += other_scale * (other_u + other_sum * tl.maximum(other_lag, -200.0))
        if with_sum_p2:
            other_q = tl.load(at, mask=is_row, other=0.0)
            at += N
            q = scale * scale * q + other_scale * other_scale * other_q
        r = scale * r + other_scale * other_sum
        m = peak

    target = tl.load(targets + row, mask=is_row, other=-1)
    known = (target >= 0) & (target < V)
    # of an unknown target nothing was written
    z_target = tl.where(known, z_target, float("-inf"))
    # the sums leave the target out, so that beside a nearly certain one they keep their digits; it joins them here
    certain = known & (z_target >= m)
    peak = tl.where(certain, z_target, m)
    # of a row that holds nothing but -inf this is NaN, and so are its log-probability and entropy
    lag = z_target - peak
    e = tl.where(known, tl.exp(lag), 0.0)
    others_lag = m - peak
    scale = tl.where(certain, tl.exp(others_lag), 1.0)
    rest = scale * r
    total = rest + e
    log_total = tl.where(certain, log1p(rest), tl.log(total))
    tl.store(logps + row, tl.where(known, lag - log_total, float("nan")), mask=is_row)
    tl.store(row_max + row, peak, mask=is_row)
    tl.store(log_sum + row, log_total, mask=is_row)
    if with_entropy:
        shifted = scale * (u + r * tl.maximum(tl.where(certain, others_lag, 0.0), -200.0))
        mean = (shifted + tl.where(e == 0, 0.0, e * lag)) / total
        h = log_total - mean
        tl.store(entropy + row, tl.where(h < 0, 0.0, h), mask=is_row)
    if with_sum_p2:
        tl.store(sum_p2 + row, (scale * scale * q + e * e) / (total * total), mask=is_row)
    if is_argmax is not None:
        tl.store(is_argmax + row, certain.to(tl.uint8), mask=is_row)
