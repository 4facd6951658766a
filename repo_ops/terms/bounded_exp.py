"""exp that stays a number."""

from __future__ import annotations

from torch import Tensor

LIMIT = 70.0
"""exp(70) = 2.5e30: as good as infinite for a ratio, and a batch of them times their weights still fits float32."""


def bounded_exp(x: Tensor, limit: float = LIMIT) -> Tensor:
    """exp(min(x, limit)), with the gradient of exp(limit) beyond it.

    An infinity that a mask of 0 meets later, here or in the backward, would become NaN; a clamp would hide a huge ratio
    by taking its gradient away. So the number is huge, finite, and visible in the gradient's norm.
    """
    return (x - (x - limit).clamp_min(0.0).detach()).exp()
