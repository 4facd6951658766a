"""kernels/group_advantages.py against float64, and its answers for NaN, equal and lonely rewards."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next line does

from repo_ops.kernels.group_advantages import group_advantages
from repo_ops.kernels.launch import interpreting

NAN = float("nan")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not interpreting():
        pytest.skip("a GPU is present: the kernels run on it, not in the interpreter")
    return request.param


def run(device, rewards, cu_groups, *, off_policy=None, **options):
    flags = None if off_policy is None else torch.as_tensor(off_policy, dtype=torch.bool, device=device)
    starts = torch.as_tensor(cu_groups, device=device)
    return group_advantages(torch.as_tensor(rewards).to(device), starts, off_policy=flags, **options).cpu()


def reference(rewards, cu_groups, off_policy, mode, normalize, eps, unbiased):
    """Loops and statistics in float64."""
    A = torch.zeros(len(rewards), dtype=torch.float64)
    kind = off_policy if mode == "split" else torch.zeros_like(off_policy)
    for begin, end in zip(cu_groups[:-1].tolist(), cu_groups[1:].tolist()):
        for wanted in (False, True):
            chosen = [i for i in range(begin, end) if kind[i] == wanted and not rewards[i].isnan()]
            own = rewards[chosen].double()
            if len(set(own.tolist())) > 1:
                A[chosen] = (own - own.mean()) / (own.std(unbiased=unbiased) + eps if normalize else 1)
    return A


@pytest.mark.parametrize("mode", ["split", "mixed"])
@pytest.mark.parametrize(
    ("normalize", "unbiased", "eps"), [(True, True, 1e-4), (True, False, 1e-6), (False, True, 0.0)]
)
def test_matches_float64(device, mode, normalize, unbiased, eps):
    # around the interpreter's block of 16, with empty groups and groups of one
    lengths = torch.tensor([0, 1, 2, 15, 16, 17, 0, 40, 8, 1])
    cu_groups = torch.tensor([0, *lengths.cumsum(0).tolist()])
    rewards = (
        torch.randint(0, 5, (int(lengths.sum()),)) / 3 + 100
    )  # a mean far from 0: a one-pass variance would lose it
    rewards[::7] = NAN
    off_policy = torch.rand(len(rewards)) < 0.4
    options = {"mode": mode, "normalize": normalize, "unbiased": unbiased, "eps": eps}
    got = run(device, rewards, cu_groups, off_policy=off_policy, **options)
    # the rewards themselves are float32 near 100, so the mean is good to an ulp of that: 8e-6
    torch.testing.assert_close(got.double(), reference(rewards, cu_groups, off_policy, **options), rtol=1e-5, atol=3e-5)


ON, OFF = [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([1.0, 0.0, 0.5, 0.2], {}, [1.321739, -0.976938, 0.172401, -0.517202]),
        ([1.0, 0.0, 0.5, 0.2], {"unbiased": False, "eps": 1e-6}, [1.526560, -1.128327, 0.199116, -0.597349]),
        ([1.0, 0.0, 0.5, 0.2], {"normalize": False}, [0.575, -0.425, 0.075, -0.225]),
        (
            ON + OFF,
            {"mode": "split"},
            [0.865875, -0.865875, -0.865875, 0.865875, 0.499900, 0.499900, -1.499700, 0.499900],
        ),
        (
            ON + OFF,
            {"mode": "mixed"},
            [0.724429, -1.207381, -1.207381, 0.724429, 0.724429, 0.724429, -1.207381, 0.724429],
        ),
    ],
)
def test_worked_numbers(device, rewards, options, expected):
    off_policy = [False] * 4 + [True] * (len(rewards) - 4)
    got = run(device, rewards, [0, len(rewards)], off_policy=off_policy, **options)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 12345.678])
@pytest.mark.parametrize("size", [1, 3, 7, 33])
def test_equal_rewards_give_exact_zero(device, value, size):
    """A float32 mean of equal rewards can miss them by an ulp; divided by eps that is no small number."""
    assert run(device, [value] * size, [0, size], eps=1e-12).tolist() == [0.0] * size


def test_nan_rewards_stand_outside(device):
    got = run(device, [1.0, NAN, 0.0, NAN, NAN, 3.0], [0, 3, 5, 6], normalize=False)
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]


def test_a_lone_replayed_member_gets_zero(device):
    got = run(device, [1.0, 0.0, 7.0], [0, 3], off_policy=[False, False, True], normalize=False)
    assert got.tolist() == [0.5, -0.5, 0.0]


def test_nothing_to_do(device):
    assert run(device, torch.empty(0), [0]).shape == (0,)
    assert run(device, torch.empty(0), [0, 0, 0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "both"}, ValueError, 'mode: expected "split" or "mixed"'),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0"),
        ({"rewards": torch.zeros(4).double()}, TypeError, "rewards: expected float32"),
        ({"cu_groups": [0.0, 4.0]}, TypeError, "cu_groups: expected int32 or int64"),
        ({"off_policy": [True]}, ValueError, r"off_policy: expected shape \[4\]"),
    ],
)
def test_bad_arguments_are_named(device, change, error, message):
    with pytest.raises(error, match=message):
        run(device, **({"rewards": torch.zeros(4), "cu_groups": [0, 4]} | change))
