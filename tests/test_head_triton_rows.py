"""backend="triton" by the public functions: the same numbers as backend="torch", and as float64, to 1e-5."""

import dataclasses
import sys

import pytest
import torch
from truth import leaf, make_case, relative_error

from repo_ops import Options, get_objective, linear_logps, linear_policy_loss, linear_stats
from repo_ops.head import triton_rows

# The unchosen side of a `where` may be inf or NaN: numpy warns of it, a GPU does not.
WHY_NOT = triton_rows.why_not(torch.zeros(1), torch.float32)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TRITON, TORCH = Options(backend="triton"), Options(backend="torch")


def stats(case, options):
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    found = linear_logps(
        hidden, weight, case.targets, bias=bias, mask=case.mask, with_entropy=True, options=options, **case.head
    )
    (found.logps.sum() + 0.5 * found.entropy.sum()).backward()
    return [*(t.detach() for t in found), *(t.grad for t in (hidden, weight, bias) if t is not None)]


# one entry, unaligned, and more than one block of the interpreter's kernels
@pytest.mark.parametrize("V", [1, 127, 5003])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("head", [{}, {"temperature": 0.6}, {"softcap": 5.0, "logit_scale": 2.0}], ids=str)
def test_linear_logps(V, shape, head):
    case = make_case(*shape, 8, V, bias=True, **head)
    for a, b in zip(stats(case, TRITON), stats(case, TORCH)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bit_inputs(dtype):
    case = make_case(2, 3, 16, 301, dtype=dtype)
    logps, entropy, grads = case.stats(torch.ones(2, 3), torch.full((2, 3), 0.5))
    found = stats(case, TRITON)
    torch.testing.assert_close(found[0].double(), logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1].double(), entropy, rtol=0, atol=1e-5)
    for grad, name in zip(found[2:], ("hidden", "weight")):
        assert relative_error(grad, grads[name]) <= {BF16: 4e-3, F16: 1e-3}[dtype], name


def test_where_a_barrier_does_not_order_memory_a_copy_is_converted(monkeypatch):
    from repo_ops.kernels import launch
    from repo_ops.kernels.logit_rows import gradients

    case = make_case(2, 3, 16, 301, dtype=BF16)
    in_place = stats(case, TRITON)
    for module in (launch, gradients):  # which refuses there
        monkeypatch.setattr(module, "narrows_in_place", lambda architecture: False)
    for a, b in zip(stats(case, TRITON), in_place):
        # the interpreter cuts where it converts in the kernel
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=1e-4)


def test_per_token_temperature_with_rows_left_out():
    case = make_case(3, 4, 8, 127, lengths=[4, 0, 3], temperature=torch.linspace(0.5, 2, 12).reshape(3, 4))
    for a, b in zip(stats(case, TRITON), stats(case, TORCH)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_temperature_and_a_bias_in_float64_around_a_head_in_float32():
    case = make_case(2, 3, 16, 127, bias=True, temperature=torch.linspace(0.5, 2, 6).double().reshape(2, 3))
    case = dataclasses.replace(case, bias=case.bias.double())
    for a, b in zip(stats(case, TRITON), stats(case, TORCH)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# what a GPU's plan asks for: gradients of the inputs' dtype, whatever that of the logits
@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "tolerance"), [(torch.float64, F32, 1e-5), (F32, BF16, 2e-2), (F32, F16, 3e-3)]
)
def test_logits_of_a_lower_precision_than_the_inputs(dtype, logits_dtype, tolerance, monkeypatch):
    module = sys.modules["repo_ops.linear_stats"]
    make_plan = module.make_plan
    monkeypatch.setattr(
        module, "make_plan", lambda *arguments: dataclasses.replace(make_plan(*arguments), gradient_dtype=dtype)
    )
    case = make_case(2, 3, 16, 301, dtype=dtype)
    logps, entropy, grads = case.stats(torch.ones(2, 3), torch.full((2, 3), 0.5))
    found = stats(case, Options(backend="triton", logits_dtype=logits_dtype))
    torch.testing.assert_close(found[0].double(), logps, rtol=0, atol=5 * tolerance)
    torch.testing.assert_close(found[1].double(), entropy, rtol=0, atol=5 * tolerance)
    for grad, name in zip(found[2:], ("hidden", "weight")):
        assert grad.dtype == dtype
        assert relative_error(grad, grads[name]) <= tolerance, name


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("grpo", {}),
        ("dapo", {"beta": 0.1, "entropy_coef": 0.01}),
        ("cispo", {}),
        ("gspo", {"eps_low": 0.1, "eps_high": 0.1}),
        ("repo", {"beta": 0.04}),
    ],
)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_linear_policy_loss(name, hyper, trained):
    case = make_case(3, 5, 8, 301, lengths=[5, 0, 4], replayed=1)
    loss, logps, _, grads = case.loss(objective=name, **hyper)
    hidden, weight = leaf(case.hidden), leaf(case.weight, trained)
    found = linear_policy_loss(
        hidden,
        weight,
        case.targets,
        case.advantages,
        objective=get_objective(name, **hyper),
        mask=case.mask,
        old_logps=case.old_logps,
        ref_logps=case.ref_logps,
        off_policy=case.off_policy,
        options=TRITON,
    )
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(found.logps[case.mask].double(), logps[case.mask], rtol=0, atol=1e-5)
    assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5
    assert (weight.grad is not None) == trained
    if trained:
        assert relative_error(weight.grad, grads["weight"]) <= 1e-5


