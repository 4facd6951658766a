"""Gradients of logit rows: a second read of the tile, which is overwritten."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.elementwise import HALF, finish_logits
from repo_ops.kernels.launch import (
    Config,
    Launch,
    architecture_of,
    check_runnable,
    check_vector,
    launch_config,
    narrows_in_place,
)
from repo_ops.kernels.logit_rows.statistics import RowStats
from repo_ops.kernels.logit_rows.tile import RUNTIME, misalignment, tile_arguments


@triton.jit
def _one_minus_exp(x):
    """1 - e^x of a scalar x <= 0; above -0.35, where e^x drops digits of x, as its series to x^8."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0)
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * series)
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * series)
    series = -x * (1.0 + x / 2.0 * series)
    return tl.where(x > -0.35, series, 1.0 - tl.exp(x))


@triton.jit
def _block_gradient(
    raw, columns, mask, bias, target, miss, dlogp, dent, peak, log_total, h, logit_scale, softcap, inv_t,
    DENTROPY: tl.constexpr,
):  # fmt: skip
    """d loss / d raw of a block, float32."""
    z = finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_t)
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


_POINTERS = [
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


@triton.jit(do_not_specialize=[*RUNTIME, "out_stride"], do_not_specialize_on_alignment=_POINTERS)
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
        lead = misalignment(row_start)
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
        out_dtype: the tile's dtype (default), or bfloat16 or float16 for a float32 tile where `narrows_in_place`.
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
    common = tile_arguments(tile, targets, bias, inv_temperature, logit_scale, softcap)
    if rows > 1 and tile.stride(0) < vocabulary:
        raise ValueError(
            f"tile: expected rows that do not overlap, got row stride {tile.stride(0)} below V = {vocabulary}"
        )
    if dentropy is not None and stats.entropy is None:
        raise ValueError(
            "stats: expected entropy where dentropy is given, got None; call row_stats with with_entropy=True"
        )
    out = _output_view(tile, tile.dtype if out_dtype is None else out_dtype)
    if out is not tile and not narrows_in_place(architecture):
        raise ValueError(
            f"out_dtype: expected {tile.dtype} on {architecture}, where a barrier does not order memory; convert a copy"
        )
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
    if tile.dtype != torch.float32 or out_dtype not in HALF:
        raise ValueError(
            f"out_dtype: expected {tile.dtype} (or bfloat16, float16 for a float32 tile), got {out_dtype};"
            " the gradient is written into the tile's own bytes"
        )
    return tile.view(out_dtype)[:, : tile.shape[1]]
