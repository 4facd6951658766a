"""OPMD: -A logp / (1 + tau), policy mirror descent with its temperature as a step size.

Its advantages are group_advantages(estimator="opmd"). Source: Trinity-RFT, opmd_policy_loss.py; arXiv 2505.17826.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    zero_at_zero_advantage: ClassVar[bool] = True

    tau: float = 1.0
    """Temperature of the mirror step: larger is more cautious; 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_positive(self, "tau", zero=True)

    def __call__(self, tokens: Tokens) -> Tensor:
        return weighted_logps(tokens.logps, tokens.advantages) / (1 + self.tau)


def reference(objective: Objective, logps: list[float], old_logps: list[float], advantage: float) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    return [-advantage * logp / (1 + objective.tau) for logp in logps]


VECTORS = [
    ((-1.0, -1.0, 2.0), (1.0, -1.0)),  # half the REINFORCE loss at tau = 1
    ((-1.0, -3.0, -2.0), (-2.0, 2.0), {"tau": 0.0}),  # REINFORCE itself
]
