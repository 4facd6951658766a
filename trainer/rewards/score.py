"""Scores completions with one or several reward functions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from repo_ops.trainer.rewards import answers

log = logging.getLogger(__name__)

BUILT_IN = ("exact_match", "number_match", "prefix_match")


# f(prompts, completions, **columns) -> one number a completion, or None to leave that sample out
RewardFunction = Callable[..., Sequence[float | None]]


@dataclass
class Scores:
    """What a batch of completions earned."""

    totals: list[float | None]
    """Weighted sum of the parts; None where a part is None: the sample is left out of training."""
    parts: dict[str, list[float | None]]
    """Unweighted reward of every function by its name."""
    errors: dict[str, list[str]] = field(default_factory=dict)
    """Messages of the exceptions of every function that raised, one for each sample lost."""


def score(
    rewards: Mapping[str, tuple[RewardFunction, float]],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Weighted sum of several rewards for every completion.

    A function that raises is asked again sample by sample, so that only the samples it fails on are lost; each counts
    as one error, the first message is logged.

    Args:
        rewards: name -> (function, weight).
        prompts: one a completion.
        completions: decoded text.
        columns: name -> one value a completion.
    Raises:
        ValueError: a function returns another number of rewards than it got completions, or a column is too short.
        TypeError: a function wants a column that is not there, or returns something other than numbers and None.
    """
    if not rewards:
        raise ValueError("rewards: expected at least one function, got none")
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(f"{name}: expected {len(completions)} values, one a completion, got {len(values)}")
    parts: dict[str, list[float | None]] = {}
    errors: dict[str, list[str]] = {}
    for name, (function, _) in rewards.items():
        _check_columns(name, function, columns)
        parts[name], failures = _ask(name, function, prompts, completions, columns)
        if failures:
            errors[name] = failures
            log.warning("reward %s: %d of %d samples left out: %s", name, len(failures), len(completions), failures[0])
    totals: list[float | None] = []
    for i in range(len(completions)):
        values = [(part[i], rewards[name][1]) for name, part in parts.items()]
        totals.append(None if any(v is None for v, _ in values) else sum(v * w for v, w in values if v is not None))
    return Scores(totals, parts, errors)


def load_reward(name: str) -> RewardFunction:
    """The reward function of that name: a built-in one, "package.module:function" or "path/to/file.py:function".

    Raises:
        ValueError: no such function.
    """
    if name in BUILT_IN:
        return getattr(answers, name)
    if name == "math_verify":
        from repo_ops.trainer.rewards.math_answers import MathVerify

        return MathVerify()
    where, _, attribute = name.rpartition(":")
    if not where:
        raise ValueError(
            f"reward: expected one of {', '.join((*BUILT_IN, 'math_verify'))}, 'module:function' or "
            f"'path/to/file.py:function', got {name!r}"
        )
    function = getattr(_module(name, where), attribute, None)
    if not callable(function):
        raise ValueError(f"reward: expected a function {attribute!r} in {where}, found {function!r}")
    return function


def _module(name: str, where: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reward: expected an importable module in {name!r}, got: {error}; install it, put its folder on "
                f"PYTHONPATH, or name the file: path/to/file.py:function"
            ) from error
    path = Path(where).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"reward: expected a Python file, got {where!r}; check the path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_columns(name: str, function: RewardFunction, columns: Mapping[str, Sequence[Any]]) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"reward {name}: expected an ordinary function, got an async one; wrap it in asyncio.run")
    try:
        inspect.signature(function).bind([], [], **{column: [] for column in columns})
    except TypeError as error:
        raise TypeError(
            f"reward {name}: expected a function of (prompts, completions, **columns) with columns "
            f"{sorted(columns)}, got: {error}; add the column to the data or **columns to the function"
        ) from error


def _ask(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[float | None], list[str]]:
    try:
        return _checked(name, function(list(prompts), list(completions), **columns), len(completions)), []
    except _NotAReward as error:
        raise error.as_shown from None
    except Exception:  # whatever a user's function raises must not end a long run
        pass
    values: list[float | None] = []
    failures = []
    for i in range(len(completions)):
        one = {column: [content[i]] for column, content in columns.items()}
        try:
            values += _checked(name, function([prompts[i]], [completions[i]], **one), 1)
        except _NotAReward as error:
            raise error.as_shown from None
        except Exception as error:
            values.append(None)
            failures.append(f"{type(error).__name__}: {error}")
    return values, failures


class _NotAReward(Exception):  # noqa: N818
    """The function came back with something that is no list of rewards: a mistake in it, not a bad sample."""

    def __init__(self, as_shown: Exception) -> None:
        self.as_shown = as_shown


def _checked(name: str, values: Any, wanted: int) -> list[float | None]:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise _NotAReward(TypeError(f"reward {name}: expected a list of numbers or None, got {type(values).__name__}"))
    if len(values) != wanted:
        raise _NotAReward(ValueError(f"reward {name}: expected {wanted} rewards, one a completion, got {len(values)}"))
    out: list[float | None] = []
    for i, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise _NotAReward(TypeError(f"reward {name}[{i}]: expected a number or None, got {value!r}")) from None
        if number is not None and not math.isfinite(number):
            raise _NotAReward(
                ValueError(f"reward {name}[{i}]: expected a finite number, got {number}; None leaves a sample out")
            )
        out.append(number)
    return out
