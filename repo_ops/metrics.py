"""Sums with their counts, so that micro-batches and ranks combine into the same number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Stat(NamedTuple):
    """A sum and the number of items in it, both detached 0-d tensors; names ending in _max or _min hold an extreme."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here


Metrics = dict[str, Stat]


def stat(values: Tensor, where: Tensor | None = None) -> Stat:
    """Sum and count of `values` [N], of those under `where` [N] bool if given."""
    values = values.detach().to(torch.float32)
    if where is None:
        return Stat(values.sum(), torch.tensor(float(values.numel()), device=values.device))
    return Stat(torch.where(where, values, 0.0).sum(), where.sum().to(torch.float32))


def extreme(values: Tensor, kind: str, where: Tensor | None = None) -> Stat:
    """Largest ("max") or smallest ("min") of `values` [N] under `where`; count 0 where there is none."""
    values = values.detach().to(torch.float32)
    fill = -float("inf") if kind == "max" else float("inf")
    if where is not None:
        values = torch.where(where, values, fill)
    count = (values != fill).any().to(torch.float32)
    values = torch.cat([values, values.new_full((1,), fill)])
    return Stat(values.amax() if kind == "max" else values.amin(), count)


def merge(parts: Iterable[Mapping[str, Stat]]) -> Metrics:
    """Metrics of the union of the parts (micro-batches, or ranks)."""
    merged: Metrics = {}
    for part in parts:
        for name, new in part.items():
            old = merged.get(name)
            if old is None:
                merged[name] = new
            elif name.endswith("_max"):
                merged[name] = Stat(torch.maximum(old.total, new.total), torch.maximum(old.count, new.count))
            elif name.endswith("_min"):
                merged[name] = Stat(torch.minimum(old.total, new.total), torch.maximum(old.count, new.count))
            else:
                merged[name] = Stat(old.total + new.total, old.count + new.count)
    return merged


def summarize(metrics: Mapping[str, Stat]) -> dict[str, float]:
    """Means and extremes as floats, with the effective sample size of every ratio. Reads tensors: call once a step.

    `X/ess` = (sum r)^2 / (n sum r^2) of the importance ratios r, in (0, 1]; 1 means on-policy. Entries without items
    are left out.
    """
    summary: dict[str, float] = {}
    for name, (total, count) in metrics.items():
        if float(count) == 0:
            continue
        summary[name] = float(total) if name.endswith(("_max", "_min")) else float(total) / float(count)
    for name in [n for n in summary if n.rsplit("/", 1)[-1] == "ratio_squared"]:
        prefix = name[: -len("ratio_squared")]
        square = summary.pop(name)
        # an overflowed ratio outweighs all others
        finite = 0 < square < float("inf")
        summary[f"{prefix}ess"] = summary[f"{prefix}ratio"] ** 2 / square if finite else 0.0
    return summary
