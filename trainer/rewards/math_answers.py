"""Reward for mathematical answers, compared as mathematics: 1/2 equals 0.5 and \\frac{1}{2}."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_ops.trainer.rewards.child import CallFailed, Child, ChildLost


class MathVerify:
    """1.0 where math-verify finds the completion equal to the column `answer`, 0.0 where not.

    The comparison runs in a child process that is killed at the deadline: expressions exist that keep a parser busy for
    ever, or take all memory. In the place of such a completion stands the exception, since nothing is known about it,
    and `score` leaves it out; so it does where the answer is no expression. The next completion finds a fresh child.

    Args:
        seconds: deadline of one comparison.
    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.child = Child(f"{Path(__file__).with_name('math_child.py')}:compare", seconds)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("reward 'math_verify': expected the package math-verify; pip install math-verify")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any
    ) -> list[float | Exception]:
        return [self._compare(str(wanted), text) for wanted, text in zip(answer, completions, strict=True)]

    def close(self) -> None:
        """Ends the child process; the next comparison starts another."""
        self.child.close()

    def _compare(self, answer: str, completion: str) -> float | Exception:
        self.child.begin(answer, completion)
        try:
            correct, parsed = self.child.result()
        except (CallFailed, ChildLost) as error:
            return error
        if not parsed:
            return CallFailed(f"answer: expected a mathematical expression, got {answer!r}; clean the data")
        return float(correct)