def test_many_tiles():
    case = make_case(2, 5, 8, 127)
    whole, parts = [
        stats(case, Options(backend="triton", memory_budget=budget)) for budget in (32 << 20, (4 << 20) + 3000)
    ]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("hyper", "advantage"),
    [
        ({}, 1.0),  # clipped
        ({"sampler_weight": "token_mask", "sampler_max": 2.0}, -1.0),  # masked
        ({}, -1.0),  # neither: bounded before it overflows
    ],
    ids=["clipped", "masked", "kept"],
)
def test_overflowing_ratios(hyper, advantage):
    case = make_case(2, 3, 8, 127)
    case.old_logps[0, 1] = -200.0
    sampler = case.old_logps.index_fill(1, torch.tensor([1]), -300.0)
    results = []
    for options in (TRITON, TORCH):
        hidden = leaf(case.hidden)
        found = linear_policy_loss(
            hidden,
            case.weight,
            case.targets,
            torch.full((2,), advantage),
            objective=get_objective("grpo", **hyper),
            old_logps=case.old_logps,
            sampler_logps=sampler if hyper else None,
            options=options,
        )
        found.loss.backward()
        assert found.loss.isfinite()
        results.append((found.loss.detach(), hidden.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_reference_of_replayed_rows_is_not_looked_at():
    case = make_case(2, 4, 8, 127, replayed=1, spread=80.0)
    case.ref_logps[1] = 0.0  # some 300 nats above
    hidden = leaf(case.hidden)
    found = linear_policy_loss(
        hidden,
        case.weight,
        case.targets,
        case.advantages,
        objective=get_objective("repo", beta=0.1),
        old_logps=case.old_logps,
        ref_logps=case.ref_logps,
        off_policy=case.off_policy,
        options=TRITON,
    )
    found.loss.backward()
    assert (found.logps[1] < -89).any()
    assert hidden.grad.isfinite().all()


def test_nearly_certain_rows_keep_their_gradient():
    # p = 1 - 1e-7: as in the PyTorch arithmetic, 1 - p must not be a difference of sums
    V = 301
    hidden, weight = torch.randn(1, 4, 16), torch.randn(V, 16) * 0.01
    bias = torch.zeros(V).index_fill(0, torch.tensor([7]), torch.tensor((V - 1) * 1e7).log().item())
    grads = []
    for dtype, function in ((F32, "op"), (torch.float64, "truth")):
        h, w = (t.clone().to(dtype).requires_grad_() for t in (hidden, weight))
        if function == "op":
            logps = linear_logps(h, w, torch.full((1, 4), 7), bias=bias, options=TRITON).logps
        else:
            logps = (h @ w.t() + bias.double()).log_softmax(-1)[..., 7]
        logps.sum().backward()
        grads.append((logps.detach(), h.grad, w.grad))
    for found, truth in zip(*grads):
        assert relative_error(found, truth) <= 1e-5


def test_same_bits_on_every_run():
    case = make_case(2, 3, 8, 127)
    assert all(torch.equal(a, b) for a, b in zip(stats(case, TRITON), stats(case, TRITON)))


def test_objectives_over_float64_inputs_with_float32_logits():
    case = make_case(2, 3, 16, 127, dtype=torch.float64)
    losses = []
    for backend in ("triton", "torch"):
        options = Options(backend=backend, logits_dtype=F32)
        hidden = leaf(case.hidden)
        loss = linear_policy_loss(hidden, case.weight, case.targets, case.advantages, options=options).loss
        losses.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for a, b in zip(*losses):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


PER_TOKEN = {"temperature": torch.linspace(0.5, 2, 80).double().reshape(2, 40)}


@pytest.mark.parametrize(
    "head", [{}, {"temperature": 0.6, "softcap": 5.0, "logit_scale": 2.0}, PER_TOKEN], ids=["plain", "all", "per_token"]
)
def test_a_tight_budget_takes_the_forward_without_logits(head, monkeypatch):
    case = make_case(2, 40, 8, 5003, bias=True, lengths=[40, 33], **head)
    # about 50 rows of logits beside what is fixed
    tight = Options(backend="triton", memory_budget=(11 if "softcap" in head else 5) << 20)
    calls = []
    tiled = triton_rows.tiled_stats
    monkeypatch.setattr(triton_rows, "tiled_stats", lambda *arguments: calls.append(1) or tiled(*arguments))
    for a, b in zip(stats(case, tight), stats(case, TORCH)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls
    adapter = (torch.randn(2, 40, 2), torch.randn(5003, 2))
    both = [
        linear_stats(
            case.hidden, case.weight, case.targets, mask=case.mask, adapter=adapter, options=options, **case.head
        )
        for options in (tight, TORCH)
    ]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
