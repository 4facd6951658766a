"""At which level policies are compared: from token log-ratios to the log-ratio that a token is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from repo_ops.scope import Scope
from repo_ops.tokens import Tokens


def token(tokens: Tokens, log_ratio: Tensor) -> Tensor:
    """Each token's own."""
    return log_ratio


def sequence_mean(tokens: Tokens, log_ratio: Tensor) -> Tensor:
    """The sequence's mean (a geometric mean of ratios), for each of its tokens, attached to all of them."""
    return tokens.spread(tokens.sequence_mean(log_ratio))


def sequence_sum(tokens: Tokens, log_ratio: Tensor) -> Tensor:
    """The sequence's sum (the ratio of the whole sequence's probabilities), attached to all of its tokens."""
    return tokens.spread(tokens.sequence_sum(log_ratio))


def prefix_min(tokens: Tokens, log_ratio: Tensor) -> Tensor:
    """The token's own plus the least of the tokens before it (0 for the first), the latter detached."""
    return running_min(tokens, log_ratio.detach(), include_current=False) + log_ratio


def running_min(tokens: Tokens, values: Tensor, *, include_current: bool) -> Tensor:
    """[N] least of `values` so far in the token's sequence; without the current token, the first token has 0.

    A scan by doubling: about log2(N) elementwise steps, exact, no loop over sequences and no wait for the device.
    """
    position = tokens.positions()
    least = values
    if not include_current:
        least = torch.where(position > 0, values.roll(1), torch.inf)
    step = 1
    while step < len(values):
        least = torch.where(position >= step, torch.minimum(least, least.roll(step)), least)
        step *= 2
    return torch.where(least == torch.inf, 0.0, least) if not include_current else least


class Level(NamedTuple):
    """How token log-ratios combine, and what must be seen for it."""

    combine: Callable[[Tokens, Tensor], Tensor]
    scope: Scope


LEVELS = {
    "token": Level(token, "token"),
    "sequence_mean": Level(sequence_mean, "sequence"),
    "sequence_sum": Level(sequence_sum, "sequence"),
    "prefix_min": Level(prefix_min, "sequence"),
}


def reference(level: str, log_ratios: list[float]) -> list[float]:
    """The same for one sequence, by the formula."""
    total, count = sum(log_ratios), len(log_ratios)
    by_hand = {
        "token": log_ratios,
        "sequence_mean": [total / count] * count,
        "sequence_sum": [total] * count,
        "prefix_min": [min(log_ratios[:t], default=0.0) + log_ratios[t] for t in range(count)],
    }
    return by_hand[level]
