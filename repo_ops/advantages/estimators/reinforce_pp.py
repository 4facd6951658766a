"""REINFORCE++: A = (R - mean) / sqrt(var + eps), mean and unbiased variance over all tokens of the batch.

Every token of a completion carries its reward, so a completion weighs as much as it has tokens. Discount 1. A penalty
for the KL divergence is subtracted from the rewards by the caller; here every token of a row has the row's advantage.
Fewer than two tokens: A = 0. `group_ids` take no part.
Source: arXiv:2501.03262; whitening as in verl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows, Sets


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    needs_lengths: ClassVar[bool] = True

    eps: float = 1e-8
    """Added to the variance."""

    def __post_init__(self) -> None:
        base.check_positive("eps", self.eps)

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.lengths is not None
        return whitened(rows.rewards, rows.lengths, rows.batch, self.eps)


def whitened(values: Tensor, lengths: Tensor, batch: Sets, eps: float) -> Tensor:
    """[B] values with mean 0 and variance 1 over the batch's tokens, each row's value counted once a token."""
    deviation = batch.deviation(values, lengths)
    tokens = batch.sum(lengths)
    variance = batch.sum(lengths * deviation.square()) / (tokens - 1).clamp_min(1)
    return torch.where(tokens >= 2, deviation / (variance + eps).sqrt(), 0)


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, token by token."""
    assert lengths is not None
    tokens = [reward for reward, length in zip(rewards, lengths, strict=True) for _ in range(length)]
    if len(tokens) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [(reward - mean) / math.sqrt(variance + estimator.eps) for reward in rewards]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    # tokens 1, 1, 1, 0: mean 3/4, squares 3/16 + 9/16 = 3/4, variance 1/4
    ({"eps": 1e-8}, (1.0, 0.0), (0, 0), (3, 1), (0.25 / math.sqrt(0.25 + 1e-8), -0.75 / math.sqrt(0.25 + 1e-8))),
    ({}, (1.0, 0.0), (0, 9), (3, 1), (0.25 / math.sqrt(0.25 + 1e-8), -0.75 / math.sqrt(0.25 + 1e-8))),  # ids: unused
    ({"eps": 0.75}, (1.0, 0.0), (0, 0), (3, 1), (0.25, -0.75)),
    ({}, (0.1, 0.1, 0.1), (0, 1, 2), (3, 1, 7), (0.0, 0.0, 0.0)),  # eps is tiny: rounding noise would show
    ({}, (1.0, 0.0), (0, 0), (1, 0), (0.0, 0.0)),  # one token has no variance
]
