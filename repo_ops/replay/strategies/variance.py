"""Variance-driven replay: the k samples whose scores have the largest population variance, oldest first.

The on-policy rewards of the step take no part. Ties: larger sum of scores, then the older samples.
Source: arXiv:2506.09340; "max_variance_k" in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from repo_ops.replay.max_variance import max_variance_subset
from repo_ops.replay.sample import Sample


def select(samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> list[int]:
    return max_variance_subset(scores, k)
