"""The policy-gradient surrogate: a constant weight times the log-probability."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_logps(logps: Tensor, advantages: Tensor, weight: Tensor | None = None) -> Tensor:
    """Per-token loss -sg(weight) A logps; 0 where A or the weight is 0, even if the other is infinite.

    Args:
        logps: [N], attached. advantages: [N], constant. weight: [N], None for 1.
    """
    if weight is None:
        return -advantages * logps
    weight = weight.detach()
    dead = (advantages == 0) | (weight == 0)
    return torch.where(dead, 0.0, -weight * advantages) * logps
