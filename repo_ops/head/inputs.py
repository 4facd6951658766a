"""What turns hidden states into logits, and which rows are live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """A head applied to live rows: z = softcap(logit_scale * (hidden weight^T + bias)) / temperature, row by row.

    softcap(x) = softcap * tanh(x / softcap); the order is that of the Hugging Face models that have these terms.
    """

    hidden: Tensor
    """[M, D], every position."""
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    targets: Tensor
    """[N] int64, of live rows."""
    rows: Tensor | None
    """[N] int64, ascending positions of the live rows in `hidden`; None where all are live."""
    inv_temperature: Tensor | float
    """[N] float32 or one float: 1 / temperature."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def num_rows(self) -> int:
        """N, the number of live rows."""
        return len(self.targets)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype in which nothing is lost: float64 for float64 inputs, else float32."""
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.weight.dtype), torch.float32)

    def hidden_rows(self, chunk: slice) -> Tensor:
        """[C, D] hidden states of some live rows, in their own dtype."""
        return self.hidden[chunk] if self.rows is None else self.hidden.index_select(0, self.rows[chunk])

    def scaling(self, chunk: slice) -> Scaling:
        """The elementwise part of the head for some live rows."""
        inv = self.inv_temperature
        return Scaling(self.bias, inv[chunk] if isinstance(inv, Tensor) else inv, self.logit_scale, self.softcap)


class Scaling(NamedTuple):
    """The elementwise part of the head: z = softcap(logit_scale * (x + bias)) * inv_temperature."""

    bias: Tensor | None
    """[V]."""
    inv_temperature: Tensor | float
    """[C] float32 or one float."""
    logit_scale: float
    softcap: float | None

    def factor(self) -> Tensor | float:
        """dz/dx without the softcap's own slope: [C, 1], or one float."""
        inv = self.inv_temperature
        return (inv[:, None] if isinstance(inv, Tensor) else inv) * self.logit_scale

    def rows(self, block: slice | Tensor) -> Scaling:
        """The same for some of its rows."""
        inv = self.inv_temperature
        return self._replace(inv_temperature=inv[block]) if isinstance(inv, Tensor) else self


class RowStats(NamedTuple):
    """What a row of logits z leaves behind; [C] each, float32 (float64 for float64 inputs)."""

    logps: Tensor
    """z[target] - logsumexp(z), computed as (z[target] - max) - log(sum exp(z - max)), hence never above 0."""
    row_max: Tensor
    log_sum: Tensor
    """log(sum exp(z - row_max)), at least 0."""
    entropy: Tensor | None
    """-sum p log p in nats, where asked for."""

    def slice(self, chunk: slice) -> RowStats:
        """The statistics of some rows."""
        return RowStats(*(None if x is None else x[chunk] for x in self))


class RowGrads(NamedTuple):
    """d loss / d (hidden weight^T) of a tile, as row_scale[:, None] * tile (row_scale None: 1)."""

    tile: Tensor
    """[C, V]."""
    row_scale: Tensor | None
    """[C] float32."""
