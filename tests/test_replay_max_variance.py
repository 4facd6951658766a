"""max_variance_subset against every subset, with true ties."""

import random
import time
from fractions import Fraction
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_ops.replay import max_variance_subset


def brute_force(scores: list[float], k: int) -> list[int]:
    """All subsets in lexicographic order, strict comparison of (variance, sum) in exact rationals."""
    exact = [Fraction(x) for x in scores]
    best, best_rank = list(range(min(k, len(scores)))), None
    for subset in combinations(range(len(scores)), min(k, len(scores))):
        chosen = [exact[i] for i in subset]
        mean = sum(chosen, Fraction(0)) / max(len(chosen), 1)
        rank = (sum(((x - mean) ** 2 for x in chosen), Fraction(0)), sum(chosen, Fraction(0)))
        if best_rank is None or rank > best_rank:
            best, best_rank = list(subset), rank
    return best


# Few distinct values make most of a subset's rivals exact ties; 0.1, 0.2 and 0.3 tie in decimals and not in binary.
TIED = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.1, 0.2, 0.3])
ANY = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(scores=st.lists(TIED | ANY, min_size=1, max_size=9), k=st.integers(1, 9))
def test_equals_all_subsets(scores, k):
    assert max_variance_subset(scores, k) == brute_force(scores, k)


@settings(max_examples=300, deadline=None)
@given(scores=st.lists(TIED, min_size=4, max_size=9), k=st.integers(1, 8))
def test_equals_all_subsets_where_ties_abound(scores, k):
    assert max_variance_subset(scores, k) == brute_force(scores, k)


def test_every_sequence_of_three_values():
    # exhaustive: 3**n score lists of n <= 5 and all k, so every pattern of ties between low, middle and high part
    for n in range(1, 6):
        for scores in product((0.0, 0.5, 1.0), repeat=n):
            for k in range(1, n + 1):
                assert max_variance_subset(scores, k) == brute_force(list(scores), k), (scores, k)


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([3.0, 1.0, 3.0, 2.0], 1, [0]),  # k = 1: the maximum, its oldest copy
        ([5.0, 5.0, 5.0, 5.0], 2, [0, 1]),  # all equal: the oldest
        ([0.0, 1.0, 0.5], 3, [0, 1, 2]),  # k = n
        ([0.0, 1.0], 9, [0, 1]),  # k > n
        ([], 2, []),
        ([1.0, 2.0], 0, []),
        ([0.0, 1.0, 0.0, 1.0], 3, [0, 1, 3]),  # one 0 and two 1s beat two 0s and one 1 by their sum
        ([-1.0, 0.0, 1.0], 2, [0, 2]),
        ([1e308, -1e308, 0.0, 1e-308], 2, [0, 1]),  # squares that overflow a float
    ],
)
def test_worked_by_hand(scores, k, expected):
    assert max_variance_subset(scores, k) == expected


def test_rounding_decides_no_tie():
    # 0.1 + 0.2 > 0.3 as floats. {0.1, 0.3} and {0.2, 0.4} differ by the same decimal but not by the same float.
    scores = [0.1, 0.30000000000000004, 0.2, 0.4]
    assert max_variance_subset(scores, 2) == brute_force(scores, 2) == [0, 3]
    # The variances differ by 2**-104 of themselves; float64 sums of squares cannot see it.
    close = [0.0, 1.0, -(2.0**-52), 1.0 - 2.0**-53]
    assert max_variance_subset(close, 2) == brute_force(close, 2) == [1, 2]


def test_cost_does_not_grow_with_the_number_of_subsets():
    # C(2000, 1000) has 600 digits; a search of them would not end
    scores = [random.Random(i).random() for i in range(2000)]
    start = time.perf_counter()
    chosen = max_variance_subset(scores, 1000)
    assert time.perf_counter() - start < 5
    assert len(set(chosen)) == 1000
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_scores_that_cannot_be_compared(bad):
    with pytest.raises(ValueError, match=r"scores: expected finite numbers, got (nan|inf) at index 1"):
        max_variance_subset([0.0, bad], 1)


def test_refuses_a_negative_k():
    with pytest.raises(ValueError, match="k: expected >= 0, got -1"):
        max_variance_subset([0.0], -1)
