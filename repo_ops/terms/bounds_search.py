"""The search for asymmetric ratio bounds, without asking the device for an answer.

Both rules walk one path of (low, high) pairs. The mass of A > 0 depends on `high` alone and that of A < 0 on `low`
alone, so each bound's candidates are summed once and the first pair that reaches the target is picked by index.
Source: arXiv 2510.18927; WooooDyy/BAPO, recipe/bapo/policy_loss.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.terms import across_ranks
from repo_ops.tokens import Tokens

_ROUNDING = 1e-9
"""A bound this close to its maximum has reached it."""


class Bounds(NamedTuple):
    """What a search found; 0-d tensors."""

    low: Tensor
    high: Tensor
    measure: Tensor
    """What the rule measures, at these bounds."""
    evaluations: Tensor
    """Pairs that were looked at."""


class Rule(NamedTuple):
    """What is measured, and which bound moves first."""

    is_share: bool
    """positive / (positive + negative); else positive / negative."""
    weighted: bool
    """Whether tokens count by their old probability."""
    high_first: bool


RULES = {
    "paper": Rule(is_share=True, weighted=True, high_first=True),
    "open_code": Rule(is_share=False, weighted=False, high_first=False),
}


def path(start: float, end: float, step: float) -> list[float]:
    """start, start + step, ... up to `end`; `start` alone for a step of 0."""
    values = [start]
    while step > 0 and values[-1] < end - _ROUNDING:
        values.append(min(values[-1] + step, end))
    return values


def search(
    tokens: Tokens, rule: Rule, lows: list[float], highs: list[float], target: float, group: dist.ProcessGroup | None
) -> Bounds:
    """The first bounds on the path whose measure reaches `target`, or the last; over the micro-batches of `group`."""
    advantages = tokens.advantages
    ratio = tokens.log_ratio.detach().clamp(-20.0, 20.0).exp()
    mass = advantages.abs() * tokens.old_logps.exp() if rule.weighted else advantages.abs()
    up, down = torch.where(advantages > 0, mass, 0.0), torch.where(advantages < 0, mass, 0.0)
    sums = [(up * ratio.clamp_max(high)).sum() for high in highs]
    sums += [(down * ratio.clamp_min(low)).sum() for low in lows]
    positive, negative = across_ranks.total(torch.stack(sums), group).split([len(highs), len(lows)])
    i, j = _pairs(rule, len(lows), len(highs), device=ratio.device)
    measure = _measure(rule, positive[j], negative[i])
    reached = measure >= target
    # argmax gives the first True; where there is none, the last pair
    at = torch.where(reached.any(), reached.to(torch.uint8).argmax(), len(i) - 1)
    low, high = (torch.tensor(values, dtype=ratio.dtype, device=ratio.device) for values in (lows, highs))
    # take, as indexing by a 0-d tensor would wait for the device
    return Bounds(low.take(i.take(at)), high.take(j.take(at)), measure.take(at), at + 1)


def _pairs(rule: Rule, num_lows: int, num_highs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of (low, high) along the path: one bound to its end, then the other."""
    first, second = (num_highs, num_lows) if rule.high_first else (num_lows, num_highs)
    step = torch.arange(first + second - 1, device=device)
    mover, follower = step.clamp_max(first - 1), (step - (first - 1)).clamp_min(0)
    return (follower, mover) if rule.high_first else (mover, follower)


def _measure(rule: Rule, positive: Tensor, negative: Tensor) -> Tensor:
    if rule.is_share:
        both = positive + negative
        return torch.where(both > 0, positive / both, torch.inf)
    return torch.where(negative > 0, positive / (negative + 1e-8), torch.inf)
