"""SPO: the policy is its own soft Q-function, Q = Q0 + slope * sum_t(logps - ref_logps), regressed on the reward R.

"squared": (Q - R)^2 per sequence, d / d logp_t = 2 slope (Q - R). "cross_entropy": R and Q are log-probabilities of
success (<= 0), -[e^R q + (1 - e^R) log(1 - e^q)] with q = min(Q, q_max), no gradient where q_max is active. Mean over
sequences; one without tokens has Q = Q0. No ratio, no clip, any data source.

`advantages` carries R. Extra "baseline" [B] is Q0, the prompt's soft value under the reference,
slope * log(mean_n exp(R_n / slope)); without it Q0 is 0, and for "squared" R - Q0 may be given as advantages.
Source: arXiv 2503.05453. A*-PO (arXiv 2505.20686) is "squared" with slope 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.arguments import check_values
from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    requires: ClassVar[tuple[str, ...]] = ("ref_logps",)
    one_loss_per_sequence: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over sequences; all tokens of a sequence share one loss."""
    form: str = "squared"
    """"squared", or "cross_entropy" for rewards that are log-probabilities of success."""
    slope: float = 0.1
    """The temperature of the soft value, called beta in the paper: reward per nat of log-ratio; 0.01 to 0.1."""
    q_max: float = -1e-6
    """Form "cross_entropy": Q is cut to this, just below 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "form", ("squared", "cross_entropy"))
        base.check_positive(self, "slope")
        if not self.q_max < 0:
            raise ValueError(f"q_max: expected a number < 0, the logarithm of a probability, got {self.q_max}")

    def __call__(self, tokens: Tokens) -> Tensor:
        return self._regression(self._q(tokens), tokens.advantages)

    def loss_without_tokens(self, advantages: Tensor, extras: Mapping[str, Tensor]) -> Tensor | None:
        return self._regression(extras.get("baseline", torch.zeros_like(advantages)), advantages)

    def _regression(self, value: Tensor, reward: Tensor) -> Tensor:
        if self.form == "squared":
            return (value - reward).square()
        check_values("advantages", (reward <= 0).all(), "rewards <= 0, log-probabilities of success", "form='squared'")
        value = value.clamp_max(self.q_max)
        return -(reward.exp() * value - torch.expm1(reward) * torch.log(-torch.expm1(value)))

    def metrics(self, tokens: Tokens) -> Metrics:
        return {**super().metrics(tokens), "q": stat(self._q(tokens))}

    def _q(self, tokens: Tokens) -> Tensor:
        assert tokens.ref_logps is not None
        value = self.slope * tokens.spread(tokens.sequence_sum(tokens.logps - tokens.ref_logps))
        baseline = tokens.extras.get("baseline")
        return value if baseline is None else value + baseline


def reference(
    objective: Objective,
    logps: list[float],
    old_logps: list[float],
    advantage: float,
    *,
    ref_logps: list[float],
    baseline: float = 0.0,
) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    value = baseline + objective.slope * (sum(logps) - sum(ref_logps))
    if objective.form == "squared":
        return [(value - advantage) ** 2] * len(logps)
    value, success = min(value, objective.q_max), math.exp(advantage)
    return [-(success * value + (1 - success) * math.log(1 - math.exp(value)))] * len(logps)


REF = {"ref_logps": [-2.0, -2.0]}
HALF = math.log(0.5)
VECTORS = [
    # Q = 0.1 * 2: (0.2 - 1)^2, and each of two tokens gets 2 * 0.1 * (0.2 - 1) from each of two terms
    (([-1.0, -1.0], [-1.0, -1.0], 1.0, REF), ([0.64, 0.64], [-0.32, -0.32])),
    # with Q0 = 0.8 the value is already the reward
    (([-1.0, -1.0], [-1.0, -1.0], 1.0, {**REF, "baseline": 0.8}), ([0.0, 0.0], [0.0, 0.0])),
    # the policy says 1/2 where success is certain: loss log 2, gradient -slope twice
    (
        ([-2.0, -2.0], [-1.0, -1.0], 0.0, {**REF, "baseline": HALF}),
        ([-HALF, -HALF], [-0.2, -0.2]),
        {"form": "cross_entropy"},
    ),
]
