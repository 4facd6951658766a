"""Tiles of bfloat16 heads, logits a slice at a time: log-probabilities to 1e-5, gradients to its rounding."""

import pytest
import torch
from truth import relative_error, token_stats

from repo_ops import Options, linear_logps, linear_policy_loss
from repo_ops.arguments import layout
from repo_ops.head import pages, plan, streamed
from repo_ops.head.inputs import Wanted
from repo_ops.head_arguments import HeadSettings, head_inputs

BF16 = torch.bfloat16
N, D, V = 24, 16, 301
SLICE = 40  # columns: eight slices, the last one uneven


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(streamed, "SLICE_BYTES", 4 * N * SLICE)


@pytest.fixture
def passes(monkeypatch):
    """How many times the vocabulary was gone over for statistics."""
    seen = []
    once = streamed._stats
    monkeypatch.setattr(streamed, "_stats", lambda *arguments: seen.append(1) or once(*arguments))
    return seen


def head(**made):
    hidden = torch.randn(N, D).to(BF16)
    weight, targets = torch.randn(V, D).to(BF16), torch.randint(V, (N,))
    found = {"hidden": hidden, "weight": weight, "targets": targets} | made
    return tuple(found.values())


def with_logits(wanted):
    """Hidden states and weights of a head whose logits are `wanted` [V] in each row, one more in the first column."""
    weight = torch.zeros(V, D, dtype=BF16)
    weight[:, 0], weight[:, 1] = wanted.to(BF16), torch.eye(V, 1)[:, 0].to(BF16)
    hidden = torch.zeros(N, D, dtype=BF16)
    hidden[:, :2] = 1
    return hidden, weight


def check(hidden, weight, targets, *, cancels=1.0, **scaling):
    """Log-probabilities and gradients of both, from one sweep and from two, against float64.

    `cancels`: how much larger the terms of the hidden states' gradient are than their sum, p being rounded to bfloat16.
    """
    bounds = 3.5e-3 * cancels, 3.5e-3
    truth = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logps = token_stats(*truth, targets, **scaling)[0]
    coefficients = torch.linspace(-1, 2, N).double()
    advantages = torch.linspace(-1, 2, N)
    (logps * coefficients).sum().backward()

    own = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    found = linear_logps(*own, targets, **scaling).logps
    assert (found - logps).abs().max() <= 1e-5 * max(1, logps.abs().max() / 10)
    (found * coefficients.float()).sum().backward()
    for mine, exact, bound in zip(own, truth, bounds):
        assert relative_error(mine.grad, exact.grad) <= bound

    once = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_policy_loss(*once, targets, advantages, objective="grpo", cu_seqlens=torch.arange(N + 1), **scaling)
    assert torch.equal(loss.logps[advantages != 0], found.detach()[advantages != 0])
    loss.loss.backward()
    for mine, exact, bound in zip(once, truth, bounds):  # on policy: minus the same coefficients, over the sequences
        assert relative_error(mine.grad, -exact.grad / N) <= bound


@pytest.mark.parametrize(
    "scaling",
    [{}, {"bias": torch.linspace(-1, 1, V)}, {"temperature": 0.7, "logit_scale": 0.5}, {"temperature": "per token"}],
    ids=["plain", "bias", "scale", "temperature"],
)
def test_against_float64(scaling):
    scaling = dict(scaling)
    if scaling.get("temperature") == "per token":
        scaling["temperature"] = torch.linspace(0.5, 2, N)
    check(*head(), **scaling)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param(torch.linspace(0, 50, V), 1, id="rising within the range"),
        pytest.param(torch.linspace(0, 300, V), 2, id="rising beyond it"),
        pytest.param(torch.linspace(300, 0, V), 1, id="falling: later slices underflow"),
        pytest.param(torch.full((V,), -3e4), 1, id="all far below zero"),
        pytest.param(torch.cat([torch.full((SLICE,), -1e30), torch.zeros(V - SLICE)]), 2, id="a masked first slice"),
    ],
)
def test_references_far_from_the_largest_logit(passes, logits, expected):
    hidden, weight = with_logits(logits)
    targets = torch.randint(V, (N,))
    found = linear_logps(hidden, weight, targets).logps
    assert len(passes) == expected
    truth = token_stats(hidden, weight, targets)[0]
    assert ((found - truth).abs() <= 1e-5 + 2e-6 * truth.abs()).all()


def test_gradients_after_a_second_pass(passes):
    check(*with_logits(torch.linspace(0, 300, V)), torch.randint(V - 30, V, (N,)), cancels=300 / 15)
    assert len(passes) == 4  # two in each of the two calls


