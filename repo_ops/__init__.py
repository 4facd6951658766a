"""Fused, exact, memory-lean policy losses for the GRPO family, led by RePO (arXiv 2506.09340)."""

from repo_ops import replay
from repo_ops.advantages import group_advantages
from repo_ops.integrations.transformers import patch_causal_lm
from repo_ops.linear_logps import TokenStats, linear_logps
from repo_ops.linear_policy_loss import linear_policy_loss
from repo_ops.linear_stats import VocabularyStats, linear_stats
from repo_ops.loss_inputs import PolicyLoss
from repo_ops.metrics import Stat, summarize
from repo_ops.objectives import Objective, get_objective, objective_names
from repo_ops.options import Options
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import NumItems
from repo_ops.replay import ReplayBuffer
from repo_ops.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "NumItems",
    "Objective",
    "Options",
    "PolicyLoss",
    "ReplayBuffer",
    "Stat",
    "TokenStats",
    "Tokens",
    "VocabularyStats",
    "get_objective",
    "group_advantages",
    "linear_logps",
    "linear_policy_loss",
    "linear_stats",
    "objective_names",
    "patch_causal_lm",
    "policy_loss",
    "replay",
    "summarize",
]
