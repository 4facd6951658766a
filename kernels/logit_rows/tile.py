"""Tiles of logits as both row kernels see them: where rows start, and the check of the arguments that they share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels.elementwise import FLOATS, elementwise_arguments
from repo_ops.kernels.launch import check_vector

# V, strides and floats are run-time values and no pointer is specialised on its alignment: another vocabulary, another
# temperature or another slice of targets runs the same binary. Only ALIGNED, dtypes and which options are None do not.
RUNTIME = ["V", "row_stride", "inv_temperature_value", "logit_scale", "softcap"]


@triton.jit
def misalignment(row_start):
    """Elements between the 16-byte boundary at or below a row's first element and that element."""
    bytes_each: tl.constexpr = row_start.dtype.element_ty.primitive_bitwidth // 8
    return ((row_start.to(tl.int64) % 16) // bytes_each).to(tl.int32)


def tile_arguments(
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
    scaling = elementwise_arguments(rows, vocabulary, tile.device, bias, inv_temperature, logit_scale, softcap)
    # where every row starts at a 16-byte boundary, the first block needs no mask and narrowed stores are 16 bytes wide
    bias = scaling["bias"]
    starts = [tile.data_ptr(), tile.stride(0) * tile.element_size(), 0 if bias is None else bias.data_ptr()]
    return {
        "tile": tile,
        "targets": check_vector("targets", targets, rows, (torch.int64,), tile.device),
        **scaling,
        "V": vocabulary,
        "row_stride": tile.stride(0),
        "ALIGNED": all(start % 16 == 0 for start in starts),
    }
