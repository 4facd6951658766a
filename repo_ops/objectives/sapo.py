"""SAPO: -(4 / tau) sigmoid(tau (r - 1)) A, a gate that closes smoothly where PPO's clip is a cliff.

d loss / d logp = -A r 4 g (1 - g) with g = sigmoid(tau (r - 1)): -A at r = 1, fading on both sides.
Source: arXiv 2511.20347.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.by_sign import by_sign
from repo_ops.tokens import Tokens

# exp(20): the gate is shut in every floating format, while an infinite ratio times its slope of 0 would be no number
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over tokens, then over sequences."""
    tau_pos: float = 1.0
    """Steepness of the gate where A > 0; 1."""
    tau_neg: float = 1.05
    """Steepness where A <= 0; 1.05: mistakes fade a little sooner."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_positive(self, "tau_pos", "tau_neg")

    def __call__(self, tokens: Tokens) -> Tensor:
        ratio = tokens.log_ratio.clamp_max(LOG_RATIO_LIMIT).exp()
        tau = by_sign(tokens.advantages > 0, self.tau_pos, self.tau_neg, ratio)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * tokens.advantages


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    tau = objective.tau_pos if advantage > 0 else objective.tau_neg
    ratios = [math.exp(logp - old) for logp, old in zip(logps, old_logps, strict=True)]
    return [-4 / tau / (1 + math.exp(min(-tau * (ratio - 1), 700))) * advantage for ratio in ratios]


VECTORS = [
    ((-1.0, -1.0, 2.0), (-4.0, -2.0)),  # on policy: the gradient is -A
    # ratio 2, tau 1: g = 1 / (1 + 1/e), gradient -2 * 4 g (1 - g)
    ((-1.0, -1.0 - math.log(2), 1.0), (-4 / (1 + 1 / math.e), -8 * math.e / (1 + math.e) ** 2)),
    ((-1.0, -1.0, -1.0), (2 / 1.05, 1.0)),  # A < 0 on policy: tau changes the value, not the gradient
    ((-1.0, -101.0, 1.0), (-4.0, 0.0)),  # far above, the gate is shut and nothing overflows
]
