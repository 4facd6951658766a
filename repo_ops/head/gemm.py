"""The three matrix products of the head, accumulated and returned in float32 (float64 for float64 inputs).

On a GPU the vendor's bfloat16 GEMM writes float32 itself. On a CPU there is no such GEMM: bfloat16 operands are upcast
(exactly) in slices of the vocabulary and multiplied in float32, with oneDNN told that it may round operands to
bfloat16, which for these operands loses nothing; measured on 2 cores with AMX, [682, 576] by [576, 49152]: 53 ms
against 168 ms without. Where the processor has no instructions for 16-bit operands, PyTorch multiplies them in loops of
its own, [256, 49152] by [49152, 256] more than a hundred times slower than in float32: there they are upcast, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """A context in which products run in the dtype of their operands; autocast would round float32 ones to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


SLICE_BYTES = 1 << 24
"""Size of an upcast slice of the head's weight on a CPU."""
PRODUCT_BYTES = 1 << 22
"""Size of a slice of a 16-bit product on a CPU, or of a 16-bit operand in float32, that is still in cache when used."""
THREAD_SLICE_BYTES, THREAD_SLICE_ENTRIES = 1 << 18, 128
"""Each thread's share of the weight, and the vocabulary entries that it has at least, in a float32 product that makes
logits on a CPU without AVX-512: MKL is slow there where it splits a large vocabulary itself, and where it gets few
entries. 2 cores, [C, D] by [D, V] whole and in such slices, ms: C = 310 by (576, 49152) 216 and 170, 512 by
(1024, 75968) 861 and 690, 256 by (1536, 151936) 1853 and 1263, 512 by (4096, 37984) 1966 and 1393, in slices of 32
entries 2075."""
SERIAL, SERIAL_TERMS = 8, 2048
"""CPU products with so few rows or columns are summed in slices of so many terms: MKL without AVX-512 gives them to a
loop that adds up the vocabulary one by one. 3 rows of 100,000 terms are 7e-6 off, and 1e-7 in slices."""


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products on `device` take operands of this dtype as they are."""
    return device.type != "cpu" or dtype.itemsize > 2 or _cpu_multiplies(dtype)


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())


def logits_(tile: Tensor, hidden: Tensor, weight: Tensor, *, add: bool = False) -> None:
    """tile [C, V] = hidden [C, D] weight^T [D, V], or += with `add`, summed in the tile's precision or better."""
    beta = 1.0 if add else 0.0
    if _vendor_writes(tile.dtype, hidden, weight):
        torch.addmm(tile, hidden, weight.t(), beta=beta, out_dtype=tile.dtype, out=tile)
        return
    dtype = _product_dtype(tile)
    if _is_slow_whole(weight, dtype) and tile.dtype == dtype == hidden.dtype:
        entry_bytes, threads = weight.shape[1] * dtype.itemsize, torch.get_num_threads()
        part_bytes = threads * max(THREAD_SLICE_BYTES, THREAD_SLICE_ENTRIES * entry_bytes)
        for part in _parts(len(weight), entry_bytes, part_bytes):
            torch.addmm(tile[:, part], hidden, weight[part].t(), beta=beta, out=tile[:, part])
        return
    with _operands_of(hidden, weight):
        hidden = hidden.to(dtype)
        for part, upcast in _slices(weight, dtype, None if dtype == tile.dtype else len(tile)):
            if dtype == tile.dtype:
                torch.addmm(tile[:, part], hidden, upcast.t(), beta=beta, out=tile[:, part])
            else:
                product = torch.mm(hidden, upcast.t())
                tile[:, part] = product.add_(tile[:, part]) if add else product


