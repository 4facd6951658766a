"""A sample without what replay needs is refused, by one line that names the field."""

import dataclasses
import json

import pytest
import torch

from repo_ops.replay import Sample

GOOD = {
    "token_ids": (5, 6, 7),
    "logps": (-0.5, -0.25, 0.0),
    "reward": 1.0,
    "rewards": {"correct": 1.0},
    "version": 3,
    "temperature": 0.8,
    "finished": True,
    "text": "12",
}


def test_holds_plain_numbers_whatever_it_was_given():
    sample = Sample(
        **{
            **GOOD,
            "token_ids": torch.tensor([5, 6, 7]),
            "logps": torch.tensor(GOOD["logps"]),
            "reward": torch.tensor(1.0),
        }
    )
    assert sample == Sample(**GOOD)
    assert all(type(x) is int for x in sample.token_ids)
    assert all(type(x) is float for x in sample.logps)
    assert type(sample.reward) is float


def test_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample(**GOOD).reward = 2.0


def test_text_alone_may_be_left_out():
    for name in GOOD:
        given = {key: value for key, value in GOOD.items() if key != name}
        if name == "text":
            assert Sample(**given).text == ""
        else:
            with pytest.raises(TypeError, match=name):
                Sample(**given)


def test_state_is_exact_through_json():
    sample = Sample(**{**GOOD, "logps": (-0.1, -1e-300, -12345.678901234567)})
    assert Sample(**json.loads(json.dumps(sample.to_state()))) == sample


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("logps", None, ValueError, "logps: expected 3 behaviour log-probs, one a token, got None; store what"),
        ("logps", (), ValueError, "logps: expected 3 behaviour log-probs, one a token, got 0; store those"),
        ("logps", (-1.0, -1.0), ValueError, "logps: expected 3 behaviour log-probs, one a token, got 2; store those"),
        ("logps", (-1.0, float("nan"), -1.0), ValueError, "logps: .* got nan at token 1; do not store"),
        ("logps", (-1.0, -1.0, float("-inf")), ValueError, "logps: .* got -inf at token 2; do not store"),
        (
            "logps",
            (0.5, -1.0, -1.0),
            ValueError,
            "logps: expected log-probabilities <= 0, got 0.5 at token 0; pass logs",
        ),
        ("logps", -1.0, TypeError, "logps: expected 3 behaviour log-probs"),
        ("token_ids", (), ValueError, "token_ids: expected at least one token, got none; do not store"),
        ("token_ids", (1, 2, -100), ValueError, "token_ids: expected ids >= 0, got -100; strip padding"),
        ("token_ids", (1.0, 2.0, 3.0), TypeError, "token_ids: expected a sequence of integers"),
        ("token_ids", 5, TypeError, "token_ids: expected a sequence of integers, got 5"),
        ("reward", float("nan"), ValueError, "reward: expected a finite number, got nan; do not store"),
        ("reward", float("inf"), ValueError, "reward: expected a finite number, got inf; do not store"),
        ("reward", None, TypeError, "reward: expected a finite number, got None; do not store"),
        ("rewards", 1.0, TypeError, "rewards: expected a mapping of part name to number, got float"),
        ("rewards", {"a": float("nan")}, ValueError, r"rewards\['a'\]: expected a finite number, got nan; leave out"),
        ("version", -1, ValueError, "version: expected an optimizer step count >= 0, got -1"),
        ("version", 1.5, TypeError, "version: expected an integer, the optimizer step count, got 1.5"),
        ("temperature", 0.0, ValueError, "temperature: expected > 0, got 0.0; greedy"),
        ("temperature", float("nan"), ValueError, "temperature: expected a finite number, got nan"),
        ("finished", "yes", TypeError, "finished: expected True or False, got 'yes'"),
        ("text", 3, TypeError, "text: expected a str, got int"),
    ],
)
def test_refuses(field, value, error, message):
    with pytest.raises(error, match=message) as caught:
        Sample(**{**GOOD, field: value})
    assert "\n" not in str(caught.value)
