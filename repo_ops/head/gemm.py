"""The three matrix products of the head, accumulated and returned in float32 (float64 for float64 inputs).

On a GPU the vendor's bfloat16 GEMM writes float32 itself. On a CPU there is no such GEMM: bfloat16 operands are upcast
(exactly) in slices of the vocabulary and multiplied in float32, with oneDNN told that it may round operands to
bfloat16, which for these operands loses nothing; measured on 2 cores with AMX, [682, 576] by [576, 49152]: 53 ms
against 168 ms without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """A context in which products run in the dtype of their operands; autocast would round float32 ones to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


SLICE_BYTES = 1 << 24
"""Size of an upcast slice of the head's weight on a CPU."""
PRODUCT_BYTES = 1 << 22
"""Size of a slice of a 16-bit weight gradient on a CPU, that is still in cache when it is added."""


def logits_(tile: Tensor, hidden: Tensor, weight: Tensor, *, add: bool = False) -> None:
    """tile [C, V] = hidden [C, D] weight^T [D, V], or += with `add`, summed in the tile's precision or better."""
    beta = 1.0 if add else 0.0
    if _vendor_writes(tile.dtype, hidden, weight):
        torch.addmm(tile, hidden, weight.t(), beta=beta, out_dtype=tile.dtype, out=tile)
        return
    with _operands_of(hidden, weight):
        hidden = hidden.to(tile.dtype)
        for part, upcast in _slices(weight, tile.dtype):
            torch.addmm(tile[:, part], hidden, upcast.t(), beta=beta, out=tile[:, part])


def hidden_grad(dlogits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """[C, D] = dlogits [C, V] weight [V, D]; `hidden` [C, D] only tells the precision of the inputs."""
    if dlogits.dtype == weight.dtype:
        return torch.mm(dlogits, weight)
    with _operands_of(hidden, weight):
        grad = None
        for part, upcast in _slices(weight, dlogits.dtype):
            grad = torch.mm(dlogits[:, part], upcast) if grad is None else grad.addmm_(dlogits[:, part], upcast)
    assert grad is not None
    return grad


def add_weight_grad_(total: Tensor, dlogits: Tensor, hidden: Tensor, weight: Tensor, *, first: bool) -> None:
    """total [V, D] += dlogits^T [V, C] hidden [C, D]; the first chunk writes instead of adding."""
    beta = 0.0 if first else 1.0
    operand = hidden.to(dlogits.dtype)
    if _vendor_writes(total.dtype, dlogits, operand):
        torch.addmm(total, dlogits.t(), operand, beta=beta, out_dtype=total.dtype, out=total)
    elif total.dtype == dlogits.dtype:
        with _operands_of(hidden, weight):
            torch.addmm(total, dlogits.t(), operand, beta=beta, out=total)
    else:  # 16-bit dlogits on a CPU: products of slices are rounded once to that dtype, sums stay in float32
        rows = max(1, PRODUCT_BYTES // (total.shape[1] * dlogits.element_size()))
        for start in range(0, len(total), rows):
            product = torch.mm(dlogits[:, start : start + rows].t(), operand)
            target = total[start : start + rows]
            target.copy_(product) if first else target.add_(product)


@contextlib.contextmanager
def bfloat16_operands() -> Iterator[None]:
    """CPU float32 matrix products inside may round their operands to bfloat16; sums stay float32."""
    backend = torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):  # torch < 2.9: float32 products, slower and as exact
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _operands_of(hidden: Tensor, weight: Tensor) -> contextlib.AbstractContextManager[None]:
    # bfloat16 inputs are not changed by rounding to bfloat16, and their dlogits are rounded like that on every GPU
    both = hidden.dtype == weight.dtype == torch.bfloat16
    return bfloat16_operands() if both and hidden.device.type == "cpu" else contextlib.nullcontext()


def _vendor_writes(dtype: torch.dtype, left: Tensor, right: Tensor) -> bool:
    """Whether one vendor GEMM multiplies these 16-bit operands and writes float32, the only `dtype` it offers."""
    sixteen_bits = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    # torch 2.8 and 2.9 have out_dtype and refuse a float32 addend to 16-bit operands (pytorch/pytorch#167931)
    return left.is_cuda and sixteen_bits and dtype == torch.float32 and torch.__version__ >= "2.10"


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(vocabulary slice, its weight in `dtype`): the whole weight where no copy is needed."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    rows = min(len(weight), max(1, SLICE_BYTES // (weight.shape[1] * dtype.itemsize)))
    upcast = weight.new_empty((rows, weight.shape[1]), dtype=dtype)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + len(part)), upcast[: len(part)].copy_(part)
