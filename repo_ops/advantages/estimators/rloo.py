"""RLOO: A = R - mean of the prompt's other samples = G / (G - 1) (R - mean).

Source: arXiv:2402.14740.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    group_of_one: Literal["zero", "reward"] = "zero"
    """A sample without others: A = 0 as in TRL, or A = R (no baseline) as in verl."""

    def __post_init__(self) -> None:
        base.check_choice("group_of_one", self.group_of_one, ("zero", "reward"))

    def __call__(self, rows: Rows) -> Tensor:
        count = rows.groups.count()
        advantages = rows.groups.deviation(rows.rewards) * count / (count - 1).clamp_min(1)
        if self.group_of_one == "reward":
            advantages = torch.where(count == 1, rows.rewards, advantages)
        return advantages


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    advantages = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and group_ids[j] == group_ids[i]]
        if others:
            advantages.append(reward - sum(others) / len(others))
        else:
            advantages.append(reward if estimator.group_of_one == "reward" else 0.0)
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (1.0, 0.0, 0.5), (0, 0, 0), None, (0.75, -0.75, 0.0)),  # baselines 0.25, 0.75, 0.5
    ({}, (1.0, 0.0, 4.0), (0, 0, 5), None, (1.0, -1.0, 0.0)),  # the last has no others
    ({"group_of_one": "reward"}, (1.0, 0.0, 4.0), (0, 0, 5), None, (1.0, -1.0, 4.0)),
    ({}, (0.3, 0.3, 0.3), (0, 0, 0), None, (0.0, 0.0, 0.0)),
]
