"""The three matrix products against float64, for every pair of dtypes, into memory that held NaN before."""

import dataclasses
import itertools
import sys

import pytest
import torch
from truth import relative_error
from watch import Watch

from repo_ops import get_objective, linear_policy_loss
from repo_ops.head import gemm

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = list(itertools.product([F32, BF16, F16, F64], repeat=2))
ROWS, DIM, V = 5, 24, 301
# What the operands of the gradient products lose: 16-bit pairs may round dlogits to 16 bits, as GPUs do.
LOSSES = {BF16: 4e-3, F16: 1e-6, F32: 1e-6, F64: 1e-12}


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    # 100 rows of a slice, so that three slices and an uneven last one are used
    monkeypatch.setattr(gemm, "SLICE_BYTES", 100 * DIM * 4)
    monkeypatch.setattr(gemm, "THREAD_SLICE_BYTES", 100 * DIM * 4 // torch.get_num_threads())
    monkeypatch.setattr(gemm, "THREAD_SLICE_ENTRIES", 1)


def operands(hidden_dtype, weight_dtype):
    return torch.randn(ROWS, DIM).to(hidden_dtype), torch.randn(V, DIM).to(weight_dtype)


def exact(*dtypes):
    found = F32
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=str)
def test_logits(hidden_dtype, weight_dtype):
    hidden, weight = operands(hidden_dtype, weight_dtype)
    tile = torch.full((ROWS, V), float("nan"), dtype=exact(hidden_dtype, weight_dtype))
    gemm.logits_(tile, hidden, weight)
    # 16-bit operands are multiplied exactly: nothing but the float32 sum rounds
    assert relative_error(tile, hidden.double() @ weight.double().t()) <= (1e-12 if tile.dtype == F64 else 1e-6)


@pytest.mark.parametrize(("capability", "products"), [("AVX2", 4), ("AVX512", 1)])
@pytest.mark.parametrize("add", [False, True])
def test_float32_logits_are_made_in_slices_where_the_library_is_slow_at_all_of_them(
    monkeypatch, capability, products, add
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    hidden, weight = operands(F32, F32)
    before = torch.randn(ROWS, V)
    tile = before.clone()
    with Watch() as watch:
        gemm.logits_(tile, hidden, weight, add=add)
    assert len(watch.products) == products
    assert relative_error(tile, hidden.double() @ weight.double().t() + add * before.double()) <= 1e-6


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=str)
def test_hidden_gradient(hidden_dtype, weight_dtype):
    hidden, weight = operands(hidden_dtype, weight_dtype)
    dlogits = torch.randn(ROWS, V, dtype=exact(hidden_dtype, weight_dtype))
    found = gemm.hidden_grad(dlogits, hidden, weight)
    assert found.dtype == dlogits.dtype
    bound = LOSSES[hidden_dtype] if hidden_dtype == weight_dtype else LOSSES[found.dtype]
    assert relative_error(found, dlogits.double() @ weight.double()) <= bound


@pytest.mark.parametrize(("rows", "dim"), [(1, 24), (3, 24), (24, 8)])
def test_few_rows_or_columns_are_not_summed_term_by_term(rows, dim):
    # all of one sign, as probabilities are: the worst case for a sum in one go, of as many terms as a real vocabulary
    dlogits, weight = torch.randn(rows, 151665).softmax(-1), torch.rand(151665, dim)
    found = gemm.hidden_grad(dlogits, torch.zeros(rows, dim), weight)
    assert relative_error(found, dlogits.double() @ weight.double()) <= 1e-6


def test_hidden_gradients_leave_the_vendors_product_in_float32(monkeypatch):
    # as on a GPU, where parts of a 16-bit result may be added up in 16 bits
    asked = {}

    def mm(left, right, **options):
        asked.update(options)
        return left.float() @ right.float()

    monkeypatch.setattr(gemm, "_vendor_writes", lambda *_: True)
    monkeypatch.setattr(torch, "mm", mm)
    hidden, weight = operands(BF16, BF16)
    dlogits = torch.randn(ROWS, V).bfloat16()
    assert relative_error(gemm.hidden_grad(dlogits, hidden, weight), dlogits.double() @ weight.double()) <= 1e-6
    assert asked == {"out_dtype": torch.float32}


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=str)
def test_weight_gradient_writes_first_and_then_adds(hidden_dtype, weight_dtype):
    hidden, weight = operands(hidden_dtype, weight_dtype)
    dtype = exact(hidden_dtype, weight_dtype)
    total, truth = torch.full((V, DIM), float("nan"), dtype=dtype), torch.zeros(V, DIM, dtype=F64)
    for first in (True, False):
        dlogits = torch.randn(ROWS, V, dtype=dtype)
        gemm.add_weight_grad_(total, dlogits, hidden, weight, first=first)
        truth += dlogits.double().t() @ hidden.double()
    bound = LOSSES[hidden_dtype] if hidden_dtype == weight_dtype else LOSSES[dtype]
    assert relative_error(total, truth) <= bound


