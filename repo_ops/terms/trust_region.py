"""Which tokens may still be moved, given how far their ratio is from 1 and what their advantage asks for.

Each rule gives [N] bool, True = keep, from detached ratios. Source: arXiv 2509.24203.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Ratio values (0.8 and 1.2, not widths)."""

    low: float
    high: float
    outer_low: float
    outer_high: float


def everywhere(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """All tokens."""
    return torch.ones_like(ratio, dtype=torch.bool)


def one_side(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """Kept unless the ratio has passed the bound towards which the advantage pushes (PPO's rule)."""
    return ((ratio <= bounds.high) & (advantages >= 0)) | ((ratio >= bounds.low) & (advantages <= 0))


def two_side(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """Kept between the bounds, whatever the advantage."""
    return (ratio >= bounds.low) & (ratio <= bounds.high)


def ring(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """Kept between the bounds, and far outside them where the advantage pulls back."""
    far_below = (advantages >= 0) & (ratio <= bounds.outer_low)
    far_above = (advantages <= 0) & (ratio >= bounds.outer_high)
    return two_side(ratio, advantages, bounds) | far_below | far_above


class Region(NamedTuple):
    """A rule, whose ratio it judges (a key of ratio_level.LEVELS), and which bounds it reads."""

    keeps: Callable[[Tensor, Tensor, Bounds], Tensor]
    level: str = "token"
    reads_bounds: bool = True
    reads_outer: bool = False


REGIONS = {
    "none": Region(everywhere, reads_bounds=False),
    "one_side": Region(one_side),
    "two_side": Region(two_side),
    "ring": Region(ring, reads_outer=True),
    "sequence_one_side": Region(one_side, "sequence_mean"),
}
