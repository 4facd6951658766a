"""VESPO: -sg(phi(W)) A logp with the ratio of whole sequences W = exp(sum_t(logps - old_logps)).

phi(W) = exp(lambda + k log W - lambda W): 1 at W = 1, falling to 0 on both sides; steeper towards small W where A < 0.
Token log-ratios are limited to +-20 and log W to [log 1e-8, 20]. A token's sampler weight becomes a factor of W.
Source: arXiv 2602.10693; TRL, grpo_trainer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.terms.by_sign import by_sign
from repo_ops.terms.sampler import SamplerWeight
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

LOG_LIMIT, LOG_FLOOR = 20.0, math.log(1e-8)


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    zero_at_zero_advantage: ClassVar[bool] = True

    k_pos: float = 2.0
    """Power of W where A >= 0; 2."""
    lambda_pos: float = 3.0
    """Decay in W where A >= 0; 3."""
    k_neg: float = 3.0
    """Power of W where A < 0; 3."""
    lambda_neg: float = 2.0
    """Decay in W where A < 0; 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler_weight is not None and not self.sampler_weight.startswith("token_"):
            raise ValueError(
                "sampler_weight: expected token_truncate or token_mask, whose product over the sequence is a factor of "
                f"W, got {self.sampler_weight!r}"
            )
        base.check_positive(self, "k_pos", "lambda_pos", "k_neg", "lambda_neg", zero=True)

    @property
    def modifiers(self) -> tuple[base.Modifier, ...]:
        return tuple(m for m in super().modifiers if not isinstance(m, SamplerWeight))

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | ({"sampler_logps"} if self.sampler_weight else set())

    def __call__(self, tokens: Tokens) -> Tensor:
        return weighted_logps(tokens.logps, tokens.advantages, self._phi(tokens))

    def metrics(self, tokens: Tokens) -> Metrics:
        return {**super().metrics(tokens), "phi": stat(self._phi(tokens))}

    def sequence_log_ratio(self, tokens: Tokens) -> Tensor:
        """[S] log W before it is limited, detached."""
        log_ratio = tokens.log_ratio.detach().clamp(-LOG_LIMIT, LOG_LIMIT)
        if self.sampler_weight is not None:
            weight = SamplerWeight(self.sampler_weight, self.sampler_min, self.sampler_max)(tokens)
            log_ratio = log_ratio + weight.log().clamp_min(LOG_FLOOR)
        return tokens.sequence_sum(log_ratio)

    def _phi(self, tokens: Tokens) -> Tensor:
        log_w = tokens.spread(self.sequence_log_ratio(tokens)).clamp(LOG_FLOOR, LOG_LIMIT)
        positive = tokens.advantages >= 0
        k = by_sign(positive, self.k_pos, self.k_neg, log_w)
        decay = by_sign(positive, self.lambda_pos, self.lambda_neg, log_w)
        return (decay + k * log_w - decay * log_w.exp()).exp()


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    total = sum(min(max(logp - old, -20.0), 20.0) for logp, old in zip(logps, old_logps, strict=True))
    log_w = min(max(total, math.log(1e-8)), 20.0)
    k, decay = objective.k_neg, objective.lambda_neg
    if advantage >= 0:
        k, decay = objective.k_pos, objective.lambda_pos
    phi = math.exp(decay) * math.exp(log_w) ** k * math.exp(-decay * math.exp(log_w))
    return [-phi * advantage * logp for logp in logps]


TWICE_POS, TWICE_NEG = 4 * math.exp(-3), 8 * math.exp(-2)
VECTORS = [
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([2.0, 4.0], [-2.0, -2.0])),  # on policy: phi = 1
    # W = 2: 2^2 e^(3 - 6)
    (([-1.0, -1.0], [-1.0 - math.log(2), -1.0], 1.0), ([TWICE_POS] * 2, [-TWICE_POS] * 2)),
    # W = 2 with A < 0: 2^3 e^(2 - 4)
    (([-1.0, -1.0], [-1.0 - math.log(2), -1.0], -1.0), ([-TWICE_NEG] * 2, [TWICE_NEG] * 2)),
]
