"""Which stored samples a draw takes: one file a strategy, and the file's name is the strategy's name.

A strategy is a function `select(samples, scores, k, rng) -> indices` into a prompt's samples, oldest first. To add
one, add a file with a function `select`; to use one without adding it, pass the function itself as `strategy`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol

from repo_ops.replay.sample import Sample

# Names of the authors' code (SihengLi99/RePO). The paper's are the ones used here, and one thing has one name.
_OFFICIAL_CODE = {
    "all": "full_scope",
    "random_k": "random",
    "recent_k": "recency",
    "highest_k": "reward",
    "max_variance_k": "variance",
}


class Strategy(Protocol):
    """Chooses among a prompt's stored samples."""

    def __call__(self, samples: Sequence[Sample], scores: Sequence[float], k: int, rng: random.Random) -> Sequence[int]:
        """Distinct indices into `samples` (oldest first) to replay, in the order in which they are returned.

        Args:
            samples: at least `min_size` samples of one prompt.
            scores: one finite number a sample: its reward, or what the buffer's `score` says.
            k: min(len(samples), num_replays).
            rng: fresh for each draw; the only source of randomness that a saved buffer repeats after a restart.
        """
        ...


def strategy_names() -> list[str]:
    """The names that `ReplayBuffer(strategy=...)` takes, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get_strategy(name: str) -> Strategy:
    """The function `select` of strategies/<name>.py.

    Raises:
        ValueError: no such file; the message lists the names and the nearest one.
    """
    names = strategy_names()
    if name not in names:
        near = [_OFFICIAL_CODE[name]] if name in _OFFICIAL_CODE else get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if name in _OFFICIAL_CODE:
            hint = f"; the official code's {name!r} is {near[0]!r} here"
        if name == "none":
            hint = "; to train without replay, leave the buffer out"
        raise ValueError(f"strategy: expected one of {', '.join(names)} or a function, got {name!r}{hint}")
    strategy: Strategy = import_module(f"{__name__}.{name}").select
    return strategy
