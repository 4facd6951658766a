"""Rewards: plain functions `f(prompts, completions, **columns) -> list[float | None]`, called with a whole batch."""

from __future__ import annotations

from repo_ops.trainer.rewards.answers import exact_match
from repo_ops.trainer.rewards.rewards import OWN_COLUMNS, Rewards, load_reward, reward_metrics
from repo_ops.trainer.rewards.score import RewardFunction, Scores, score

__all__ = [
    "OWN_COLUMNS",
    "RewardFunction",
    "Rewards",
    "Scores",
    "exact_match",
    "load_reward",
    "reward_metrics",
    "score",
]
