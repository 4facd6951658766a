"""Rewards: plain functions `f(prompts, completions, **columns) -> list[float | None]`, called with a whole batch."""

from __future__ import annotations

from repo_ops.trainer.rewards.answers import exact_match
from repo_ops.trainer.rewards.score import RewardFunction, Scores, load_reward, score

__all__ = ["RewardFunction", "Scores", "exact_match", "load_reward", "score"]
