"""RED-Drop: A = R - mean over the kept samples of the prompt, 0 for dropped ones; negatives that outnumber are dropped.

Samples with R >= mean are positive. Where a prompt has more negatives than positives, the surplus of negatives, chosen
at random, is dropped. Dropped rows stay in the batch and in the loss's denominator.
Source: arXiv:2509.24203 (drop="balance" in Trinity-RFT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_ops.advantages import base
from repo_ops.advantages.rows import Rows, standardized


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator(base.Estimator):
    generator: torch.Generator | None = None
    """Source of the choice, one per step: torch.Generator().manual_seed(step), of the rewards' device unless a copy
    to it may be waited for. Required unless `keep` is given."""
    keep: Tensor | None = None
    """[B] bool, the samples to keep, in place of the rule above."""
    normalize: bool = False
    """Divide by the population standard deviation of the kept samples."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        base.check_positive("eps", self.eps, zero=True)
        if (self.keep is None) == (self.generator is None):
            raise ValueError(
                "generator: expected either generator or keep, got "
                f"{'neither' if self.keep is None else 'both'}; pass generator=torch.Generator().manual_seed(step)"
            )
        if self.keep is not None and self.keep.dtype != torch.bool:
            raise TypeError(f"keep: expected a bool tensor, got {self.keep.dtype}")

    def __call__(self, rows: Rows) -> Tensor:
        kept = rows.groups.among(self._kept(rows))
        advantages = kept.deviation(rows.rewards)
        if self.normalize:
            advantages = standardized(advantages, kept.std(rows.rewards, unbiased=False), self.eps)
        return advantages

    def check(self, rows: Rows) -> None:
        base.check_per_row("keep", self.keep, rows)

    def _kept(self, rows: Rows) -> Tensor:
        if self.keep is not None:
            return self.keep.to(rows.rewards.device)
        assert self.generator is not None
        draw = torch.rand(rows.rewards.shape, generator=self.generator, device=self.generator.device)
        return balanced(rows, draw.to(rows.rewards.device))


def balanced(rows: Rows, draw: Tensor) -> Tensor:
    """[B] bool: all positives of a prompt and as many negatives as it has positives, those of smallest `draw` [B]."""
    negative = rows.scored & (rows.groups.deviation(rows.rewards) < 0)
    order = draw.argsort(stable=True)
    # members of no rank (positives) sort into a set of their own, behind all prompts
    owner = torch.where(negative, rows.groups.slot, rows.groups.slots)[order]
    order = order[owner.argsort(stable=True)]
    position = torch.empty_like(draw, dtype=torch.float64)
    position[order] = torch.arange(len(draw), dtype=torch.float64, device=draw.device)
    rank = position - rows.groups.among(negative).smallest(position)
    return ~negative | (rank < rows.groups.sum((~negative).double()))


def reference(
    estimator: Estimator, rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int] | None
) -> list[float]:
    """Advantages of one batch in which all rows are alike, for a given `keep`."""
    assert estimator.keep is not None
    keep, advantages = estimator.keep.tolist(), []
    for reward, group, kept in zip(rewards, group_ids, keep, strict=True):
        peers = [r for r, g, k in zip(rewards, group_ids, keep, strict=True) if g == group and k]
        if not kept:
            advantages.append(0.0)
            continue
        mean = sum(peers) / len(peers)
        std = (sum((r - mean) ** 2 for r in peers) / len(peers)) ** 0.5
        advantages.append((reward - mean) / (std + estimator.eps if estimator.normalize else 1.0))
    return advantages


def _keep(*kept: int) -> dict[str, Any]:
    return {"keep": torch.tensor(kept, dtype=torch.bool)}


# (hyper-parameters, rewards, group ids, lengths, advantages)
VECTORS: list[tuple[dict[str, Any], Any, Any, Any, Any]] = [
    (_keep(1, 1, 0), (1.0, 0.0, 0.0), (0, 0, 0), None, (0.5, -0.5, 0.0)),
    ({**_keep(1, 1, 0), "normalize": True, "eps": 0.5}, (1.0, 0.0, 0.0), (0, 0, 0), None, (0.5, -0.5, 0.0)),  # std 1/2
    (_keep(1, 0, 0), (1.0, 0.0, 0.0), (0, 0, 0), None, (0.0, 0.0, 0.0)),  # one kept sample has no others
    (_keep(0, 0), (1.0, 0.0), (0, 0), None, (0.0, 0.0)),
]


def random_case(generator: torch.Generator) -> tuple[dict[str, Any], list[float], list[int], list[int] | None]:
    """Hyper-parameters and a batch that suit each other."""
    rewards = torch.rand(15, generator=generator, dtype=torch.float64)
    keep = torch.rand(15, generator=generator) < 0.6
    hyper = {"keep": keep, "normalize": bool(keep[0])}
    return hyper, rewards.tolist(), torch.randint(4, (15,), generator=generator).tolist(), None
