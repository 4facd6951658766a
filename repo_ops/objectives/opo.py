"""OPO's loss: -A exp(logp - sg(logp)), exactly on policy: one update per batch, no ratio, no clip, no KL.

The gradient is -A. What OPO is about is its baseline, an advantage estimator: group_advantages(estimator="opo").
old_logps are not read. Source: arXiv 2505.23585.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    def __call__(self, tokens: Tokens) -> Tensor:
        return -tokens.advantages * (tokens.logps - tokens.logps.detach()).exp()


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula: the ratio to itself is 1."""
    return [-advantage * 1.0 for _ in logps]


VECTORS = [
    ((-1.0, -1.0, 2.0), (-2.0, -2.0)),
    ((-1.0, -3.0, -2.0), (2.0, 2.0)),  # whatever the old log-probability was
]
