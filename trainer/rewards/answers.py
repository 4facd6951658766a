"""Rewards that compare a completion with the column `answer`, and one for its length."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_ops.trainer.rewards.child import CallFailed, Child, ChildLost


def exact_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the completion is the answer, surrounding space aside, else 0.0."""
    return [float(text.strip() == str(wanted).strip()) for text, wanted in zip(completions, answer, strict=True)]


def number_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the whole completion is a number equal to the answer (042 and 42.0 equal 42), else 0.0."""
    return [
        float((got := _number(text)) is not None and got == _number(str(wanted)))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def prefix_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float]:
    """The share of the longer of completion and answer that they have in common from the start; 1.0 for equal ones."""
    return [_common_start(text.strip(), str(wanted).strip()) for text, wanted in zip(completions, answer, strict=True)]


class MathVerify:
    """1.0 where math-verify finds the completion equal to the answer, 0.0 where not: 1/2 equals 0.5 and \\frac{1}{2}.

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
        try:
            correct, parsed = self.child(answer, completion)
        except (CallFailed, ChildLost) as error:
            return error
        if not parsed:
            return CallFailed(f"answer: expected a mathematical expression, got {answer!r}; clean the data")
        return float(correct)


def soft_overlong(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    num_tokens: Sequence[int],
    max_new_tokens: Sequence[int],
    margin: float = 0.2,
    **_: Any,
) -> list[float]:
    """0 up to a length of (1 - margin) * max_new_tokens, from there falling evenly to -1 at max_new_tokens.

    A penalty to add to another reward. A margin of 0.2 is the paper's, 4096 tokens of 20480.
    Source: arXiv:2503.14476 (DAPO), equation 13.
    """
    return [
        -min(1.0, max(0.0, (length - (1 - margin) * most) / (margin * most)))
        for length, most in zip(num_tokens, max_new_tokens, strict=True)
    ]


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _common_start(a: str, b: str) -> float:
    if a == b:
        return 1.0
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return same / max(len(a), len(b))
