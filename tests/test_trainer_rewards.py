"""Rewards: the built-in ones, several at once, functions that fail, and answers that hang the checker."""

import logging
import math
import time

import numpy as np
import pytest
import torch

from repo_ops.trainer.rewards import exact_match, load_reward, score
from repo_ops.trainer.rewards.answers import number_match, prefix_match
from repo_ops.trainer.rewards.math_answers import MathVerify

PROMPTS = ["p"] * 3
TEXTS = ["1", "bad", "3"]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def picky(prompts, completions, **columns):
    """Fails on a whole batch that holds one bad completion, as careless functions do."""
    return [float(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "completion", "answer", "expected"),
    [
        (exact_match, " 42 ", "42", 1.0),
        (exact_match, "042", "42", 0.0),
        (exact_match, "42 apples", "42", 0.0),
        (exact_match, "", "42", 0.0),
        (number_match, "042", "42", 1.0),
        (number_match, "1,042.0", "1042", 1.0),
        (number_match, "-3", "3", 0.0),
        (number_match, "nan", "nan", 0.0),
        (number_match, "x", "x", 0.0),
        (prefix_match, "dcba", "dcba", 1.0),
        (prefix_match, "dcxa", "dcba", 0.5),
        (prefix_match, "dc", "dcba", 0.5),
        (prefix_match, "dcbaaaaa", "dcba", 0.5),
        (prefix_match, "x", "dcba", 0.0),
        (prefix_match, "", "", 1.0),
    ],
)
def test_answers_by_hand(function, completion, answer, expected):
    assert function(["p"], [completion], answer=[answer]) == [expected]


def test_weighted_sum_and_parts():
    result = score(
        {"exact": (exact_match, 1.0), "length": (length, -0.25)},
        PROMPTS,
        TEXTS,
        {"answer": ["1", "2", "4"]},
    )
    assert result.parts == {"exact": [1.0, 0.0, 0.0], "length": [1.0, 3.0, 1.0]}
    assert result.totals == [0.75, -0.75, -0.25]
    assert result.errors == {}


def test_none_leaves_a_sample_out():
    result = score({"sure": (lambda p, c, **_: [1.0, None, 0.0], 1.0), "length": (length, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [2.0, None, 1.0]


def test_an_exception_costs_only_its_sample_and_is_shown(caplog):
    with caplog.at_level(logging.WARNING):
        result = score({"picky": (picky, 1.0), "length": (length, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [2.0, None, 4.0]
    assert list(result.errors) == ["picky"]
    assert len(result.errors["picky"]) == 1
    assert "ValueError: could not convert string to float: 'bad'" in result.errors["picky"][0]
    assert "reward picky: 1 of 3 samples left out: ValueError" in caplog.text


def test_columns_follow_the_samples_when_a_batch_fails():
    def needs_own_column(prompts, completions, *, wanted, **_):
        return [float(text) if text == want else 1 / 0 for text, want in zip(completions, wanted)]

    result = score({"f": (needs_own_column, 1.0)}, PROMPTS, ["1", "2", "3"], {"wanted": ["1", "x", "3"]})
    assert result.totals == [1.0, None, 3.0]


def test_an_interrupt_is_not_swallowed():
    def interrupted(prompts, completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"f": (interrupted, 1.0)}, PROMPTS, TEXTS, {})


@pytest.mark.parametrize("values", [np.array([1, 0, 2]), torch.tensor([1.0, 0.0, 2.0]), (True, False, 2)])
def test_any_sequence_of_numbers_will_do(values):
    result = score({"f": (lambda p, c, **_: values, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [1.0, 0.0, 2.0]
    assert all(type(total) is float for total in result.totals)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"^reward f: expected 3 rewards, one a completion, got 2"),
        ([1.0, "2x", 3.0], TypeError, r"^reward f\[1\]: expected a number or None, got '2x'"),
        ([1.0, math.nan, 3.0], ValueError, r"^reward f\[1\]: expected a finite number, got nan"),
        ([1.0, 2.0, math.inf], ValueError, r"^reward f\[2\]: expected a finite number, got inf"),
        (None, TypeError, r"^reward f: expected a list of numbers or None, got NoneType"),
        (0.5, TypeError, r"^reward f: expected a list of numbers or None, got float"),
        ("yes", TypeError, r"^reward f: expected a list of numbers or None, got str"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        score({"f": (lambda p, c, **_: values, 1.0)}, PROMPTS, TEXTS, {})


def test_async_functions_are_refused():
    async def later(prompts, completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match=r"^reward f: expected an ordinary function, got an async one"):
        score({"f": (later, 1.0)}, PROMPTS, TEXTS, {})


def test_a_missing_column_is_named_before_anything_is_asked():
    with pytest.raises(TypeError, match=r"^reward exact: .*columns \['question'\].*missing .*'answer'"):
        score({"exact": (exact_match, 1.0)}, PROMPTS, TEXTS, {"question": ["q"] * 3})
    with pytest.raises(ValueError, match=r"^answer: expected 3 values, one a completion, got 2"):
        score({"exact": (exact_match, 1.0)}, PROMPTS, TEXTS, {"answer": ["1", "2"]})
    with pytest.raises(ValueError, match=r"^rewards: expected at least one function"):
        score({}, PROMPTS, TEXTS, {})


def test_functions_by_name(tmp_path):
    assert load_reward("exact_match") is exact_match
    assert load_reward("repo_ops.trainer.rewards.answers:prefix_match") is prefix_match
    file = tmp_path / "mine.py"
    file.write_text("def half(prompts, completions, **columns):\n    return [0.5] * len(completions)\n")
    assert load_reward(f"{file}:half")([], ["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactmatch", r"^reward: expected one of exact_match, .*, got 'exactmatch'"),
        ("no_such_module_here:f", r"^reward: expected an importable module .*no_such_module_here.*path/to/file.py"),
        ("no/such/file.py:f", r"^reward: expected a Python file, got 'no/such/file.py'"),
        ("math:no_such_function", r"^reward: expected a function 'no_such_function' in math, found None"),
        ("math:pi", r"^reward: expected a function 'pi' in math, found 3.14"),
    ],
)
def test_unknown_functions_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


@pytest.mark.slow
def test_math_verify_compares_and_survives_what_hangs():
    """One test, since a child that imports sympy takes seconds to start; a hang costs a second child."""
    reward = load_reward("math_verify")
    assert isinstance(reward, MathVerify)
    reward.seconds = 60.0  # a busy machine is no hang
    texts = ["0.5", "so it is $\\frac{2}{4}$", "2", "no idea"]
    assert reward(["p"] * 4, texts, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]

    reward.seconds = 1.0
    start = time.monotonic()
    assert reward(["p"], ["$9^{9^{9^{9}}}$"], answer=["2"]) == [None]
    # left to itself the expression takes for ever; the slack is for a busy machine
    assert 1.0 <= time.monotonic() - start < 20.0
    assert reward.timeouts == 1

    reward.seconds = 60.0
    result = score({"math": (reward, 1.0)}, ["p"] * 2, ["4", "4"], {"answer": ["2+2", "hello"]})
    assert result.totals == [1.0, None]
    assert "answer: expected a mathematical expression, got 'hello'" in result.errors["math"][0]
    reward.close()


def test_math_verify_refuses_a_deadline_of_nothing():
    with pytest.raises(ValueError, match=r"^seconds: expected > 0, got 0"):
        MathVerify(seconds=0)
