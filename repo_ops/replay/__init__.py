"""Replay of earlier completions, prompt by prompt (RePO, arXiv:2506.09340).

Order within a step: generate -> draw -> push. Needs nothing but the standard library.
"""

from repo_ops.replay.buffer import ReplayBuffer
from repo_ops.replay.home import home_rank
from repo_ops.replay.max_variance import max_variance_subset
from repo_ops.replay.sample import Sample
from repo_ops.replay.strategies import Strategy, strategy_names

__all__ = ["ReplayBuffer", "Sample", "Strategy", "home_rank", "max_variance_subset", "strategy_names"]
