"""KL-Cov: -A r without a clip, plus kl_coef |log r| on the few tokens whose covariance drives entropy down most.

cov = (A - mean A)(logp - mean logp) over the batch; the penalty is on the max(1, int(fraction * tokens)) largest.
Source: arXiv 2505.22617; verl, core_algos.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.clipped_ratio import clipped_ratio
from repo_ops.terms.covariance import covariance, largest
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    scope: ClassVar[base.Scope] = "batch"

    fraction: float = 2e-4
    """Share of tokens that are penalised; 0.0002."""
    kl_coef: float = 1.0
    """Weight of their |log r|; 1 in verl's function, 0.1 in its configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_positive(self, "kl_coef", zero=True)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a share in (0, 1], got {self.fraction}")

    def __call__(self, tokens: Tokens) -> Tensor:
        loss = clipped_ratio(tokens.log_ratio, tokens.advantages, None, None)
        return loss + torch.where(self._penalised(tokens), self.kl_coef * tokens.log_ratio.abs(), 0.0)

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"kl_cov": self._penalised(tokens)}

    def _penalised(self, tokens: Tokens) -> Tensor:
        return largest(covariance(tokens, self.process_group), self.fraction, self.process_group)


def reference(
    objective: Objective, logps: list[list[float]], old_logps: list[list[float]], advantages: list[float]
) -> list[list[float]]:
    """Per-token losses of a batch, by the formula."""
    flat = [(logp, a, (i, t)) for i, a in enumerate(advantages) for t, logp in enumerate(logps[i])]
    mean_logp, mean_a = (sum(column) / len(flat) for column in list(zip(*flat))[:2])
    by_cov = sorted(flat, key=lambda token: -(token[1] - mean_a) * (token[0] - mean_logp))
    chosen = {place for *_, place in by_cov[: max(1, int(objective.fraction * len(flat)))]}
    losses = []
    for i, (row, olds) in enumerate(zip(logps, old_logps, strict=True)):
        drifts = [logp - old for logp, old in zip(row, olds, strict=True)]
        penalties = [objective.kl_coef * abs(drift) if (i, t) in chosen else 0.0 for t, drift in enumerate(drifts)]
        losses.append([p - advantages[i] * math.exp(drift) for p, drift in zip(penalties, drifts, strict=True)])
    return losses


VECTORS = [
    # covariances 2 * 1 and -2 * -1 over these two: a tie, so both are penalised
    (
        ([[-1.0], [-3.0]], [[-1.0], [-3.0]], [2.0, -2.0]),
        ([[-2.0], [2.0]], [[-2.0], [2.0]]),
    ),  # on policy: nothing to add
    # mean A 3, mean logp -2: covariances 1, 0, -1 and 0, so the first token alone is penalised
    (
        ([[-1.0, -2.0, -3.0], [-2.0]], [[-2.0, -2.0, -3.0], [-2.0]], [4.0, 0.0]),
        ([[1 - 4 * math.e, -4.0, -4.0], [0.0]], [[1 - 4 * math.e, -4.0, -4.0], [0.0]]),
    ),
]
