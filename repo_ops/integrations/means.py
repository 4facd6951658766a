"""Metrics in the form that hosts average themselves."""

from __future__ import annotations

from torch import Tensor

from repo_ops.metrics import Metrics


def means(metrics: Metrics) -> dict[str, Tensor]:
    """name -> mean over the call's tokens, 0-d and detached; 0 where there were none, so that names never change.

    Extremes are left out: a host that averages over micro-batches would make neither a mean nor an extreme of them.
    """
    return {
        name: found.total / found.count.clamp_min(1)
        for name, found in metrics.items()
        if not name.endswith(("_max", "_min"))
    }
