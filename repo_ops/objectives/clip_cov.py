"""Clip-Cov: PPO's clip, and no gradient for a few random tokens whose covariance drives entropy down.

cov = (A - mean A)(logp - mean logp) over the batch. Among tokens that PPO keeps, with cov_min < cov < cov_max,
max(1, int(fraction * tokens)) random ones get coefficient 0. The choice is a pseudo-random function of the token's own
numbers and `seed`: it does not depend on the order of tokens, on micro-batch ranks, or on a generator's state.
Source: arXiv 2505.22617; verl, core_algos.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.objectives import base, grpo
from repo_ops.terms import ratio_level
from repo_ops.terms.covariance import covariance, largest
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(grpo.Objective):
    scope: ClassVar[base.Scope] = "batch"
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "token-mean"
    """Every token weighs the same."""
    fraction: float = 2e-4
    """Share of tokens that are dropped; 0.0002."""
    cov_min: float = 1.0
    """Candidates have a covariance above this; 1."""
    cov_max: float = 5.0
    """Candidates have a covariance below this; 5."""
    seed: int = 0
    """Of the choice among candidates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a share in (0, 1], got {self.fraction}")
        if not self.cov_min < self.cov_max:
            raise ValueError(f"cov_min: expected less than cov_max = {self.cov_max}, got {self.cov_min}")

    def __call__(self, tokens: Tokens) -> Tensor:
        return torch.where(self._dropped(tokens), 0.0, super().__call__(tokens))

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        return {**super().gates(tokens), "clip_cov": self._dropped(tokens)}

    def _dropped(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens, self.process_group)
        clipped = torch.stack(list(super().gates(tokens).values())).any(0)
        candidates = (cov > self.cov_min) & (cov < self.cov_max) & ~clipped
        chance = torch.sin(tokens.logps.detach() * 12989.8 + cov * 78233.0 + self.seed).mul(43758.5453).frac().abs()
        return largest(torch.where(candidates, chance, -math.inf), self.fraction, self.process_group)


def reference(
    objective: Objective, logps: list[list[float]], old_logps: list[list[float]], advantages: list[float]
) -> list[list[float]]:
    """Per-token losses of a batch, by the formula, where every candidate is dropped."""
    rows = [grpo.reference(objective, *row) for row in zip(logps, old_logps, advantages, strict=True)]
    flat = [(logp, a) for row, a in zip(logps, advantages, strict=True) for logp in row]
    mean_logp, mean_a = sum(x for x, _ in flat) / len(flat), sum(a for _, a in flat) / len(flat)
    low, high, limit = 1 - objective.eps_low, 1 + objective.eps_high, objective.log_ratio_clamp or math.inf
    for i, (row, olds, a) in enumerate(zip(logps, old_logps, advantages, strict=True)):
        drifts = [min(max(logp - old, -limit), limit) for logp, old in zip(row, olds, strict=True)]
        for t, (logp, drift) in enumerate(zip(row, ratio_level.reference(objective.ratio_level, drifts), strict=True)):
            ratio = math.exp(drift)
            clipped = (a > 0 and ratio > high) or (a < 0 and ratio < low)
            clipped = clipped or (a < 0 and objective.delta is not None and ratio > objective.delta)
            if objective.cov_min < (a - mean_a) * (logp - mean_logp) < objective.cov_max and not clipped:
                rows[i][t] = 0.0
    return rows


ALL = {"fraction": 1.0, "cov_min": 0.4}
BATCH = ([[-1.0], [-2.0]], [[-1.0], [-2.0]], [1.0, -1.0])  # cov = 1 * 0.5 and -1 * -0.5
VECTORS = [
    (BATCH, ([[-1.0], [1.0]], [[-1.0], [1.0]])),  # 0.5 is below cov_min = 1: PPO
    (BATCH, ([[0.0], [0.0]], [[0.0], [0.0]]), ALL),  # above 0.4: both dropped
    # the first is clipped by its ratio already, so it keeps the clip's value and is no candidate
    (([[-1.0], [-2.0]], [[-2.0], [-2.0]], [1.0, -1.0]), ([[-1.2], [0.0]], [[0.0], [0.0]]), ALL),
]
