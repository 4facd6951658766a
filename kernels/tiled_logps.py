"""Statistics of the logits hidden @ weight^T, tile by tile on the tensor cores, with no logits in memory.

A program multiplies a block of rows with one share of the vocabulary and keeps running sums over its tiles; a second,
small kernel joins the shares of each row in their order. Forward only: the gradient needs the logits again anyway, and
vendor GEMMs make them faster. It is for log-probabilities of old and reference policies where even one tile of logits
is too much memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.elementwise import FLOATS, elementwise_arguments, finish_logits, log1p
from repo_ops.kernels.launch import (
    Config,
    Launch,
    architecture_of,
    check_runnable,
    check_vector,
    interpreting,
    launch_config,
)
from repo_ops.kernels.logit_rows import RowStats, new_stats

_ROWS_A_LAUNCH = 16384
"""Bounds the memory between the kernels: 8 to 16 bytes for each row and `Config.share` entries of the vocabulary."""
_JOIN_ROWS = 128
_WIDEST_STEP = 64
"""No row of the launch table steps further along the hidden states."""


@triton.jit
def _add_product(
    acc, left, left_rows, right, right_rows, D,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """acc [M, N] + left[left_rows] @ right[right_rows]^T; the rows are offsets in elements, 64 bits wide."""
    a_rows = left + left_rows
    b_rows = right + right_rows
    if ALIGNED:
        a_rows = tl.multiple_of(a_rows, [16])
        b_rows = tl.multiple_of(b_rows, [16])
    depth = tl.arange(0, DEPTH)
    a = a_rows[:, None] + depth[None, :]
    b = b_rows[None, :] + depth[:, None]
    for start in range(0, D, DEPTH):
        if EVEN:
            x = tl.load(a)
            y = tl.load(b)
        else:
            inside = depth < D - start
            x = tl.load(a, mask=inside[None, :], other=0.0)
            y = tl.load(b, mask=inside[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        # "ieee": float32 operands are not rounded to TF32; 16-bit ones are exact on the tensor cores either way
        acc = tl.dot(x, y, acc, input_precision="ieee")
        a += DEPTH
        b += DEPTH
    return acc


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile."""
    pairs = tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1])
    return tl.split(pairs)


