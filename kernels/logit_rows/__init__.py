"""Statistics and gradients of logit rows, one read of the tile each.

The tile [C, V] is a chunk of logits that a GEMM wrote. `row_stats` reads it once and returns a few floats a row;
`row_grads_` reads it again and overwrites it with d loss / d logits. Nothing of size [C, V] is allocated.
"""

from __future__ import annotations

from repo_ops.kernels.logit_rows.gradients import grads_launch, row_grads_
from repo_ops.kernels.logit_rows.statistics import RowStats, new_stats, row_stats, stats_launch

__all__ = ["RowStats", "grads_launch", "new_stats", "row_grads_", "row_stats", "stats_launch"]
