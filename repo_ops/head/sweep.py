"""Sweeps over the vocabulary: a chunk of rows at a time, GEMM to a tile, row arithmetic, GEMMs back.

`statistics` costs one pass of N V D multiply-adds, `gradients` three (it recomputes the tile), and `one_sweep` three in
all: there the objective turns a tile's statistics into coefficients while the tile still exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repo_ops.head import gemm, torch_rows, triton_rows
from repo_ops.head.inputs import HeadInputs, RowGrads, RowStats
from repo_ops.head.plan import Plan

Rule = Callable[[slice, RowStats], tuple[Tensor, Tensor | None]]
"""(rows of the chunk, their statistics) -> (d loss / d logps, d loss / d entropy or None), [C] each."""

DEAD_SHARE = 0.1
"""Rows without gradient leave a CPU tile before the gradient GEMMs when they are at least this share of it; moving the
others up costs one copy of the tile."""


@dataclass(eq=False)
class Gradients:
    """Gradients of the head's tensors, gathered over chunks; buffers exist only for tensors that need one."""

    head: HeadInputs
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    hidden: Tensor | None = field(default=None, init=False)
    weight: Tensor | None = field(default=None, init=False)
    bias: Tensor | None = field(default=None, init=False)
    _chunks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        head = self.head
        if self.need_hidden:
            every_row_is_written = head.rows is None
            new = torch.empty_like if every_row_is_written else torch.zeros_like
            self.hidden = new(head.hidden, memory_format=torch.contiguous_format)
        if self.need_weight:
            self.weight = torch.empty_like(head.weight, dtype=head.exact_dtype, memory_format=torch.contiguous_format)
        if self.need_bias:
            assert head.bias is not None
            self.bias = torch.zeros_like(head.bias, dtype=head.exact_dtype)

    @property
    def wanted(self) -> bool:
        """Whether any tensor needs a gradient."""
        return self.need_hidden or self.need_weight or self.need_bias

    def add(self, chunk: slice, live: Tensor | None, grads: RowGrads) -> None:
        """Add a tile's share; `live` [C'] are the rows of the chunk that the tile still holds, None for all."""
        head, (dlogits, scale) = self.head, grads
        if len(dlogits) == 0:
            if self.hidden is not None and head.rows is None:
                self.hidden[chunk] = 0
            return
        hidden = head.hidden_rows(chunk) if live is None else head.hidden_rows(chunk)[live]
        if self.hidden is not None:
            dhidden = gemm.hidden_grad(dlogits, hidden, head.weight)
            dhidden = dhidden if scale is None else dhidden.mul_(scale[:, None])
            self._write_hidden(chunk, live, dhidden)
        if self.weight is not None:
            scaled = hidden if scale is None else hidden * scale[:, None]
            gemm.add_weight_grad_(self.weight, dlogits, scaled, head.weight, first=self._chunks == 0)
        if self.bias is not None:
            ones = torch.ones_like(dlogits[:, 0]) if scale is None else scale.to(dlogits.dtype)
            self.bias += torch.mv(dlogits.t(), ones)
        self._chunks += 1

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dhidden, dweight, dbias) in the dtypes of their tensors."""
        if self._chunks == 0 and self.weight is not None:
            self.weight.zero_()
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return self.hidden, weight, bias

    def _write_hidden(self, chunk: slice, live: Tensor | None, values: Tensor) -> None:
        assert self.hidden is not None
        values = values.to(self.hidden.dtype)
        rows = self.head.rows
        if rows is None and live is None:
            self.hidden[chunk] = values
            return
        where = torch.arange(chunk.start, chunk.stop, device=values.device) if rows is None else rows[chunk]
        if live is not None:
            if rows is None:
                self.hidden[chunk] = 0
            where = where[live]
        self.hidden.index_copy_(0, where, values)


def statistics(head: HeadInputs, plan: Plan, *, with_entropy: bool) -> RowStats:
    """Statistics of all live rows: one pass, nothing of size V is kept."""
    stats = _new_stats(head, with_entropy)
    tile = plan.new_tile(head)
    for chunk in plan.chunks(head.num_rows):
        _fill(stats, chunk, _tile_stats(head, plan, tile, chunk, with_entropy))
    return stats


def one_sweep(
    head: HeadInputs, plan: Plan, chunks: list[slice], rule: Rule, grads: Gradients, *, with_entropy: bool
) -> RowStats:
    """Statistics of all live rows, with gradients formed as soon as `rule` has given a chunk's coefficients."""
    stats = _new_stats(head, with_entropy)
    tile = plan.new_tile(head)
    for chunk in chunks:
        found = _tile_stats(head, plan, tile, chunk, with_entropy)
        _fill(stats, chunk, found)
        dlogps, dentropy = rule(chunk, found)
        if grads.wanted:
            _add_gradients(head, plan, tile, chunk, found, dlogps, dentropy, grads, seen=True)
    return stats