@triton.jit
def _fold_logits(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    """Some columns more for each row's max m, r = sum e^(z-m), u = sum e^(z-m) (z-m) and q = sum e^(2(z-m)).

    The target's logit goes to z_target instead.
    """
    width: tl.constexpr = raw.shape[1]
    z = finish_logits(raw, None, None, None, logit_scale, softcap, inv_t[:, None])
    lanes = tl.arange(0, width)
    local = tl.where((target >= start) & (target < start + width), target - start, -1)
    # Few tiles hold a target of these rows, and one a column past the end. A branch for each mask: on CDNA masks that
    # live together take more scalar registers than there are
    has_target = tl.max(local, axis=0) >= 0
    if has_target:
        z_target += tl.sum(tl.where(lanes[None, :] == local[:, None], z, 0.0), axis=1)
    if start + width > V:
        z = tl.where((lanes < V - start)[None, :], z, float("-inf"))
    if has_target:
        z = tl.where(lanes[None, :] == local[:, None], float("-inf"), z)

    peak = tl.maximum(m, tl.max(z, axis=1))
    # (-inf) - (-inf) is NaN: a row of which nothing but -inf was seen has its max at 0 for as long
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    lag = m - origin
    scale = tl.exp(lag)
    below = z - origin[:, None]
    e = tl.exp(below)
    if ENTROPY:
        # e^-200 is 0 in float32, and 0 * -inf would be NaN; a NaN reaches the row through r
        u = scale * (u + r * tl.maximum(lag, -200.0)) + tl.sum(e * tl.maximum(below, -200.0), axis=1)
    if SUM_P2:
        q = scale * scale * q + tl.sum(e * e, axis=1)
    r = scale * r + tl.sum(e, axis=1)
    return peak, r, u, q, z_target


@triton.jit
def _fold_part(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    if raw.shape[1] > 64:
        half: tl.constexpr = raw.shape[1] // 2
        left, right = _halves(raw)
        m, r, u, q, z_target = _fold_logits(
            left, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
        return _fold_logits(
            right, target, start + half, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
    else:
        return _fold_logits(raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2)


@triton.jit
def _fold_tile(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    """`_fold_logits` by 64 columns: exponentials of a whole tile beside its logits do not fit into the registers."""
    if raw.shape[1] > 128:
        half: tl.constexpr = raw.shape[1] // 2
        left, right = _halves(raw)
        m, r, u, q, z_target = _fold_part(
            left, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
        return _fold_part(
            right, target, start + half, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
    else:
        return _fold_part(raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2)


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
        acc = _add_product(
            acc, hidden, position * hidden_stride, weight, entry * weight_stride, D, EVEN, ALIGNED, UPCAST, DEPTH
        )
        if adapter_hidden is not None:
            acc = _add_product(
                acc, adapter_hidden, position * adapter_hidden_stride,
                adapter_weight, entry * adapter_weight_stride, R,
                ADAPTER_EVEN, ADAPTER_ALIGNED, UPCAST, ADAPTER_DEPTH,
            )  # fmt: skip
        m, r, u, q, z_target = _fold_tile(
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


class _Product(NamedTuple):
    """One checked product of hidden states and weights, and what its kernel code assumes of them."""

    hidden: Tensor | None
    weight: Tensor | None
    size: int
    aligned: bool


def tiled_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
) -> RowStats:
    """Log-probability of each row's target, with the row's max and log-sum, from hidden states; no logits in memory.

    Equals `row_stats(tile, targets, ...)` for, in float32,
        tile = hidden[rows] @ weight.T + adapter[0][rows] @ adapter[1].T
    A row's bits depend on the weight and on the configuration, not on how many rows are computed with it.

    Args:
        hidden: [M, D] float32, bfloat16 or float16; rows may lie further apart than D. Where the dtypes of hidden and
            weight differ, both are multiplied as float32, far from the speed of the tensor cores.
        weight: [V, D]. Fastest where D is a multiple of 64 and rows start at 16-byte boundaries.
        targets: [N] int64 in [0, V). An id outside, -1 for a target in another rank's shard of the vocabulary, answers
            NaN in that row's logps and False in is_argmax; the other statistics are those of the shard.
        rows: [N] int64 positions in hidden, in any order, inside [0, M); None where N = M and all are wanted.
        bias, inv_temperature, logit_scale, softcap: as for `row_stats`; inv_temperature a float or [N].
        adapter: low-rank addition to the logits, ([M, R], [V, R]) of the dtypes of hidden and weight.
    Returns:
        RowStats of [N] tensors; entropy, sum_p2 and is_argmax only where asked for. The target is kept out of the sums
        until the end, so log-probability and entropy have full relative precision where it is nearly certain; elsewhere
        they are off by a few 1e-7. A row of nothing but -inf is NaN.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    Source: online softmax over tiles, arXiv:1805.02867; the long axis split, with a second kernel, arXiv:2311.01282.
    """
    check_runnable("hidden", hidden)
    make = partial(
        tiled_launches,
        hidden,
        weight,
        targets,
        rows=rows,
        bias=bias,
        inv_temperature=inv_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        adapter=adapter,
        with_entropy=with_entropy,
        with_sum_p2=with_sum_p2,
        with_argmax=with_argmax,
        architecture=architecture_of(hidden.device),
    )
    config = None
    if tune.enabled():
        kernel, dtype = _tuning_key(hidden, weight)
        config = tune.tuned_config(kernel, hidden, lambda config: make(config=config), dtype=dtype)
    launches, stats = make(config=config)
    for launch in launches:
        launch.run(hidden.device)
    return stats


def tiled_launches(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
    config: Config | None = None,
    architecture: str,
) -> tuple[list[Launch], RowStats]:
    """The launches behind `tiled_logps`, two for each 16384 rows, and the tensors that they fill."""
    head = _check_product("hidden", hidden, "weight", weight)
    num_rows, vocabulary, device = targets.numel(), weight.shape[0], hidden.device
    if rows is None and hidden.shape[0] != num_rows:
        raise ValueError(
            f"targets: expected shape [{hidden.shape[0]}] like the rows of hidden, got {list(targets.shape)};"
            " pass rows to compute some of them"
        )
    scaling = elementwise_arguments(num_rows, vocabulary, device, bias, inv_temperature, logit_scale, softcap)
    vectors = {
        "targets": check_vector("targets", targets, num_rows, (torch.int64,), device),
        "rows": check_vector("rows", rows, num_rows, (torch.int64,), device),
        "inv_temperature": scaling["inv_temperature"],
    }
    low_rank = _check_adapter(adapter, hidden, weight)
    if config is None:
        kernel, dtype = _tuning_key(hidden, weight)
        config = launch_config(kernel, architecture, dtype)
    constants = {
        **_product_arguments(head, low_rank, config),
        **scaling,
        "weight": weight,
        "adapter_weight": low_rank.weight,
        "V": vocabulary,
        # numpy has no bfloat16 product
        "UPCAST": hidden.dtype != weight.dtype or interpreting(),
    }
    stats = new_stats(hidden, num_rows, with_entropy, with_sum_p2, with_argmax)
    fields = 2 + with_entropy + with_sum_p2
    height = 1 + fields * triton.cdiv(vocabulary, config.share)
    partial = stats.logps.new_empty(height * min(num_rows, _ROWS_A_LAUNCH))
    launches = []
    for start in range(0, num_rows, _ROWS_A_LAUNCH):
        part = slice(start, min(start + _ROWS_A_LAUNCH, num_rows))
        states = {"hidden": hidden, "adapter_hidden": low_rank.hidden}
        if rows is None:
            states = {name: None if value is None else value[part] for name, value in states.items()}
        own = {name: None if value is None else value[part] for name, value in vectors.items()}
        found = RowStats._make(None if field is None else field[part] for field in stats)
        launches += _launch_pair({**constants, **states, **own, "partial": partial}, found, config)
    return launches, stats


def _tuning_key(hidden: Tensor, weight: Tensor) -> tuple[str, torch.dtype]:
    """Name and dtype of the launch table's row: loads of single elements want smaller tiles than loads of 16 bytes."""
    whole = _aligned(hidden, weight) and hidden.shape[-1] % _WIDEST_STEP == 0
    return "tiled_logps" if whole else "tiled_logps_uneven", torch.promote_types(hidden.dtype, weight.dtype)


def _launch_pair(arguments: dict[str, Any], stats: RowStats, config: Config) -> list[Launch]:
    """The product and the join of some rows; all pairs of a call use the same memory in between, one after another."""
    targets, vocabulary = arguments["targets"], arguments["V"]
    num_rows, num_shares = len(targets), triton.cdiv(vocabulary, config.share)
    blocks = {
        "BLOCK": config.block,
        "COLUMNS": config.columns,
        "SHARE": config.share,
        "GROUP": config.group,
        "ENTROPY": stats.entropy is not None,
        "SUM_P2": stats.sum_p2 is not None,
    }
    programs = triton.cdiv(num_rows, config.block) * num_shares
    product = Launch(tiled_logps_kernel, programs, {**arguments, **blocks, "N": num_rows}, config)
    flags = None if stats.is_argmax is None else stats.is_argmax.view(torch.uint8)
    joined = {
        **stats._asdict(),
        "is_argmax": flags,
        "partial": arguments["partial"],
        "targets": targets,
        "N": num_rows,
        "V": vocabulary,
        "shares": num_shares,
        "BLOCK": _JOIN_ROWS,
    }
    join_config = Config(_JOIN_ROWS, 4, 1, config.device, config.shape, config.date)
    return [product, Launch(join_shares_kernel, triton.cdiv(num_rows, _JOIN_ROWS), joined, join_config)]


def _product_arguments(head: _Product, adapter: _Product, config: Config) -> dict[str, Any]:
    rank_depth = min(config.depth, max(16, triton.next_power_of_2(max(adapter.size, 1))))
    return {
        "D": head.size,
        "R": adapter.size,
        "hidden_stride": _row_stride(head.hidden),
        "weight_stride": _row_stride(head.weight),
        "adapter_hidden_stride": _row_stride(adapter.hidden),
        "adapter_weight_stride": _row_stride(adapter.weight),
        "EVEN": head.size % config.depth == 0,
        "ALIGNED": head.aligned,
        "ADAPTER_EVEN": adapter.size % rank_depth == 0,
        "ADAPTER_ALIGNED": adapter.aligned,
        "ADAPTER_DEPTH": rank_depth,
        "DEPTH": config.depth,
    }


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _check_adapter(adapter: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Tensor) -> _Product:
    if adapter is None:
        return _Product(None, None, 0, False)
    left, right = adapter
    product = _check_product("adapter[0]", left, "adapter[1]", right)
    for name, value, like in (("adapter[0]", left, hidden), ("adapter[1]", right, weight)):
        if len(value) != len(like) or value.dtype != like.dtype:
            raise ValueError(
                f"{name}: expected {len(like)} rows of {like.dtype}, got {len(value)} of {value.dtype};"
                " its rows are those of hidden and weight"
            )
    return product


def _check_product(left_name: str, left: Tensor, right_name: str, right: Tensor) -> _Product:
    for name, matrix in ((left_name, left), (right_name, right)):
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected a matrix, got shape {list(matrix.shape)}")
        if matrix.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected float32, bfloat16 or float16, got {matrix.dtype}; float64 takes the PyTorch backend"
            )
        if matrix.device != left.device:
            raise ValueError(f"{name}: expected device {left.device}, got {matrix.device}; move it first")
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous rows, got column stride {matrix.stride(1)}; .contiguous()")
    if right.shape[0] < 1 or right.shape[1] != left.shape[1]:
        raise ValueError(
            f"{right_name}: expected shape [V >= 1, {left.shape[1]}] like the columns of {left_name},"
            f" got {list(right.shape)}"
        )
    return _Product(left, right, left.shape[1], _aligned(left, right))


def _aligned(left: Tensor, right: Tensor) -> bool:
    """Whether every row of both starts at a 16-byte boundary."""
    starts = [start for m in (left, right) for start in (m.data_ptr(), m.stride(0) * m.element_size())]
    return all(start % 16 == 0 for start in starts)
