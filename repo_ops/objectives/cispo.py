"""CISPO: -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp; the ratio is a bounded weight and no token is dropped.

Source: arXiv 2506.13585 eq. 4. The paper sets no effective lower bound (eps_low = 1); ScaleRL (arXiv 2510.13786) caps
the ratio at 5, which is eps_high = 4 here: widths around 1, as everywhere in this library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.scope import Scope, widest
from repo_ops.terms import ratio_level
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    eps_low: float = 1.0
    """Weights are at least 1 - eps_low; 1 is no lower bound (the paper's setting)."""
    eps_high: float = 4.0
    """Weights are at most 1 + eps_high; 4 (ScaleRL's cap of 5), verl's example 0.2."""
    ratio_level: str = "token"
    """Whose ratio is the weight: "token", "sequence_mean", "sequence_sum" or "prefix_min"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_width("eps_low", self.eps_low, low=True)
        base.check_width("eps_high", self.eps_high)
        base.check_choice(self, "ratio_level", ratio_level.LEVELS)

    @property
    def reach(self) -> Scope:
        return widest(super().reach, ratio_level.LEVELS[self.ratio_level].scope)

    def __call__(self, tokens: Tokens) -> Tensor:
        weight = self._ratio(tokens).clamp(1 - self.eps_low, 1 + self.eps_high)
        return weighted_logps(tokens.logps, tokens.advantages, weight)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        ratio = self._ratio(tokens)
        return {"capped_low": ratio < 1 - self.eps_low, "capped_high": ratio > 1 + self.eps_high}

    def _ratio(self, tokens: Tokens) -> Tensor:
        return ratio_level.LEVELS[self.ratio_level].combine(tokens, tokens.log_ratio.detach()).exp()


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    log_ratios = [logp - old for logp, old in zip(logps, old_logps, strict=True)]
    losses = []
    for logp, log_ratio in zip(logps, ratio_level.reference(objective.ratio_level, log_ratios), strict=True):
        weight = max(1 - objective.eps_low, min(1 + objective.eps_high, math.exp(log_ratio)))
        losses.append(-weight * advantage * logp)
    return losses


VECTORS = [
    ((-1.0, -1.0, 2.0), (2.0, -2.0)),  # on policy: the gradient is -A
    ((-1.0, -4.0, 2.0), (10.0, -10.0)),  # ratio e^3 is capped at 5 and keeps its gradient
    ((-4.0, -4.0 + math.log(4), 1.0), (1.0, -0.25)),  # a small ratio weighs what it is
    ((-1.0, -4.0, -1.0), (-5.0, 5.0)),  # the cap does not look at the sign of A
]
