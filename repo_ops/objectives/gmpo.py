"""GMPO: the geometric mean of token ratios that are clipped one by one, w = exp(mean_t y_t), loss -w A.

y = logps - old_logps, clipped to [-eps_low, eps_high] on the side that the advantage pushes to (log space), so that a
clipped token gets no gradient and the others -A w / T. Source: arXiv 2507.20673; verl, core_algos.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.bounded_exp import bounded_exp
from repo_ops.terms.by_sign import by_sign
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "sequence"
    zero_at_zero_advantage: ClassVar[bool] = True

    reduction: str = "seq-mean-token-mean"
    """Mean over sequences; all tokens of a sequence share one loss."""
    eps_low: float = 0.4
    """Clip width of log-ratios below 0; 0.4 is a ratio of 0.67."""
    eps_high: float = 0.4
    """Clip width of log-ratios above 0; 0.4 is a ratio of 1.49."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_positive(self, "eps_low", "eps_high", zero=True)

    def __call__(self, tokens: Tokens) -> Tensor:
        log_ratio, stopped = tokens.log_ratio, self._stopped(tokens)
        bound = by_sign(tokens.advantages > 0, self.eps_high, -self.eps_low, log_ratio)
        mean = tokens.spread(tokens.sequence_mean(torch.where(stopped, bound, log_ratio)))
        return -bounded_exp(mean) * tokens.advantages

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        stopped = self._stopped(tokens)
        return {"clip_low": stopped & (tokens.advantages < 0), "clip_high": stopped & (tokens.advantages > 0)}

    def _stopped(self, tokens: Tokens) -> Tensor:
        log_ratio = tokens.log_ratio.detach()
        above = (tokens.advantages > 0) & (log_ratio > self.eps_high)
        return above | ((tokens.advantages < 0) & (log_ratio < -self.eps_low))


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    clipped = []
    for logp, old in zip(logps, old_logps, strict=True):
        inside = min(max(logp - old, -objective.eps_low), objective.eps_high)
        clipped.append(min(logp - old, inside) if advantage > 0 else max(logp - old, inside))
    return [-advantage * math.exp(sum(clipped) / len(clipped))] * len(logps)


GROWN = math.exp(0.2)
VECTORS = [
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([-2.0, -2.0], [-2.0, -2.0])),  # on policy: -A
    # the first token is cut to 0.4 and stops; the mean of 0.4 and 0 moves the second
    (([-1.0, -2.0], [-2.0, -2.0], 1.0), ([-GROWN, -GROWN], [0.0, -GROWN])),
    (([-1.0, -2.0], [-2.0, -2.0], -1.0), ([math.exp(0.5)] * 2, [math.exp(0.5)] * 2)),  # A < 0 pulls it back whole
]
