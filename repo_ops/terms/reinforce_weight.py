"""How much a token counts in a policy gradient whose ratio is a constant.

Each rule gives [N] factors of the advantage from detached ratios. Source: arXiv 2509.24203.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from repo_ops.terms.trust_region import Bounds


def one(ratio: Tensor, advantages: Tensor, bounds: Bounds, temperature: float) -> Tensor:
    """1."""
    return torch.ones_like(ratio)


def own_ratio(ratio: Tensor, advantages: Tensor, bounds: Bounds, temperature: float) -> Tensor:
    """The importance ratio."""
    return ratio


def truncated_ratio(ratio: Tensor, advantages: Tensor, bounds: Bounds, temperature: float) -> Tensor:
    """The importance ratio within the outer bounds."""
    return ratio.clamp(bounds.outer_low, bounds.outer_high)


def advantage(ratio: Tensor, advantages: Tensor, bounds: Bounds, temperature: float) -> Tensor:
    """exp(A / temperature): successes count more, mistakes less."""
    return (advantages / temperature).exp().to(ratio.dtype)


class Weight(NamedTuple):
    """A rule, whose ratio it takes (a key of ratio_level.LEVELS), and what else it reads."""

    factor: Callable[[Tensor, Tensor, Bounds, float], Tensor]
    level: str = "token"
    reads_outer: bool = False
    reads_temperature: bool = False


WEIGHTS = {
    "none": Weight(one),
    "ratio": Weight(own_ratio),
    "truncated_ratio": Weight(truncated_ratio, reads_outer=True),
    "sequence_ratio": Weight(own_ratio, "sequence_mean"),
    "advantage": Weight(advantage, reads_temperature=True),
}
