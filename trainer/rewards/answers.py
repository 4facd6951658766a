"""Rewards that compare a completion with the column `answer`, and one for its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


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
