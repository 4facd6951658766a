"""kernels/logit_rows.py against float64, at its block and alignment borders, and on the rows that broke its peers."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next line does

from repo_ops.kernels import launch
from repo_ops.kernels.launch import interpreting
from repo_ops.kernels.logit_rows import RowStats, grads_launch, row_grads_, row_stats

INF = float("inf")
# The unchosen side of a `where` may be inf or NaN: numpy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Rounding of the stored gradient, relative to the element. The interpreter cuts float32 to bfloat16 (error below 2^-7)
# where a GPU rounds to nearest (2^-8; test_kernels_aot.py looks for the rounding instruction).
ROUNDING = {
    torch.float32: 2e-6,
    torch.float16: 2**-11 + 2e-6,
    torch.bfloat16: (2**-7 if interpreting() else 2**-8) + 2e-6,
}


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not interpreting():
        pytest.skip("a GPU is present: the kernels run on it, not in the interpreter")
    return request.param


def reference(tile, targets, dlogps, dentropy, *, bias=None, inv_temperature=1.0, logit_scale=1.0, softcap=None):
    """Statistics by name and d sum(dlogps * logps + dentropy * entropy) / d tile, all in float64 by autograd."""
    x = tile.double().requires_grad_()
    z = (x if bias is None else x + bias.double()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * (inv_temperature.double()[:, None] if isinstance(inv_temperature, torch.Tensor) else inv_temperature)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    logps = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(1)
    (dlogps.double() * logps + dentropy.double() * entropy).sum().backward()
    row_max = z.detach().amax(1)
    stats = {
        "logps": logps.detach(),
        "row_max": row_max,
        "log_sum": z.detach().logsumexp(1) - row_max,
        "entropy": entropy.detach(),
        "sum_p2": (p * p).sum(1).detach(),
        "is_argmax": z.detach().gather(1, targets[:, None])[:, 0] == row_max,
    }
    return stats, x.grad


def check(device, tile, targets, out_dtype=None, atol=1e-6, **options):
    """Run both kernels on a copy of `tile` and compare with the reference; returns (stats, gradient)."""
    C = len(tile)
    dlogps, dentropy = torch.randn(C), torch.randn(C)
    expected, dtile = reference(tile, targets, dlogps, dentropy, **options)
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    own = torch.empty_strided(tile.shape, tile.stride(), dtype=tile.dtype, device=device).copy_(tile)
    ids = targets.to(device)
    stats = row_stats(own, ids, with_entropy=True, with_sum_p2=True, with_argmax=True, **moved)
    # beyond |z| = 8, a float32 logit itself is coarser than 1e-6
    coarse = max(1.0, expected["row_max"].abs().max().item() / 8) if C else 1.0
    for name, value in expected.items():
        got = getattr(stats, name).cpu()
        if name == "is_argmax":
            assert torch.equal(got, value)
            continue
        assert got.dtype == torch.float32
        # 3e-7 of the value: two roundings of the float32 that holds it
        torch.testing.assert_close(
            got.double(), value, rtol=3e-7, atol=atol * coarse, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (stats.logps <= 0).all()
    assert (stats.log_sum >= 0).all()
    assert (stats.entropy >= 0).all()
    grads = row_grads_(own, ids, stats, dlogps.to(device), dentropy.to(device), out_dtype=out_dtype, **moved)
    assert grads.dtype == (out_dtype or tile.dtype)
    assert grads.data_ptr() == own.data_ptr()
    size = dtile.abs().amax().item() if dtile.numel() else 0.0
    rounding = ROUNDING[grads.dtype]
    tiny = 2.0**-24 if grads.dtype == torch.float16 else 0.0  # below 2^-14 float16 steps by 2^-24
    torch.testing.assert_close(grads.cpu().double(), dtile, rtol=rounding, atol=1e-6 * coarse * size + tiny)
    return stats, grads.cpu()


# 1; below a warp's worth; prime and below one block of 16384; three whole blocks, a real vocabulary (SmolLM2).
@pytest.mark.parametrize("V", [1, 127, 5003, 49152])
@pytest.mark.parametrize("C", [0, 1, 7, 65])
def test_statistics_and_gradient_match_float64(device, C, V):
    check(device, torch.randn(C, V) * 2, torch.randint(0, V, (C,)))


OPTIONS = {
    "bias": {"bias": torch.linspace(-2, 2, 5003)},
    "bias in bfloat16": {"bias": torch.linspace(-2, 2, 5003).bfloat16()},
    "scale": {"logit_scale": 0.0625},
    "temperature": {"inv_temperature": 1 / 0.7},
    "temperature by row": {"inv_temperature": 1 / torch.linspace(0.3, 2.0, 5)},
    "softcap": {"softcap": 5.0},
    "all": {
        "bias": torch.linspace(-2, 2, 5003),
        "logit_scale": 0.7,
        "softcap": 3.0,
        "inv_temperature": 1 / torch.linspace(0.3, 2.0, 5),
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIONS), ("all", torch.bfloat16), ("all", torch.float16)],
)
def test_options_match_float64(device, name, dtype):
    check(device, (torch.randn(5, 5003) * 3).to(dtype), torch.tensor([0, 5002, 17, 4096, 4095]), **OPTIONS[name])


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 127, 5003, 49152])
def test_half_precision_gradient_in_the_front_half_of_each_row(device, V, out_dtype):
    _, grads = check(device, torch.randn(3, V) * 2, torch.randint(0, V, (3,)), out_dtype=out_dtype)
    assert grads.shape == (3, V)
    row_stride = torch.empty(3, V).view(out_dtype).stride(0)
    assert row_grads_view_stride(V, out_dtype, device) == (row_stride, 1)


def row_grads_view_stride(V, out_dtype, device):
    tile, ids, ones = torch.zeros(3, V, device=device), torch.zeros(3, dtype=torch.int64, device=device), None
    stats = row_stats(tile, ids)
    ones = torch.ones(3, device=device)
    return row_grads_(tile, ids, stats, ones, out_dtype=out_dtype).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_rows_that_start_anywhere_and_lie_apart(device, offset, dtype, out_dtype):
    """Starts off the 16-byte boundaries, a stride other than V, and not one element outside the rows changed."""
    C, V, gap = 4, 16384 + 130, 9
    buffer = torch.full((offset + C * (V + gap),), 123.0, dtype=dtype, device=device)
    tile = buffer[offset:].as_strided((C, V), (V + gap, 1), offset)
    tile.copy_(torch.randn(C, V, device=device))
    ids, dlogps, dentropy = torch.tensor([0, V - 1, 16384, 16383]), torch.randn(C), torch.randn(C)
    dlogps[2] = dentropy[2] = 0.0
    expected, dtile = reference(tile.cpu(), ids, dlogps, dentropy)
    ids = ids.to(device)
    stats = row_stats(tile, ids, with_entropy=True)
    torch.testing.assert_close(stats.logps.cpu().double(), expected["logps"], rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(stats.entropy.cpu().double(), expected["entropy"], rtol=3e-7, atol=1e-6)
    outside = torch.ones(len(buffer), dtype=torch.bool)
    outside.as_strided((C, V), (V + gap, 1), offset).fill_(False)
    grads = row_grads_(tile, ids, stats, dlogps.to(device), dentropy.to(device), out_dtype=out_dtype)
    torch.testing.assert_close(grads.cpu().double(), dtile, rtol=ROUNDING[grads.dtype], atol=1e-6)
    assert (buffer.cpu()[outside] == 123.0).all()


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_shifted_logits_keep_their_statistics(device, shift):
    """A running max that starts at 0 sees exp(-200) = 0 everywhere and answers log 0 (verl, SkyRL #2141)."""
    tile = torch.randn(3, 5003) + shift
    check(device, tile, torch.tensor([0, 2500, 5002]))


def test_blocks_of_minus_infinity(device):
    """Masked vocabulary: a first block, a last block and a middle with nothing in them (flash-attention #1930)."""
    V = 49152
    tile = torch.randn(4, V)
    tile[0, :20000] = -INF
    tile[1, 30000:] = -INF
    tile[2, 16384:32768] = -INF
    tile[3, 1::2] = -INF
    targets = torch.tensor([20000, 29999, 0, 49150])
    _, grads = check(device, tile, targets)
    assert (grads[tile == -INF] == 0).all()


@pytest.mark.parametrize("alive", [0, 16383, 16384, 49151])
def test_all_but_one_minus_infinity(device, alive):
    tile = torch.full((1, 49152), -INF, device=device)
    tile[0, alive] = -3.5
    targets = torch.tensor([alive], device=device)
    stats = row_stats(tile, targets, with_entropy=True, with_sum_p2=True, with_argmax=True)
    assert [field.item() for field in stats] == [0.0, -3.5, 0.0, 0.0, 1.0, True]
    ones = torch.ones(1, device=device)
    assert (row_grads_(tile, targets, stats, ones, ones) == 0).all()


@pytest.mark.parametrize("miss", [1e-1, 1e-3, 1e-5, 1e-7])
def test_peaked_rows_keep_their_digits(device, miss):
    """p = 1 - 1e-7: the digits of 1 - p, which a float32 sum beside 1 drops and a bfloat16 p loses (fla #1231)."""
    V, target = 5003, 4000
    tile = torch.zeros(1, V)
    tile[0, target] = math.log((1 - miss) / miss * (V - 1))
    ids, ones = torch.tensor([target]), torch.ones(1)
    expected, dtile = reference(tile, ids, ones, torch.zeros(1))
    for out_dtype in (torch.float32, torch.bfloat16):
        own = tile.clone().to(device)
        stats = row_stats(own, ids.to(device), with_entropy=True)
        # e^-z has the rounding of z in it: 25 * 2^-24
        assert stats.logps.item() == pytest.approx(expected["logps"].item(), rel=3e-6)
        assert stats.entropy.item() == pytest.approx(expected["entropy"].item(), rel=3e-6)
        grads = row_grads_(own, ids.to(device), stats, ones.to(device), out_dtype=out_dtype).cpu().double()
        for column in (0, target):
            rounded = pytest.approx(dtile[0, column].item(), rel=3e-6 + ROUNDING[out_dtype])
            assert grads[0, column].item() == rounded


def test_probability_that_underflows(device):
    """Far columns get 0 and not NaN from p log p; a far target still gets its whole gradient."""
    tile = torch.zeros(1, 300, device=device)
    tile[0, 5] = 500.0
    targets = torch.tensor([7], device=device)
    stats = row_stats(tile, targets, with_entropy=True)
    assert stats.logps.item() == -500.0
    assert stats.entropy.item() == 0.0
    grads = row_grads_(tile, targets, stats, torch.full((1,), 2.0, device=device), torch.ones(1, device=device))
    assert grads[0, 7] == 2.0
    assert grads[0, 5] == -2.0
    assert grads.count_nonzero() == 2


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_without_gradient_are_exact_zeros(device, out_dtype):
    tile = torch.randn(4, 16384 + 5, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    stats = row_stats(tile, targets, with_entropy=True)
    tile[1] = float("nan")  # never read
    dlogps = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
    dentropy = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    grads = row_grads_(tile, targets, stats, dlogps, dentropy, out_dtype=out_dtype)
    assert (grads[:2] == 0).all()
    assert (grads[2:] != 0).any(dim=1).all()


def test_what_is_not_asked_for_is_not_there(device):
    tile, targets = torch.randn(2, 40, device=device), torch.tensor([0, 39], device=device)
    alone = row_stats(tile, targets)
    assert alone.entropy is None
    assert alone.sum_p2 is None
    assert alone.is_argmax is None
    for option, name in {"with_entropy": "entropy", "with_sum_p2": "sum_p2", "with_argmax": "is_argmax"}.items():
        more = row_stats(tile, targets, **{option: True})
        assert torch.equal(more.logps, alone.logps)
        assert [field for field, value in more._asdict().items() if value is not None][3:] == [name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_of_likely_and_of_tied_targets(device, dtype):
    tile = torch.randn(64, 700).to(dtype)
    top = tile.argmax(1)
    tile[32:48, 650] = tile[32:48].amax(1)  # a tie: both are the largest
    targets = torch.where(torch.arange(64) % 2 == 0, top, (top + 1) % 700)
    targets[32:48] = 650
    expected = tile.gather(1, targets[:, None])[:, 0] == tile.amax(1)
    assert 40 <= expected.sum() < 64
    found = row_stats(tile.to(device), targets.to(device), with_argmax=True, softcap=30.0, inv_temperature=0.7)
    assert torch.equal(found.is_argmax.cpu(), expected)


@pytest.mark.parametrize("temperature", [0.6, 0.7, 1.3])
def test_the_likeliest_token_keeps_its_digits_at_any_temperature(device, temperature):
    # its logit times 1 / temperature is not exact, and must meet itself as it was rounded
    tile = torch.randn(256, 700)
    top = tile.argmax(1)
    tile[torch.arange(256), top] = temperature * (20 + torch.rand(256))
    exact = (tile.double() * (1 / temperature)).log_softmax(1).gather(1, top[:, None])[:, 0]
    found = row_stats(tile.to(device), top.to(device), with_argmax=True, inv_temperature=1 / temperature)
    assert found.is_argmax.all()
    torch.testing.assert_close(found.logps.cpu().double(), exact, rtol=1e-4, atol=0)


def test_gradient_without_entropy(device):
    tile, targets, dlogps = torch.randn(3, 5003), torch.tensor([1, 2, 3]), torch.randn(3)
    _, dtile = reference(tile, targets, dlogps, torch.zeros(3))
    own = tile.clone().to(device)
    grads = row_grads_(own, targets.to(device), row_stats(own, targets.to(device)), dlogps.to(device))
    torch.testing.assert_close(grads.cpu().double(), dtile, rtol=1e-6, atol=1e-6)


def test_ids_outside_the_vocabulary_answer_nan(device):
    tile = torch.zeros(4, 50, device=device)
    stats = row_stats(tile, torch.tensor([-100, 50, 2**40, 0], device=device))
    assert stats.logps.isnan().tolist() == [True, True, True, False]
    assert stats.log_sum.isfinite().all()


def test_nan_logits_are_not_hidden(device):
    tile = torch.zeros(3, 20000, device=device)
    tile[0, 0] = tile[1, 19999] = float("nan")
    stats = row_stats(tile, torch.tensor([5, 5, 5], device=device), with_entropy=True)
    assert stats.logps.isnan().tolist() == [True, True, False]
    assert stats.entropy.isnan().tolist() == [True, True, False]


def test_same_bits_twice_and_for_any_neighbours(device):
    tile, targets = torch.randn(6, 5003, device=device), torch.arange(6, device=device)
    first = row_stats(tile, targets, with_entropy=True)
    again = row_stats(tile, targets, with_entropy=True)
    assert torch.equal(first.logps, again.logps)
    assert torch.equal(first.entropy, again.entropy)
    # a row's blocks start at its 16-byte boundary, so equal alignment means equal bits wherever the row lies
    other = row_stats(tile[4:5], targets[4:5], with_entropy=True)
    assert torch.equal(first.logps[4:5], other.logps)


def test_row_offsets_beyond_two_to_the_31(device, monkeypatch):
    """Two rows 2^31 + 64 elements apart in 4.3 GB of address space, of which only the pages of the rows are touched."""
    V, stride = 300, 2**31 + 64
    buffer = torch.empty(stride + V, dtype=torch.bfloat16, device=device)
    tile = buffer.as_strided((2, V), (stride, 1))
    rows = torch.randn(2, V).bfloat16()
    tile.copy_(rows)
    if device == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # after a launch the interpreter copies each storage onto itself, which would touch all 4.3 GB
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    targets, dlogps, dentropy = torch.tensor([0, V - 1]), torch.randn(2), torch.randn(2)
    expected, dtile = reference(rows, targets, dlogps, dentropy)
    ids = targets.to(device)
    stats = row_stats(tile, ids, with_entropy=True)
    torch.testing.assert_close(stats.logps.cpu().double(), expected["logps"], rtol=3e-7, atol=1e-6)
    grads = row_grads_(tile, ids, stats, dlogps.to(device), dentropy.to(device))
    torch.testing.assert_close(grads.cpu().double(), dtile, rtol=ROUNDING[torch.bfloat16], atol=1e-6)


def test_more_rows_than_a_grid_dimension_of_16_bits(device):
    """65536 rows broke a kernel with rows on the y axis of its grid (Liger #1294)."""
    if device == "cpu":
        pytest.skip("65537 interpreted programs take minutes; test_kernels_aot.py checks that grids are 1-D")
    tile, targets = torch.randn(65537, 3, device=device), torch.zeros(65537, dtype=torch.int64, device=device)
    torch.testing.assert_close(row_stats(tile, targets).logps, tile.log_softmax(1)[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tile": torch.zeros(4)}, ValueError, r"tile: expected shape \[C, V\]"),
        ({"tile": torch.zeros(2, 0)}, ValueError, "tile: expected shape .* V >= 1"),
        ({"tile": torch.zeros(2, 8).double()}, TypeError, "tile: expected float32, bfloat16 or float16"),
        ({"tile": torch.zeros(8, 2).T}, ValueError, "tile: expected contiguous rows, got column stride 2"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets: expected shape \[2\], got \[3\]"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets: expected int64, got int32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \[8\]"),
        ({"inv_temperature": -1.0}, ValueError, "inv_temperature: expected a finite number above 0, got -1.0"),
        ({"inv_temperature": torch.ones(3)}, ValueError, r"inv_temperature: expected shape \[2\]"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(device, change, error, message):
    options = {"tile": torch.zeros(2, 8), "targets": torch.zeros(2, dtype=torch.int64)} | change
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    with pytest.raises(error, match=message):
        row_stats(moved.pop("tile"), moved.pop("targets"), **moved)


def test_bad_gradient_arguments_are_named(device):
    tile, targets = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    ones = torch.ones(2, device=device)
    stats = row_stats(tile, targets)
    with pytest.raises(ValueError, match="stats: expected entropy where dentropy is given"):
        row_grads_(tile, targets, stats, ones, ones)
    with pytest.raises(ValueError, match="out_dtype: expected"):
        row_grads_(tile, targets, stats, ones, out_dtype=torch.float64)
    with pytest.raises(ValueError, match="out_dtype: expected"):
        row_grads_(tile.half(), targets, stats, ones, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows that do not overlap"):
        row_grads_(tile[:1].expand(2, 8), targets, stats, ones)
    with pytest.raises(ValueError, match=r"dlogps: expected shape \[2\]"):
        row_grads_(tile, targets, stats, ones[:1])


@pytest.mark.parametrize("architecture", ["gfx1100", "xpu"])
def test_no_narrowing_in_place_where_a_barrier_does_not_order_memory(architecture):
    tile, ids, vector = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    given = RowStats(vector, vector, vector)
    grads_launch(tile, ids, given, vector, architecture=architecture)
    with pytest.raises(ValueError, match=rf"out_dtype: expected torch.float32 on {architecture}.*; convert a copy"):
        grads_launch(tile, ids, given, vector, out_dtype=torch.bfloat16, architecture=architecture)


def test_launch_table_serves_every_architecture():
    for kernel in {name for name, _, _ in launch.TABLE}:
        for architecture in (
            "sm_75",
            "sm_80",
            "sm_86",
            "sm_89",
            "sm_90",
            "sm_103",
            "sm_121",
            "gfx90a",
            "gfx950",
            "xpu",
        ):
            assert launch.launch_config(kernel, architecture, torch.float32).block > 0
    assert launch.launch_config("row_stats", "sm_89", torch.float32).device == "A100"
    assert launch.launch_config("row_stats", "sm_103", torch.bfloat16).device == "B200"
    assert launch.launch_config("row_grads", "gfx950", torch.float16).num_warps == 4
    with pytest.raises(KeyError, match="no launch configuration"):
        launch.launch_config("nothing", "sm_90", torch.float32)
