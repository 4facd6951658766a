"""GRPO: A = (R - mean) / (std + eps), mean and std over the prompt's samples.

Source: arXiv:2402.03300; defaults and `scale` as in TRL 1.16; unbiased=False with eps 1e-6 is the normalised REC of
arXiv:2509.24203. RePO (arXiv:2506.09340) uses this, on-policy and replayed samples apart or together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows, standardized


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    normalize: bool = True
    """Divide by the standard deviation. False is Dr. GRPO's advantage, the same as scale="none"."""
    scale: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation: of the prompt's samples, of the whole batch's rewards (the mean stays the prompt's), or
    none."""
    unbiased: bool = True
    """Divide the squares by G - 1 (torch's default, TRL, verl), else by G."""
    eps: float = 1e-4
    """Added to the standard deviation; TRL and RePO 1e-4, verl 1e-6."""
    group_of_one: Literal["zero", "reward"] = "zero"
    """A sample without others to compare with: A = 0, or A = R / (1 + eps) as in verl (mean 0, std 1)."""

    def __post_init__(self) -> None:
        base.check_choice("scale", self.scale, ("group", "batch", "none"))
        base.check_choice("group_of_one", self.group_of_one, ("zero", "reward"))
        base.check_positive("eps", self.eps, zero=True)
        if not self.normalize and self.scale == "batch":
            raise ValueError("scale: expected 'group' or 'none' with normalize=False, got 'batch'; drop one of the two")

    def __call__(self, rows: Rows) -> Tensor:
        advantages = rows.groups.deviation(rows.rewards)
        normalized = self.normalize and self.scale != "none"
        if normalized:
            sets = rows.groups if self.scale == "group" else rows.batch
            advantages = standardized(advantages, sets.std(rows.rewards, unbiased=self.unbiased), self.eps)
        if self.group_of_one == "reward":
            alone = rows.rewards / (1 + self.eps) if normalized else rows.rewards
            advantages = torch.where(rows.groups.count() == 1, alone, advantages)
        return advantages


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""

    def std(values: list[float]) -> float:
        if max(values) == min(values):
            return 0.0
        mean = math.fsum(values) / len(values)
        degrees = len(values) - 1 if estimator.unbiased else len(values)
        return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / degrees)

    advantages = []
    for reward, group in zip(rewards, group_ids, strict=True):
        peers = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        divisor = 1.0
        if estimator.normalize and estimator.scale != "none":
            divisor = estimator.eps + std(peers if estimator.scale == "group" else list(rewards))
        if len(peers) == 1 and estimator.group_of_one == "reward":
            divides = estimator.normalize and estimator.scale != "none"
            advantages.append(reward / (1 + estimator.eps) if divides else reward)
        else:
            centred = reward - math.fsum(peers) / len(peers) if max(peers) > min(peers) else 0.0
            advantages.append(centred / divisor)
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (1.0, 0.0), (0, 0), None, (0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4))),
    ({"unbiased": False, "eps": 0.5}, (3.0, 1.0), (7, 7), None, (1 / 1.5, -1 / 1.5)),  # std 1
    ({"normalize": False}, (3.0, 1.0, 5.0, 5.0), (1, 1, 0, 0), None, (1.0, -1.0, 0.0, 0.0)),
    ({"scale": "none"}, (3.0, 1.0, 5.0, 5.0), (1, 1, 0, 0), None, (1.0, -1.0, 0.0, 0.0)),
    # batch rewards 2, 0, 4, 2: mean 2, squares 0 + 4 + 4 + 0, population std sqrt 2
    (
        {"scale": "batch", "unbiased": False, "eps": 1e-4},
        (2.0, 0.0, 4.0, 2.0),
        (0, 0, 1, 1),
        None,
        tuple(x / (math.sqrt(2) + 1e-4) for x in (1.0, -1.0, 1.0, -1.0)),
    ),
    ({}, (0.7, 0.7, 0.7), (0, 0, 0), None, (0.0, 0.0, 0.0)),  # no variance: no signal, and no rounding noise over eps
    ({}, (5.0, 1.0, 1.0), (0, 1, 1), None, (0.0, 0.0, 0.0)),  # a group of one
    ({"group_of_one": "reward", "eps": 1.0}, (5.0, 1.0, 1.0), (0, 1, 1), None, (2.5, 0.0, 0.0)),
]
