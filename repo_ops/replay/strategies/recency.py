"""Recency-based replay: the k newest samples, oldest of them first.

Source: arXiv:2506.09340; "recent_k" in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from repo_ops.replay.sample import Sample


def select(samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> list[int]:
    return list(range(len(scores) - k, len(scores)))
