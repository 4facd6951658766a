"""DPPO: -A r M, where a token is masked (M = 0) for how much probability mass has moved, not for its ratio.

M = 0 iff (A > 0, p > p_b, D > delta_high) or (A < 0, p < p_b, D > delta_low), with p_b the behaviour policy's
probability and D the total variation or KL divergence of (token, rest). Form "ratio" attaches r = p / p_b; "repo" is
-A sg(min(r, ratio_cap)) M logp, with the same gradient where r < ratio_cap.
Source: arXiv 2602.04879; sail-sg/Stable-RL, core_algos.py; PrimeIntellect-ai/prime-rl, loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.terms import divergence
from repo_ops.terms.clipped_ratio import clipped_ratio
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

BEHAVIOURS = ("old_logps", "sampler_logps")


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    divergence: str = "tv"
    """Divergence that is bounded: "tv" (total variation) or "kl"."""
    delta_low: float = 0.15
    """Most divergence for a token with A < 0 that became rarer; TV 0.15, KL 0.05, prime-rl TV 0.2."""
    delta_high: float = 0.15
    """Most divergence for a token with A > 0 that became likelier; TV 0.15, KL 0.05, prime-rl TV 0.2."""
    symmetric: bool = False
    """Whether the sign of A is ignored: D > delta_high masks upwards, D > delta_low downwards (prime-rl's "ipo")."""
    form: str = "ratio"
    """"ratio": attached r, no cap. "repo": constant weight times logp, as the official code has it."""
    ratio_cap: float | None = None
    """Form "repo": largest weight, 10; None: no cap."""
    behaviour: str = "old_logps"
    """Whose probabilities r is relative to: old_logps or sampler_logps (the paper's main variant)."""
    anchor: str | None = None
    """Whose probabilities D is relative to, old_logps or sampler_logps; None: the same ("recompute" variants do so)."""
    adv_tau: float = 1.0
    """Factor of the advantage (prime-rl); 1."""
    kl_tau: float = 0.0
    """Weight of the squared log-ratio, over masked tokens too; prime-rl 0.001."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "divergence", divergence.BINARY)
        base.check_choice(self, "form", ("ratio", "repo"))
        base.check_choice(self, "behaviour", BEHAVIOURS)
        if self.anchor is not None:
            base.check_choice(self, "anchor", BEHAVIOURS)
        base.check_positive(self, "delta_low", "delta_high", "kl_tau", zero=True)
        base.check_positive(self, "adv_tau")
        if self.ratio_cap is not None and self.form == "ratio":
            raise ValueError("ratio_cap: an attached ratio has no cap; set form='repo'")
        if self.sampler_weight is not None and self.behaviour == "sampler_logps":
            raise ValueError(
                "sampler_weight: r is relative to sampler_logps already, the weight would count them twice"
            )

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | ({"sampler_logps"} & {self.behaviour, self.anchor})

    @property
    def skips_zero_advantage(self) -> bool:
        return super().skips_zero_advantage and not self.kl_tau

    def __call__(self, tokens: Tokens) -> Tensor:
        log_ratio = tokens.logps - self._of(tokens, self.behaviour)
        advantages = torch.where(self._masked(tokens), 0.0, self.adv_tau * tokens.advantages)
        if self.form == "ratio":
            loss = clipped_ratio(log_ratio, advantages, None, None)
        else:
            weight = log_ratio.detach().clamp_max(20.0).exp().clamp_max(self.ratio_cap or math.inf)
            loss = weighted_logps(tokens.logps, advantages, weight)
        return loss + self.kl_tau * log_ratio.square() if self.kl_tau else loss

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        masked = self._masked(tokens)
        return {"mask_low": masked & (tokens.advantages < 0), "mask_high": masked & (tokens.advantages > 0)}

    def metrics(self, tokens: Tokens) -> Metrics:
        return {**super().metrics(tokens), "divergence": stat(self._divergence(tokens))}

    def _of(self, tokens: Tokens, name: str) -> Tensor:
        values = tokens.old_logps if name == "old_logps" else tokens.sampler_logps
        assert values is not None
        return values

    def _divergence(self, tokens: Tokens) -> Tensor:
        anchor = self._of(tokens, self.anchor or self.behaviour)
        return divergence.BINARY[self.divergence](tokens.logps.detach(), anchor)

    def _masked(self, tokens: Tokens) -> Tensor:
        moved = tokens.logps.detach() - self._of(tokens, self.anchor or self.behaviour)
        far = self._divergence(tokens)
        above, below = (moved > 0) & (far > self.delta_high), (moved < 0) & (far > self.delta_low)
        if self.symmetric:
            return above | below
        return (above & (tokens.advantages > 0)) | (below & (tokens.advantages < 0))


def reference(
    objective: Objective, logps: list[float], old_logps: list[float], advantage: float, *, sampler_logps: list[float]
) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    given = {"old_logps": old_logps, "sampler_logps": sampler_logps}
    behaviours, anchors = given[objective.behaviour], given[objective.anchor or objective.behaviour]
    losses = []
    for logp, behaviour, anchor in zip(logps, behaviours, anchors, strict=True):
        p, q = math.exp(logp), math.exp(anchor)
        far = abs(p - q)
        if objective.divergence == "kl":
            far = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        above, below = p > q and far > objective.delta_high, p < q and far > objective.delta_low
        if not objective.symmetric:
            above, below = above and advantage > 0, below and advantage < 0
        ratio = math.exp(logp - behaviour)
        if objective.form == "repo":
            ratio = min(math.exp(min(logp - behaviour, 20.0)), objective.ratio_cap or math.inf) * logp
        keep = not (above or below)
        losses.append(-keep * objective.adv_tau * advantage * ratio + objective.kl_tau * (logp - behaviour) ** 2)
    return losses


HALF, LESS, MORE = math.log(0.5), math.log(0.4), math.log(0.9)
VECTORS = [
    ((HALF, HALF, 2.0), (-2.0, -2.0)),  # on policy: the gradient is -A
    ((HALF, LESS, 2.0), (-2.5, -2.5)),  # ratio 1.25 is beyond PPO's clip, a mass of 0.1 is not too much
    ((MORE, HALF, 2.0), (0.0, 0.0)),  # a mass of 0.4 is
    ((MORE, HALF, -1.0), (1.8, 1.8)),  # but not where the advantage pulls back
    ((LESS, MORE, -1.0), (0.0, 0.0)),  # the same downwards
    ((LESS, MORE, 1.0), (0.0, 0.0), {"symmetric": True}),  # whatever the sign of A
    ((HALF, LESS, 2.0), (-2.5 * HALF, -2.5), {"form": "repo"}),  # the other form: other value, same gradient
    ((HALF, LESS, 2.0), (-2.0 * HALF, -2.0), {"form": "repo", "ratio_cap": 1.0}),  # until the cap
    ((MORE, HALF, 2.0), (math.log(1.8) ** 2, 2 * math.log(1.8)), {"kl_tau": 1.0}),  # a masked token keeps this term
]
