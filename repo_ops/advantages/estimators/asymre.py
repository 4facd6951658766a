"""AsymRE: A = R - (mean + shift), mean over the prompt's samples.

A negative shift raises every sample a little, which is the gradient of a forward-KL term with weight -shift. So samples
without variance, and a sample without others, have A = -shift and not 0.
Source: arXiv:2506.20520; one of the REP methods of arXiv:2509.24203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    shift: float = -0.1
    """Added to the baseline; -0.1. Above 0 it lowers every sample, which is unstable on off-policy data."""

    def __call__(self, rows: Rows) -> Tensor:
        return rows.groups.deviation(rows.rewards) - self.shift


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    peers = [[r for r, g in zip(rewards, group_ids, strict=True) if g == group] for group in group_ids]
    return [r - (sum(g) / len(g) + estimator.shift) for r, g in zip(rewards, peers, strict=True)]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (1.0, 0.0), (0, 0), None, (0.6, -0.4)),
    ({"shift": 0.25}, (1.0, 0.0), (0, 0), None, (0.25, -0.75)),
    ({"shift": 0.0}, (1.0, 0.0), (0, 0), None, (0.5, -0.5)),  # Dr. GRPO
    ({}, (1.0, 1.0, 7.0), (0, 0, 1), None, (0.1, 0.1, 0.1)),  # no variance, and a group of one
]
