"""RED-Weight: A = d exp(d / temp), d = R - mean over the prompt's samples; not normalised.

Samples above the mean count more and those below it less.
Source: arXiv:2509.24203 (weight "advantage" in Trinity-RFT).
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
    temp: float = 1.0
    """Scale of d in the exponent, in units of reward; 1. Large: a plain mean baseline."""

    def __post_init__(self) -> None:
        base.check_positive("temp", self.temp)

    def __call__(self, rows: Rows) -> Tensor:
        return weighted(rows.groups.deviation(rows.rewards), self.temp)


def weighted(advantages: Tensor, temp: float) -> Tensor:
    """Advantages of any kind times exp(A / temp)."""
    return advantages * (advantages / temp).exp()


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    peers = [[r for r, g in zip(rewards, group_ids, strict=True) if g == group] for group in group_ids]
    centred = [r - sum(g) / len(g) for r, g in zip(rewards, peers, strict=True)]
    return [d * math.exp(d / estimator.temp) for d in centred]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({"temp": 0.5}, (1.0, 0.0), (0, 0), None, (0.5 * math.e, -0.5 / math.e)),
    ({}, (2 * math.log(2.0), 0.0), (0, 0), None, (2 * math.log(2.0), -0.5 * math.log(2.0))),  # weights 2 and 1/2
    ({}, (0.7, 0.7, 3.0), (0, 0, 1), None, (0.0, 0.0, 0.0)),
]
