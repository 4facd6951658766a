"""Full-scope replay: every stored sample of the prompt, oldest first; `num_replays` is not used.

Source: arXiv:2506.09340; "all" in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from repo_ops.replay.sample import Sample


def select(samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> list[int]:
    return list(range(len(scores)))
