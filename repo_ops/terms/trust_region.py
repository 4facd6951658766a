"""Which tokens may still be moved, given how far their ratio is from 1 and what their advantage asks for.

Each rule gives [N] bool, True = keep, from detached ratios. Source: arXiv 2509.24203.
"""

from __future__ import annotations

from torch import Tensor


def one_side(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Kept unless the ratio has passed the bound towards which the advantage pushes (PPO's rule)."""
    return ((ratio <= high) & (advantages >= 0)) | ((ratio >= low) & (advantages <= 0))


def two_side(ratio: Tensor, low: float, high: float) -> Tensor:
    """Kept between the bounds, whatever the advantage."""
    return (ratio >= low) & (ratio <= high)


def ring(ratio: Tensor, advantages: Tensor, low: float, high: float, outer_low: float, outer_high: float) -> Tensor:
    """Kept between the bounds, and far outside them where the advantage pulls back."""
    far_below = (advantages >= 0) & (ratio <= outer_low)
    far_above = (advantages <= 0) & (ratio >= outer_high)
    return two_side(ratio, low, high) | far_below | far_above
