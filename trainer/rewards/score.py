"""Scores completions with one or several reward functions."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from repo_ops.trainer.rewards.child import CallFailed, Child, ChildLost
from repo_ops.trainer.rewards.serve import describe, plain

__all__ = ["RewardFunction", "Scores", "missing_columns", "score"]

# f(prompts, completions, **columns) -> one number a completion; None leaves that sample out, an exception too
RewardFunction = Callable[..., Any]
# what the functions read, prompts and completions among it: name -> one value a completion
_Batch = Mapping[str, Sequence[Any]]


@dataclass
class Scores:
    """What a batch of completions earned."""

    totals: list[float | None]
    """Weighted sum of the parts; None where a part is None: the sample is left out of training."""
    parts: dict[str, list[float | None]]
    """Unweighted reward of every function by its name."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    """Of every function that failed, what went wrong: one message for each sample lost, time-outs aside."""
    timeouts: int = 0
    """Samples left out because a deadline passed."""


def score(
    rewards: Mapping[str, tuple[RewardFunction, float]],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Weighted sum of several rewards for every completion.

    Functions in child processes and async ones work at the same time, others one after the other. Nothing that a
    function does ends the caller: one that raises, or returns something other than one number or None a completion, is
    asked again sample by sample, so that only the samples it fails on are lost, each with a message in `errors`. An
    exception that it returns in the place of a number loses that sample. One that passes its deadline, or whose process
    dies, loses the whole batch.

    Args:
        rewards: name -> (function, weight). A function with a parameter `completions` gets everything by keyword,
            another gets prompts and completions by position. It gets the columns that it has parameters for.
        prompts: one a completion.
        completions: decoded text.
        columns: name -> one value a completion.
    Raises:
        ValueError: no function, or a column is too short.
    """
    if not rewards:
        raise ValueError("rewards: expected at least one function, got none")
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(f"{name}: expected {len(completions)} values, one a completion, got {len(values)}")
    batch = {"prompts": list(prompts), "completions": list(completions), **columns}
    parts, errors, timeouts = {}, {}, 0
    for name, outcome in _ask_all({name: function for name, (function, _) in rewards.items()}, batch).items():
        parts[name], failures, timed_out = _settled(rewards[name][0], batch, outcome)
        timeouts += timed_out
        if failures:
            errors[name] = failures
    totals: list[float | None] = []
    for i in range(len(completions)):
        values = [(part[i], rewards[name][1]) for name, part in parts.items()]
        totals.append(None if any(v is None for v, _ in values) else sum(v * w for v, w in values if v is not None))
    return Scores(totals, parts, errors, timeouts)


def missing_columns(function: RewardFunction, columns: Sequence[str]) -> list[str]:
    """Parameters that the function insists on and that are no column."""
    wanted = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    given = {"prompts", "completions"} if "completions" in wanted else set(wanted[:2])
    return [name for name in wanted if name not in given and name not in columns]


def _arguments(function: RewardFunction, batch: _Batch) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, the way that the function's parameters ask for them."""
    parameters = inspect.signature(function).parameters
    positional: list[str] = []
    taken: list[str] = []
    if "completions" not in parameters:
        positional = ["prompts", "completions"]
        # f(question, text) may be asked about data that have a column "question"
        taken = [p.name for p in list(parameters.values())[:2] if p.kind is p.POSITIONAL_OR_KEYWORD]
    accepted = {p.name for p in parameters.values() if p.kind is not p.VAR_POSITIONAL}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        accepted |= set(batch)
    names = [name for name in batch if name in accepted and name not in (*positional, *taken)]
    return [list(batch[name]) for name in positional], {name: list(batch[name]) for name in names}


def _ask_all(functions: Mapping[str, RewardFunction], batch: _Batch) -> dict[str, Any]:
    """What each function returned for the whole batch, or the exception that it raised."""
    found: dict[str, Any] = {}
    # children first: they work while the others are asked
    for name, function in sorted(functions.items(), key=lambda item: not isinstance(item[1], Child)):
        args, keywords = _arguments(function, batch)
        ask = function.begin if isinstance(function, Child) else function
        found[name] = _tried(partial(ask, *args, **keywords))
    waiting = [name for name, outcome in found.items() if inspect.isawaitable(outcome)]
    found |= dict(zip(waiting, _gathered([found[name] for name in waiting])))
    for name, function in functions.items():
        if isinstance(function, Child) and found[name] is None:  # it has begun
            found[name] = _tried(function.result)
    return {name: found[name] for name in functions}


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # whatever a user's function raises must not end a long run
        return error


def _gathered(awaitables: list[Any]) -> list[Any]:
    """The result of each, or its exception; they wait for one another at nothing."""

    async def together() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    if not awaitables:
        return []
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(together())
    # a notebook's loop runs already and cannot be entered again
    found: list[list[Any]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(together())))
    thread.start()
    thread.join()
    return found[0]


def _settled(function: RewardFunction, batch: _Batch, outcome: Any) -> tuple[list[float | None], list[str], int]:
    """The rewards of a batch out of what the function returned or raised; messages of what failed; time-outs."""
    size = len(batch["completions"])
    if isinstance(outcome, ChildLost):
        outcome = [outcome] * size
    if not isinstance(outcome, Exception):
        outcome = plain(outcome)
        problem = _not_a_list(outcome, size)
        if problem is None:
            lost = [isinstance(value, ChildLost) and value.timed_out for value in outcome]
            numbers = [(None, None) if timed_out else _number(value) for value, timed_out in zip(outcome, lost)]
            return [n for n, _ in numbers], [text for _, text in numbers if text is not None], sum(lost)
        outcome = CallFailed(problem)
    if size == 1:
        return [None], [_message(outcome)], 0
    values: list[float | None] = []
    messages: list[str] = []
    for i in range(size):
        one = {name: [column[i]] for name, column in batch.items()}
        value, message, late = _settled(function, one, _ask_all({"": function}, one)[""])
        values, messages = values + value, messages + message
        if late:  # no more deadlines are spent on this batch
            return values + [None] * (size - len(values)), messages, size - i
    return values, messages, 0


def _not_a_list(values: Any, wanted: int) -> str | None:
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        return f"returned {type(values).__name__}, expected a list of numbers or None"
    if len(values) != wanted:
        return f"returned {len(values)} rewards for {wanted} completions, expected one each"
    return None


def _number(value: Any) -> tuple[float | None, str | None]:
    """The reward as a float, or None and why it is none."""
    if value is None:
        return None, None
    if isinstance(value, Exception):
        return None, _message(value)
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return (number, None) if math.isfinite(number) else (None, f"returned {value!r}, expected a finite number or None")


def _message(error: Exception) -> str:
    """What went wrong; our own exceptions say it themselves."""
    return str(error) if isinstance(error, (CallFailed, ChildLost)) else describe(error)
