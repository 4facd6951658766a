"""Gradients of the head's tensors, gathered over chunks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.head import gemm
from repo_ops.head.inputs import HeadInputs, Product, RowGrads


@dataclass(eq=False)
class ProductGradients:
    """Gradients of one product hidden @ weight^T; buffers exist only for tensors that need one."""

    product: Product
    need_hidden: bool
    need_weight: bool
    every_row_is_written: bool
    accumulation_dtype: torch.dtype
    hidden_dtype: torch.dtype
    """Of the gradients that are handed over, like that of the weight's."""
    weight_dtype: torch.dtype
    weight_grad: Tensor | None = None
    """The weight's existing .grad, which is added to; None: a new tensor is handed over."""
    hidden: Tensor | None = field(default=None, init=False)
    weight: Tensor | None = field(default=None, init=False)
    """[V, D] so far; None before the first chunk."""

    def __post_init__(self) -> None:
        hidden = self.product.hidden
        if self.need_hidden:
            new = torch.empty_like if self.every_row_is_written else torch.zeros_like
            self.hidden = new(hidden, dtype=self.hidden_dtype, memory_format=torch.contiguous_format)
        self.weight = self.weight_grad

    def add(
        self,
        rows: Tensor | slice,
        hidden: Tensor,
        grads: RowGrads,
        tp_group: dist.ProcessGroup | None,
        *,
        only: bool,
    ) -> None:
        """Add a tile's share: `rows` are the positions, `hidden` the states of its rows; `only`: there is no other."""
        dlogits, scale = grads
        if self.hidden is not None:
            dhidden = gemm.hidden_grad(dlogits, hidden, self.product.weight)
            dhidden = dhidden if scale is None else dhidden.mul_(scale[:, None])
            if tp_group is not None:
                dhidden = dhidden.to(self.accumulation_dtype)  # a sum over ranks in 16 bits is rounded at every one
                dist.all_reduce(dhidden, group=tp_group)
            self.hidden[rows] = dhidden.to(self.hidden.dtype)
        if self.need_weight:
            # for 16-bit dlogits rounded as they are: GEMMs want operands of one dtype
            scaled = hidden if scale is None else (hidden * scale[:, None]).to(dlogits.dtype)
            self._add_weight(dlogits, scaled, only)

    def _add_weight(self, dlogits: Tensor, hidden: Tensor, only: bool) -> None:
        weight, first = self.product.weight, self.weight is None
        same = dlogits.dtype == hidden.dtype == weight.dtype == self.weight_dtype
        if only and first and same and gemm.multiplies(weight.dtype, weight.device):
            # the result itself, accumulated inside and rounded once
            self.weight = torch.mm(dlogits.t(), hidden, out=self._new_weight(weight.dtype))
            return
        if self.weight is None:
            self.weight = self._new_weight(self.accumulation_dtype)
        gemm.add_weight_grad_(self.weight, dlogits, hidden, weight, first=first)

    def _new_weight(self, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self.product.weight, dtype=dtype, memory_format=torch.contiguous_format)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dhidden, dweight) in their dtypes."""
        weight = self.product.weight
        if not self.need_weight or self.weight_grad is not None:
            return self.hidden, None
        if self.weight is None:
            return self.hidden, torch.zeros_like(weight, dtype=self.weight_dtype)
        return self.hidden, self.weight.to(self.weight_dtype)


FLOAT16 = frozenset({torch.float16})


def result_dtype(tensor: Tensor, exact: torch.dtype, late: frozenset[torch.dtype]) -> torch.dtype:
    """Dtype in which the gradient of `tensor` leaves the sweep: `exact` where its own dtype is one of `late`."""
    return exact if tensor.dtype in late else tensor.dtype


def _weight_grad(weight: Tensor) -> Tensor:
    """weight.grad, zeros where there was none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return weight.grad


class Gradients:
    """Gradients of a head: of its products and its bias, those that are needed."""

    def __init__(
        self,
        head: HeadInputs,
        needs: Sequence[bool],
        *,
        late: frozenset[torch.dtype] = frozenset(),
        scale: Tensor | None = None,
    ) -> None:
        """`needs`: for hidden, weight, bias, adapter hidden, adapter weight, as in `HeadInputs.tensors`.

        Gradients of tensors of the dtypes `late` stay in float32, for the caller to round: of float16 where a gradient
        scaler multiplies them later, as they would underflow. `scale` (0-d, a power of two) multiplies them on the way
        and is taken out at the end: what float16 operands of the gradient GEMMs need for the same reason.
        """
        self.scale = scale
        self.head = head
        self.wanted = any(needs)
        exact, leaves = head.exact_dtype, head.tensors
        self.dtypes = [exact if leaf is None else result_dtype(leaf, exact, late) for leaf in leaves]
        weight = leaves[1]
        self.weight_grad = _weight_grad(weight) if weight is not None and head.accumulates and needs[1] else None
        self.products = [
            ProductGradients(
                product, needs[at], needs[at + 1], head.rows is None, exact, self.dtypes[at], self.dtypes[at + 1], grad
            )
            for product, at, grad in zip(head.products, (0, 3), (self.weight_grad, None), strict=False)
        ]
        self.bias = torch.zeros_like(head.bias, dtype=exact) if needs[2] and head.bias is not None else None

    def add(self, chunk: slice, live: Tensor | None, grads: RowGrads) -> None:
        """Add a tile's share; `live` [C'] are the rows of the chunk that the tile still holds, None for all."""
        rows = self._positions(chunk, live)
        only = chunk.start == 0 and chunk.stop == self.head.num_rows
        for gradients in self.products:
            if live is not None and gradients.hidden is not None and self.head.rows is None:
                gradients.hidden[chunk] = 0
            if len(grads.tile):
                hidden = self.head.rows_of(gradients.product.hidden, chunk)
                gradients.add(rows, hidden if live is None else hidden[live], grads, self.head.tp_group, only=only)
        if self.bias is not None and len(grads.tile):
            dlogits, scale = grads
            if scale is None:
                self.bias += dlogits.sum(0, dtype=self.bias.dtype)
            else:
                self.bias += torch.mv(dlogits.t(), scale.to(dlogits.dtype))

    def finish(self) -> list[Tensor | None]:
        """Gradients in the order of `HeadInputs.tensors`, in the dtypes of their tensors but for late rounding."""
        (hidden, weight), *adapter = [gradients.finish() for gradients in self.products]
        bias = None if self.bias is None else self.bias.to(self.dtypes[2])
        found = [hidden, weight, bias, *(adapter[0] if adapter else (None, None))]
        return found if self.scale is None else [None if grad is None else grad.div_(self.scale) for grad in found]

    def _positions(self, chunk: slice, live: Tensor | None) -> Tensor | slice:
        rows = self.head.rows
        if live is None:
            return chunk if rows is None else rows[chunk]
        return live + chunk.start if rows is None else rows[chunk][live]
