"""Soft penalty for completions that come close to the length limit (DAPO)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """What to add to the reward of completions of these lengths: 0, then down to -1 over the last `cache` tokens.

    Equals clip((max_length - cache - lengths) / cache, -1, 0). Add it to the rewards before `group_advantages`.

    Args:
        lengths: integer tensor of any shape, tokens.
        max_length: the length at which the penalty reaches -1; DAPO 20480.
        cache: tokens before it over which the penalty grows; DAPO 4096.
    Returns:
        float32, shape of lengths, in [-1, 0].
    Raises:
        ValueError: cache is not in [1, max_length].
        TypeError: lengths are not integers.
    Source: arXiv:2503.14476 eq. 13.
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected an integer tensor of token counts, got {got}")
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache: expected within [1, max_length = {max_length}], got {cache}")
    return ((max_length - cache - lengths).to(torch.float32) / cache).clamp(-1, 0)
