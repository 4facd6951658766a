"""A setting that differs between tokens with positive and other advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def by_sign(positive: Tensor, value: float, other: float, like: Tensor) -> Tensor:
    """[N] `value` under `positive` [N] bool, `other` elsewhere, in the dtype of `like`.

    torch.where of two Python numbers would be float32 whatever the tokens are.
    """
    return torch.where(positive, like.new_full((), value), like.new_full((), other))
