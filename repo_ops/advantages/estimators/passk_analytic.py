"""Pass@k, analytic: mean advantage of a sample over all subsets of k of the prompt's N samples, rewards 0 or 1.

With n- wrong samples, rho = C(n-, k) / C(N, k) the share of subsets that fail and s = sqrt(rho (1 - rho)):
A = rho / s for a right sample, A = (rho - C(n- - 1, k-1) / C(N - 1, k-1)) / s for a wrong one, 0 where s = 0.
A prompt with fewer than k samples has no subsets: A = 0.
Source: arXiv:2508.10751; checked against the enumeration of all subsets.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    mixed_refusal: ClassVar[str | None] = "pass@k counts samples of one policy, and replayed ones are another's"

    k: int
    """Samples in a subset, of which one right one is enough; at most the group's size."""

    def __post_init__(self) -> None:
        try:
            base.check_positive("k", operator.index(self.k))
        except TypeError:
            raise TypeError(f"k: expected an integer, got {self.k!r}") from None

    def __call__(self, rows: Rows) -> Tensor:
        right = rows.rewards == 1
        count, wrong = rows.groups.count(), rows.groups.sum((~right).double())
        fail = _share(wrong, count, self.k)
        spread = (fail * (1 - fail)).sqrt()
        advantages = torch.where(right, fail, fail - _share(wrong - 1, count - 1, self.k - 1))
        usable = (spread > 0) & (count >= self.k)
        return torch.where(usable, advantages / torch.where(usable, spread, 1), 0)

    def check(self, rows: Rows) -> None:
        odd = rows.rewards[(rows.rewards != 0) & (rows.rewards != 1)]
        if odd.numel():
            raise ValueError(
                f"rewards: expected 0 or 1 for 'passk_analytic', got {odd[0].item()}; threshold them first"
            )


def _share(part: Tensor, whole: Tensor, k: int) -> Tensor:
    """C(part, k) / C(whole, k), a product of k factors: exactly 0 where part < k and exactly 1 where part = whole."""
    share = torch.ones_like(part)
    for taken in range(k):
        share = share * (part - taken).clamp_min(0) / (whole - taken).clamp_min(1)
    return share


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, by enumerating the subsets that hold each sample."""
    advantages = []
    for i in range(len(rewards)):
        peers = [j for j, g in enumerate(group_ids) if g == group_ids[i]]
        subsets = list(itertools.combinations(peers, estimator.k))
        scores = [max(rewards[j] for j in subset) for subset in subsets]
        mean = sum(scores) / max(len(scores), 1)
        if not 0 < mean < 1:
            advantages.append(0.0)
            continue
        own = [score for subset, score in zip(subsets, scores, strict=True) if i in subset]
        advantages.append((sum(own) / len(own) - mean) / math.sqrt(mean * (1 - mean)))
    return advantages


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS = [
    # 3 of 6 pairs fail: rho 1/2, s 1/2; of the 3 pairs of a wrong sample 2 fail: (1/2 - 2/3) / (1/2)
    ({"k": 2}, (1.0, 0.0, 0.0, 0.0), (0, 0, 0, 0), None, (1.0, -1 / 3, -1 / 3, -1 / 3)),
    ({"k": 1}, (1.0, 0.0), (0, 0), None, (1.0, -1.0)),  # k = 1: (R - p) / sqrt(p (1 - p))
    ({"k": 2}, (1.0, 1.0, 0.0), (0, 0, 0), None, (0.0, 0.0, 0.0)),  # one wrong: every pair passes
    ({"k": 2}, (0.0, 0.0, 0.0), (0, 0, 0), None, (0.0, 0.0, 0.0)),  # every pair fails
    ({"k": 3}, (1.0, 0.0), (0, 0), None, (0.0, 0.0)),  # fewer samples than k
]


def random_case(generator: torch.Generator) -> tuple[dict[str, Any], list[float], list[int], list[int] | None]:
    """Hyper-parameters and a batch that suit each other."""
    rewards = torch.randint(2, (17,), generator=generator).tolist()
    k = int(torch.randint(1, 5, (), generator=generator))
    return {"k": k}, [float(r) for r in rewards], torch.randint(3, (17,), generator=generator).tolist(), None
