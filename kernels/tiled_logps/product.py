"""hidden @ weight^T, a block of it at a time: the kernel's loop, the check of its operands, what it assumes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels.elementwise import FLOATS
from repo_ops.kernels.launch import Config


@triton.jit
def add_product(
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


class Product(NamedTuple):
    """One checked product of hidden states and weights, and what its kernel code assumes of them."""

    hidden: Tensor | None
    weight: Tensor | None
    size: int
    aligned: bool


def check_adapter(adapter: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Tensor) -> Product:
    """The low-rank addition to the logits of `hidden` and `weight`; of no tensors where there is none."""
    if adapter is None:
        return Product(None, None, 0, False)
    left, right = adapter
    product = check_product("adapter[0]", left, "adapter[1]", right)
    for name, value, like in (("adapter[0]", left, hidden), ("adapter[1]", right, weight)):
        if len(value) != len(like) or value.dtype != like.dtype:
            raise ValueError(
                f"{name}: expected {len(like)} rows of {like.dtype}, got {len(value)} of {value.dtype};"
                " its rows are those of hidden and weight"
            )
    return product


def check_product(left_name: str, left: Tensor, right_name: str, right: Tensor) -> Product:
    """left @ right^T as the kernel can multiply it, or an error that names the operand."""
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
    return Product(left, right, left.shape[1], aligned(left, right))


def aligned(left: Tensor, right: Tensor) -> bool:
    """Whether every row of both starts at a 16-byte boundary."""
    starts = [start for m in (left, right) for start in (m.data_ptr(), m.stride(0) * m.element_size())]
    return all(start % 16 == 0 for start in starts)


def product_arguments(head: Product, adapter: Product, config: Config) -> dict[str, Any]:
    """What `tiled_logps_kernel` takes of both products, by its parameter names."""
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
