"""Golden advantages and selections, to 1e-9 in float64."""

import json
from pathlib import Path

import pytest
from golden_advantages import advantages, agrees, compared

CASES = json.loads((Path(__file__).parent / "data" / "golden_advantages.json").read_text())["cases"]


def test_all_cases_are_there():
    kinds = [case["kind"] for case in CASES]
    assert (kinds.count("advantage"), kinds.count("selection")) == (25, 5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case):
    pairs = compared(case)
    assert pairs
    for name, got, expected in pairs:
        assert agrees(got, expected), f"{name}: expected {expected}, got {got}"


R = [1.0, 0.0, 0.5, 0.2]


@pytest.mark.parametrize(
    ("estimator", "hyper", "rewards", "expected"),
    [
        ("opmd", {"tau": 1.0}, R, [0.500983, -0.499017, 0.000983, -0.299017]),
        ("passk_analytic", {"k": 2}, [1.0, 0.0, 0.0, 0.0], [1.0, -0.333333, -0.333333, -0.333333]),
        ("grpo", {"unbiased": False, "eps": 1e-6}, R, [1.526560, -1.128327, 0.199116, -0.597349]),
    ],
)
def test_published_to_six_digits(estimator, hyper, rewards, expected):
    assert agrees(advantages(rewards, estimator=estimator, **hyper), expected, rtol=0, atol=6e-7)


def test_bnpo_of_five_groups_to_six_digits():
    groups = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 0]]
    positive = [0.593414, 0.378943, 0.593414, 0.261281, 0.593414]
    negative = [-0.197805, -0.378943, -0.197805, -0.783842, -0.197805]
    ids = [g for g, group in enumerate(groups) for _ in group]
    rewards = [float(r) for group in groups for r in group]
    got = advantages(rewards, ids, estimator="bnpo")
    assert agrees(got, [positive[g] if r else negative[g] for g, r in zip(ids, rewards)], rtol=0, atol=6e-7)


def test_a_wrong_number_is_noticed():
    assert agrees([1.0, [2.0, None]], [1.0, [2.0, None]])
    assert not agrees([1.0 + 1e-8], [1.0])
    assert not agrees([1.0], [1.0, 2.0])
    assert not agrees([float("nan")], [1.0])
    assert not agrees([0], [None])
