"""Row arithmetic by the Triton kernels of repo_ops.kernels.logit_rows, with the interface of torch_rows."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from repo_ops.head.inputs import HeadInputs, RowGrads, RowStats, Scaling, Wanted


def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    from repo_ops.kernels import launch

    return launch.interpreting()


def why_not(tensor: Tensor, tile_dtype: torch.dtype) -> str:
    """Why kernels cannot run on `tensor` with tiles of `tile_dtype`; empty if they can."""
    if not available():
        return "the package triton is not installed"
    if tensor.device.type == "cpu" and not interpreted():
        return "tensors are on a CPU and TRITON_INTERPRET=1 was not set before the start"
    if tile_dtype == torch.float64:
        return "the kernels compute in float32, and float64 inputs or logits_dtype ask for float64"
    return ""


def stats_(tile: Tensor, targets: Tensor, scaling: Scaling, wanted: Wanted) -> RowStats:
    """Statistics of each row of `tile` [C, V], which is only read."""
    from repo_ops.kernels import logit_rows

    found = logit_rows.row_stats(
        tile,
        targets,
        **scaling._asdict(),
        with_entropy=wanted.entropy,
        with_sum_p2=wanted.sum_p2,
        with_argmax=wanted.is_argmax,
    )
    return RowStats(found.logps, found.row_max, found.log_sum, found.entropy, None, found.sum_p2, found.is_argmax)


def why_not_tiled(head: HeadInputs) -> str:
    """Why `tiled_stats` cannot run where `stats_` can; empty if it can."""
    for hidden, weight in head.products:
        if any(matrix.shape[1] > 1 and matrix.stride(1) != 1 for matrix in (hidden, weight)):
            return "the rows of hidden or weight are not contiguous"
        if (hidden.dtype, weight.dtype) != (head.hidden.dtype, head.weight.dtype):
            return "the adapter's dtypes are not those of hidden and weight"
    return ""


def tiled_stats(head: HeadInputs, wanted: Wanted) -> RowStats:
    """Statistics of all live rows from hidden states, with no logits in memory."""
    from repo_ops.kernels import tiled_logps

    found = tiled_logps.tiled_logps(
        head.hidden,
        head.weight,
        head.targets,
        rows=head.rows,
        bias=head.bias,
        inv_temperature=head.inv_temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        adapter=head.adapter,
        with_entropy=wanted.entropy,
        with_sum_p2=wanted.sum_p2,
        with_argmax=wanted.is_argmax,
    )
    return RowStats(found.logps, found.row_max, found.log_sum, found.entropy, None, found.sum_p2, found.is_argmax)


def exponentiate_(tile: Tensor, stats: RowStats, scaling: Scaling) -> None:
    """Nothing: `grads_` starts from logits."""


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
    """Gradient of sum(dlogps * logps + dentropy * entropy) for a tile of logits, in place of the tile's memory."""
    from repo_ops.kernels import logit_rows

    if owned is not None:
        targets = torch.where(owned, targets, -1)  # which no column matches
    rows = logit_rows.RowStats(stats.logps, stats.row_max, stats.log_sum, stats.entropy, None)
    scale = scaling._asdict()
    return RowGrads(logit_rows.row_grads_(tile, targets, rows, dlogps, dentropy, **scale, out_dtype=out_dtype), None)
