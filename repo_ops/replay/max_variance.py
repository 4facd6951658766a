"""Choosing the k scores that vary most."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate


def max_variance_subset(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k scores with the largest population variance, ascending.

    Equals the maximum over `itertools.combinations(range(n), k)` by (variance, sum), the first such subset in
    lexicographic order; here in O(n log n). With all members of a subset fixed but one, the variance is a strictly
    convex quadratic in that one (leading coefficient (k-1)/k**2), so a member with an unselected value below it and
    another above it can be exchanged for a better one. Every maximiser is therefore j smallest plus k-j largest
    values, and k+1 values of j remain. For k = 1 every variance is 0 and the larger sum decides: the maximum. Among
    equal values the oldest (smallest) indices are taken.

    Floats are compared as the exact rationals that they are: a tie is a tie, and rounding decides nothing.

    Args:
        scores: n finite numbers.
        k: how many to choose, >= 0; k >= n chooses all.
    Raises:
        ValueError: a score is not finite, or k is negative.
    Source: arXiv:2506.09340 (the strategy); the search is ours, the official code tries every subset.
    """
    n, k = len(scores), operator.index(k)
    if k < 0:
        raise ValueError(f"k: expected >= 0, got {k}")
    exact = _as_integers(scores)
    if k == 0 or k >= n:
        return list(range(n if k else 0))

    order = sorted(range(n), key=exact.__getitem__)
    ranked = [exact[i] for i in order]
    sums = list(accumulate(ranked, initial=0))
    squares = list(accumulate((x * x for x in ranked), initial=0))

    best_rank, best_low = (-1, 0), 0
    for low in range(k + 1):
        start = n - (k - low)  # the k-low largest are ranked[start:]
        total = sums[low] + sums[n] - sums[start]
        square = squares[low] + squares[n] - squares[start]
        rank = (k * square - total * total, total)  # k**2 times the variance, then the sum
        if rank > best_rank:
            best_rank, best_low = rank, low
    return _oldest(exact, ranked[:best_low] + ranked[n - (k - best_low) :])


def _as_integers(scores: Sequence[float]) -> list[int]:
    """The scores times one common factor, without rounding: every float is an integer over a power of two."""
    values = [float(x) for x in scores]
    for i, x in enumerate(values):
        if not math.isfinite(x):
            raise ValueError(f"scores: expected finite numbers, got {x} at index {i}; leave unscored samples out")
    ratios = [x.as_integer_ratio() for x in values]
    common = max((denominator for _, denominator in ratios), default=1)
    return [numerator * (common // denominator) for numerator, denominator in ratios]


def _oldest(values: Sequence[int], chosen: list[int]) -> list[int]:
    """Ascending indices whose values are the multiset `chosen`, the oldest among equal values."""
    wanted: dict[int, int] = {}
    for x in chosen:
        wanted[x] = wanted.get(x, 0) + 1
    indices = []
    for i, x in enumerate(values):
        if wanted.get(x, 0):
            wanted[x] -= 1
            indices.append(i)
    return indices