def hidden_grad(dlogits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """[C, D] = dlogits [C, V] weight [V, D]; `hidden` [C, D] only tells the precision of the inputs."""
    if _vendor_writes(torch.float32, dlogits, weight):
        # with a 16-bit result cuBLAS may split the vocabulary and add the parts in 16 bits, which is PyTorch's default
        return torch.mm(dlogits, weight, out_dtype=torch.float32)
    dtype = _product_dtype(dlogits)
    if dlogits.dtype == weight.dtype == dtype:
        few = min(len(dlogits), weight.shape[1]) <= SERIAL
        serial = few and dtype == torch.float32 and dlogits.device.type == "cpu"
        terms = SERIAL_TERMS if serial else len(weight)
        total = torch.mm(dlogits[:, :terms], weight[:terms])
        for start in range(terms, len(weight), terms):  # addmm_ would add each term to the sum of all before it
            total += torch.mm(dlogits[:, start : start + terms], weight[start : start + terms])
        return total
    with _operands_of(hidden, weight):
        grad: Tensor | None = None
        for part, upcast in _slices(weight, dtype, None if dtype == dlogits.dtype else len(dlogits)):
            left = dlogits[:, part].to(dtype)
            grad = torch.mm(left, upcast) if grad is None else grad.addmm_(left, upcast)
    assert grad is not None
    return grad


def add_weight_grad_(total: Tensor, dlogits: Tensor, hidden: Tensor, weight: Tensor, *, first: bool) -> None:
    """total [V, D] += dlogits^T [V, C] hidden [C, D]; the first chunk writes instead of adding."""
    beta, dtype = 0.0 if first else 1.0, _product_dtype(dlogits)
    operand = hidden.to(dtype)
    if _vendor_writes(total.dtype, dlogits, operand):
        torch.addmm(total, dlogits.t(), operand, beta=beta, out_dtype=total.dtype, out=total)
    elif total.dtype == dlogits.dtype:
        with _operands_of(hidden, weight):
            torch.addmm(total, dlogits.t(), operand, beta=beta, out=total)
    elif dtype == total.dtype:
        for part in _parts(len(total), max(dlogits.shape[0], total.shape[1]) * dtype.itemsize):
            torch.addmm(total[part], dlogits[:, part].to(dtype).t(), operand, beta=beta, out=total[part])
    else:  # 16-bit products of slices are rounded once to that dtype, sums stay in float32
        for part in _parts(len(total), total.shape[1] * dtype.itemsize):
            product = torch.mm(dlogits[:, part].t(), operand)
            total[part].copy_(product) if first else total[part].add_(product)


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


def _is_slow_whole(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether THREAD_SLICE_BYTES holds for a product of these."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == dtype == torch.float32
    return on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _product_dtype(result: Tensor) -> torch.dtype:
    """Dtype of operands for a product whose result, or whose other operand, is `result`."""
    return result.dtype if multiplies(result.dtype, result.device) else torch.float32


def _slices(weight: Tensor, dtype: torch.dtype, rows: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(vocabulary slice, its weight in `dtype`): the whole weight where no copy is needed.

    `rows`: of a 16-bit matrix whose columns of the slice are upcast as well; None: there is none.
    """
    if weight.dtype == dtype and rows is None:
        yield slice(None), weight
        return
    vocab_size, dim = weight.shape
    if rows is None:
        size = min(vocab_size, max(1, SLICE_BYTES // (dim * dtype.itemsize)))
    else:
        size = min(vocab_size, max(1, PRODUCT_BYTES // (max(dim, rows, 1) * dtype.itemsize)))
    upcast = weight.new_empty((size, dim), dtype=dtype)
    for start in range(0, vocab_size, size):
        part = slice(start, min(start + size, vocab_size))
        yield part, upcast[: part.stop - start].copy_(weight[part])


def _parts(vocab_size: int, entry_bytes: int, part_bytes: int = PRODUCT_BYTES) -> Iterator[slice]:
    size = max(1, part_bytes // max(1, entry_bytes))
    for start in range(0, vocab_size, size):
        yield slice(start, min(start + size, vocab_size))
