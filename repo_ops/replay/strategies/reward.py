"""Reward-oriented replay: the k highest scores, highest first; among equal scores the older sample first.

Source: arXiv:2506.09340; "highest_k" in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from repo_ops.replay.sample import Sample


def select(samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]  # sorted is stable
