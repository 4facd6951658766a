"""GPG: A = alpha (R - mean) / f_norm, mean over the prompt's samples; alpha makes up for samples without a gradient.

Source: arXiv:2504.02546; alpha="nonzero_rewards" is verl's count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    alpha: Literal["usable_groups", "nonzero_rewards"] | float = "usable_groups"
    """B over the number of samples whose group has any variance (the paper), B over the number of samples whose reward
    is not 0 (verl), or a number. B counts the samples with a reward."""
    f_norm: float = 1.0
    """Divides every advantage; 1."""

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            base.check_choice("alpha", self.alpha, ("usable_groups", "nonzero_rewards"))
        else:
            base.check_positive("alpha", self.alpha)
        base.check_positive("f_norm", self.f_norm)

    def __call__(self, rows: Rows) -> Tensor:
        advantages = rows.groups.deviation(rows.rewards) / self.f_norm
        if not isinstance(self.alpha, str):
            return advantages * self.alpha
        if self.alpha == "usable_groups":
            usable = rows.groups.largest(rows.rewards) > rows.groups.smallest(rows.rewards)
        else:
            usable = rows.rewards != 0
        # nothing usable: every advantage is 0 anyway
        return advantages * rows.batch.count() / rows.batch.sum(usable.double()).clamp_min(1)


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by the formula."""
    peers = [[r for r, g in zip(rewards, group_ids, strict=True) if g == group] for group in group_ids]
    if estimator.alpha == "usable_groups":
        usable = sum(max(group) != min(group) for group in peers)
        alpha = len(rewards) / max(usable, 1)
    elif estimator.alpha == "nonzero_rewards":
        alpha = len(rewards) / max(sum(r != 0 for r in rewards), 1)
    else:
        alpha = float(estimator.alpha)
    return [alpha * (r - sum(g) / len(g)) / estimator.f_norm for r, g in zip(rewards, peers, strict=True)]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    ({}, (1.0, 0.0, 1.0, 1.0), (0, 0, 1, 1), None, (1.0, -1.0, 0.0, 0.0)),  # 2 of 4 usable: alpha 2
    ({"alpha": "nonzero_rewards"}, (1.0, 0.0, 1.0, 1.0), (0, 0, 1, 1), None, (2 / 3, -2 / 3, 0.0, 0.0)),  # alpha 4/3
    ({"alpha": 3.0, "f_norm": 2.0}, (1.0, 0.0), (0, 0), None, (0.75, -0.75)),
    ({}, (1.0, 1.0), (0, 0), None, (0.0, 0.0)),  # no usable group: 0, not 0/0
    ({"alpha": "nonzero_rewards"}, (0.0, 0.0), (0, 0), None, (0.0, 0.0)),
]
