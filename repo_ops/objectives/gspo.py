"""GSPO: one ratio per sequence, s = exp(mean_t(logps - old_logps)); loss -min(s A, clip(s) A) for each of its tokens.

The mean over tokens of the attached s gives d loss / d logp_t = -A s / T on every token, where s is not clipped.
Source: arXiv 2507.18071 eq. 5-7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.clipped_ratio import clipped_ratio, gates
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over tokens, then over sequences."""
    eps_low: float = 3e-4
    """Clip width of the sequence ratio below 1; 3e-4, far narrower than a token ratio's."""
    eps_high: float = 4e-4
    """Clip width of the sequence ratio above 1; 4e-4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_width("eps_low", self.eps_low, low=True)
        base.check_width("eps_high", self.eps_high)

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) as ratio values."""
        return 1 - self.eps_low, 1 + self.eps_high

    def __call__(self, tokens: Tokens) -> Tensor:
        log_ratio = tokens.spread(tokens.sequence_mean(tokens.log_ratio))
        return clipped_ratio(log_ratio, tokens.advantages, *self.bounds)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        ratio = tokens.spread(tokens.sequence_mean(tokens.log_ratio.detach())).exp()
        below, above = gates(ratio, tokens.advantages, *self.bounds)
        return {"clip_low": below, "clip_high": above}


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    log_ratios = [logp - old for logp, old in zip(logps, old_logps, strict=True)]
    ratio = math.exp(sum(log_ratios) / len(log_ratios))
    clipped = min(max(ratio, 1 - objective.eps_low), 1 + objective.eps_high)
    return [-min(ratio * advantage, clipped * advantage)] * len(logps)


VECTORS = [
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([-2.0, -2.0], [-2.0, -2.0])),  # on policy: -A, whatever the length
    (([-1.0, -2.0], [-1.5, -1.5], 1.0), ([-1.0, -1.0], [-1.0, -1.0])),  # token ratios cancel: s = 1
    (([-1.0, -1.0], [-2.0, -1.0], 1.0), ([-1.0004, -1.0004], [0.0, 0.0])),  # s = e^0.5 is clipped as a whole
    (
        ([-1.0, -1.0], [-2.0, -1.0], -1.0),
        ([math.sqrt(math.e)] * 2, [math.sqrt(math.e)] * 2),
    ),  # and pulled back if A < 0
]
