"""Memory: gradients plus the budget and not more, whatever N, counted storage by storage; and once by the process."""

import subprocess
import sys

import pytest
import torch
from watch import Watch

from repo_ops import Options, get_objective, linear_logps, linear_policy_loss

MIB = 1 << 20
BF16, F32 = torch.bfloat16, torch.float32


def extra_bytes(N, D, V, budget, *, dtype=F32, frozen=False, objective="grpo", entropy=False, options=None, **head):
    """Peak bytes of forward and backward beyond the gradients that come out; N tokens in sequences of 8."""
    hidden = torch.randn(N // 8, 8, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 0.1).to(dtype).requires_grad_(not frozen)
    targets, advantages = torch.randint(0, V, (N // 8, 8)), torch.randn(N // 8)
    options = options or Options(memory_budget=budget)
    with Watch() as watch:
        if objective is None:
            found = linear_logps(hidden, weight, targets, with_entropy=entropy, options=options, **head)
            (found.logps.sum() + (found.entropy.sum() if entropy else 0.0)).backward()
        else:
            chosen = get_objective(objective, entropy_coef=0.01 if entropy else 0.0)
            found = linear_policy_loss(hidden, weight, targets, advantages, objective=chosen, options=options, **head)
            found.loss.backward()
    gradients = hidden.grad.nbytes + (0 if frozen else weight.grad.nbytes)
    if dtype != F32 and not frozen:
        gradients += 4 * V * D  # the float32 sum that a 16-bit weight gradient is rounded from
    return watch.peak - gradients


# SmolLM2's vocabulary, and Gemma's, where a row alone is 1 MiB
SMALL, LARGE = (49152, 512), (262144, 128)


@pytest.mark.parametrize(
    ("size", "call"),
    [
        (SMALL, {}),
        (LARGE, {}),
        (LARGE, {"frozen": True}),
        (SMALL, {"entropy": True}),
        (LARGE, {"entropy": True}),
        (SMALL, {"objective": "gspo"}),
        (LARGE, {"objective": None}),
        (SMALL, {"objective": None, "entropy": True}),
        (LARGE, {"temperature": 0.7, "logit_scale": 0.5}),
        (SMALL, {"softcap": 30.0}),
        (LARGE, {"softcap": 30.0, "entropy": True}),
    ],
    ids=str,
)
def test_within_the_budget(size, call):
    (V, N), budget = size, 32 * MIB
    used = extra_bytes(N, 16, V, budget, **call)
    assert 0.5 * budget <= used <= budget


# D = 256: the upcast weight is 48 MiB, three slices of it
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["grpo", None])
def test_within_the_budget_in_bfloat16(objective, frozen):
    budget = 32 * MIB
    assert extra_bytes(256, 256, 49152, budget, dtype=BF16, frozen=frozen, objective=objective) <= budget


def test_default_budget():
    assert extra_bytes(1024, 8, 49152, None, options=Options()) <= 128 * MIB


def test_default_budget_holds_512_tokens_of_a_large_vocabulary():
    # 512 rows of 1 MiB, and what a row of 262144 needs at least four of
    assert 500 * MIB <= extra_bytes(1024, 8, 262144, None, options=Options()) <= (512 + 2 * 4 + 1) * MIB


@pytest.mark.parametrize(("budget", "N"), [(128 * MIB, 700), (1024 * MIB, 5600)])
def test_larger_budgets(budget, N):
    # N * V * 4 bytes is a little over the budget, so that it binds; forward only, which takes the same tile
    hidden, weight = torch.randn(N, 4), torch.randn(49152, 4)
    with torch.no_grad(), Watch() as watch:
        linear_logps(hidden, weight, torch.zeros(N, dtype=torch.long), options=Options(memory_budget=budget))
    assert 0.45 * budget <= watch.peak <= budget


@pytest.mark.parametrize(("objective", "dtype"), [("grpo", BF16), (None, F32)])
def test_a_support_of_512_tokens_within_the_budget(objective, dtype):
    # the ids alone are as large as the budget, logits half as large
    N, V, budget = 8192, 1024, 32 * MIB
    ids = torch.arange(512).repeat(N // 8, 8, 1)
    assert extra_bytes(N, 4, V, budget, dtype=dtype, objective=objective, entropy=True, support_ids=ids) <= budget


@pytest.mark.parametrize("objective", ["grpo", "gspo", None])
def test_flat_when_tokens_double(objective):
    # at most 128 bytes a token: statistics, coefficients and weights of the token, none of them of size D or V
    V, budget = 5003, 8 * MIB
    used = [extra_bytes(N, 16, V, budget, objective=objective) for N in (1024, 2048)]
    assert used[1] - used[0] <= 1024 * 128


def test_nothing_of_the_size_of_the_logits():
    N, V = 512, 5003
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.long)
    with Watch() as watch:
        linear_logps(hidden, weight, targets, options=Options(memory_budget=6 * MIB)).logps.sum().backward()
        linear_policy_loss(
            hidden,
            weight,
            targets,
            torch.ones(1),
            cu_seqlens=torch.tensor([0, N]),
            options=Options(memory_budget=6 * MIB),
        ).loss.backward()
    assert watch.largest <= 6 * MIB / 4 < N * V


def test_only_live_rows_need_memory():
    # hidden states of masked rows are not copied either: 7 of 8 tokens are prompt
    N, D, V = 1024, 512, 64
    hidden, weight = torch.randn(N // 8, 8, D), torch.randn(V, D)
    mask = torch.zeros(N // 8, 8).index_fill(1, torch.tensor([7]), 1)
    with torch.no_grad(), Watch() as watch:
        linear_logps(hidden, weight, torch.zeros(N // 8, 8, dtype=torch.long), mask=mask)
    assert watch.peak <= N // 8 * (2 * D + 2 * V) * 4 + 64 * N


def test_gradients_are_handed_over_not_kept():
    hidden, weight = torch.randn(8, 8, 64, requires_grad=True), torch.randn(5003, 64, requires_grad=True)
    with Watch() as watch:
        loss = linear_policy_loss(hidden, weight, torch.zeros(8, 8, dtype=torch.long), torch.ones(8)).loss
        loss.backward()
        held = watch.live
        hidden.grad = weight.grad = None
        assert watch.live <= held - 4 * (hidden.numel() + weight.numel())


RESIDENT = """
import resource, torch
from repo_ops import Options, linear_policy_loss

def step(N):
    hidden, weight = torch.randn(N // 8, 8, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    linear_policy_loss(
        hidden, weight, torch.zeros(N // 8, 8, dtype=torch.long), torch.ones(N // 8), options=Options(memory_budget=B)
    ).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
V, D, B = 49152, 16, 32 << 20
print(step(8), step(512), step(1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
def test_peak_resident_size_of_the_process():
    # sees what operators allocate inside themselves, which storages do not show; full logits would be 96 and 192 MiB
    found = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, timeout=120)
    warm, once, twice = map(int, found.stdout.split())
    slack = 16 * MIB  # the allocator's own, and packing buffers of the matrix products
    assert once - warm <= 32 * MIB + slack
    assert twice - once <= slack
