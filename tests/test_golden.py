"""Every golden case: losses through `policy_loss` and through the fused head."""

import copy
import math
from pathlib import Path

import pytest
from golden import KINDS, cases_of, run

CASES = cases_of(Path(__file__).parent / "data" / "objectives_golden.json")


def test_all_cases_are_there():
    kinds = [case["kind"] for case in CASES]
    assert [kinds.count(kind) for kind in KINDS] == [149, 4, 25, 5]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case):
    assert run(case).failure is None


def _grpo():
    return copy.deepcopy(next(case for case in CASES if case["id"] == "grpo_k3/small"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"expected": {"loss": 0.2, "dlogp": [[0.0] * 4] * 2}}, "float64 error"),
        ({"objective": "grqo"}, "not covered"),
        ({"hyper": {"eps_lo": 0.2}}, "not covered: hyper-parameter 'eps_lo'"),
        ({"hyper": {"agg": "median"}}, "not covered: aggregation 'median'"),
    ],
)
def test_a_wrong_number_and_an_unknown_name_are_failures(change, complaint):
    assert complaint in run(_grpo() | change).failure


def test_other_shapes_pass_too():
    # an empty row, a row without advantage, a width of 5, NaN under zero masks: the k3 rows of grpo_k3/small are kept
    case, junk = _grpo(), float("nan")
    for name in ("logp", "oldlogp", "reflogp", "samplogp"):
        short, long = case[name]
        case[name] = [[junk] * 5, [*short[:3], junk, junk], [-1.0] * 5, [*long, junk]]
    case["mask"] = [[0] * 5, [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    case["A"] = [3.0, case["A"][0], 0.0, case["A"][1]]
    expected = case["expected"]  # four rows instead of two halve everything; the row with A = 0 is at its reference
    expected["loss"] /= 2
    first, second = ([x / 2 for x in row] for row in expected["dlogp"])
    expected["dlogp"] = [[0.0] * 5, [*first, 0.0], [0.0] * 5, [*second, 0.0]]
    assert run(case).failure is None


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "loss"], ids=lambda case: case["id"])
def test_wider_rows_with_nan_under_zero_masks(case):
    # a masked column on either side: live tokens need not start at 0, and what lies under the mask is never read
    case = copy.deepcopy(case)
    for name in ("logp", "oldlogp", "reflogp", "samplogp"):
        if name in case:
            case[name] = [[math.nan, *row, math.nan] for row in case[name]]
    entropy = case.get("inputs_extra", {}).get("entropy")
    if entropy is not None:
        case["inputs_extra"]["entropy"] = [[math.nan, *row, math.nan] for row in entropy]
    case["A"] = [[math.nan, *a, math.nan] if isinstance(a, list) else a for a in case["A"]]
    case["mask"] = [[0, *row, 0] for row in case["mask"]]
    case["expected"]["dlogp"] = [[0.0, *row, 0.0] for row in case["expected"]["dlogp"]]
    assert run(case).failure is None


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("kimi_squared", 4.0),
        ("spo_squared", (-0.3 - 2.0) ** 2),
        ("gspo", 0.0),
        ("rloo_sequence_clip", 0.0),
        ("topr", 0.0),
    ],
)
def test_an_empty_row_counts_and_a_squared_one_has_its_constant(name, empty):
    case = copy.deepcopy(next(c for c in CASES if c["id"] in (f"{name}/small", name)))
    for field in ("logp", "oldlogp", "reflogp", "samplogp"):
        case[field] = [*case[field], [-1.0] * 4]
    case["mask"], case["A"] = [*case["mask"], [0] * 4], [*case["A"], 2.0]
    for extra, value in (("reward", 2.0), ("Q0", -0.3)):
        if extra in case["inputs_extra"]:
            case["inputs_extra"][extra] = [*case["inputs_extra"][extra], value]
    expected = case["expected"]
    expected["loss"] = (expected["loss"] * 2 + empty) / 3
    expected["dlogp"] = [[x * 2 / 3 for x in row] for row in expected["dlogp"]] + [[0.0] * 4]
    assert run(case).failure is None
