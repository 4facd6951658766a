"""OPO: A = R - sum(T R) / sum(T) over the prompt's samples, T the completion's length in tokens; no division.

The baseline of least variance, if the squared gradient of a sample grows with its length. Equal lengths: R - mean.
Lengths that are all 0 leave no token to train, and A = 0.
Source: arXiv:2505.23585.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    needs_lengths: ClassVar[bool] = True

    group_of_one: Literal["zero", "reward"] = "zero"
    """A sample without others: A = 0 (it is its own baseline), or A = R (no baseline) as in verl."""

    def __post_init__(self) -> None:
        base.check_choice("group_of_one", self.group_of_one, ("zero", "reward"))

    def __call__(self, rows: Rows) -> Tensor:
        advantages = rows.groups.deviation(rows.rewards, rows.lengths)
        if self.group_of_one == "reward":
            advantages = torch.where(rows.groups.count() == 1, rows.rewards, advantages)
        return advantages


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    assert lengths is not None
    advantages = []
    for reward, group in zip(rewards, group_ids, strict=True):
        peers = [i for i, g in enumerate(group_ids) if g == group]
        tokens = sum(lengths[i] for i in peers)
        if len(peers) == 1 and estimator.group_of_one == "reward":
            advantages.append(reward)
        elif tokens == 0:
            advantages.append(0.0)
        else:
            advantages.append(reward - sum(lengths[i] * rewards[i] for i in peers) / tokens)
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (1.0, 0.0), (0, 0), (3, 1), (0.25, -0.75)),  # baseline 3/4
    ({}, (1.0, 0.0), (0, 0), (2, 2), (0.5, -0.5)),  # equal lengths: the mean
    ({}, (1.0, 0.0), (0, 0), (0, 5), (1.0, 0.0)),  # an empty completion has no weight
    ({}, (1.0, 0.0), (0, 0), (0, 0), (0.0, 0.0)),
    ({}, (2.0, 1.0), (0, 1), (3, 3), (0.0, 0.0)),
    ({"group_of_one": "reward"}, (2.0, 1.0), (0, 1), (3, 3), (2.0, 1.0)),
]
