"""One question with its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What a task is made of, before it becomes a prompt."""

    question: str
    """What the model is asked, up to the place where the answer begins: `6 * 7 =`."""
    answer: str
    """What it should write, without surrounding space: `42`."""
    key: str
    """Equal for problems that give each other away, such as 6 * 7 and 7 * 6: they stay on one side of a split."""
