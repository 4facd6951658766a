"""Reward for mathematical answers, compared as mathematics: 1/2 equals 0.5 and \\frac{1}{2}."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_ops.trainer.rewards.child import Child, ChildLost


class MathVerify:
    """1.0 where math-verify finds the completion equal to the column `answer`, 0.0 where not.

    The comparison runs in a child process that is killed at the deadline: expressions exist that keep a parser busy for
    ever. Such a completion gets None (left out, since nothing is known about it) and counts in `timeouts`; the next one
    finds a fresh child. A child that runs out of memory dies without a word, which counts as the same.

    Args:
        seconds: deadline of one comparison.
    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.child = Child(f"{Path(__file__).with_name('math_child.py')}:compare", seconds)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("reward 'math_verify': expected the package math-verify; pip install math-verify")
        self.timeouts = 0

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any
    ) -> list[float | None]:
        return [self._compare(str(wanted), text) for wanted, text in zip(answer, completions, strict=True)]

    def close(self) -> None:
        """Ends the child process; the next comparison starts another."""
        self.child.close()

    def _compare(self, answer: str, completion: str) -> float | None:
        self.child.begin(answer, completion)
        try:
            correct, parsed = self.child.result()
        except ChildLost:
            self.timeouts += 1
            return None
        if not parsed:
            raise ValueError(f"answer: expected a mathematical expression, got {answer!r}; clean the data")
        return float(correct)
