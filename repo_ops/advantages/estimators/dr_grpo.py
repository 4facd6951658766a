"""Dr. GRPO: A = R - mean over the prompt's samples; no division by the standard deviation.

The loss has a denominator of its own: objective "dr_grpo".
Source: arXiv:2503.20783; also the REINFORCE of arXiv:2509.24203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    def __call__(self, rows: Rows) -> Tensor:
        return rows.groups.deviation(rows.rewards)


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    peers = [[r for r, g in zip(rewards, group_ids, strict=True) if g == group] for group in group_ids]
    return [reward - sum(group) / len(group) for reward, group in zip(rewards, peers, strict=True)]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS: list[tuple[dict[str, Any], Any, Any, Any, Any]] = [
    ({}, (1.0, 0.0, 0.5, 0.5), (0, 0, 0, 0), None, (0.5, -0.5, 0.0, 0.0)),
    ({}, (1.0, 4.0, 0.0, 2.0), (3, -1, 3, -1), None, (0.5, 1.0, -0.5, -1.0)),  # groups interleaved
    ({}, (0.1, 0.1, 0.1), (0, 0, 0), None, (0.0, 0.0, 0.0)),
    ({}, (9.0,), (0,), None, (0.0,)),  # a group of one is its own mean
]
