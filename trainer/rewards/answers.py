"""Rewards that compare a completion with the column `answer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def exact_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion is the answer, surrounding space aside, else 0.0."""
    return [float(text.strip() == wanted.strip()) for text, wanted in zip(completions, answer, strict=True)]


def number_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the whole completion is a number equal to the answer (042 and 42.0 equal 42), else 0.0."""
    return [
        float((got := _number(text)) is not None and got == _number(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def prefix_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any) -> list[float]:
    """The share of the longer of completion and answer that they have in common from the start; 1.0 for equal ones."""
    return [_common_start(text.strip(), wanted.strip()) for text, wanted in zip(completions, answer, strict=True)]


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
