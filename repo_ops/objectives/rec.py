"""REC, REP and RED-Weight: -W K logp, group-relative REINFORCE as an off-policy method.

The clip mask K says which tokens learn, the weight W how much, and a regulariser may pull back; r = exp(logps -
old_logps) is a constant throughout. Advantages are rewards less the group's mean.
Source: arXiv 2509.24203; Trinity-RFT, rec_policy_loss.py. `recipes.py` has the paper's names (rec_one_side_nois, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.objectives import base
from repo_ops.scope import Scope, widest
from repo_ops.terms.bounded_exp import bounded_exp
from repo_ops.terms.ratio_level import LEVELS
from repo_ops.terms.reinforce_weight import WEIGHTS
from repo_ops.terms.trust_region import REGIONS, Bounds
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

REGULARIZERS = ("none", "forward_kl", "k2")
WIDTHS = {"eps_low": 0.2, "eps_high": 0.2, "eps_ring_low": 0.6, "eps_ring_high": 2.0}


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    clip: str = "none"
    """K: "one_side" drops what has passed the bound that A pushes to, "two_side" all outside the bounds, "ring" keeps
    what A pulls back from far outside; "sequence_one_side" judges the sequence's mean ratio."""
    weight: str = "none"
    """W / A: 1, "ratio" r, "truncated_ratio" r within the ring, "sequence_ratio" exp(mean log r), or "advantage"
    exp(A / advantage_temperature) (RED-Weight)."""
    eps_low: float | None = None
    """Clip width below 1; None: 0.2, the paper's wide setting 0.6."""
    eps_high: float | None = None
    """Clip width above 1; None: 0.2, the paper's wide setting 2."""
    eps_ring_low: float | None = None
    """Outer width below 1, of clip "ring" and weight "truncated_ratio"; None: 0.6."""
    eps_ring_high: float | None = None
    """Outer width above 1, of clip "ring" and weight "truncated_ratio"; None: 2."""
    advantage_temperature: float | None = None
    """Of weight "advantage"; None: 1."""
    regularizer: str = "none"
    """"forward_kl" adds -coef * logp (AsymRE: a baseline lower by coef), "k2" coef * (logps - old_logps)^2 (OPMD)."""
    regularizer_coef: float = 0.1
    """Weight of the regulariser; 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "clip", REGIONS)
        base.check_choice(self, "weight", WEIGHTS)
        base.check_choice(self, "regularizer", REGULARIZERS)
        base.check_positive(self, "regularizer_coef")
        region, weight = REGIONS[self.clip], WEIGHTS[self.weight]
        read = {"eps_low": region.reads_bounds, "eps_high": region.reads_bounds}
        read |= dict.fromkeys(("eps_ring_low", "eps_ring_high"), region.reads_outer or weight.reads_outer)
        read["advantage_temperature"] = weight.reads_temperature
        for name, is_read in read.items():
            if getattr(self, name) is not None and not is_read:
                raise ValueError(f"{name}: clip {self.clip!r} with weight {self.weight!r} does not read it; drop it")
        for name in WIDTHS:
            base.check_width(name, getattr(self, name), low=name.endswith("low"))
        if self.advantage_temperature is not None:
            base.check_positive(self, "advantage_temperature")

    @property
    def reach(self) -> Scope:
        levels = (REGIONS[self.clip].level, WEIGHTS[self.weight].level)
        return widest(super().reach, *(LEVELS[level].scope for level in levels))

    @property
    def skips_zero_advantage(self) -> bool:
        return super().skips_zero_advantage and self.regularizer == "none"

    @property
    def bounds(self) -> Bounds:
        """As ratio values."""
        low, high, far_low, far_high = (WIDTHS[n] if getattr(self, n) is None else getattr(self, n) for n in WIDTHS)
        return Bounds(1 - low, 1 + high, 1 - far_low, 1 + far_high)

    def __call__(self, tokens: Tokens) -> Tensor:
        rule, temperature = WEIGHTS[self.weight], self.advantage_temperature or 1.0
        weight = rule.factor(_ratio(tokens, rule.level), tokens.advantages, self.bounds, temperature)
        loss = weighted_logps(tokens.logps, tokens.advantages, torch.where(self._kept(tokens), weight, 0.0))
        if self.regularizer == "forward_kl":
            return loss - self.regularizer_coef * tokens.logps
        if self.regularizer == "k2":
            return loss + self.regularizer_coef * tokens.log_ratio.square()
        return loss

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        dropped = ~self._kept(tokens)
        return {"clip_low": dropped & (tokens.advantages < 0), "clip_high": dropped & (tokens.advantages > 0)}

    def _kept(self, tokens: Tokens) -> Tensor:
        region = REGIONS[self.clip]
        return region.keeps(_ratio(tokens, region.level), tokens.advantages, self.bounds)


def _ratio(tokens: Tokens, level: str) -> Tensor:
    return bounded_exp(LEVELS[level].combine(tokens, tokens.log_ratio.detach()))


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    given = {name: getattr(objective, name) for name in WIDTHS}
    width = {name: WIDTHS[name] if value is None else value for name, value in given.items()}
    low, high = 1 - width["eps_low"], 1 + width["eps_high"]
    far_low, far_high = 1 - width["eps_ring_low"], 1 + width["eps_ring_high"]
    whole = math.exp((sum(logps) - sum(old_logps)) / len(logps))
    losses = []
    for logp, old in zip(logps, old_logps, strict=True):
        ratio = math.exp(logp - old)
        judged = whole if objective.clip == "sequence_one_side" else ratio
        passed = (advantage > 0 and judged > high) or (advantage < 0 and judged < low)
        outside = not low <= ratio <= high
        pulled_back = (advantage >= 0 and ratio <= far_low) or (advantage <= 0 and ratio >= far_high)
        dropped = {"none": False, "two_side": outside, "ring": outside and not pulled_back}.get(objective.clip, passed)
        weight = {
            "none": 1.0,
            "ratio": ratio,
            "truncated_ratio": min(max(ratio, far_low), far_high),
            "sequence_ratio": whole,
            "advantage": math.exp(advantage / (objective.advantage_temperature or 1.0)),
        }[objective.weight]
        extra = {"none": 0.0, "forward_kl": -logp, "k2": (logp - old) ** 2}[objective.regularizer]
        losses.append(-(not dropped) * weight * advantage * logp + objective.regularizer_coef * extra)
    return losses


E = math.e
VECTORS = [
    ((-1.0, -2.0, 2.0), (2.0, -2.0)),  # REINFORCE: the ratio does not matter
    ((-1.0, -2.0, 2.0), (0.0, 0.0), {"clip": "one_side"}),  # ratio e with A > 0: dropped
    ((-1.0, -2.0, -1.0), (-1.0, 1.0), {"clip": "one_side"}),  # with A < 0: pulled back
    ((-1.0, -2.0, -1.0), (0.0, 0.0), {"clip": "two_side"}),  # outside either bound: dropped
    ((-1.0, -2.0, -1.0), (0.0, 0.0), {"clip": "ring"}),  # e is between 1.2 and 3: still dropped
    ((-1.0, -3.0, -1.0), (-1.0, 1.0), {"clip": "ring"}),  # e^2 is beyond 3: pulled back
    ((-1.0, -2.0, -1.0), (-E, E), {"weight": "ratio"}),
    ((-1.0, -3.0, -1.0), (-3.0, 3.0), {"weight": "truncated_ratio"}),  # e^2 is cut to 3
    ((-1.0, -2.0, 1.0), (E, -E), {"weight": "advantage"}),  # exp(A / 1)
    ((-1.0, -2.0, 1.0), (1.1, -1.1), {"regularizer": "forward_kl"}),  # as if A were higher by 0.1
    ((-1.0, -2.0, 1.0), (1.1, -0.8), {"regularizer": "k2"}),  # 0.1 * 1^2, gradient 0.2
]
