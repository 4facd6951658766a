"""TOPR: -sg(w) R sum_t logp per sequence; w = 1 for R >= 0, else the sequence's own ratio, cut to at most 1.

w = clip(exp(sum_t(logps - old_logps)), weight_min, weight_max) for R < 0: what the policy has forgotten is not pushed
further down. `advantages` are rewards, less a baseline if there is one. Source: arXiv 2503.14286.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.terms import ratio_level
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "seq-mean-token-sum"
    """Sum over tokens, mean over sequences."""
    weight_min: float = 0.0
    """Least weight of a sequence with R < 0; 0."""
    weight_max: float = 1.0
    """Largest weight of a sequence with R < 0; 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight_min <= self.weight_max < math.inf:
            raise ValueError(f"weight_min: expected 0 <= weight_min <= weight_max, got {self.weight_min}")

    def __call__(self, tokens: Tokens) -> Tensor:
        return weighted_logps(tokens.logps, tokens.advantages, self._weight(tokens))

    def metrics(self, tokens: Tokens) -> Metrics:
        return {**super().metrics(tokens), "weight_negative": stat(self._weight(tokens), tokens.advantages < 0)}

    def _weight(self, tokens: Tokens) -> Tensor:
        ratio = ratio_level.sequence_sum(tokens, tokens.log_ratio.detach()).exp()
        return torch.where(tokens.advantages < 0, ratio.clamp(self.weight_min, self.weight_max), 1.0)


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    weight = 1.0
    if advantage < 0:
        ratio = math.exp(sum(logps) - sum(old_logps))
        weight = max(objective.weight_min, min(objective.weight_max, ratio))
    return [-weight * advantage * logp for logp in logps]


VECTORS = [
    (([-1.0, -2.0], [-3.0, -3.0], 2.0), ([2.0, 4.0], [-2.0, -2.0])),  # R > 0: no ratio at all
    (([-1.0, -2.0], [-3.0, -3.0], -1.0), ([-1.0, -2.0], [1.0, 1.0])),  # R < 0, ratio e^3: cut to 1
    (([-2.0, -2.0], [-1.0, -1.0], -1.0), ([-2 * math.exp(-2)] * 2, [math.exp(-2)] * 2)),  # forgotten: pushed less
]