def gradients(
    head: HeadInputs, plan: Plan, stats: RowStats, dlogps: Tensor, dentropy: Tensor | None, grads: Gradients
) -> None:
    """Gradients of sum(dlogps * logps + dentropy * entropy) for coefficients that arrive after the statistics."""
    tile = plan.new_tile(head)
    for chunk in plan.chunks(head.num_rows):
        gemm.logits_(tile[: chunk.stop - chunk.start], head.hidden_rows(chunk), head.weight)
        dh = None if dentropy is None else dentropy[chunk]
        _add_gradients(head, plan, tile, chunk, stats.rows(chunk), dlogps[chunk], dh, grads, seen=False)


def _tile_stats(head: HeadInputs, plan: Plan, tile: Tensor, chunk: slice, with_entropy: bool) -> RowStats:
    part = tile[: chunk.stop - chunk.start]
    gemm.logits_(part, head.hidden_rows(chunk), head.weight)
    rows = triton_rows if plan.backend == "triton" else torch_rows
    return rows.stats_(part, head.targets[chunk], head.scaling(chunk), with_entropy)


def _add_gradients(
    head: HeadInputs,
    plan: Plan,
    tile: Tensor,
    chunk: slice,
    stats: RowStats,
    dlogps: Tensor,
    dentropy: Tensor | None,
    grads: Gradients,
    *,
    seen: bool,
) -> None:
    part, targets, scaling = tile[: chunk.stop - chunk.start], head.targets[chunk], head.scaling(chunk)
    live = None
    if tile.device.type == "cpu":  # elsewhere counting the live rows would wait for the device
        live = _live_rows(dlogps, dentropy)
    if live is not None:
        for to, origin in enumerate(live.tolist()):
            if to != origin:
                part[to] = part[origin]
        part, targets, scaling = part[: len(live)], targets[live], scaling.rows(live)
        stats = stats.rows(live)
        dlogps, dentropy = dlogps[live], None if dentropy is None else dentropy[live]
    if plan.backend == "triton":
        row_grads = triton_rows.grads_(part, targets, stats, dlogps, dentropy, scaling, plan.gradient_dtype)
    else:
        if not seen:
            torch_rows.exponentiate_(part, stats, scaling)
        row_grads = torch_rows.grads_(part, targets, stats, dlogps, dentropy, scaling, plan.gradient_dtype)
    grads.add(chunk, live, row_grads)


def _live_rows(dlogps: Tensor, dentropy: Tensor | None) -> Tensor | None:
    """Rows of a chunk that carry a gradient, or None where moving them up would not pay."""
    alive = dlogps != 0 if dentropy is None else (dlogps != 0) | (dentropy != 0)
    live = alive.nonzero()[:, 0]
    return live if len(live) <= (1 - DEAD_SHARE) * len(dlogps) else None


def _new_stats(head: HeadInputs, with_entropy: bool) -> RowStats:
    def new() -> Tensor:
        return torch.empty(head.num_rows, dtype=head.exact_dtype, device=head.hidden.device)

    return RowStats(new(), new(), new(), new() if with_entropy else None)


def _fill(stats: RowStats, chunk: slice, found: RowStats) -> None:
    for whole, part in zip(stats, found, strict=True):
        if whole is not None and part is not None:
            whole[chunk] = part
