"""RePO, Replay-Enhanced Policy Optimization: J_on + c * J_off, the clipped GRPO loss on fresh and on replayed rows.

Replayed rows use the log-probabilities stored when they were sampled; c is the argument off_policy_coef. With
row_norm "paper" each part is divided by its own number of sequences; "official_code" divides both by all of them, so
that with equal numbers it is half of the paper's. The KL penalty is averaged over on-policy tokens.
Source: arXiv 2506.09340; repository SihengLi99/RePO, src/replay_grpo_trainer.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from repo_ops.objectives import grpo


@dataclass(frozen=True, kw_only=True)
class Objective(grpo.Objective):
    kl_reduction: str | None = "token-mean"
    """The official code averages the KL over on-policy tokens whatever the loss does."""


reference = grpo.reference

VECTORS = [
    ((-1.0, -1.0, 2.0), (-2.0, -2.0)),  # an on-policy token
    ((-1.0, -2.0, 2.0), (-2.4, 0.0)),  # a replayed token that the policy has already learned: ratio e, clipped
    ((-2.0, -1.0, -1.0), (0.8, 0.0)),  # a replayed mistake that is already rarer than when it was sampled
]
