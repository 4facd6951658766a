"""Row arithmetic by the Triton kernels of repo_ops.kernels.logit_rows, with the interface of torch_rows."""

from __future__ import annotations

import importlib.util
from typing import Any

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
        **_arguments(scaling),
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
        **_arguments(head.scaling(slice(None))),
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
    from repo_ops.kernels import launch, logit_rows

    if owned is not None:
        targets = torch.where(owned, targets, -1)  # which no column matches
    entropy, dentropy = (None if values is None else values.float() for values in (stats.entropy, dentropy))
    rows = logit_rows.RowStats(stats.logps.float(), stats.row_max.float(), stats.log_sum.float(), entropy)
    # only half of a float32 tile's memory may change its dtype; a tile of another one is copied
    halves = tile.dtype == torch.float32 and out_dtype.itemsize == 2
    in_place = out_dtype if halves and launch.narrows_in_place(launch.architecture_of(tile.device)) else tile.dtype
    found = logit_rows.row_grads_(
        tile, targets, rows, dlogps.float(), dentropy, **_arguments(scaling), out_dtype=in_place
    )
    return RowGrads(found.to(out_dtype), None)


def _arguments(scaling: Scaling) -> dict[str, Any]:
    """The scaling by the kernels' names, in no more than their float32."""
    inv, bias = scaling.inv_temperature, scaling.bias
    return {
        "bias": bias.float() if bias is not None and bias.dtype == torch.float64 else bias,
        "inv_temperature": inv.float() if isinstance(inv, Tensor) else inv,
        "logit_scale": scaling.logit_scale,
        "softcap": scaling.softcap,
    }
