"""Random replay: k samples, uniformly and without replacement.

Source: arXiv:2506.09340; "random_k" in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from repo_ops.replay.sample import Sample


def select(samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> list[int]:
    return rng.sample(range(len(scores)), k)
