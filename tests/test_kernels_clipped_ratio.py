"""kernels/clipped_ratio.py against float64 autograd, worked numbers, and its rules at ties, overflow, empty rows."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next line does

from repo_ops.kernels.clipped_ratio import clipped_ratio
from repo_ops.kernels.launch import interpreting

INF = float("inf")
# The unchosen side of a `where` may be inf or NaN: numpy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# Around the interpreter's block of 64 and its double, with empty sequences first, in the middle and last.
LENGTHS = (0, 1, 63, 64, 0, 65, 130, 0)


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not interpreting():
        pytest.skip("a GPU is present: the kernels run on it, not in the interpreter")
    return request.param


def starts_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def reference(
    logps, advantages, *, old_logps, low, high, level="token", cu_seqlens=None, delta=None,
    ref_logps=None, kl="k3", beta=0.0, weights=None, kl_weights=None, correction=None,
):  # fmt: skip
    """(loss, dlogps, ratio) in float64 by autograd, a loop over sequences, no tie handling."""
    logps = logps.double().requires_grad_()
    log_ratio = logps - logps.detach() if old_logps is None else logps - old_logps.double()
    if level == "token":
        ratio = log_ratio.exp()
    else:
        parts = []
        for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
            own = log_ratio[begin:end]
            if level == "sequence" and end > begin:
                parts.append(own.mean().exp().expand(end - begin))
            elif level == "prefix":
                least = [0.0, *(own[:t].min().item() for t in range(1, end - begin))][: end - begin]
                parts.append((own + torch.tensor(least, dtype=torch.float64)).exp())
        ratio = torch.cat(parts)
    clipped = ratio
    if low is not None:
        clipped = torch.maximum(clipped, torch.as_tensor(low, dtype=torch.float64))
    if high is not None:
        clipped = torch.minimum(clipped, torch.as_tensor(high, dtype=torch.float64))
    surrogate = -torch.minimum(ratio * advantages.double(), clipped * advantages.double())
    if delta is not None:
        capped = torch.minimum(surrogate, -advantages.double() * delta)
        surrogate = torch.where(advantages < 0, capped, surrogate)
    weight = torch.ones_like(logps) if weights is None else weights.double()
    kl_weight = weight if kl_weights is None else kl_weights.double()
    loss = weight * surrogate if correction is None else weight * correction.double() * surrogate
    if ref_logps is not None:
        x = ref_logps.double() - logps
        loss = loss + beta * kl_weight * {"k1": -x, "k2": x * x / 2, "k3": x.exp() - x - 1}[kl]
    loss.sum().backward()
    return loss.detach(), logps.grad, ratio.detach()


def packed(lengths=LENGTHS, spread=0.3):
    """Tokens of one batch. A spread of 0.3 in log-ratio puts about half of the tokens outside [0.8, 1.2]."""
    cu_seqlens = starts_of(lengths)
    N = int(cu_seqlens[-1])
    logps = -torch.rand(N) * 3
    return {
        "logps": logps,
        "advantages": torch.randn(N),
        "old_logps": logps + spread * torch.randn(N),
        "ref_logps": logps + spread * torch.randn(N),
        "weights": torch.rand(N),
        "kl_weights": torch.rand(N),
        "correction": torch.rand(N) * 2,
    }, cu_seqlens


def run(device, logps, advantages, **options):
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    result = clipped_ratio(logps.to(device), advantages.to(device), **moved)
    return type(result)(*(None if field is None else field.cpu() for field in result))


@pytest.mark.parametrize("level", ["token", "sequence", "prefix"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_value_and_gradient_match_float64(device, level, kl):
    data, cu_seqlens = packed()
    options = {"low": 0.8, "high": 1.28, "delta": 1.5, "level": level, "kl": kl, "beta": 0.04, "cu_seqlens": cu_seqlens}
    if level == "sequence":  # means of 64 log-ratios lie near 0: the bounds do too, or nothing is clipped
        options |= {"low": 0.99, "high": 1.01, "delta": 1.02}
    got = run(device, **data, **options)
    loss, dlogps, ratio = reference(**data, **options)
    torch.testing.assert_close(got.ratio.double(), ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got.dlogps.double(), dlogps, rtol=2e-6, atol=1e-6)
    assert got.clipped_low.any()
    assert got.clipped_high.any()
    assert got.clipped_delta.any()


@pytest.mark.parametrize("level", ["token", "sequence", "prefix"])
@pytest.mark.parametrize("absent", ["old_logps", "ref_logps", "weights", "kl_weights", "correction", "low", "high"])
def test_each_argument_may_be_absent(device, level, absent):
    data, cu_seqlens = packed((3, 70))
    options = {"low": 0.9, "high": 1.1, "beta": 0.1, "level": level, "cu_seqlens": cu_seqlens, **data}
    options[absent] = None
    got = run(device, **options)
    loss, dlogps, ratio = reference(**options)
    torch.testing.assert_close(got.ratio.double(), ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got.dlogps.double(), dlogps, rtol=2e-6, atol=1e-6)
    assert (got.kl is None) == (absent == "ref_logps")
    assert got.clipped_delta is None


@pytest.mark.parametrize("level", ["token", "sequence", "prefix"])
def test_bounds_and_lengths_may_differ_by_token(device, level):
    data, cu_seqlens = packed((5, 66))
    N = data["logps"].numel()
    options = {"low": 1 - torch.rand(N) / 3, "high": 1 + torch.rand(N) / 3, "level": level}
    options["cu_seqlens"] = cu_seqlens.long()  # int64 starts as well as int32
    got = run(device, **data, **options)
    loss, dlogps, _ = reference(**data, **options)
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got.dlogps.double(), dlogps, rtol=2e-6, atol=1e-6)


# Two rows of three and four tokens, worked by hand to eight digits in float64; each row's weight is 1 / (2 T).
LOGPS = torch.tensor([-0.9, -0.35, -2.1, -1.6, -1.9, -0.2, -0.5])
OLD = torch.tensor([-1.0, -0.8, -1.5, -1.5, -1.4, -1.5, -0.8])
REF = torch.tensor([-1.1, -0.5, -1.8, -1.2, -1.7, -0.6, -0.4])
ADVANTAGES = torch.tensor([0.8] * 3 + [-0.6] * 4)
BY_ROW = torch.tensor([1 / 6] * 3 + [1 / 8] * 4)
BY_TOKEN = torch.full((7,), 1 / 7)
WORKED = {
    "one ratio a token, both sides clipped": (
        {"low": 0.8, "high": 1.2, "weights": BY_ROW},
        0.123768460,
        (-0.14735612, 0, -0.07317488, 0.06786281, 0, 0.27519725, 0.10123941),
    ),
    "with k3": (
        {"low": 0.8, "high": 1.2, "weights": BY_ROW, "ref_logps": REF, "beta": 0.04, "kl": "k3"},
        0.125240702,
        (-0.14614766, 0.00092861, -0.07550728, 0.06540368, -0.00110701, 0.27684565, 0.10071356),
    ),
    "dual clip": (
        {"low": 0.8, "high": 1.28, "weights": BY_TOKEN, "delta": 3.0},
        None,
        (-0.12630525, 0, -0.06272133, 0.07755749, 0, 0, 0.11570218),
    ),
    "one ratio a sequence": (
        {"low": 1 - 3e-4, "high": 1 + 4e-4, "weights": BY_ROW, "level": "sequence"},
        -0.008180957,
        (-0.13112953,) * 3 + (0.09630191,) * 4,
    ),
    "minimum of the prefix": (
        {"low": 0.8, "high": 1.28, "weights": BY_TOKEN, "level": "prefix"},
        0.065157743,
        (-0.12630525, 0, -0.06931779, 0.07755749, 0, 0.19076065, 0.07017692),
    ),
}


@pytest.mark.parametrize("case", WORKED)
def test_worked_numbers(device, case):
    options, loss, dlogps = WORKED[case]
    got = run(device, LOGPS, ADVANTAGES, old_logps=OLD, cu_seqlens=torch.tensor([0, 3, 7]), **options)
    torch.testing.assert_close(got.dlogps, torch.tensor(dlogps), rtol=0, atol=1e-7)
    if loss is not None:
        assert got.loss.sum().item() == pytest.approx(loss, abs=1e-7)


def test_ratio_of_one_keeps_its_gradient_even_with_closed_bounds(device):
    advantages = torch.tensor([2.0, -3.0])
    for old_logps in (None, torch.tensor([-1.0, -2.0])):
        got = run(device, torch.tensor([-1.0, -2.0]), advantages, old_logps=old_logps, low=1.0, high=1.0, delta=1.0)
        assert got.dlogps.tolist() == [-2.0, 3.0]
        assert got.loss.tolist() == [-2.0, 3.0]
        assert not got.clipped_low.any()
        assert not got.clipped_high.any()
        assert not got.clipped_delta.any()


def test_ratio_equal_to_a_bound_keeps_its_gradient(device):
    # the bounds are the float32 ratios that the kernel itself computes, so both ties are exact
    logps, old_logps = torch.tensor([-1.0, -1.0]), torch.tensor([-1.25, -0.75])
    high, low = run(device, logps, logps, old_logps=old_logps, low=None, high=None).ratio.tolist()
    got = run(device, logps, torch.tensor([1.0, -1.0]), old_logps=old_logps, low=low, high=high)
    assert got.dlogps.tolist() == [-high, low]
    assert not (got.clipped_high | got.clipped_low).any()


@pytest.mark.parametrize("level", ["token", "sequence", "prefix"])
def test_overflowing_ratios_never_make_nan(device, level):
    """exp(200) is inf in float32: where nothing asks for such a ratio, it must leave exact zeros, not inf * 0."""
    logps = torch.tensor([-0.1] * 6)
    old_logps = logps - 200
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, -1.0])
    options = {"weights": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0]), "correction": torch.tensor([1.0] * 5 + [0.0])}
    options |= {"level": level, "cu_seqlens": torch.arange(7), "low": 0.8, "high": 1.25, "delta": 3.0}
    got = run(device, logps, advantages, old_logps=old_logps, **options)
    assert got.loss.tolist() == [-1.25, 3.0, 0.0, 0.0, 0.0, 0.0]
    assert got.dlogps.tolist() == [0.0] * 6
    assert got.clipped_high.tolist() == [True] + [False] * 5
    # unbounded above and A < 0: the largest ratio there is, exp(70), in value and gradient; a sum stays a number
    unbounded = run(device, logps, advantages, old_logps=old_logps, **(options | {"delta": None}))
    assert unbounded.loss[1].item() == pytest.approx(math.exp(70), rel=1e-5)
    assert unbounded.dlogps[1].item() == pytest.approx(math.exp(70), rel=1e-5)


def test_zero_advantage_and_zero_weight_silence_nan(device):
    nan = float("nan")
    logps = torch.tensor([nan, -1.0, -1.0, nan])
    old_logps = torch.tensor([-1.0, nan, nan, -1.0])
    options = {"old_logps": old_logps, "low": 0.8, "high": 1.2, "ref_logps": torch.full((4,), nan), "beta": 1.0}
    options |= {"weights": torch.tensor([1.0, 1.0, 0.0, 1.0]), "kl_weights": torch.zeros(4)}
    got = run(device, logps, torch.tensor([0.0, 0.0, 5.0, 5.0]), **options)
    assert got.loss[:3].tolist() == [0.0, 0.0, 0.0]
    assert got.dlogps[:3].tolist() == [0.0, 0.0, 0.0]
    assert got.loss[3].isnan()  # a NaN that carries weight is not hidden
    assert got.dlogps[3].isnan()


def test_small_k3_keeps_its_digits(device):
    logps = torch.full((4,), -1.0)
    ref_logps = logps + torch.tensor([1e-3, -1e-3, 0.05, -0.05])
    got = run(device, logps, torch.zeros(4), old_logps=None, low=None, high=None, ref_logps=ref_logps, beta=1.0)
    x = ref_logps.double() - logps.double()
    torch.testing.assert_close(got.kl.double(), torch.expm1(x) - x, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.dlogps.double(), -torch.expm1(x), rtol=1e-6, atol=0)


def test_nothing_to_do(device):
    empty = torch.empty(0)
    for level, cu_seqlens in (("token", None), ("sequence", torch.zeros(4).int()), ("prefix", torch.zeros(1).int())):
        got = run(device, empty, empty, old_logps=empty, low=0.8, high=1.2, level=level, cu_seqlens=cu_seqlens)
        assert got.loss.shape == got.dlogps.shape == (0,)


def test_starts_past_the_tokens_read_nothing_there(device):
    """A wrong cu_seqlens must not make the kernel touch memory after the tensors: one spare element shows it."""
    storage = torch.full((5,), 7.0)
    logps = storage[:4].to(device)
    got = clipped_ratio(
        logps, torch.ones(4, device=device), old_logps=logps.clone(), low=0.8, high=1.2, level="sequence",
        cu_seqlens=torch.tensor([0, 2**20], device=device),
    )  # fmt: skip
    assert got.ratio.tolist() == [1.0] * 4


def test_same_bits_twice(device):
    data, cu_seqlens = packed()
    options = {**data, "low": 0.8, "high": 1.2, "beta": 0.1, "level": "sequence", "cu_seqlens": cu_seqlens}
    first, second = run(device, **options), run(device, **options)
    assert torch.equal(first.dlogps, second.dlogps)
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"level": "batch"}, ValueError, "level: expected"),
        ({"kl": "k4"}, ValueError, "kl: expected one of k1, k2, k3"),
        ({"low": 1.1}, ValueError, "low: expected a ratio of at most 1"),
        ({"high": 0.2}, ValueError, "high: expected a ratio of at least 1"),
        ({"delta": 0.5}, ValueError, "delta: expected at least 1"),
        ({"delta": float("nan")}, ValueError, "delta: expected"),
        ({"beta": INF}, ValueError, "beta: expected a finite number"),
        ({"level": "sequence"}, ValueError, "cu_seqlens: expected"),
        ({"level": "prefix", "cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected int32 or int64"),
        ({"old_logps": torch.zeros(3)}, ValueError, r"old_logps: expected shape \[4\]"),
        ({"weights": torch.zeros(4).double()}, TypeError, "weights: expected float32"),
        ({"advantages": torch.zeros(4, 1)}, ValueError, "advantages: expected shape"),
        ({"high": torch.ones(5)}, ValueError, r"high: expected shape \[4\]"),
        ({"correction": 2.0}, TypeError, "correction: expected a float32 tensor, got float"),
    ],
)
def test_bad_arguments_are_named(device, change, error, message):
    options = {"advantages": torch.zeros(4), "old_logps": None, "low": 0.8, "high": 1.2} | change
    with pytest.raises(error, match=message):
        run(device, torch.zeros(4), **options)
