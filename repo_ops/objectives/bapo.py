"""BAPO: PPO's clip with ratio bounds that are searched at every step.

Tokens with A > 0 shall carry enough of the loss. Rule "paper": while their share of sum p_old |min(r A, clip(r) A)| is
below `target`, raise high, then low. Rule "open_code": while (effective mass of A > 0) / (of A < 0) is below it, raise
low, then high. Bounds are ratio values and constants; `delta` is the dual clip. Source: arXiv 2510.18927;
WooooDyy/BAPO, recipe/bapo/policy_loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.metrics import Metrics, stat
from repo_ops.objectives import base
from repo_ops.terms.bounds_search import RULES, Bounds, path, search
from repo_ops.terms.clipped_ratio import clipped_ratio, gates
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "batch"
    zero_at_zero_advantage: ClassVar[bool] = True

    rule: str = "paper"
    """"paper" or "open_code": what is measured, and which bound moves first."""
    target: float = 0.4
    """What the measure must reach; "paper": a share, 0.4 (0.5); "open_code": a quotient, 1 (0.5)."""
    low_start: float = 0.6
    """Lower bound to start from; 0.6 (open code's example 0.8)."""
    low_max: float = 0.9
    """Highest lower bound; 0.9 (open code 0.8, example 0.95)."""
    low_step: float = 0.02
    """Its step, 0: it stays; 0.02 (open code 0.05)."""
    high_start: float = 1.2
    """Upper bound to start from; 1.2."""
    high_max: float = 3.0
    """Highest upper bound; 3 (open code 2)."""
    high_step: float = 0.05
    """Its step, 0: it stays; 0.05 (open code's example 0.1)."""
    delta: float | None = None
    """Upper bound on the ratio where A < 0, else unbounded; the open code 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_choice(self, "rule", RULES)
        base.check_positive(self, "target", "low_step", "high_step", zero=True)
        if not 0 <= self.low_start <= self.low_max <= 1 <= self.high_start <= self.high_max < math.inf:
            raise ValueError(
                "low_start: expected ratio bounds 0 <= low_start <= low_max <= 1 <= high_start <= high_max, got "
                f"{self.low_start}, {self.low_max}, {self.high_start}, {self.high_max}"
            )
        if self.delta is not None and not self.delta > 1:
            raise ValueError(f"delta: expected a ratio above 1, got {self.delta}")

    def __call__(self, tokens: Tokens) -> Tensor:
        found = self._bounds(tokens)
        return clipped_ratio(tokens.log_ratio, tokens.advantages, found.low, found.high, self.delta)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        found = self._bounds(tokens)
        ratio = tokens.log_ratio.detach().exp()
        below, above = gates(ratio, tokens.advantages, found.low, found.high, self.delta)
        return {"clip_low": below, "clip_high": above}

    def metrics(self, tokens: Tokens) -> Metrics:
        own = {f"bapo/{name}": stat(value[None]) for name, value in self._bounds(tokens)._asdict().items()}
        return {**super().metrics(tokens), **own}

    def _bounds(self, tokens: Tokens) -> Bounds:
        lows = path(self.low_start, self.low_max, self.low_step)
        highs = path(self.high_start, self.high_max, self.high_step)
        return search(tokens, RULES[self.rule], lows, highs, self.target, self.process_group)


def reference(
    objective: Objective, logps: list[list[float]], old_logps: list[list[float]], advantages: list[float]
) -> list[list[float]]:
    """Per-token losses of a batch, by the formula and its loops."""
    flat = [
        (math.exp(logp - old), math.exp(old) if objective.rule == "paper" else 1.0, a)
        for row, olds, a in zip(logps, old_logps, advantages, strict=True)
        for logp, old in zip(row, olds, strict=True)
    ]

    def reached(low: float, high: float) -> bool:
        plus = sum(p * a * min(r, high) for r, p, a in flat if a > 0)
        minus = sum(p * -a * max(r, low) for r, p, a in flat if a < 0)
        if objective.rule == "paper":
            return minus + plus == 0 or plus / (plus + minus) >= objective.target
        return minus <= 0 or plus / (minus + 1e-8) >= objective.target

    low, high, tiny = objective.low_start, objective.high_start, 1e-9
    low_left = objective.low_step > 0
    high_left = objective.high_step > 0
    while not reached(low, high):
        can_low = low_left and low < objective.low_max - tiny
        can_high = high_left and high < objective.high_max - tiny
        if not can_low and not can_high:
            break
        if can_high and (objective.rule == "paper" or not can_low):
            high = min(high + objective.high_step, objective.high_max)
        else:
            low = min(low + objective.low_step, objective.low_max)
    losses = []
    for row, olds, a in zip(logps, old_logps, advantages, strict=True):
        ratios = [math.exp(logp - old) for logp, old in zip(row, olds, strict=True)]
        one = [-min(r * a, min(max(r, low), high) * a) for r in ratios]
        losses.append([min(x, -objective.delta * a) if a < 0 and objective.delta is not None else x for x in one])
    return losses


VECTORS = [
    # a share of 1/2 from the start: the first bounds, and ratio e is cut to 1.2
    (([[-1.0], [-2.0]], [[-2.0], [-2.0]], [1.0, -1.0]), ([[-1.2], [1.0]], [[0.0], [1.0]])),
    # the mistake weighs nine times as much, and no bound changes that: high ends at 3, where e is not cut
    (([[-1.0], [-2.0]], [[-2.0], [-2.0]], [1.0, -9.0]), ([[-math.e], [9.0]], [[-math.e], [9.0]])),
]
