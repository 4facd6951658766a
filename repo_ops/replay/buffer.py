"""Per-prompt store of earlier completions, and what to replay of them."""

from __future__ import annotations

import math
import operator
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from repo_ops.replay.home import prompt_bytes
from repo_ops.replay.sample import Sample
from repo_ops.replay.strategies import Strategy, get_strategy

_FORMAT = 1


@dataclass
class _Stored:
    sample: Sample
    times_drawn: int = 0


@dataclass
class _Ring:
    """One prompt's samples, newest on the right, and what has happened to them."""

    stored: deque[_Stored]
    pushed: int = 0
    """Samples ever stored; those that are no longer here were evicted."""
    draws: int = 0
    """Draws that returned something; together with seed and prompt it is the state of the random generator."""
    drawn: int = 0
    """Samples that those draws returned, evicted ones included."""

    @property
    def evicted(self) -> int:
        return self.pushed - len(self.stored)


class ReplayBuffer:
    """Earlier completions of each prompt, kept first in first out, replayed by a strategy.

    In a step: generate -> `draw` -> `push`, so that the samples of this step can be drawn at the prompt's next visit
    and never in the step that made them. Where a prompt occurs twice in a step, draw for both before pushing either;
    with `draw(prompt, version=...)` the buffer checks this order.

    Randomness is a function of (seed, prompt, how often the prompt was drawn) and of nothing else. A draw therefore
    does not depend on the order of prompts, on the rank that keeps the prompt, or on a restart.

    Args:
        capacity_per_prompt: samples kept of each prompt; the oldest leaves first.
        strategy: "full_scope", "random", "recency", "reward", "variance" (files in strategies/), or a function
            `select(samples, scores, k, rng) -> indices` of your own.
        num_replays: samples a draw returns, fewer while fewer are stored. "full_scope" returns all and ignores it, so
            it may be None there.
        min_size: samples of a prompt needed before a draw returns any.
        seed: of the "random" strategy and of a strategy of your own that asks for `rng`.
        score: what strategies compare: "reward" (the scalar of the advantage), or "sum_of_parts" (unweighted sum of
            `Sample.rewards`, as the authors' code does).
    Raises:
        ValueError, TypeError: an argument out of range, or a setting with which replay would never start.
    Source: arXiv:2506.09340.
    """

    def __init__(
        self,
        capacity_per_prompt: int,
        strategy: str | Strategy,
        num_replays: int | None,
        min_size: int,
        seed: int = 0,
        *,
        score: Literal["reward", "sum_of_parts"] = "reward",
    ) -> None:
        self.capacity_per_prompt = _positive("capacity_per_prompt", capacity_per_prompt)
        self.min_size = _positive("min_size", min_size)
        if self.min_size > self.capacity_per_prompt:
            raise ValueError(
                f"min_size: expected at most capacity_per_prompt = {capacity_per_prompt}, got {min_size}; "
                "no prompt could ever hold that many samples, so replay would never start"
            )
        if num_replays is None and strategy != "full_scope":
            raise ValueError("num_replays: expected >= 1, got None; only strategy 'full_scope' goes without it")
        remedy = "; to train without replay, leave the buffer out"
        self.num_replays = None if num_replays is None else _positive("num_replays", num_replays, remedy)
        self.seed = _integer("seed", seed)
        if score not in ("reward", "sum_of_parts"):
            raise ValueError(f"score: expected 'reward' or 'sum_of_parts', got {score!r}")
        self.score = score
        self.strategy = strategy
        if isinstance(strategy, str):
            self._select = get_strategy(strategy)
        elif callable(strategy):
            self._select = strategy
        else:
            raise TypeError(f"strategy: expected a name or a function, got {type(strategy).__name__}")
        self._rings: dict[str, _Ring] = {}

    def __len__(self) -> int:
        """Samples stored, over all prompts."""
        return sum(len(ring.stored) for ring in self._rings.values())

    @property
    def newest(self) -> int | None:
        """Policy version of the newest stored sample; None while there is none."""
        return max((entry.sample.version for ring in self._rings.values() for entry in ring.stored), default=None)

    def samples(self, prompt: str) -> list[Sample]:
        """What is stored of a prompt, oldest first; looking does not count as drawing."""
        ring = self._rings.get(_checked_prompt(prompt))
        return [] if ring is None else [entry.sample for entry in ring.stored]

    def draw(self, prompt: str, *, version: int | None = None) -> list[Sample]:
        """Samples of this prompt to replay now; [] while fewer than `min_size` are stored.

        Prompts may return different numbers of samples. Each returned sample counts as reused once more.

        Args:
            prompt: the key, exactly as it was pushed.
            version: the step's policy version; if given, samples of this very version are refused as a mistake in the
                order of calls.
        Raises:
            ValueError: `push` came before `draw` in the same step (needs version), or a strategy of your own returned
                indices that are out of range or repeated.
        """
        ring = self._rings.get(_checked_prompt(prompt))
        if ring is None:
            return []
        newest = max(entry.sample.version for entry in ring.stored)
        if version is not None and newest >= version:
            raise ValueError(
                f"version: expected later than every stored sample (newest {newest}), got {version}; "
                "draw before push, or a step replays its own samples"
            )
        if len(ring.stored) < self.min_size:
            return []
        chosen = self._choose(prompt, ring)
        ring.draws += 1
        ring.drawn += len(chosen)
        for entry in chosen:
            entry.times_drawn += 1
        return [entry.sample for entry in chosen]

    def push(self, prompt: str, samples: Sequence[Sample]) -> None:
        """Store this step's samples of a prompt; the oldest ones leave when the ring is full.

        All or nothing: if one sample is refused, none is stored.

        Raises:
            TypeError: the prompt is not a str, or something that is not a Sample is pushed.
            ValueError: score is "sum_of_parts" and a sample has no parts.
        """
        _checked_prompt(prompt)
        new = list(samples)
        for sample in new:
            if not isinstance(sample, Sample):
                raise TypeError(f"samples: expected Sample objects, got {type(sample).__name__}")
            if self.score == "sum_of_parts" and not sample.rewards:
                raise ValueError(
                    "rewards: expected at least one part, because score='sum_of_parts', got none; "
                    "fill Sample.rewards or use score='reward'"
                )
        if not new:
            return
        if prompt not in self._rings:
            self._rings[prompt] = _Ring(deque(maxlen=self.capacity_per_prompt))
        ring = self._rings[prompt]
        ring.stored.extend(_Stored(sample) for sample in new)
        ring.pushed += len(new)

    def metrics(self, version: int) -> dict[str, float]:
        """What the buffer holds and has done, under the names of a log.

        Sizes and counters (`size`, `distinct_*`, `ready_prompts`, `pushed`, `evicted`, `drawn`) add up over ranks.
        Means are over the stored samples, so they combine with `size` as weight. All are 0 while the buffer is empty.

        Args:
            version: the current policy version; a sample's age is counted from its own.
        Raises:
            ValueError: a stored sample is newer than `version`.
        """
        rings = self._rings.values()
        stored = [entry for ring in rings for entry in ring.stored]
        ages = sorted(version - entry.sample.version for entry in stored)
        if ages and ages[0] < 0:
            raise ValueError(f"version: expected the current policy version, got {version}; a sample is newer")
        reused = [entry.times_drawn for entry in stored]
        count = max(len(stored), 1)
        groups = {(prompt, entry.sample.version) for prompt, ring in self._rings.items() for entry in ring.stored}
        return {
            "replay/size": float(len(stored)),
            "replay/distinct_prompts": float(len(self._rings)),
            "replay/distinct_groups": float(len(groups)),
            "replay/ready_prompts": float(sum(len(ring.stored) >= self.min_size for ring in rings)),
            "replay/pushed": float(sum(ring.pushed for ring in rings)),
            "replay/evicted": float(sum(ring.evicted for ring in rings)),
            "replay/drawn": float(sum(ring.drawn for ring in rings)),
            "replay/age_steps_mean": sum(ages) / count,
            "replay/age_steps_p95": float(ages[math.ceil(0.95 * len(ages)) - 1]) if ages else 0.0,
            "replay/age_steps_max": float(ages[-1]) if ages else 0.0,
            "replay/times_reused_mean": sum(reused) / count,
            "replay/times_reused_max": float(max(reused, default=0)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, as plain containers (JSON, `torch.load(weights_only=True)`)."""
        return {
            "format": _FORMAT,
            "configuration": self._configuration(),
            "prompts": {
                prompt: {
                    "pushed": ring.pushed,
                    "draws": ring.draws,
                    "drawn": ring.drawn,
                    "times_drawn": [entry.times_drawn for entry in ring.stored],
                    "samples": [entry.sample.to_state() for entry in ring.stored],
                }
                for prompt, ring in self._rings.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a saved state; the next draws are those that the saved buffer would have made.

        Raises:
            ValueError: the state is of another configuration; the message names the field. Nothing is changed then.
        """
        self.load_state_dicts([state])

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]], keep: Callable[[str], bool] | None = None) -> None:
        """Replace the contents by the saved states of several ranks, as after a restart with another world size.

        Args:
            states: one a rank that saved; a prompt may occur in one of them only.
            keep: which prompts this rank is to have; None: all. See `home_rank`.
        Raises:
            ValueError: a state is of another configuration, or two hold the same prompt. Nothing is changed then.
        """
        rings: dict[str, _Ring] = {}
        for state in states:
            self._check_configuration(state)
            for prompt, saved in state["prompts"].items():
                if keep is not None and not keep(prompt):
                    continue
                if prompt in rings:
                    raise ValueError(
                        f"states: expected each prompt in one state, got {prompt[:40]!r} in two; "
                        "a prompt stays on its home rank, so pass each rank's state once"
                    )
                rings[prompt] = self._ring(saved)
        self._rings = rings

    def _choose(self, prompt: str, ring: _Ring) -> list[_Stored]:
        entries = list(ring.stored)
        samples = [entry.sample for entry in entries]
        scores = [self._score(sample) for sample in samples]
        k = len(entries) if self.num_replays is None else min(len(entries), self.num_replays)
        key = f"{self.seed} {ring.draws} ".encode() + prompt_bytes(prompt)
        rng = random.Random(int.from_bytes(blake2b(key, digest_size=16).digest(), "big"))
        indices = [operator.index(i) for i in self._select(samples, scores, k, rng)]
        if len(set(indices)) != len(indices) or any(not 0 <= i < len(entries) for i in indices):
            raise ValueError(f"strategy: expected distinct indices in [0, {len(entries)}), got {indices}")
        return [entries[i] for i in indices]

    def _score(self, sample: Sample) -> float:
        # fsum does not depend on the order of the parts, so equal parts are equal scores
        return sample.reward if self.score == "reward" else math.fsum(sample.rewards.values())

    def _configuration(self) -> dict[str, Any]:
        return {
            "capacity_per_prompt": self.capacity_per_prompt,
            "strategy": _strategy_label(self.strategy),
            "num_replays": self.num_replays,
            "min_size": self.min_size,
            "seed": self.seed,
            "score": self.score,
        }

    def _check_configuration(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != _FORMAT:
            raise ValueError(f"state: expected a ReplayBuffer state of format {_FORMAT}, got {state.get('format')!r}")
        saved = state["configuration"]
        for name, mine in self._configuration().items():
            if saved[name] != mine:
                raise ValueError(
                    f"{name}: expected {saved[name]!r} as in the saved state, got {mine!r}; "
                    "resume with the saved settings, or start with an empty buffer"
                )

    def _ring(self, saved: Mapping[str, Any]) -> _Ring:
        samples, times = saved["samples"], saved["times_drawn"]
        if len(samples) != len(times) or not 0 < len(samples) <= min(self.capacity_per_prompt, saved["pushed"]):
            raise ValueError(
                f"state: expected 1 to {self.capacity_per_prompt} samples with a count each, "
                f"got {len(samples)} samples and {len(times)} counts; the file is damaged"
            )
        stored = deque(
            (_Stored(Sample(**sample), count) for sample, count in zip(samples, times)),
            maxlen=self.capacity_per_prompt,
        )
        return _Ring(stored, saved["pushed"], saved["draws"], saved["drawn"])


def _strategy_label(strategy: str | Strategy) -> str:
    """What a saved state calls the strategy. A dataclass shows its settings, so that they are compared too."""
    if isinstance(strategy, str):
        return strategy
    if hasattr(strategy, "__dataclass_fields__"):
        return repr(strategy)
    return f"{strategy.__module__}.{getattr(strategy, '__qualname__', type(strategy).__qualname__)}"


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def _positive(name: str, value: int, remedy: str = "") -> int:
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: expected >= 1, got {number}{remedy}")
    return number


def _checked_prompt(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}; the prompt's text is the buffer's key")
    return prompt
