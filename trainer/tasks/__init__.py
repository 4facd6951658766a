"""Tasks with known answers, split so that no held-out problem has a twin in training."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from repo_ops.trainer.rewards import RewardFunction, exact_match
from repo_ops.trainer.tasks.problems import ARITHMETIC_TASKS, BALANCED, SYMBOL_TASKS, Problem

__all__ = ["Example", "Problem", "Task", "load_task", "task_names"]


@dataclass(frozen=True)
class Example:
    """One prompt and what its reward needs."""

    key: str
    """Names the problem; twins (6 * 7 and 7 * 6) share it."""
    prompt: str
    """Raw text; the completion goes on from its last character."""
    columns: dict[str, Any]
    """What the reward functions read beside prompt and completion: `answer`."""
    source: str = ""
    """The data set that it is from, where there are several."""


@dataclass(frozen=True)
class Task:
    """Prompts to train on, prompts held out, and how to sample and score them."""

    name: str
    train: Sequence[Example]
    """May lie on disk: an example is made when it is asked for."""
    heldout: list[Example]
    stop: tuple[str, ...]
    """Characters that end a completion."""
    max_new_tokens: int
    """Tokens that an answer may take."""
    reward: RewardFunction | None
    """The reward that suits the task; a run may use others. None: it has to."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, in sentences."""

    @property
    def columns(self) -> list[str]:
        """What every example brings to the rewards beside its prompt."""
        return sorted(self.train[0].columns)


SOURCES = SYMBOL_TASKS | ARITHMETIC_TASKS
MAX_NEW_TOKENS = 8


def task_names() -> list[str]:
    """Every name that `load_task` knows, in alphabetical order."""
    return sorted(SOURCES)


def load_task(name: str, *, train_size: int, heldout_size: int, seed: int = 0, **options: Any) -> Task:
    """The task `name` with so many different problems to train on and so many held out.

    Solved examples in a prompt are never held out, nor twins of the question. Equal arguments give equal tasks.

    Args:
        name: one of `task_names()`.
        train_size: problems to train on (>= 1).
        heldout_size: problems kept for evaluation (>= 0).
        seed: picks and splits the problems.
        options: of the task, for example `digits=2` for products; the generators in `problems.py` list them.
    Raises:
        ValueError: unknown name or option, or more problems asked for than the task has.
    """
    if name not in SOURCES:
        raise ValueError(f"task: expected one of {', '.join(task_names())}, got {name!r}")
    if train_size < 1 or heldout_size < 0:
        raise ValueError(
            f"train_size, heldout_size: expected at least 1 and at least 0, got {train_size} and {heldout_size}"
        )
    problems = SOURCES[name]
    known = [p for p in inspect.signature(problems).parameters if p != "seed"]
    for option in options:
        if option not in known:
            raise ValueError(f"task_args.{option}: expected an option of task {name!r}: {', '.join(known)}")
    shots = 2 if name in ARITHMETIC_TASKS else 0  # solved examples before the question
    rng = random.Random(f"{name} {seed}")
    asked = train_size + heldout_size
    # shots come from the problems that are not held out, the asked one excepted
    needed = max(asked, heldout_size + shots + 1)
    pool = _different_problems(problems(seed, **options), 8 * needed if name in BALANCED else needed)
    if len(pool) < needed:
        raise ValueError(
            f"train_size, heldout_size: expected at most {len(pool)} problems of task {name!r} in all, got "
            f"{train_size} + {heldout_size} (solved examples need {shots} that are not held out); ask for "
            f"fewer or widen the task's options"
        )
    rng.shuffle(pool)
    if name in BALANCED:
        pool = _one_answer_after_the_other(pool)[:needed]
        rng.shuffle(pool)
    heldout, train, spare = pool[:heldout_size], pool[heldout_size:asked], pool[asked:]
    return Task(
        name=name,
        train=[_example(p, train + spare, shots, rng) for p in train],
        heldout=[_example(p, train + spare, shots, rng) for p in heldout],
        stop=("\n",),
        max_new_tokens=MAX_NEW_TOKENS,
        reward=exact_match,
    )


def _different_problems(stream: Iterator[Problem], wanted: int) -> list[Problem]:
    """Up to `wanted` problems with different keys; fewer when the stream has run out of new ones."""
    found: dict[str, Problem] = {}
    dry = 0
    # of two numbers, the equal pairs are half as frequent as the others: one is missed with a chance of exp(-12)
    while len(found) < wanted and dry < 25 * len(found) + 200:
        problem = next(stream)
        dry = dry + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
    return list(found.values())


def _one_answer_after_the_other(problems: list[Problem]) -> list[Problem]:
    """The same problems, every answer once, then every answer twice ...: any first part is as balanced as can be."""
    by_answer: dict[str, list[Problem]] = {}
    for problem in problems:
        by_answer.setdefault(problem.answer, []).append(problem)
    rounds = itertools.zip_longest(*by_answer.values())
    return [problem for round_ in rounds for problem in round_ if problem is not None]


def _example(problem: Problem, solved: list[Problem], shots: int, rng: random.Random) -> Example:
    others = [p for p in solved if p.key != problem.key]
    lines = [f"{p.question} {p.answer}\n" for p in rng.sample(others, shots)]
    return Example(problem.key, "".join(lines) + problem.question, {"answer": problem.answer})
