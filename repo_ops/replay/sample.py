"""One stored completion: what a later step needs to train on it as off-policy data."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A completion with the log-probabilities of the policy that produced it.

    Sequences of any kind are accepted and stored as tuples of Python numbers, so a sample holds no tensor, no graph
    and no device memory.

    Raises:
        ValueError, TypeError: a field is missing, of another length, not finite or out of range; the message names it.
    """

    token_ids: tuple[int, ...]
    """The completion's tokens with the terminating one if it was produced; never the prompt, never padding."""

    logps: tuple[float, ...]
    """Behaviour log-probability of each token in nats, at the sampling temperature. Required: log-probabilities that
    are recomputed later belong to another policy, and the ratio of a replayed token would be 1 by mistake."""

    reward: float
    """The scalar that the advantage is computed from."""

    rewards: Mapping[str, float] = field(hash=False)
    """The parts of the reward by name, unweighted; {} where there is only one."""

    version: int
    """Number of optimizer steps that the behaviour policy had taken; age in steps is counted from it."""

    temperature: float
    """Sampling temperature. The current policy's log-probabilities must be taken at the same one."""

    finished: bool
    """False if the length limit cut the completion off."""

    text: str = ""
    """The completion as text, for logs; never read by the buffer."""

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        store("token_ids", _token_ids(self.token_ids))
        store("logps", _logps(self.logps, len(self.token_ids)))
        store("reward", _finite("reward", self.reward, "do not store a completion that could not be scored"))
        if not isinstance(self.rewards, Mapping):
            raise TypeError(f"rewards: expected a mapping of part name to number, got {type(self.rewards).__name__}")
        remedy = "leave out the part that could not be scored"
        store("rewards", {str(name): _finite(f"rewards[{name!r}]", x, remedy) for name, x in self.rewards.items()})
        store("version", _version(self.version))
        store("temperature", _finite("temperature", self.temperature, "pass the temperature of the sampler"))
        if self.temperature <= 0:
            raise ValueError(
                f"temperature: expected > 0, got {self.temperature}; "
                "greedy completions have no behaviour distribution, so do not store them"
            )
        if not isinstance(self.finished, bool):
            raise TypeError(f"finished: expected True or False, got {self.finished!r}")
        if not isinstance(self.text, str):
            raise TypeError(f"text: expected a str, got {type(self.text).__name__}")

    def to_state(self) -> dict[str, Any]:
        """The fields as plain containers that JSON and `torch.load(weights_only=True)` take."""
        return {
            "token_ids": list(self.token_ids),
            "logps": list(self.logps),
            "reward": self.reward,
            "rewards": dict(self.rewards),
            "version": self.version,
            "temperature": self.temperature,
            "finished": self.finished,
            "text": self.text,
        }


def _token_ids(token_ids: Any) -> tuple[int, ...]:
    try:
        ids = tuple(operator.index(token) for token in token_ids)
    except TypeError:
        raise TypeError(f"token_ids: expected a sequence of integers, got {_shown(token_ids)}") from None
    if not ids:
        raise ValueError("token_ids: expected at least one token, got none; do not store empty completions")
    if min(ids) < 0:
        raise ValueError(f"token_ids: expected ids >= 0, got {min(ids)}; strip padding and ignore labels first")
    return ids


def _logps(logps: Any, length: int) -> tuple[float, ...]:
    wanted = f"logps: expected {length} behaviour log-probs, one a token"
    if logps is None:
        raise ValueError(f"{wanted}, got None; store what the sampler reported, replay is wrong without it")
    try:
        values = tuple(float(x) for x in logps)
    except TypeError:
        raise TypeError(f"{wanted}, got {_shown(logps)}") from None
    if len(values) != length:
        raise ValueError(f"{wanted}, got {len(values)}; store those of the completion only, terminator included")
    for i, x in enumerate(values):
        if not math.isfinite(x):
            raise ValueError(f"{wanted}, got {x} at token {i}; do not store a completion with an unscored token")
        if x > 0:
            raise ValueError(f"logps: expected log-probabilities <= 0, got {x} at token {i}; pass logs, in nats")
    return values


def _version(version: Any) -> int:
    try:
        steps = operator.index(version)
    except TypeError:
        raise TypeError(f"version: expected an integer, the optimizer step count, got {_shown(version)}") from None
    if steps < 0:
        raise ValueError(f"version: expected an optimizer step count >= 0, got {steps}")
    return steps


def _finite(name: str, value: Any, remedy: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a finite number, got {_shown(value)}; {remedy}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}; {remedy}")
    return number


def _shown(value: object) -> str:
    """A value short enough for one line of an error."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
