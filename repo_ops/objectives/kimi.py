"""Kimi's squared objective, with X = sum_t(logps - old_logps): "squared" is (A - tau X)^2 per sequence (K2).

"k1.5" is -A sum_t logp + tau/2 X^2, whose gradient is 1/(2 tau) of the former's: d / d logp_t = -A + tau X. A is the
reward less the group's mean, not divided by a deviation (group_advantages(estimator="dr_grpo")). Mean over sequences.
Source: arXiv 2501.12599 (k1.5), arXiv 2507.20534 (K2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.ratio_level import sequence_sum
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    one_loss_per_sequence: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over sequences; all tokens of a sequence share one loss."""
    form: str = "squared"
    """"squared" (K2), or "k1.5", the gradient that k1.5 takes."""
    tau: float = 0.5
    """Reward per nat of drift from the old policy; the papers give no value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "form", ("squared", "k1.5"))
        base.check_positive(self, "tau")

    def __call__(self, tokens: Tokens) -> Tensor:
        drift = sequence_sum(tokens, tokens.log_ratio)
        if self.form == "squared":
            return (tokens.advantages - self.tau * drift).square()
        return self.tau / 2 * drift.square() - tokens.advantages * sequence_sum(tokens, tokens.logps)

    def loss_without_tokens(self, advantages: Tensor, extras: Mapping[str, Tensor]) -> Tensor | None:
        return advantages.square() if self.form == "squared" else None


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    drift = sum(logps) - sum(old_logps)
    if objective.form == "squared":
        return [(advantage - objective.tau * drift) ** 2] * len(logps)
    return [objective.tau / 2 * drift**2 - advantage * sum(logps)] * len(logps)


K15 = {"form": "k1.5"}
VECTORS = [
    # on policy: A^2, and each of two tokens gets -2 tau A from each of two terms
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([4.0, 4.0], [-4.0, -4.0])),
    (([-1.0, -2.0], [-3.0, -4.0], 2.0), ([0.0, 0.0], [0.0, 0.0])),  # X = 4 = A / tau: moved far enough
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([6.0, 6.0], [-4.0, -4.0]), K15),
    (([-1.0, -2.0], [-3.0, -4.0], 2.0), ([10.0, 10.0], [0.0, 0.0]), K15),
]
