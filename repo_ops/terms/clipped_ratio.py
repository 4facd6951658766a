"""The clipped importance ratio of PPO, one- or two-sided."""

from __future__ import annotations

import torch
from torch import Tensor

from repo_ops.terms.bounded_exp import bounded_exp

Bound = float | Tensor | None


def gates(ratio: Tensor, advantages: Tensor, low: Bound, high: Bound, delta: Bound = None) -> tuple[Tensor, Tensor]:
    """Tokens whose ratio left the bounds in the direction that its advantage rewards: (below, above), [N] bool.

    Below: A < 0 and ratio < low. Above: A > 0 and ratio > high, or A < 0 and ratio > delta. A ratio on a bound stays.
    """
    below = torch.zeros_like(ratio, dtype=torch.bool) if low is None else (advantages < 0) & (ratio < low)
    above = torch.zeros_like(ratio, dtype=torch.bool) if high is None else (advantages > 0) & (ratio > high)
    if delta is not None:
        above = above | ((advantages < 0) & (ratio > delta))
    return below, above


def clipped_ratio(log_ratio: Tensor, advantages: Tensor, low: Bound, high: Bound, delta: Bound = None) -> Tensor:
    """Per-token loss -min(r A, clip(r, low, high) A) with r = exp(log_ratio); for A < 0 at most delta |A|.

    Where the clip is active the value is the bound's and the gradient is 0; on a bound the gradient is kept. Ratios
    beyond exp(70) count as that, so that loss and gradient stay finite.

    Args:
        log_ratio: [N], attached. advantages: [N], constant.
        low, high: bounds on the ratio (0.8 and 1.2, not widths), float, [N] tensor, or None for no bound.
        delta: upper bound on the ratio for negative advantages (dual clip), or None.
    Source: arXiv 1707.06347 eq. 7; dual clip arXiv 1912.09729; delta arXiv 2505.07291.
    """
    ratio = bounded_exp(log_ratio.detach())
    below, above = gates(ratio, advantages, low, high, delta)
    kept = ~(below | above) & (advantages != 0)
    attached = bounded_exp(log_ratio)
    loss = torch.where(kept, -attached * advantages, 0.0)
    for bound, side in ((low, below), (high, above & (advantages > 0)), (delta, above & (advantages < 0))):
        if bound is not None:
            loss = torch.where(side, -bound * advantages, loss)
    return loss
