"""Tasks of the package reasoning-gym, worded for a model that completes text and follows no instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from repo_ops.trainer.tasks.problem import Problem


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


# name -> (problems, whether the answers need balancing)
ARITHMETIC_TASKS: dict[str, tuple[Callable[..., Iterator[Problem]], bool]] = {
    "products": (products, False),
    "chain_sum": (chain_sum, False),
    "lcm": (lcm, False),
    "gcd": (gcd, True),
    "count_bits": (count_bits, True),
    "letter_counting": (letter_counting, True),
}


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
        raise ValueError(f"options of task {name!r}: {error}, got {settings}") from error
    index = 0
    while True:
        yield data[index]
        index += 1
