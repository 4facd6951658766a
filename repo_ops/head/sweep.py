"""Sweeps over the vocabulary: a chunk of rows at a time, GEMM to a tile, row arithmetic, GEMMs back.

`statistics` costs one pass of N V D multiply-adds, `gradients` three (it recomputes the tile), and `one_sweep` three in
all: there the objective turns a tile's statistics into coefficients while the tile still exists.

A row backend is two functions, `stats_` and `grads_`. Between them it may leave in the tile what suits it: Triton's
leaves the logits, PyTorch's leaves exponentials, so that one pass over memory serves both; `exponentiate_` brings a
tile of fresh logits to that state where the statistics are known already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repo_ops.head import gemm, shards, streamed, torch_rows, triton_rows
from repo_ops.head.gradients import Gradients
from repo_ops.head.inputs import HeadInputs, RowStats, Wanted
from repo_ops.head.plan import Plan

Rule = Callable[[slice, RowStats], tuple[Tensor, Tensor | None]]
"""(rows of the chunk, their statistics) -> (d loss / d logps, d loss / d entropy or None), [C] each."""

DEAD_SHARE = 0.1
"""Rows without gradient leave a CPU tile before the gradient GEMMs when they are at least this share of it; moving the
others up costs one copy of the tile."""


def statistics(head: HeadInputs, plan: Plan, *, wanted: Wanted) -> RowStats:
    """Statistics of all live rows: one pass, nothing of size V is kept."""
    if plan.tiles_statistics:
        found = triton_rows.tiled_stats(head, wanted)
        group, owned = head.tp_group, head.owned
        return found if group is None or owned is None else shards.combine(found, owned, group)
    stats = _new_stats(head, wanted)
    tile = None if plan.streams else plan.new_tile(head)
    for chunk in plan.chunks(head.num_rows):
        _fill(stats, chunk, _tile_stats(head, plan, tile, chunk, wanted))
    return stats


def one_sweep(
    head: HeadInputs, plan: Plan, chunks: list[slice], rule: Rule, grads: Gradients, *, wanted: Wanted
) -> RowStats:
    """Statistics of all live rows, with gradients formed as soon as `rule` has given a chunk's coefficients."""
    stats = _new_stats(head, wanted)
    tile = plan.new_tile(head)
    for chunk in chunks:
        found = _tile_stats(head, plan, tile, chunk, wanted)
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
        part, known = tile[: chunk.stop - chunk.start], stats.rows(chunk)
        if plan.streams:
            streamed.exponentiate_(part, head, chunk, known)
        else:
            _logits_(part, head, chunk)
        dh = None if dentropy is None else dentropy[chunk]
        _add_gradients(head, plan, tile, chunk, known, dlogps[chunk], dh, grads, seen=plan.streams)


def _tile_stats(head: HeadInputs, plan: Plan, tile: Tensor | None, chunk: slice, wanted: Wanted) -> RowStats:
    part = None if tile is None else tile[: chunk.stop - chunk.start]
    if plan.streams:
        stats = streamed.stats(head, chunk, part)
    else:
        assert part is not None
        _logits_(part, head, chunk)
        rows = triton_rows if plan.backend == "triton" else torch_rows
        stats = rows.stats_(part, head.targets[chunk], head.scaling(chunk), wanted)
    if head.tp_group is None or head.owned is None:
        return stats
    return shards.combine(stats, head.owned[chunk], head.tp_group)


def _logits_(tile: Tensor, head: HeadInputs, chunk: slice) -> None:
    for i, (hidden, weight) in enumerate(head.products):
        gemm.logits_(tile, head.rows_of(hidden, chunk), weight, add=i > 0)


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
    if grads.scale is not None:
        dlogps, dentropy = dlogps * grads.scale, None if dentropy is None else dentropy * grads.scale
    live = None
    # elsewhere counting the live rows would wait for the device, and ranks that share rows must agree on them
    if tile.device.type == "cpu" and head.tp_group is None:
        live = _live_rows(dlogps, dentropy)
    if live is not None:
        for to, origin in enumerate(live.tolist()):
            if to != origin:
                part[to] = part[origin]
        part, targets, scaling = part[: len(live)], targets[live], scaling.rows(live)
        stats = stats.rows(live)
        dlogps, dentropy = dlogps[live], None if dentropy is None else dentropy[live]
    rows = triton_rows if plan.backend == "triton" else torch_rows
    if not seen:
        rows.exponentiate_(part, stats, scaling)
    owned = None if head.owned is None else head.owned[chunk]
    grads.add(chunk, live, rows.grads_(part, targets, stats, dlogps, dentropy, scaling, plan.gradient_dtype, owned))


def _live_rows(dlogps: Tensor, dentropy: Tensor | None) -> Tensor | None:
    """Rows of a chunk that carry a gradient, or None where moving them up would not pay."""
    alive = dlogps != 0 if dentropy is None else (dlogps != 0) | (dentropy != 0)
    live = alive.nonzero()[:, 0]
    return live if len(live) <= (1 - DEAD_SHARE) * len(dlogps) else None


def _new_stats(head: HeadInputs, wanted: Wanted) -> RowStats:
    def new(dtype: torch.dtype = head.exact_dtype) -> Tensor:
        return torch.empty(head.num_rows, dtype=dtype, device=head.hidden.device)

    return RowStats(
        new(),
        new(),
        new(),
        new() if wanted.entropy else None,
        None if head.tp_group is None else new(),
        new() if wanted.sum_p2 else None,
        new(torch.bool) if wanted.is_argmax else None,
    )


def _fill(stats: RowStats, chunk: slice, found: RowStats) -> None:
    for whole, part in zip(stats, found, strict=True):
        if whole is not None and part is not None:
            whole[chunk] = part
