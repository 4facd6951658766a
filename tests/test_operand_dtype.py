"""Operands of products in fewer bits, by autocast or by Options(operand_dtype=...): nothing else is rounded."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from truth import leaf, make_case, relative_error, token_stats

from repo_ops import Options, get_objective, linear_logps, linear_policy_loss
from repo_ops.head import triton_rows

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BOTH = pytest.mark.parametrize("asked_by", ["autocast", "options"])
WHY_NOT = triton_rows.why_not(torch.zeros(1), F32)


def asked(by, dtype=BF16, **options):
    """(autocast, options) that round operands to `dtype`."""
    return torch.autocast("cpu", dtype=dtype, enabled=by == "autocast"), Options(
        operand_dtype=dtype if by == "options" else None, **options
    )


def rounded(x, dtype=BF16):
    return x.to(dtype) if x.dtype == F32 else x


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F16, F32), (F32, F16), (BF16, BF16)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@BOTH
def test_values_and_gradients_are_those_of_rounded_operands(dtype, weight_dtype, needs, asked_by):
    case = make_case(1, 5, 128, 5003, dtype=dtype, weight_dtype=weight_dtype)
    given = [leaf(x, need) for x, need in zip((case.hidden, case.weight), needs)]
    exact = [leaf(rounded(x), need) for x, need in zip((case.hidden, case.weight), needs)]
    autocast, options = asked(asked_by)
    with autocast:
        logps, entropy = linear_logps(*given, case.targets, with_entropy=True, options=options)
    want, want_entropy = token_stats(*exact, case.targets)
    torch.testing.assert_close(logps.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=1e-5)
    (logps.sum() + 0.1 * entropy.sum()).backward()
    (want.sum() + 0.1 * want_entropy.sum()).backward()
    for mine, truth, need in zip(given, exact, needs):
        assert (mine.grad is not None) == need
        if need:
            assert mine.grad.dtype == mine.dtype
            assert relative_error(mine.grad, truth.grad) <= 3.5e-3


@BOTH
def test_an_adapter_is_rounded_with_the_head(asked_by):
    case, g = make_case(2, 4, 32, 211), torch.Generator().manual_seed(1)
    low, up = torch.randn(2, 4, 3, generator=g), torch.randn(211, 3, generator=g)
    given, exact = [], []
    for x in (case.hidden, case.weight, low, up):
        given.append(leaf(x))
        exact.append(leaf(rounded(x).double()))
    autocast, options = asked(asked_by)
    with autocast:
        found = linear_logps(*given[:2], case.targets, adapter=tuple(given[2:]), options=options).logps
    hidden, weight, low, up = exact
    want = (hidden @ weight.T + low @ up.T).log_softmax(-1).gather(-1, case.targets[..., None])[..., 0]
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)
    found.sum().backward()
    want.sum().backward()
    for mine, truth in zip(given, exact):
        assert mine.grad.dtype == F32
        assert relative_error(mine.grad, truth.grad) <= 4e-3


@pytest.mark.parametrize("name", ["dapo", "gspo", "repo"])
@pytest.mark.parametrize("accumulate", [False, True])
@BOTH
def test_a_loss_over_rounded_operands(name, accumulate, asked_by):
    case = make_case(3, 5, 64, 997, bias=True, lengths=[5, 0, 3])
    autocast, options = asked(asked_by, accumulate_weight_grad=accumulate)
    copy = dataclasses.replace(case, hidden=rounded(case.hidden).float(), weight=rounded(case.weight).float())

    def run(case, options):
        leaves = [leaf(x) for x in (case.hidden, case.weight, case.bias)]
        found = linear_policy_loss(
            *leaves[:2], case.targets, case.advantages, bias=leaves[2], objective=name, mask=case.mask,
            old_logps=case.old_logps, options=options,
        )  # fmt: skip
        return found, leaves

    with autocast:
        found, given = run(case, options)
    want, exact = run(copy, None)
    found.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(found.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logps, want.logps, rtol=0, atol=1e-5)
    for mine, truth in zip(given, exact):
        assert mine.grad.dtype == F32
        assert relative_error(mine.grad, truth.grad) <= 4e-3


def test_over_a_support_gathered_rows_are_rounded_and_the_head_is_not_copied():
    case = make_case(2, 4, 64, 127)
    everything, found = torch.arange(127).expand(2, 4, 127), []
    for support in (None, everything):
        hidden, weight = leaf(case.hidden), leaf(case.weight)
        with torch.autocast("cpu", dtype=BF16), Copies() as copies:
            logps = linear_logps(hidden, weight, case.targets, support_ids=support).logps
        assert (case.weight.shape in copies.shapes) == (support is None)
        logps.sum().backward()
        assert hidden.grad.dtype == weight.grad.dtype == F32
        found.append((logps.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for tiles, gathered in zip(found[0][1:], found[1][1:]):  # gathered products are made in float32
        assert relative_error(tiles, gathered) <= 3.5e-3


class Copies(TorchDispatchMode):
    """Shapes of all bfloat16 copies, and the storages of those that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.shapes, self.made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is BF16:
            self.shapes.append(out.shape)
            self.made.append(weakref.ref(out))
        return out

    def alive(self):
        return [copy.shape for ref in self.made if (copy := ref()) is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_copies_live_no_longer_than_a_sweep(checkpointed):
    case = make_case(1, 5, 32, 211)
    hidden, weight = leaf(case.hidden), leaf(case.weight)

    def score(hidden):
        return linear_logps(hidden, weight, case.targets).logps

    with torch.autocast("cpu", dtype=BF16), Copies() as copies:
        logps = checkpoint(score, hidden, use_reentrant=False) if checkpointed else score(hidden)
        assert copies.shapes.count(weight.shape) == 1
        assert copies.alive() == []
        logps.sum().backward()
        assert copies.shapes.count(weight.shape) == (3 if checkpointed else 2)
        assert copies.alive() == []
    plain = leaf(case.hidden)
    with torch.autocast("cpu", dtype=BF16):
        linear_logps(plain, case.weight, case.targets).logps.sum().backward()
    assert torch.equal(hidden.grad, plain.grad)


def test_float64_is_not_rounded():
    case = make_case(1, 5, 16, 127, dtype=F64)
    want = linear_logps(case.hidden, case.weight, case.targets).logps
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(linear_logps(case.hidden, case.weight, case.targets).logps, want)
    options = Options(operand_dtype=F32)
    assert torch.equal(linear_logps(case.hidden, case.weight, case.targets, options=options).logps, want)


@BOTH
def test_float16_operands_under_a_gradient_scaler(asked_by):
    case = make_case(2, 6, 32, 211)
    case.advantages.mul_(1e-4)  # gradients that float16 cannot hold, before the scaler
    autocast, options = asked(asked_by, F16)
    found, exact = [], []
    for leaves, dtype in ((found, F32), (exact, F64)):
        leaves += [leaf(rounded(x, F16).to(dtype) if dtype is F64 else x) for x in (case.hidden, case.weight)]
    with autocast:
        loss = linear_policy_loss(*found, case.targets, case.advantages, options=options).loss
    (loss * 2.0**16).backward()
    (linear_policy_loss(*exact, case.targets, case.advantages).loss * 2.0**16).backward()
    for mine, truth in zip(found, exact):
        assert relative_error(mine.grad, truth.grad) <= 1e-3


@BOTH
def test_float16_operands_do_not_add_to_a_gradient_in_place(asked_by):
    # they are formed scaled on a GPU, and weight.grad holds what is not
    case = make_case(1, 4, 16, 37)
    autocast, options = asked(asked_by, F16, accumulate_weight_grad=True)
    weight = leaf(case.weight)
    with autocast, pytest.raises(ValueError, match=r"options.accumulate_weight_grad: expected operands of bfloat16 or"):
        linear_policy_loss(case.hidden, weight, case.targets, case.advantages, options=options)
    assert weight.grad is None


def test_a_graph_traced_without_autocast_is_not_that_with_it():
    case = make_case(1, 5, 16, 127)

    def score(hidden):
        return linear_logps(hidden, case.weight, case.targets).logps

    torch._dynamo.reset()
    traced = torch.compile(score, fullgraph=True, backend="aot_eager")
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            assert torch.equal(traced(case.hidden), score(case.hidden)), enabled
    with torch.autocast("cpu", dtype=BF16):
        assert not torch.equal(
            traced(case.hidden),
            linear_logps(case.hidden, case.weight, case.targets, options=Options(operand_dtype=F32)).logps,
        )


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_kernels_take_rounded_operands(dtype):
    case = make_case(2, 3, 16, 301)
    found = []
    for backend in ("triton", "torch"):
        leaves = [leaf(case.hidden), leaf(case.weight)]
        options = Options(backend=backend, operand_dtype=dtype)
        loss = linear_policy_loss(
            *leaves, case.targets, case.advantages, objective=get_objective("grpo"), old_logps=case.old_logps,
            options=options,
        ).loss  # fmt: skip
        loss.backward()
        found.append((loss.detach(), *(x.grad for x in leaves)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for kernels, plain in zip(found[0][1:], found[1][1:]):
        assert kernels.dtype == F32
        assert relative_error(kernels, plain) <= 4e-3
