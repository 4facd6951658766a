"""OPMD: A = R - tau log mean exp(R / tau), the mean over the prompt's samples.

The baseline is the soft maximum of the rewards: near the mean for a large tau, near the maximum for a small one.
Source: one of the REP methods of arXiv:2509.24203 (Trinity-RFT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    tau: float = 1.0
    """Temperature of the soft maximum, in units of reward; 1."""

    def __post_init__(self) -> None:
        base.check_positive("tau", self.tau)

    def __call__(self, rows: Rows) -> Tensor:
        below = rows.rewards - rows.groups.largest(rows.rewards)  # <= 0, so that exp cannot overflow
        mean = rows.groups.sum((below / self.tau).exp()) / rows.groups.count().clamp_min(1)
        return below - self.tau * mean.log()


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    tau, advantages = estimator.tau, []
    for reward, group in zip(rewards, group_ids, strict=True):
        total, count = -math.inf, 0  # log of the sum, one sample after another
        for x in (r / tau for r, g in zip(rewards, group_ids, strict=True) if g == group):
            total, count = max(total, x) + math.log1p(math.exp(-abs(total - x))), count + 1
        advantages.append(reward - tau * (total - math.log(count)))
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (math.log(3.0), 0.0), (0, 0), None, (math.log(3.0) - math.log(2.0), -math.log(2.0))),  # mean of 3 and 1
    ({"tau": 2.0}, (2 * math.log(3.0), 0.0), (0, 0), None, (2 * math.log(1.5), -2 * math.log(2.0))),
    ({}, (0.3, 0.3, 4.0), (0, 0, 1), None, (0.0, 0.0, 0.0)),  # no variance, and a group of one
    ({}, (2000.0, 0.0), (0, 0), None, (math.log(2.0), math.log(2.0) - 2000.0)),  # exp(2000) overflows
]
