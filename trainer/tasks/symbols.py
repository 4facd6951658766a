"""Tasks on strings of letters, for the tiny model: every letter is one of its tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from repo_ops.trainer.tasks.problem import Problem


def reverse(seed: int, *, min_length: int = 3, max_length: int = 4, letters: int = 8) -> Iterator[Problem]:
    """r:abc= -> cba. A string and its reverse are twins."""
    for text in _strings(seed, min_length, max_length, letters):
        yield Problem(f"r:{text}=", text[::-1], key=min(text, text[::-1]))


def sort(seed: int, *, min_length: int = 3, max_length: int = 4, letters: int = 8) -> Iterator[Problem]:
    """s:cab= -> abc. All orders of the same letters are twins."""
    for text in _strings(seed, min_length, max_length, letters):
        yield Problem(f"s:{text}=", "".join(sorted(text)), key="".join(sorted(text)))


def copy(seed: int, *, min_length: int = 3, max_length: int = 4, letters: int = 8) -> Iterator[Problem]:
    """c:abc= -> abc."""
    for text in _strings(seed, min_length, max_length, letters):
        yield Problem(f"c:{text}=", text, key=text)


SYMBOL_TASKS: dict[str, Callable[..., Iterator[Problem]]] = {"reverse": reverse, "sort": sort, "copy": copy}


def _strings(seed: int, min_length: int, max_length: int, letters: int) -> Iterator[str]:
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"min_length, max_length: expected 1 <= min_length <= max_length, got {min_length}, {max_length}"
        )
    if not 1 <= letters <= 26:
        raise ValueError(f"letters: expected 1 to 26, got {letters}")
    rng = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]
    while True:
        yield "".join(rng.choices(alphabet, k=rng.randint(min_length, max_length)))
