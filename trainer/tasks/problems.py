"""Generators of problems with their answers: a task is one of these and its name in a table below."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """What a task is made of, before it becomes a prompt."""

    question: str
    """What the model is asked, up to the place where the answer begins: `6 * 7 =`."""
    answer: str
    """What it should write, without surrounding space: `42`."""
    key: str
    """Equal for problems that give each other away, such as 6 * 7 and 7 * 6: they stay on one side of a split."""


# On strings of letters, for the tiny model: every letter is one of its tokens.


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


def _strings(seed: int, min_length: int, max_length: int, letters: int) -> Iterator[str]:
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"task_args: expected 1 <= min_length <= max_length, got min_length {min_length}, max_length {max_length}"
        )
    if not 1 <= letters <= 26:
        raise ValueError(f"task_args.letters: expected 1 to 26, got {letters}")
    rng = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]
    while True:
        yield "".join(rng.choices(alphabet, k=rng.randint(min_length, max_length)))


# Of the package reasoning-gym, worded for a model that completes text and follows no instructions.


def products(seed: int, *, digits: int = 1, terms: int = 2) -> Iterator[Problem]:
    """`6 * 7 =`: the factors' order does not matter. digits: most digits of a factor; terms: number of factors."""
    for item in _items("products", seed, max_digits=digits, min_terms=terms, max_terms=terms):
        expression = item["metadata"]["expression"]
        key = " * ".join(sorted(expression.split(" * "), key=int))
        yield Problem(f"{expression} =", item["answer"], key)


def chain_sum(seed: int, *, digits: int = 1, terms: int = 2) -> Iterator[Problem]:
    """`4 - 7 =`: the order of the signed terms does not matter. digits: most digits of a term; terms: their number."""
    for item in _items("chain_sum", seed, max_digits=digits, min_terms=terms, max_terms=terms):
        expression = item["metadata"]["expression"]
        signed = ("+ " + expression).split(" ")
        key = " ".join(sorted(sign + term for sign, term in zip(signed[::2], signed[1::2])))
        yield Problem(f"{expression} =", item["answer"], key)


def lcm(seed: int, *, max_value: int = 10) -> Iterator[Problem]:
    """`lcm(4, 6) =`, of two numbers up to max_value."""
    yield from _of_two_numbers("lcm", seed, max_value)


def gcd(seed: int, *, max_value: int = 30) -> Iterator[Problem]:
    """`gcd(4, 6) =`, of two numbers up to max_value. Left alone, three answers in five would be 1."""
    yield from _of_two_numbers("gcd", seed, max_value)


def count_bits(seed: int, *, max_value: int = 31) -> Iterator[Problem]:
    """`bits of 13 =`: how many ones the number has in base two."""
    for item in _items("count_bits", seed, max_n=max_value):
        number = str(item["metadata"]["number"])
        yield Problem(f"bits of {number} =", item["answer"], number)


def letter_counting(seed: int, *, max_words: int = 2) -> Iterator[Problem]:
    """`"t" in "the tide" =`: how often the letter occurs, capitals counted with the rest."""
    for item in _items("letter_counting", seed, min_words=1, max_words=max_words):
        letter, words = item["metadata"]["target_letter"], " ".join(item["metadata"]["span"])
        key = f"{letter} {' '.join(sorted(words.lower().split()))}"
        yield Problem(f'"{letter}" in "{words}" =', item["answer"], key)


def _of_two_numbers(name: str, seed: int, max_value: int) -> Iterator[Problem]:
    for item in _items(name, seed, max_value=max_value):
        numbers = item["metadata"]["numbers"]
        listed = ", ".join(map(str, numbers))
        yield Problem(f"{name}({listed}) =", item["answer"], " ".join(map(str, sorted(numbers))))


def _items(name: str, seed: int, **settings: Any) -> Iterator[dict[str, Any]]:
    """Items of a reasoning-gym data set without end.

    Raises:
        ImportError: the package is missing.
        ValueError: the data set refuses the settings.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"task {name!r}: expected the package reasoning-gym; pip install reasoning-gym") from error
    try:
        # item i of seed s is item 0 of seed s + i there, so seeds lie far apart here
        data = reasoning_gym.create_dataset(name, seed=seed * 2**32, size=2**32, **settings)
    except AssertionError as error:
        raise ValueError(f"task_args of {name!r}: {error}, got {settings}") from error
    yield from map(data.__getitem__, itertools.count())


Generator = Callable[..., Iterator[Problem]]
"""generator(seed, **options) -> endless problems, repeats among them."""
SYMBOL_TASKS: dict[str, Generator] = {"reverse": reverse, "sort": sort, "copy": copy}
ARITHMETIC_TASKS: dict[str, Generator] = {
    "products": products,
    "chain_sum": chain_sum,
    "lcm": lcm,
    "gcd": gcd,
    "count_bits": count_bits,
    "letter_counting": letter_counting,
}
BALANCED = frozenset({"gcd", "count_bits", "letter_counting"})
"""Tasks whose problems are spread evenly over the answers, where one answer would otherwise win by itself."""
