"""Weights that make up for the inference engine sampling from slightly other probabilities than the trainer computes.

With gap = old_logps - sampler_logps, detached: w = exp(gap) per token, exp(sum gap) per sequence, or exp(mean gap)
("geometric"). "truncate" limits w to [low, high] (TIS), "mask" drops what lies outside (MIS). Dropped tokens stay in
the denominators. Source: verl, rollout_corr_helper.py; TRL, grpo_trainer.py; arXiv 2110.00641 for the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.scope import Scope
from repo_ops.terms import ratio_level
from repo_ops.tokens import Tokens

LOG_LIMIT = 20.0
"""Log-weights are limited to this, so that an unbounded weight stays finite in float32."""

LEVELS = {
    "token": ratio_level.LEVELS["token"],
    "sequence": ratio_level.LEVELS["sequence_sum"],
    "geometric": ratio_level.LEVELS["sequence_mean"],
}


def truncate(weight: Tensor, low: float | None, high: float | None) -> Tensor:
    """The weight, not below `low`, not above `high`."""
    return weight if low is None and high is None else weight.clamp(low, high)


def mask(weight: Tensor, low: float | None, high: float | None) -> Tensor:
    """The weight, 0 below `low` and above `high`."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept = kept if low is None else kept & (weight >= low)
    kept = kept if high is None else kept & (weight <= high)
    return torch.where(kept, weight, 0.0)


ACTIONS: dict[str, Callable[[Tensor, float | None, float | None], Tensor]] = {"truncate": truncate, "mask": mask}
MODES = tuple(f"{level}_{action}" for level in LEVELS for action in ACTIONS)


@dataclass(frozen=True)
class SamplerWeight:
    """The factor of each token's policy loss; a token without a finite sampler log-probability counts as gap 0."""

    name: ClassVar[str] = "sampler_weight"
    reads: ClassVar[tuple[str, ...]] = ("sampler_logps",)
    per_token: ClassVar[bool] = True

    mode: str
    low: float | None
    high: float | None

    @property
    def scope(self) -> Scope:
        """What must be seen for it."""
        return LEVELS[self.mode.split("_")[0]].scope

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N], detached."""
        level, action = self.mode.split("_")
        assert tokens.sampler_logps is not None
        gap = LEVELS[level].combine(tokens, tokens.old_logps - tokens.sampler_logps)
        return ACTIONS[action](gap.clamp(-LOG_LIMIT, LOG_LIMIT).exp(), self.low, self.high)
