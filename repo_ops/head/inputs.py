"""What turns hidden states into logits, and which rows are live."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def exact_dtype(*values: Tensor) -> torch.dtype:
    """Dtype in which nothing is lost: float64 if one of `values` is, else float32."""
    return torch.float64 if any(getattr(v, "dtype", None) == torch.float64 for v in values) else torch.float32


def rounded(dtype: torch.dtype | None, *operands: Tensor) -> list[Tensor]:
    """`operands`, those of more bytes than `dtype` as detached copies in it; nothing is where one is float64."""
    if dtype is None or exact_dtype(*operands) == torch.float64:
        return list(operands)
    return [x.detach().to(dtype) if x.dtype.itemsize > dtype.itemsize else x for x in operands]


class Product(NamedTuple):
    """hidden [M, D] of every position times weight [V, D] transposed."""

    hidden: Tensor
    weight: Tensor


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
    """[N] float32 (float64 for float64 inputs) or one float: 1 / temperature."""
    logit_scale: float = 1.0
    softcap: float | None = None
    adapter: Product | None = None
    """A low-rank addition to the logits."""
    tp_group: dist.ProcessGroup | None = None
    """Group whose ranks hold consecutive shards of the vocabulary; `targets` are then local, see head/shards.py."""
    owned: Tensor | None = None
    """[N] bool, targets that lie in this rank's shard; None without tp_group."""
    largest_shard: int = 0
    """V, or that of the largest shard, so that all ranks of a tp_group cut the same chunks."""
    accumulates: bool = False
    """Whether the gradient of `weight` is added to weight.grad as it is formed, instead of being handed over."""
    rounds_to: torch.dtype | None = None
    """Precision of the products' operands; None: their own."""
    leaves: tuple[Tensor | None, ...] | None = None
    """Where operands are rounded copies: what they were made of, in the order of `tensors`."""

    def with_copies(self) -> HeadInputs:
        """The same with operands that are rounded to `rounds_to`; itself where they are already."""
        products = [Product(*rounded(self.rounds_to, *product)) for product in self.products]
        if all(new.hidden is old.hidden and new.weight is old.weight for new, old in zip(products, self.products)):
            return self
        (hidden, weight), *adapter = products
        return replace(
            self, hidden=hidden, weight=weight, adapter=adapter[0] if adapter else None, leaves=tuple(self.tensors)
        )

    def without_copies(self) -> HeadInputs:
        """The same as it was before `with_copies`."""
        if self.leaves is None:
            return self
        hidden, weight, _, low, up = self.leaves
        assert hidden is not None
        assert weight is not None
        adapter = None if low is None or up is None else Product(low, up)
        return replace(self, hidden=hidden, weight=weight, adapter=adapter, leaves=None)

    @property
    def products(self) -> list[Product]:
        """The products whose sum is the raw logits."""
        return [Product(self.hidden, self.weight), *([] if self.adapter is None else [self.adapter])]

    @property
    def tensors(self) -> list[Tensor | None]:
        """What gradients may flow to: hidden, weight, bias, adapter hidden, adapter weight."""
        return list(self.leaves or (self.hidden, self.weight, self.bias, *(self.adapter or (None, None))))

    @property
    def num_rows(self) -> int:
        """N, the number of live rows."""
        return len(self.targets)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype in which nothing is lost: float64 for float64 inputs, else float32."""
        return exact_dtype(self.hidden, self.weight)

    def rows_of(self, hidden: Tensor, chunk: slice) -> Tensor:
        """[C, D] of some live rows, from hidden states [M, D] of every position."""
        return hidden[chunk] if self.rows is None else hidden.index_select(0, self.rows[chunk])

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


class Wanted(NamedTuple):
    """Statistics of a row beyond its log-probability; what is not wanted is not computed."""

    entropy: bool = False
    sum_p2: bool = False
    is_argmax: bool = False


class RowStats(NamedTuple):
    """What a row of logits z leaves behind; [C] each, float32 (float64 for float64 inputs)."""

    logps: Tensor
    """z[target] - logsumexp(z), never above 0; exact also where it is nearly 0."""
    row_max: Tensor
    """The largest logit, or one near it (streamed.py): what exponentials are taken relative to."""
    log_sum: Tensor
    """log(sum exp(z - row_max))."""
    entropy: Tensor | None
    """-sum p log p in nats, where asked for."""
    entry_logps: Tensor | None = None
    """Log-probability of the entry that `targets` names in this rank's vocabulary shard, where the target may lie in
    another; None where it is the target itself."""
    sum_p2: Tensor | None = None
    """sum p^2, in (0, 1], where asked for."""
    is_argmax: Tensor | None = None
    """bool, whether no entry is likelier than the target, where asked for."""

    def rows(self, chunk: slice | Tensor) -> RowStats:
        """The statistics of some rows."""
        return RowStats(*(None if values is None else values[chunk] for values in self))  # type: ignore[arg-type]


class RowGrads(NamedTuple):
    """d loss / d (hidden weight^T) of a tile, as row_scale[:, None] * tile (row_scale None: 1)."""

    tile: Tensor
    """[C, V]."""
    row_scale: Tensor | None
    """[C] float32."""
