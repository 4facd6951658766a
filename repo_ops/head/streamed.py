"""Tiles of bfloat16 heads on a CPU: float32 logits live in cache, a slice of the vocabulary at a time.

What the gradient GEMMs read is the exponentials, rounded to bfloat16 as their operands are on every device. So only
those are stored, in half the memory of logits, while log-probabilities come from float32 sums. Exponentials are taken
relative to a logit of the row that is known early, the largest of the first slice: bfloat16 has the range of float32,
so a later logit may exceed it by far without harm. Where one exceeds it by more than RANGE, the row's largest is known
by then, and the tile is made a second time relative to that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repo_ops.head import gemm, torch_rows
from repo_ops.head.inputs import HeadInputs, RowStats, Scaling, Wanted

RANGE = 60.0
"""exp(RANGE) times any vocabulary is far below float32's largest number, exp(88)."""
SLICE_BYTES = 1 << 22
"""Float32 logits of a slice; measured on 2 cores with 2 MiB of L2 each: 1 to 4 MiB are alike, 16 MiB cost 15 % more."""


def suits(head: HeadInputs, wanted: Wanted) -> bool:
    """Whether a head's tiles can be made this way: all bfloat16, and log-probabilities are all that is asked for."""
    dtypes = {tensor.dtype for product in head.products for tensor in product}
    return head.hidden.device.type == "cpu" and dtypes == {torch.bfloat16} and head.softcap is None and not any(wanted)


def stats(head: HeadInputs, chunk: slice, tile: Tensor | None) -> RowStats:
    """Statistics of a chunk of rows; `tile` [C, V] bfloat16 becomes exp(z - row_max), 0 at the target (None: no tile).

    Here `row_max` is the reference above: the largest logit of a row, or one at most RANGE below it.
    """
    found, peak = _stats(head, chunk, tile, None)
    if bool((peak.abs() > RANGE).any()):
        masked = peak == -float("inf")  # all of the row, which may be one rank's shard of it
        found, _ = _stats(head, chunk, tile, torch.where(masked, 0.0, found.row_max + peak))
        found = found._replace(row_max=torch.where(masked, peak, found.row_max))
    return found


def exponentiate_(tile: Tensor, head: HeadInputs, chunk: slice, known: RowStats) -> None:
    """The tile of a chunk becomes exp(z - row_max), from statistics that are already known."""
    for part, z in _logits(head, chunk):
        tile[:, part] = z.sub_(known.row_max[:, None]).exp_()


def _stats(head: HeadInputs, chunk: slice, tile: Tensor | None, reference: Tensor | None) -> tuple[RowStats, Tensor]:
    """(statistics relative to `reference` [C], the largest logit of each row minus it)."""
    targets = head.targets[chunk]
    target, rest = torch.zeros(2, len(targets))
    peak = torch.full_like(rest, -float("inf"))
    for part, z in _logits(head, chunk):
        if reference is None:
            reference = z.amax(1)
            reference = torch.where(reference == -float("inf"), 0.0, reference)  # all of this slice is masked
        torch.maximum(peak, z.sub_(reference[:, None]).amax(1), out=peak)
        here = ((targets >= part.start) & (targets < part.stop)).nonzero()[:, 0]
        places = here, targets[here] - part.start
        target[here] = z[places]
        z.exp_()[places] = 0.0
        rest += z.sum(1)
        if tile is not None:
            tile[:, part] = z
    assert reference is not None
    target_exp = target.exp()
    log_sum = torch.where(target == 0, rest.log1p(), (rest + target_exp).log())
    # likelier than all others together: log p = -log(1 + rest / e), without cancellation
    logps = torch.where(rest < target_exp, -(rest / target_exp).log1p(), target - log_sum)
    return RowStats(logps, reference, log_sum, None), peak


def _logits(head: HeadInputs, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the vocabulary, its scaled logits [C, n] in float32, in memory that the next slice takes over)."""
    scaling, (vocab_size, dim) = head.scaling(chunk), head.weight.shape
    products = [(head.rows_of(hidden, chunk).float(), weight) for hidden, weight in head.products]
    rows = len(products[0][0])
    columns = max(1, min(vocab_size, SLICE_BYTES // (4 * max(rows, dim))))
    memory = head.hidden.new_empty(rows * columns, dtype=torch.float32)
    for start in range(0, vocab_size, columns):
        part = slice(start, min(start + columns, vocab_size))
        z = memory[: rows * (part.stop - start)].view(rows, -1)
        with gemm.bfloat16_operands():  # which all of them are
            for i, (hidden, weight) in enumerate(products):
                gemm.logits_(z, hidden, weight[part], add=i > 0)
        bias = None if scaling.bias is None else scaling.bias[part]
        yield part, torch_rows.scale_(z, Scaling(bias, scaling.inv_temperature, scaling.logit_scale, None))
