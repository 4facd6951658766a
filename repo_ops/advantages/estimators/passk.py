"""Pass@k, best of the group: the best sample gets A = (R_max - R_second) / (std + eps), all others 0.

The signal is what the best sample adds to the maximum of the group. A shared maximum adds nothing: all 0. So does a
sample without others.
Source: arXiv:2503.19595, as in verl's grpo_passk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows, standardized


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    mixed_refusal: ClassVar[str | None] = "the best of k counts samples of one policy, and replayed ones are another's"

    normalize: bool = True
    """Divide by the unbiased standard deviation of the prompt's rewards."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        base.check_positive("eps", self.eps, zero=True)

    def __call__(self, rows: Rows) -> Tensor:
        rewards, groups = rows.rewards, rows.groups
        best = rewards == groups.largest(rewards)
        second = groups.among(~best).largest(rewards)
        gain = torch.where(best & (groups.sum(best.double()) == 1) & second.isfinite(), rewards - second, 0)
        return standardized(gain, groups.std(rewards, unbiased=True), self.eps) if self.normalize else gain


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    advantages = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and group_ids[j] == group_ids[i]]
        if not others or reward <= max(others):
            advantages.append(0.0)
            continue
        peers = [*others, reward]
        mean = sum(peers) / len(peers)
        std = math.sqrt(sum((r - mean) ** 2 for r in peers) / len(others))
        advantages.append((reward - max(others)) / (std + estimator.eps if estimator.normalize else 1.0))
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({"normalize": False}, (1.0, 0.25, 0.5), (0, 0, 0), None, (0.5, 0.0, 0.0)),
    ({"eps": 1.0}, (3.0, 1.0, 2.0), (0, 0, 0), None, (0.5, 0.0, 0.0)),  # std 1
    ({}, (1.0, 1.0, 0.0), (0, 0, 0), None, (0.0, 0.0, 0.0)),  # a shared maximum
    ({}, (1.0, 5.0), (0, 1), None, (0.0, 0.0)),  # groups of one
    ({"normalize": False}, (-1.0, -3.0), (0, 0), None, (2.0, 0.0)),  # rewards below 0
]
