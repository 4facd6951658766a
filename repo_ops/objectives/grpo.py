"""GRPO: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logps - old_logps), mean per sequence, then over sequences.

Source: arXiv 2402.03300 eq. 3; two-sided cap `delta`: arXiv 2505.07291.
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
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over tokens, then over sequences."""
    eps_low: float = 0.2
    """Clip width below 1: a token with A < 0 stops once its ratio is under 1 - eps_low; 0.2."""
    eps_high: float = 0.2
    """Clip width above 1: a token with A > 0 stops once its ratio is over 1 + eps_high; 0.2, DAPO 0.28."""
    delta: float | None = None
    """Upper bound on the ratio where A < 0, else unbounded; INTELLECT-2 uses 4. Must exceed 1 + eps_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_width("eps_low", self.eps_low, low=True)
        base.check_width("eps_high", self.eps_high)
        if self.delta is not None and not self.delta >= 1 + self.eps_high:
            raise ValueError(f"delta: expected at least 1 + eps_high = {1 + self.eps_high}, got {self.delta}")

    @property
    def bounds(self) -> tuple[float, float, float | None]:
        """(low, high, delta) as ratio values."""
        return 1 - self.eps_low, 1 + self.eps_high, self.delta

    def __call__(self, tokens: Tokens) -> Tensor:
        return clipped_ratio(tokens.log_ratio, tokens.advantages, *self.bounds)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        below, above = gates(tokens.log_ratio.detach().exp(), tokens.advantages, *self.bounds)
        return {"clip_low": below, "clip_high": above}


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    losses = []
    for logp, old in zip(logps, old_logps, strict=True):
        ratio = math.exp(logp - old)
        clipped = min(max(ratio, 1 - objective.eps_low), 1 + objective.eps_high)
        loss = -min(ratio * advantage, clipped * advantage)
        if objective.delta is not None and advantage < 0:
            loss = min(loss, -objective.delta * advantage)
        losses.append(loss)
    return losses


VECTORS = [
    ((-1.0, -1.0, 2.0), (-2.0, -2.0)),  # on policy: the gradient is -A
    ((-1.0, -2.0, 2.0), (-2.4, 0.0)),  # ratio e > 1.2 with A > 0: clipped at 1.2 A
    ((-1.0, -2.0, -1.0), (math.e, math.e)),  # the same ratio with A < 0 still pulls back
    ((-2.0, -1.0, -1.0), (0.8, 0.0)),  # ratio 1/e < 0.8 with A < 0: clipped
    ((-2.0, -1.0, 1.0), (-1 / math.e, -1 / math.e)),  # the same ratio with A > 0 is still raised
    ((-1.0, -1.5, 0.0), (0.0, 0.0)),  # no advantage, no loss
]