@pytest.mark.parametrize("tile_dtype", [BF16, F16])
def test_cce_14_sums_of_sixteen_bit_tiles_stay_in_float32(tile_dtype):
    # 200 equal contributions: a 16-bit running sum would stop growing at 256 times one of them and lose 3 % before
    hidden, weight = torch.ones(1, DIM, dtype=tile_dtype), torch.ones(V, DIM, dtype=tile_dtype)
    total = torch.full((V, DIM), float("nan"))
    for i in range(200):
        gemm.add_weight_grad_(total, torch.full((1, V), 1.01, dtype=tile_dtype), hidden, weight, first=i == 0)
    one = torch.tensor(1.01, dtype=tile_dtype).item()
    torch.testing.assert_close(total, torch.full((V, DIM), 200 * one), rtol=1e-5, atol=0)


def test_a_weight_stored_transposed():
    hidden, weight = torch.randn(ROWS, DIM), torch.randn(DIM, V).t()
    tile = torch.full((ROWS, V), float("nan"))
    gemm.logits_(tile, hidden, weight)
    assert relative_error(tile, hidden.double() @ weight.double().t()) <= 1e-6


def test_the_precision_of_other_products_is_left_alone():
    # the switch is process-wide: it must be back after the call, also after one that fails
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    before = matmul.fp32_precision
    hidden, weight = operands(BF16, BF16)
    gemm.logits_(torch.empty(ROWS, V), hidden, weight)
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        gemm.logits_(torch.empty(ROWS, V), hidden[:, 1:], weight)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("reduction", ["token-mean", "token-sum"])
def test_float16_dlogits_keep_what_small_probabilities_carry(monkeypatch, reduction):
    # as on a GPU, where the gradient products have float16 operands: 1 / rows times p is below their smallest numbers,
    # and a sum's gradients times the number of rows are above their largest
    module = sys.modules["repo_ops.linear_policy_loss"]
    make_plan = module.make_plan
    on_gpu = {"gradient_dtype": torch.float16}
    monkeypatch.setattr(module, "make_plan", lambda *arguments: dataclasses.replace(make_plan(*arguments), **on_gpu))
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 256, 16).half().requires_grad_(), (0.1 * torch.randn(5003, 16)).half()
    targets, weight = torch.randint(0, 5003, (1, 256)), weight.requires_grad_()
    advantages, count = (torch.ones(1), 256) if reduction == "token-mean" else (torch.full((1,), 300.0), 1 / 300)
    objective = get_objective("grpo", reduction=reduction)
    loss = linear_policy_loss(hidden, weight, targets, advantages, objective=objective).loss
    scale = 2.0**12 * count / 256  # of a gradient scaler
    found = torch.autograd.grad(loss * scale, [hidden, weight])
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logps = (wide[0] @ wide[1].T).log_softmax(-1).gather(-1, targets[..., None])
    for ours, truth in zip(found, torch.autograd.grad(-scale / count * logps.sum(), wide)):
        assert (ours.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_processor_without_products_of_16_bits(monkeypatch, dtype):
    # there the products go through float32 operands, slice by slice; both roads agree with float64
    monkeypatch.setattr(gemm, "_cpu_multiplies", lambda dtype: False)
    monkeypatch.setattr(gemm, "PRODUCT_BYTES", 100 * DIM * 4)
    hidden, weight = operands(dtype, dtype)
    z = hidden.double() @ weight.double().t()
    tile, twice = torch.empty(2, ROWS, V, dtype=dtype)
    gemm.logits_(tile, hidden, weight)
    gemm.logits_(twice.copy_(tile), hidden, weight, add=True)
    rounding = torch.finfo(dtype).eps
    assert relative_error(tile, z) <= rounding
    assert relative_error(twice, 2 * z) <= 2 * rounding
    assert relative_error(gemm.hidden_grad(tile, hidden, weight), tile.double() @ weight.double()) <= 1e-6
    total = torch.full((V, DIM), float("nan"))
    for first in (True, False):
        gemm.add_weight_grad_(total, tile, hidden, weight, first=first)
    assert relative_error(total, 2 * tile.double().t() @ hidden.double()) <= 1e-6
