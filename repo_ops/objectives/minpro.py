"""MinPRO: token t weighs w_t = m_t r_t, with m_t the least ratio among the tokens before it (1 for the first).

Surrogate "cispo": -sg(min(w, cap)) A logp. "ppo": -min(w A, clip(w, 1 - eps_low, 1 + eps_high) A), m detached.
Source: arXiv 2601.22718, whose abstract gives the minimum over the prefix; surrogates, detachment and the first token's
1 are this library's reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.terms.clipped_ratio import clipped_ratio, gates
from repo_ops.terms.ratio_level import running_min
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    zero_at_zero_advantage: ClassVar[bool] = True

    surrogate: str = "cispo"
    """"cispo": constant weight, no token dropped. "ppo": attached ratio, clipped."""
    cap: float = 5.0
    """Surrogate "cispo": largest weight; 5."""
    eps_low: float = 0.2
    """Surrogate "ppo": clip width of w below 1; 0.2."""
    eps_high: float = 0.28
    """Surrogate "ppo": clip width of w above 1; 0.28."""
    include_current: bool = False
    """Surrogate "cispo": the minimum includes the token itself and is the whole weight."""
    cap_prefix_at_1: bool = False
    """m_t is at most 1: a prefix that only became likelier does not raise the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "surrogate", ("cispo", "ppo"))
        base.check_positive(self, "cap")
        base.check_width("eps_low", self.eps_low, low=True)
        base.check_width("eps_high", self.eps_high)
        if self.include_current and self.surrogate == "ppo":
            raise ValueError("include_current: the weight is then a constant, and surrogate 'ppo' has no gradient left")

    def __call__(self, tokens: Tokens) -> Tensor:
        prefix = self._prefix(tokens)
        if self.surrogate == "ppo":
            return clipped_ratio(prefix + tokens.log_ratio, tokens.advantages, 1 - self.eps_low, 1 + self.eps_high)
        return weighted_logps(tokens.logps, tokens.advantages, self._weight(tokens).clamp_max(self.cap))

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        weight = self._weight(tokens)
        if self.surrogate == "cispo":
            return {"capped_high": weight > self.cap}
        below, above = gates(weight, tokens.advantages, 1 - self.eps_low, 1 + self.eps_high)
        return {"clip_low": below, "clip_high": above}

    def metrics(self, tokens: Tokens) -> Metrics:
        return {**super().metrics(tokens), "prefix_min_ratio": stat(self._prefix(tokens).exp())}

    def _prefix(self, tokens: Tokens) -> Tensor:
        """[N] log m_t, detached."""
        least = running_min(tokens, tokens.log_ratio.detach(), include_current=self.include_current)
        return least.clamp_max(0.0) if self.cap_prefix_at_1 else least

    def _weight(self, tokens: Tokens) -> Tensor:
        own = 0.0 if self.include_current else tokens.log_ratio.detach()
        return (self._prefix(tokens) + own).exp()


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    ratios = [math.exp(logp - old) for logp, old in zip(logps, old_logps, strict=True)]
    losses = []
    for t, ratio in enumerate(ratios):
        prefix = min(ratios[: t + 1] if objective.include_current else ratios[:t], default=1.0)
        prefix = min(prefix, 1.0) if objective.cap_prefix_at_1 else prefix
        weight = prefix if objective.include_current else prefix * ratio
        if objective.surrogate == "ppo":
            clipped = min(max(weight, 1 - objective.eps_low), 1 + objective.eps_high)
            losses.append(-min(weight * advantage, clipped * advantage))
        else:
            losses.append(-min(weight, objective.cap) * advantage * logps[t])
    return losses


LOG_2, PPO = math.log(2), {"surrogate": "ppo"}
HALVED = [-1.0 + LOG_2, -1.0, -1.0]
DOUBLED = [-1.0 - LOG_2, -1.0, -1.0]
VECTORS = [
    # ratio 1/2 first: it weighs 1/2 itself, and so does every later token on policy
    (([-1.0] * 3, HALVED, 2.0), ([1.0] * 3, [-1.0] * 3)),
    # ratio 2 first: the second token's prefix is 2, the third one's is back at min(2, 1)
    (([-1.0] * 3, DOUBLED, 1.0), ([2.0, 2.0, 1.0], [-2.0, -2.0, -1.0])),
    (([-1.0] * 3, DOUBLED, 1.0), ([2.0, 1.0, 1.0], [-2.0, -1.0, -1.0]), {"cap_prefix_at_1": True}),
    (([-1.0] * 3, HALVED, -1.0), ([0.8] * 3, [0.0] * 3), PPO),  # weight 1/2 with A < 0: clipped all along
    (([-1.0] * 3, HALVED, 1.0), ([-0.5] * 3, [-0.5] * 3), PPO),
]
