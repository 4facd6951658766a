"""BNPO: A = w (R - p), p the prompt's mean reward, w = 1 / density of a Beta(alpha, beta) at p, within [0, max_weight].

The Beta is fitted to the batch by moments: with m the mean and v the unbiased variance of p over the prompts,
f = m (1 - m) / v - 1, alpha = max(1 + f m / 3, 1), beta = max(1 + f (1 - m) / 3, 1). alpha = beta = 1 is a plain mean
baseline, alpha = beta = 3/2 is GRPO up to a factor. Rewards in [B, K] are K parts: each has its own fit, and A is the
mean of theirs. All prompts of the step belong in one call.

Where the fit is undefined: one prompt, or prompts of equal p (a spread under 1e-6 is rounding), have w = 1. p of 0 or 1
has the largest weight and R - p = 0, so A = 0. A sample without others has p = R and A = 0 (the authors' code says
p = 0, which can give it the largest weight).
Source: arXiv:2506.02864; multi-reward rule and one-prompt rule as in changyi7231/BNPO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows, Sets

_EQUAL = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    takes_parts: ClassVar[bool] = True

    min_value: float = 0.0
    """Smallest possible reward; rewards are mapped from [min_value, max_value] to [0, 1]."""
    max_value: float = 1.0
    """Largest possible reward."""
    max_weight: float = 1e6
    """Bound on w."""

    def __post_init__(self) -> None:
        base.check_positive("max_weight", self.max_weight)
        if not self.min_value < self.max_value:
            raise ValueError(f"max_value: expected > min_value = {self.min_value}, got {self.max_value}")

    def __call__(self, rows: Rows) -> Tensor:
        rewards = (rows.rewards - self.min_value) / (self.max_value - self.min_value)
        advantages = rows.groups.deviation(rewards)
        share = (rewards - advantages).clamp(0, 1)  # p, for each row that of its prompt
        alpha, beta = _fitted(share, rows.batch.among(rows.groups.first()))
        return advantages / beta_density(share, alpha, beta).clamp_min(1 / self.max_weight)

    def check(self, rows: Rows) -> None:
        outside = rows.rewards[rows.scored & ((rows.rewards < self.min_value) | (rows.rewards > self.max_value))]
        if outside.numel():
            raise ValueError(
                f"rewards: expected values in [{self.min_value}, {self.max_value}], got {outside[0].item()}; "
                "set min_value and max_value to the range of the reward"
            )


def _fitted(share: Tensor, prompts: Sets) -> tuple[Tensor, Tensor]:
    """alpha and beta of each row's batch, from the p of its prompts (one member a prompt)."""
    mean = prompts.sum(share) / prompts.count().clamp_min(1)
    defined = prompts.largest(share) - prompts.smallest(share) > _EQUAL
    variance = torch.where(defined, prompts.std(share, unbiased=True).square(), 1)
    factor = torch.where(defined, mean * (1 - mean) / variance - 1, 0)
    return (1 + factor * mean / 3).clamp_min(1), (1 + factor * (1 - mean) / 3).clamp_min(1)


def beta_density(p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Density of Beta(alpha, beta) at p in [0, 1], alpha and beta >= 1; 0 at an end whose exponent is above 0."""
    powers = torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p)
    return (powers + torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)).exp()


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, prompt by prompt."""
    span = estimator.max_value - estimator.min_value
    groups: dict[int, list[float]] = {}
    for reward, group in zip(rewards, group_ids, strict=True):
        groups.setdefault(group, []).append((reward - estimator.min_value) / span)
    p = {group: sum(values) / len(values) for group, values in groups.items()}
    alpha = beta = 1.0
    if len(p) > 1 and max(p.values()) - min(p.values()) > 1e-6:
        m = sum(p.values()) / len(p)
        v = sum((share - m) ** 2 for share in p.values()) / (len(p) - 1)
        alpha = max(1 + (m * (1 - m) / v - 1) * m / 3, 1)
        beta = max(1 + (m * (1 - m) / v - 1) * (1 - m) / 3, 1)
    constant = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)

    def weight(x: float) -> float:
        power = x ** (alpha - 1) * (1 - x) ** (beta - 1)
        return min(constant / power, estimator.max_weight) if power else estimator.max_weight

    centred = [(r - estimator.min_value) / span - p[g] for r, g in zip(rewards, group_ids, strict=True)]
    return [weight(p[g]) * c if c else 0.0 for c, g in zip(centred, group_ids, strict=True)]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS: list[tuple[dict[str, Any], Any, Any, Any, Any]] = [
    # p = 1/4, 1/2, 3/4: m 1/2, v 1/16, f 3, alpha = beta = 3/2; density (8 / pi) sqrt(p (1 - p))
    (
        {},
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0),
        (0, 0, 0, 0, 1, 1, 2, 2, 2, 2),
        None,
        tuple(math.pi / 8 * x for x in (3**0.5, *[-(3**-0.5)] * 3, 1, -1, *[3**-0.5] * 3, -(3**0.5))),
    ),
    # p = 1/4 and 3/4 alone: v 1/8, f 1, alpha = beta = 7/6; w = 0.955 at both, cut to 1/2
    (
        {"max_weight": 0.5},
        (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0),
        (0, 0, 0, 0, 1, 1, 1, 1),
        None,
        (0.375, -0.125, -0.125, -0.125, 0.125, 0.125, 0.125, -0.375),
    ),
    ({}, (1.0, 0.0, 0.0, 0.0), (0, 0, 0, 0), None, (0.75, -0.25, -0.25, -0.25)),  # one prompt: w = 1
    ({}, (1.0, 0.0, 1.0, 0.0), (0, 0, 1, 1), None, (0.5, -0.5, 0.5, -0.5)),  # equal p: w = 1, not 0/0
    # p = 0, 1, 1/2 have v 1/4, f 0: w = 1 everywhere
    ({}, (0.0, 0.0, 1.0, 1.0, 1.0, 0.0), (0, 0, 1, 1, 2, 2), None, (0.0, 0.0, 0.0, 0.0, 0.5, -0.5)),
    ({"min_value": -1.0}, (1.0, -1.0), (0, 0), None, (0.5, -0.5)),
    ({}, (0.5, 1.0, 0.0), (0, 1, 1), None, (0.0, 0.5, -0.5)),  # a group of one, p = 1/2 like the other
]
