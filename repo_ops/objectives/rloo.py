"""RLOO's loss as TRL has it: PPO's clip on the ratio of whole sequences, S = exp(sum_t(logps - old_logps)).

Loss -min(S A, clip(S) A) per sequence, mean over sequences; d loss / d logp_t = -A S on every token where S is not
clipped. RLOO's baseline is an advantage estimator (group_advantages(estimator="rloo")); its KL goes into the reward.
Source: arXiv 2402.14740; TRL, rloo_trainer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from repo_ops.objectives import grpo


@dataclass(frozen=True, kw_only=True)
class Objective(grpo.Objective):
    ratio_level: str = "sequence_sum"
    """Whose ratio is clipped: the whole sequence's."""


reference = grpo.reference

VECTORS = [
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([-2.0, -2.0], [-4.0, -4.0])),  # on policy: each token moves S by itself
    (([-1.0, -1.0], [-2.0, -2.0], 1.0), ([-1.2, -1.2], [0.0, 0.0])),  # S = e^2 is clipped
    (([-1.0, -1.0], [-2.0, -2.0], -1.0), ([math.e**2] * 2, [2 * math.e**2] * 2)),  # and pulled back if A < 0
    (([-2.0, -2.0], [-1.0, -1.0], -1.0), ([0.8, 0.8], [0.0, 0.0])),  # S = e^-2 with A < 0 is clipped
]
