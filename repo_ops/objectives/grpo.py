"""GRPO: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logps - old_logps).

Averaged per sequence, then over sequences. Source: arXiv 2402.03300 eq. 3. `delta` bounds the ratio where A < 0: dual
clip (arXiv 1912.09729), or the two-sided clip of INTELLECT-2 (arXiv 2505.07291); the same arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.scope import Scope, widest
from repo_ops.terms import ratio_level
from repo_ops.terms.clipped_ratio import clipped_ratio, gates
from repo_ops.tokens import Tokens

KERNEL_LEVELS: dict[str, Literal["token", "sequence", "prefix"]] = {
    "token": "token",
    "sequence_mean": "sequence",
    "prefix_min": "prefix",
}
KERNEL_KL: dict[str, Literal["k1", "k2", "k3"]] = {"k1": "k1", "k2": "k2", "k3": "k3"}


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
    """Upper bound on the ratio where A < 0, else unbounded; dual clip 3, INTELLECT-2 4. Must exceed 1 + eps_high."""
    ratio_level: str = "token"
    """Whose ratio is clipped: "token", "sequence_mean" (GSPO), "sequence_sum" (RLOO) or "prefix_min" (MinPRO)."""
    log_ratio_clamp: float | None = None
    """Limit on |logps - old_logps| of a token, 20 in verl: no overflow, and no gradient beyond it. None: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_width("eps_low", self.eps_low, low=True)
        base.check_width("eps_high", self.eps_high)
        base.check_choice(self, "ratio_level", ratio_level.LEVELS)
        if self.log_ratio_clamp is not None:
            base.check_positive(self, "log_ratio_clamp")
        if self.delta is not None and not self.delta >= 1 + self.eps_high:
            raise ValueError(f"delta: expected at least 1 + eps_high = {1 + self.eps_high}, got {self.delta}")

    @property
    def reach(self) -> Scope:
        return widest(super().reach, ratio_level.LEVELS[self.ratio_level].scope)

    @property
    def bounds(self) -> tuple[float, float, float | None]:
        """(low, high, delta) as ratio values."""
        return 1 - self.eps_low, 1 + self.eps_high, self.delta

    @property
    def kernel_terms(self) -> base.KernelTerms | None:
        level, kl = KERNEL_LEVELS.get(self.ratio_level), KERNEL_KL.get(self.kl if self.beta else "k3")
        cls = type(self)
        own_loss = cls.__call__ is not Objective.__call__ or cls.log_ratio is not Objective.log_ratio
        if own_loss or level is None or kl is None or self.log_ratio_clamp is not None:
            return None
        return base.KernelTerms(level, *self.bounds, kl=kl)

    def log_ratio(self, tokens: Tokens) -> Tensor:
        """[N] logarithm of the ratio that is clipped, attached."""
        limit, log_ratio = self.log_ratio_clamp, tokens.log_ratio
        if limit is not None:
            log_ratio = log_ratio.clamp(-limit, limit)
        return ratio_level.LEVELS[self.ratio_level].combine(tokens, log_ratio)

    def __call__(self, tokens: Tokens) -> Tensor:
        return clipped_ratio(self.log_ratio(tokens), tokens.advantages, *self.bounds)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        below, above = gates(self.log_ratio(tokens).detach().exp(), tokens.advantages, *self.bounds)
        return {"clip_low": below, "clip_high": above}


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    limit = objective.log_ratio_clamp or math.inf
    log_ratios = [min(max(logp - old, -limit), limit) for logp, old in zip(logps, old_logps, strict=True)]
    losses = []
    for log_ratio in ratio_level.reference(objective.ratio_level, log_ratios):
        ratio = math.exp(log_ratio)
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
    ((-1.0, -2.0, -1.0), (2.0, 0.0), {"delta": 2.0}),  # but not beyond delta
    ((-2.0, -1.0, -1.0), (0.8, 0.0)),  # ratio 1/e < 0.8 with A < 0: clipped
    ((-2.0, -1.0, 1.0), (-1 / math.e, -1 / math.e)),  # the same ratio with A > 0 is still raised
    ((-1.0, -1.5, 0.0), (0.0, 0.0)),  # no advantage, no loss
    ((-1.0, -31.0, -1.0), (math.exp(20), 0.0), {"log_ratio_clamp": 20.0}),  # the clamp also ends the gradient
]
