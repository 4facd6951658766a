"""ReMax: A = R - reward of the same prompt's greedy completion.

The baseline is one decode per prompt and no group is needed, so `group_ids` take no part.
Source: arXiv:2310.10505.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    mixed_refusal: ClassVar[str | None] = "each row has a baseline of its own, so there are no statistics to share"

    greedy_rewards: Tensor | float
    """[B], for every row the reward of its prompt's greedy completion under the current policy; or one number."""

    def __call__(self, rows: Rows) -> Tensor:
        if isinstance(self.greedy_rewards, Tensor):
            return rows.rewards - self.greedy_rewards.detach().to(rows.rewards)
        return rows.rewards - self.greedy_rewards

    def check(self, rows: Rows) -> None:
        base.check_per_row("greedy_rewards", self.greedy_rewards, rows)
        if not torch.as_tensor(self.greedy_rewards).isfinite().all():
            raise ValueError("greedy_rewards: expected finite numbers; leave out prompts whose greedy decode has none")


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch, by the formula."""
    greedy = torch.as_tensor(estimator.greedy_rewards).tolist()
    baselines = greedy if isinstance(greedy, list) else [greedy] * len(rewards)
    return [reward - baseline for reward, baseline in zip(rewards, baselines, strict=True)]


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS: list[tuple[dict[str, Any], Any, Any, Any, Any]] = [
    ({"greedy_rewards": 0.25}, (1.0, 0.0), (0, 0), None, (0.75, -0.25)),
    ({"greedy_rewards": torch.tensor([0.5, 1.0])}, (1.0, 0.0), (0, 1), None, (0.5, -1.0)),  # one a prompt
    ({"greedy_rewards": 0.0}, (5.0,), (0,), None, (5.0,)),  # a group of one has its baseline too
]


def random_case(generator: torch.Generator) -> tuple[dict[str, Any], list[float], list[int], list[int] | None]:
    """Hyper-parameters and a batch that suit each other."""
    rewards = torch.rand(13, generator=generator, dtype=torch.float64)
    greedy = torch.rand(13, generator=generator, dtype=torch.float64)
    return {"greedy_rewards": greedy}, rewards.tolist(), torch.randint(4, (13,), generator=generator).tolist(), None