@pytest.mark.parametrize("place", [0, SLICE - 1, SLICE, V - 1])
def test_all_but_one_entry_masked(place):
    bias = torch.full((V,), -float("inf"))
    bias[place] = 0.0
    hidden, weight, _ = head()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = linear_logps(hidden, weight, torch.full((N,), place), bias=bias).logps
    assert torch.equal(found, torch.zeros(N))
    found.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_nearly_certain_targets_keep_their_digits():
    # 1 - p is 1e-7: as log p = z - logsumexp(z) it would be a multiple of 2e-6 at these logits
    logits = torch.full((V,), 8.0)
    logits[77] = 30.0
    hidden, weight = with_logits(logits)
    targets = torch.full((N,), 77)
    found, truth = linear_logps(hidden, weight, targets).logps, token_stats(hidden, weight, targets)[0]
    assert ((found - truth).abs() <= 1e-5 * truth.abs()).all()


def test_rows_without_gradient_are_left_out_of_the_tile():
    hidden, weight, targets = head()
    advantages = torch.randn(N)
    # a third is clipped: the ratio is far above 1 + eps where the advantage is positive
    old = linear_logps(hidden, weight, targets).logps - torch.where(torch.arange(N) % 3 == 0, 1.0, 0.0)
    arguments = {"old_logps": old, "cu_seqlens": torch.arange(N + 1), "objective": "grpo"}
    truth = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    ratio = (token_stats(*truth, targets)[0] - old.double()).exp()
    exact = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    exact.backward()
    own = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_policy_loss(*own, targets, advantages, **arguments).loss
    loss.backward()
    assert abs(loss.item() - exact.item()) <= 1e-5
    for mine, right in zip(own, truth):
        assert relative_error(mine.grad, right.grad) <= 3.5e-3


def test_several_tiles_equal_one(monkeypatch):
    hidden, weight, targets = head()
    found = []
    for rows in (plan.CPU_ROWS, 5):
        monkeypatch.setattr(plan, "CPU_BUDGET", 0)
        monkeypatch.setattr(plan, "CPU_ROWS", rows)
        own = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        out = linear_policy_loss(*own, targets, torch.ones(N), cu_seqlens=torch.arange(N + 1))
        out.loss.backward()
        found.append([out.logps, *(tensor.grad for tensor in own)])
    for one, many in zip(*found):
        assert relative_error(many, one) <= 3.5e-3


def test_what_else_is_asked_for_takes_whole_rows():
    hidden, weight, targets = head()
    made = {"hidden": hidden, "weight": weight, "targets": targets}
    where = layout(targets, None, None)

    def suits(*wanted, **changed):
        settings = HeadSettings(None, 1.0, changed.pop("softcap", None), 1.0, None, None)
        given = made | changed
        return streamed.suits(head_inputs(given["hidden"], given["weight"], targets, where, settings), Wanted(*wanted))

    assert suits()
    assert not suits(True)
    assert not suits(softcap=30.0)
    assert not suits(weight=weight.float())


def test_large_pages_are_advised_within_the_tensor(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *arguments: asked.append(arguments))
    small, large = torch.empty(1000), torch.empty(pages.OWN_MAPPING // 4 + 12345)
    assert pages.on_large_pages(small) is small
    assert not asked
    assert pages.on_large_pages(large) is large
    ((start, length, advice),) = asked
    assert start.value % pages.PAGE == length.value % pages.PAGE == 0
    assert large.data_ptr() <= start.value < start.value + length.value <= large.data_ptr() + large.nbytes
    assert length.value > large.nbytes - 2 * pages.PAGE
    assert advice == 14


def test_advice_that_is_refused_changes_nothing():
    tensor = pages.on_large_pages(torch.empty(pages.OWN_MAPPING // 4))  # whatever this machine answers
    assert tensor.fill_(2.0).sum(dtype=torch.float64) == 2.0 * len(tensor)


def test_kernels_that_were_asked_for_are_not_replaced(monkeypatch):
    hidden, weight, targets = head()
    settings = HeadSettings(None, 1.0, None, 1.0, None, None)
    checked = head_inputs(hidden, weight, targets, layout(targets, None, None), settings)
    assert plan.make_plan(checked, Options(), Wanted()).streams
    assert not plan.make_plan(checked, Options(logits_dtype=BF16), Wanted()).streams
    monkeypatch.setattr(plan, "choose_backend", lambda *arguments: "triton")
    monkeypatch.setattr(plan.triton_rows, "why_not_tiled", lambda head: "not here")
    assert not plan.make_plan(checked, Options(backend="triton"), Wanted()).streams
