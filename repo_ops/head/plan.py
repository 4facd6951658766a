"""How many rows a tile of logits holds, from a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from repo_ops.head import streamed, triton_rows
from repo_ops.head.gemm import PRODUCT_BYTES, SLICE_BYTES, multiplies
from repo_ops.head.inputs import HeadInputs, Wanted
from repo_ops.head.pages import on_large_pages
from repo_ops.head.torch_rows import BLOCK_BYTES
from repo_ops.options import MIB, Options

CPU_BUDGET = 128 * MIB
CPU_ROWS = 512
"""Each tile reads the weight again and adds to all of its gradient. Measured on 2 cores, float32, (512, 1024, 151936),
in 15 rounds of random order: tiles of 256 rows 1.08x of three bare GEMMs, of 512 rows 1.03x."""
ROW_ALIGNMENT, ROW_OFFSET, PADDED_FROM = 4096, 320, 1 << 16
"""Bytes. Rows of a float32 CPU tile begin an odd number of cache lines after a multiple of 4 KiB: where all begin at
such a multiple, as over 49152 entries, the elements of a column share a few sets of the cache. 2 cores, rows next to
one another and so: 512 rows of 49152 entries, `hidden` of 576 columns: 899 and 782 ms; 256 of 151936, 1024: 2594 and
2476 ms."""
GPU_ROWS = 2048
"""Below about 1100 rows a tile, accumulating a float32 weight gradient is bound by memory bandwidth on an H100."""
TILED_BELOW = 192
"""A GEMM over few rows is bound by reading the weight from memory, and it writes and reads logits besides. A kernel
that keeps them in registers then wins, though its products alone are slower: predicted below 170 rows on an H100."""


@dataclass(frozen=True)
class Plan:
    """Rows of a tile, its dtype and the row backend."""

    rows: int
    tile_dtype: torch.dtype
    gradient_dtype: torch.dtype
    """Dtype of dlogits as operands of the gradient GEMMs: the inputs' own, on a CPU only where that is bfloat16."""
    backend: str
    tiles_statistics: bool = False
    """Whether a sweep for statistics alone keeps its logits in registers (kernels/tiled_logps)."""
    streams: bool = False
    """Whether tiles hold exponentials only, their logits exist a slice of the vocabulary at a time (streamed.py)."""
    padding: int = 0
    """Entries between the rows of a tile."""

    def new_tile(self, head: HeadInputs) -> Tensor:
        """[rows, V] uninitialised; one is reused by all chunks of a sweep."""
        rows, vocab_size = min(self.rows, head.num_rows), len(head.weight)
        tile = head.hidden.new_empty((rows, vocab_size + self.padding), dtype=self.tile_dtype)
        return on_large_pages(tile)[:, :vocab_size]

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Slices of at most `rows` rows, of equal size but for one row."""
        count = -(-num_rows // self.rows)
        for i in range(count):
            yield slice(i * num_rows // count, (i + 1) * num_rows // count)

    def sequence_chunks(self, lengths: list[int]) -> list[tuple[slice, slice]] | None:
        """(rows, sequences) of chunks that hold whole sequences; None where one sequence is longer than a tile."""
        if max(lengths, default=0) > self.rows:
            return None
        chunks, row, first = [], 0, 0
        end = 0
        for i, length in enumerate(lengths):
            if end + length - row > self.rows:
                chunks.append((slice(row, end), slice(first, i)))
                row, first = end, i
            end += length
        if end > row:
            chunks.append((slice(row, end), slice(first, len(lengths))))
        return chunks


def make_plan(head: HeadInputs, options: Options, wanted: Wanted) -> Plan:
    """The plan for `head` within options.memory_budget, for sweeps that ask for `wanted` at most.

    Raises:
        ValueError: the budget does not hold a single row, or the backend cannot run on these tensors.
    """
    hidden, weight = head.hidden, head.weight
    tile_dtype = options.logits_dtype or head.exact_dtype
    backend = choose_backend(hidden, options, tile_dtype)
    streams = backend == "torch" and options.logits_dtype is None and streamed.suits(head, wanted)
    tile_dtype = torch.bfloat16 if streams else tile_dtype
    gradient_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    vocab_size = head.largest_shard or len(weight)
    narrows = gradient_dtype == torch.bfloat16 and tile_dtype == torch.float32
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:
        gradient_dtype = torch.bfloat16 if narrows and multiplies(torch.bfloat16, hidden.device) else tile_dtype
    pads = on_cpu and backend == "torch" and gradient_dtype == tile_dtype == torch.float32
    padding = _padding(vocab_size * tile_dtype.itemsize) // tile_dtype.itemsize if pads else 0
    row_bytes = (vocab_size + padding) * tile_dtype.itemsize
    # beside its logits a row holds its gathered hidden state, a scaled copy of it and its gradient
    row_bytes += 3 * weight.shape[1] * head.exact_dtype.itemsize
    budget, fixed = options.memory_budget, 0
    if on_cpu:
        # temporaries of the row arithmetic, a block of rows each: logarithms, and a softcap's slope in three steps
        blocks = 1 + (3 if head.softcap is not None else 0) + 1
        fixed = blocks * max(BLOCK_BYTES, 4 * vocab_size * tile_dtype.itemsize)
        fixed += SLICE_BYTES if weight.dtype != tile_dtype else 0
        fixed += 2 * PRODUCT_BYTES if not multiplies(tile_dtype, hidden.device) else 0
        if streams:  # a slice of logits, and the weights of its columns in float32
            fixed = 2 * streamed.SLICE_BYTES
        budget = max(CPU_BUDGET, fixed + CPU_ROWS * row_bytes) if budget is None else budget
    elif backend == "torch":  # whose blocks of rows are whole tiles there
        row_bytes += (3 if head.softcap is None else 5) * vocab_size * tile_dtype.itemsize
    elif tile_dtype.itemsize < gradient_dtype.itemsize:  # dlogits that the gradient GEMMs read are a copy of the tile
        row_bytes += vocab_size * gradient_dtype.itemsize
    rows = GPU_ROWS if budget is None else (budget - fixed) // row_bytes
    if rows < 1:
        raise ValueError(
            f"options.memory_budget: expected at least {fixed + row_bytes} bytes, which one row of logits over "
            f"{vocab_size} entries needs, got {budget}"
        )
    tiles = backend == "triton" and rows < min(TILED_BELOW, head.num_rows) and not triton_rows.why_not_tiled(head)
    return Plan(rows, tile_dtype, gradient_dtype, backend, tiles, streams, padding)


def _padding(row_bytes: int) -> int:
    """Bytes from the end of a row to the start of the next."""
    return -row_bytes % ROW_ALIGNMENT + ROW_OFFSET if row_bytes >= PADDED_FROM else 0


def choose_backend(hidden: Tensor, options: Options, tile_dtype: torch.dtype) -> str:
    """ "triton" or "torch": what runs the row arithmetic.

    Raises:
        ValueError: "triton" was asked for and cannot run here.
    """
    if options.backend == "auto":
        return "triton" if hidden.is_cuda and not triton_rows.why_not(hidden, tile_dtype) else "torch"
    if options.backend == "triton":
        reason = triton_rows.why_not(hidden, tile_dtype)
        if reason:
            raise ValueError(f"options.backend: 'triton' cannot run here: {reason}; use 'torch' or 'auto'")
    return options.backend
