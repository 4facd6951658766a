"""REINFORCE++ with a baseline: d = R - mean over the prompt's samples, then whitened over all tokens of the batch.

A = (d - mean) / sqrt(var + eps), mean and unbiased variance over tokens, each carrying its completion's d. A sample
without others has d = 0.
Source: arXiv:2501.03262; whitening as in verl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.estimators.reinforce_pp import whitened
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    needs_lengths: ClassVar[bool] = True

    eps: float = 1e-8
    """Added to the variance."""

    def __post_init__(self) -> None:
        base.check_positive("eps", self.eps)

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.lengths is not None
        return whitened(rows.groups.deviation(rows.rewards), rows.lengths, rows.batch, self.eps)


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, token by token."""
    assert lengths is not None
    centred = []
    for reward, group in zip(rewards, group_ids, strict=True):
        peers = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        centred.append(reward - math.fsum(peers) / len(peers))
    tokens = [d for d, length in zip(centred, lengths, strict=True) for _ in range(length)]
    if len(tokens) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [(d - mean) / math.sqrt(variance + estimator.eps) for d in centred]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    # d = 0.5, -0.5; tokens 0.5 (three times), -0.5: mean 1/4, squares 3/16 + 9/16, variance 1/4
    ({"eps": 0.75}, (1.0, 0.0), (0, 0), (3, 1), (0.25, -0.75)),
    # an offset of a prompt is gone before the whitening: d = 0.5, -0.5, 0.5, -0.5, variance 1/3
    (
        {},
        (1.0, 0.0, 8.0, 7.0),
        (0, 0, 1, 1),
        (1, 1, 1, 1),
        tuple(x / math.sqrt(1 / 3 + 1e-8) for x in (0.5, -0.5, 0.5, -0.5)),
    ),
    ({}, (0.1, 0.1, 0.7, 0.7, 0.7), (0, 0, 1, 1, 1), (2, 3, 4, 5, 6), (0.0,) * 5),  # every prompt without variance
    ({}, (1.0, 0.0), (0, 1), (4, 4), (0.0, 0.0)),  # groups of one
]
