"""repo_rephrase: when the worst rollout gives way, and which one it is."""

import pytest

from repo_ops.group_edits import repo_rephrase


def edit(rewards, new=1.0, rho=1.0, delta=0.5):
    return repo_rephrase([f"r{i}" for i in range(len(rewards))], rewards, "new", new, rho=rho, delta=delta)


def test_replaces_the_worst_rollout_of_a_failed_group():
    group = edit([0.2, 0.1, 0.4])
    assert group.rollouts == ["r0", "new", "r2"]
    assert group.rewards == [0.2, 1.0, 0.4]
    assert (group.replaced, group.fail_rate) == (1, 1.0)


def test_the_first_of_equally_bad_rollouts_goes():
    assert edit([0.3, 0.0, 0.0]).replaced == 1


@pytest.mark.parametrize(
    ("rewards", "rho", "replaced"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.75, 1),  # three of four fail: exactly rho
        ([1.0, 0.0, 0.0, 0.0], 0.76, None),
        ([1.0, 1.0, 1.0, 0.0], 0.25, 3),
        ([0.5, 0.5], 0.5, None),  # a reward of delta does not fail
    ],
)
def test_the_gate_opens_at_rho(rewards, rho, replaced):
    group = edit(rewards, rho=rho)
    assert group.replaced == replaced
    if replaced is None:
        assert group.rollouts == [f"r{i}" for i in range(len(rewards))]
        assert group.rewards == rewards


def test_a_rephrasing_that_fails_itself_is_not_used():
    assert edit([0.0, 0.0], new=0.49).replaced is None
    assert edit([0.0, 0.0], new=0.5).replaced == 0


def test_nothing_to_rephrase_with():
    group = repo_rephrase(["a"], [0.0], None, None, rho=1.0, delta=0.5)
    assert (group.rollouts, group.rewards, group.replaced, group.fail_rate) == (["a"], [0.0], None, 1.0)


def test_the_given_lists_are_left_alone():
    rollouts, rewards = ["a", "b"], [0.0, 0.0]
    repo_rephrase(rollouts, rewards, "new", 1.0, rho=1.0, delta=0.5)
    assert (rollouts, rewards) == (["a", "b"], [0.0, 0.0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": [0.0]}, "rewards: expected 2 >= 1, one a rollout, got 1"),
        ({"rollouts": [], "rewards": []}, "rewards: expected 0 >= 1"),
        ({"rewards": [0.0, float("nan")]}, "rewards: expected finite numbers, got .*; leave out rollouts"),
        ({"rephrased_reward": float("inf")}, "rewards: expected finite numbers"),
        ({"rephrased_reward": None}, "rephrased_reward: expected a reward exactly where"),
        ({"rho": 0.0}, r"rho: expected within \(0, 1\], got 0.0"),
        ({"rho": 1.1}, r"rho: expected within \(0, 1\], got 1.1"),
        ({"delta": float("nan")}, "delta: expected a finite reward, got nan"),
    ],
)
def test_refuses(changed, message):
    arguments = {
        "rollouts": ["a", "b"],
        "rewards": [0.0, 0.0],
        "rephrased": "new",
        "rephrased_reward": 1.0,
        "rho": 1.0,
        "delta": 0.5,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        repo_rephrase(**arguments)


def test_rho_and_delta_have_no_default():
    with pytest.raises(TypeError, match="rho"):
        repo_rephrase(["a"], [0.0], "new", 1.0, delta=0.5)
    with pytest.raises(TypeError, match="delta"):
        repo_rephrase(["a"], [0.0], "new", 1.0, rho=1.0)
