"""kernels/tiled_logps against float64, at the borders of its blocks, and on the rows that broke its peers."""

import itertools
import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next line does

from repo_ops.kernels import launch
from repo_ops.kernels.launch import interpreting
from repo_ops.kernels.tiled_logps import launches, tiled_launches, tiled_logps

INF = float("inf")
# The unchosen side of a `where` may be inf or NaN: numpy warns of it, a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
EVERYTHING = {"with_entropy": True, "with_sum_p2": True, "with_argmax": True}


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not interpreting():
        pytest.skip("a GPU is present: the kernels run on it, not in the interpreter")
    return request.param


def reference(
    hidden, weight, targets, *, rows=None, bias=None, inv_temperature=1.0, logit_scale=1.0, softcap=None, adapter=None
):
    """Statistics by name, in float64."""
    z = hidden.double() @ weight.double().T
    if adapter is not None:
        z = z + adapter[0].double() @ adapter[1].double().T
    z = z if rows is None else z[rows]
    z = (z if bias is None else z + bias.double()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * (inv_temperature.double()[:, None] if isinstance(inv_temperature, torch.Tensor) else inv_temperature)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    row_max = z.amax(1)
    target = z.gather(1, targets[:, None])[:, 0]
    return {
        "logps": log_p.gather(1, targets[:, None])[:, 0],
        "row_max": row_max,
        "log_sum": z.logsumexp(1) - row_max,
        "entropy": -(p * log_p.masked_fill(p == 0, 0.0)).sum(1),
        "sum_p2": (p * p).sum(1),
        "is_argmax": target == row_max,
    }


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(device, hidden, weight, targets, *, atol=2e-6, **options):
    """Run the kernels with every statistic and compare with the reference; returns what the kernels said."""
    expected = reference(hidden, weight, targets, **options)
    given = {name: moved(value, device) for name, value in options.items()}
    stats = tiled_logps(hidden.to(device), weight.to(device), targets.to(device), **EVERYTHING, **given)
    # beyond |z| = 8, a float32 logit itself is coarser than 1e-6
    coarse = max(1.0, expected["row_max"].abs().max().item() / 8) if len(targets) else 1.0
    for name, value in expected.items():
        got = getattr(stats, name).cpu()
        if name == "is_argmax":
            assert torch.equal(got, value)
            continue
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), value, rtol=3e-7, atol=atol * coarse, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (stats.logps <= 0).all()
    assert (stats.log_sum >= 0).all()
    assert (stats.entropy >= 0).all()
    return stats


def head(N, D, V, dtype=torch.float32, scale=2.0):
    """Hidden states and a weight whose logits have a standard deviation of `scale`, and targets with both ends."""
    targets = torch.randint(0, V, (N,))
    targets[:1], targets[1:2] = 0, V - 1
    return torch.randn(N, D).to(dtype), (torch.randn(V, D) * scale / D**0.5).to(dtype), targets


# In the interpreter a program has 32 rows and 512 entries of the vocabulary, in tiles of 128, in halves of 64.
# 1; a half; a prime below a tile; a share and one entry more; a prime of five shares.
@pytest.mark.parametrize("V", [1, 64, 127, 513, 2111])
@pytest.mark.parametrize("N", [0, 1, 33])
def test_statistics_match_float64(device, N, V):
    check(device, *head(N, 32, V))


# one element, unaligned, a step and one more
@pytest.mark.parametrize("D", [1, 31, 33, 96])
def test_hidden_sizes(device, D):
    check(device, *head(5, D, 130))


def test_row_blocks_beside_a_group_of_them(device):
    """Three blocks of rows in groups of two: the last group is smaller."""
    check(device, *head(70, 16, 600))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_summed_in_float32(device, dtype):
    check(device, *head(5, 96, 300, dtype))


def test_mixed_dtypes(device):
    hidden, weight, targets = head(5, 40, 300)
    check(device, hidden.bfloat16(), weight, targets)
    check(device, hidden.half(), weight.bfloat16(), targets)


OPTIONS = {
    "bias": {"bias": torch.linspace(-2, 2, 600)},
    "bias in bfloat16": {"bias": torch.linspace(-2, 2, 600).bfloat16()},
    "scale": {"logit_scale": 0.0625},
    "negative scale": {"logit_scale": -1.0},
    "temperature": {"inv_temperature": 1 / 0.7},
    "temperature by row": {"inv_temperature": 1 / torch.linspace(0.3, 2.0, 5)},
    "softcap": {"softcap": 5.0},
    "some rows, in any order, one of them twice": {"rows": torch.tensor([3, 3, 39, 0, 17])},
    "adapter": {"adapter": (torch.randn(40, 8), torch.randn(600, 8))},
    "all": {
        "bias": torch.linspace(-2, 2, 600),
        "logit_scale": 0.7,
        "softcap": 3.0,
        "inv_temperature": 1 / torch.linspace(0.3, 2.0, 5),
        "rows": torch.tensor([30, 1, 39, 0, 17]),
        "adapter": (torch.randn(40, 17), torch.randn(600, 17) / 4),
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIONS), ("all", torch.bfloat16)],
)
def test_options_match_float64(device, name, dtype):
    options = dict(OPTIONS[name])
    if "adapter" in options:
        options["adapter"] = tuple(value.to(dtype) for value in options["adapter"])
    hidden, weight, _ = head(40, 24, 600, dtype)
    targets = torch.tensor([0, 599, 17, 511, 512])
    if "rows" not in options:
        hidden = hidden[:5]
        if "adapter" in options:
            options["adapter"] = (options["adapter"][0][:5], options["adapter"][1])
    check(device, hidden, weight, targets, **options)


def test_rows_that_start_anywhere_and_lie_apart(device):
    """Slices of wider and longer buffers: strides other than D, starts off the 16-byte boundaries."""
    hidden, weight, targets = head(9, 50, 300)
    check(device, hidden[2:7, 3:40], weight[:, 13:], targets[2:7])
    check(device, hidden[1::2, :37], weight[::3, :37], targets[1::2] // 3)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_shifted_logits_keep_their_statistics(device, shift):
    """A running max that starts at 0 sees exp(-200) = 0 everywhere and answers log 0 (verl, SkyRL #2141)."""
    hidden, weight, targets = head(3, 16, 600)
    check(device, hidden, weight, targets, bias=torch.full((600,), shift))


def test_vocabulary_that_fills_no_tile(device):
    """Columns past the end must add nothing: exp(0) each lifted log-probabilities by up to 123 (verl #2656, #2899)."""
    hidden, weight, targets = head(3, 16, 129)
    check(device, hidden, weight, targets, bias=torch.full((129,), -90.0))


def test_blocks_of_minus_infinity(device):
    """Masked vocabulary: a first share, a last one, a tile and a half with nothing in them (flash-attention #1930)."""
    V = 1200
    targets = torch.tensor([600, 1, 300])
    for dead in (slice(0, 520), slice(500, 1200), slice(128, 256), slice(64, 128), slice(1, None, 2)):
        bias = torch.zeros(V)
        bias[dead] = -INF
        alive = (bias == 0).nonzero()[:, 0]
        hidden, weight, _ = head(3, 8, V)
        check(device, hidden, weight, alive[targets % len(alive)], bias=bias)


def test_target_without_mass(device):
    hidden, weight, targets = head(2, 8, 70)
    bias = torch.zeros(70)
    bias[targets[0]] = -INF
    stats = check(device, hidden, weight, targets, bias=bias)
    assert stats.logps[0] == -INF


@pytest.mark.parametrize("alive", [0, 63, 64, 511, 512, 1199])
def test_all_but_one_minus_infinity(device, alive):
    weight = torch.full((1200, 1), -INF, device=device)
    weight[alive] = -3.5
    one = torch.ones(1, 1, device=device)
    stats = tiled_logps(one, weight, torch.tensor([alive], device=device), **EVERYTHING)
    assert [field.item() for field in stats] == [0.0, -3.5, 0.0, 0.0, 1.0, True]


def test_a_row_of_nothing_but_minus_infinity_is_nan(device):
    weight = torch.full((130, 1), -INF, device=device)
    stats = tiled_logps(torch.ones(1, 1, device=device), weight, torch.tensor([3], device=device), **EVERYTHING)
    assert stats.logps.isnan()
    assert stats.entropy.isnan()


@pytest.mark.parametrize("miss", [1e-1, 1e-3, 1e-5, 1e-7])
def test_peaked_rows_keep_their_digits(device, miss):
    """p = 1 - 1e-7: the digits of 1 - p, which a float32 sum beside 1 drops."""
    V, target = 1200, 700
    weight = torch.zeros(V, 1)
    weight[target] = math.log((1 - miss) / miss * (V - 1))
    hidden, targets = torch.ones(1, 1), torch.tensor([target])
    expected = reference(hidden, weight, targets)
    stats = tiled_logps(hidden.to(device), weight.to(device), targets.to(device), with_entropy=True)
    # e^-z has the rounding of z in it: 25 * 2^-24
    assert stats.logps.item() == pytest.approx(expected["logps"].item(), rel=3e-6)
    assert stats.entropy.item() == pytest.approx(expected["entropy"].item(), rel=3e-6)
    # where another entry is the peak, the error stays that of a float32 beside 1
    other = check(device, hidden, weight, torch.tensor([3]))
    assert not other.is_argmax.item()


def test_nan_logits_are_not_hidden(device):
    hidden = torch.eye(4, device=device)
    weight = torch.zeros(600, 4, device=device)
    targets = torch.tensor([5, 5, 5, 5], device=device)
    hidden[0, 0] = float("nan")
    bias = torch.zeros(600, device=device)
    stats = tiled_logps(hidden, weight, targets, with_entropy=True)
    assert stats.logps.isnan().tolist() == [True, False, False, False]
    for column in (0, 5, 599):
        bias.zero_()
        bias[column] = float("nan")
        stats = tiled_logps(hidden[1:], weight, targets[1:], bias=bias, with_entropy=True)
        assert stats.logps.isnan().all()
        assert stats.entropy.isnan().all()


def test_ids_outside_the_vocabulary_answer_nan(device):
    hidden, weight, _ = head(5, 8, 50)
    targets = torch.tensor([-1, -100, 50, 2**40, 0], device=device)
    stats = tiled_logps(hidden.to(device), weight.to(device), targets, **EVERYTHING)
    assert stats.logps.isnan().tolist() == [True, True, True, True, False]
    assert stats.is_argmax.tolist()[:4] == [False] * 4
    expected = reference(hidden, weight, torch.zeros(5, dtype=torch.int64))
    for name in ("row_max", "log_sum", "entropy", "sum_p2"):
        torch.testing.assert_close(getattr(stats, name).cpu().double(), expected[name], rtol=3e-7, atol=2e-6)


def test_shards_of_the_vocabulary_join_to_the_whole(device):
    """Each rank's shard knows -1 for the targets of the others; max, sum and the owner's logit make up the whole."""
    hidden, weight, targets = head(6, 16, 700)
    parts = []
    for begin, end in ((0, 300), (300, 301), (301, 700)):
        local = torch.where((targets >= begin) & (targets < end), targets - begin, -1)
        parts.append(tiled_logps(hidden.to(device), weight[begin:end].to(device), local.to(device)))
    lse = torch.stack([part.row_max + part.log_sum for part in parts])
    at_target = torch.stack([part.logps + part.row_max + part.log_sum for part in parts]).nan_to_num(0.0).sum(0)
    expected = reference(hidden, weight, targets)["logps"]
    torch.testing.assert_close((at_target - lse.logsumexp(0)).cpu().double(), expected, rtol=0, atol=5e-6)


def test_what_is_not_asked_for_is_not_there(device):
    hidden, weight, targets = (value.to(device) for value in head(2, 8, 130))
    alone = tiled_logps(hidden, weight, targets)
    assert alone[3:] == (None, None, None)
    names = {"with_entropy": "entropy", "with_sum_p2": "sum_p2", "with_argmax": "is_argmax"}
    for option, name in names.items():
        more = tiled_logps(hidden, weight, targets, **{option: True})
        assert torch.equal(more.logps, alone.logps)
        assert [field for field, value in more._asdict().items() if value is not None][3:] == [name]


def test_same_bits_twice_and_for_any_number_of_rows(device):
    hidden, weight, targets = (value.to(device) for value in head(40, 33, 700))
    first = tiled_logps(hidden, weight, targets, with_entropy=True)
    again = tiled_logps(hidden, weight, targets, with_entropy=True)
    fewer = tiled_logps(hidden[:7], weight, targets[:7], with_entropy=True)
    for a, b, c in zip(first[:4], again[:4], fewer[:4]):
        assert torch.equal(a, b)
        assert torch.equal(a[:7], c)


def test_more_rows_than_a_launch(device, monkeypatch):
    hidden, weight, targets = (value.to(device) for value in head(33, 8, 600))
    options = {**EVERYTHING, "inv_temperature": torch.linspace(0.5, 2, 33, device=device)}
    whole = tiled_logps(hidden, weight, targets, **options)
    by_index = tiled_logps(hidden, weight, targets, rows=torch.arange(33, device=device), **options)
    monkeypatch.setattr(launches, "_ROWS_A_LAUNCH", 16)
    for rows in (None, torch.arange(33, device=device)):
        parts = tiled_logps(hidden, weight, targets, rows=rows, **options)
        for a, b, c in zip(whole, parts, by_index):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            assert torch.equal(a, c)


def test_row_offsets_beyond_two_to_the_31(device, monkeypatch):
    """Rows of hidden and of weight far apart, in 4.3 GB each of address space of which only their pages are touched."""
    D, V = 8, 40
    far = (2**31 + 64) // 8 * 8
    hidden = torch.empty(far + D, dtype=torch.bfloat16, device=device).as_strided((2, D), (far, 1))
    stride = -(-far // (V - 1))
    weight = torch.empty((V - 1) * stride + D, dtype=torch.bfloat16, device=device).as_strided((V, D), (stride, 1))
    assert hidden.stride(0) * 1 > 2**31 < (V - 1) * weight.stride(0)
    near, heads, targets = torch.randn(2, D).bfloat16(), torch.randn(V, D).bfloat16(), torch.tensor([0, V - 1])
    hidden.copy_(near)
    weight.copy_(heads)
    if device == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # after a launch the interpreter copies each storage onto itself, which would touch all of it
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    expected = reference(near, heads, targets)["logps"]
    for rows in (None, torch.tensor([0, 1], device=device)):
        stats = tiled_logps(hidden, weight, targets.to(device), rows=rows)
        torch.testing.assert_close(stats.logps.cpu().double(), expected, rtol=3e-7, atol=2e-6)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("N", [65535, 65536, 2**20])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_grids_of_many_rows(N, architecture):
    """Every program index fits 31 bits and lies on the first axis; memory between the kernels does not grow with N."""
    targets = meta(N, dtype=torch.int64)
    launches, _ = tiled_launches(meta(N, 64), meta(262144, 64), targets, architecture=architecture, with_entropy=True)
    assert len(launches) == 2 * math.ceil(N / 16384)
    assert sum(one.arguments["N"] for one in launches[::2]) == N
    for one in launches:
        assert 0 < one.programs < 2**31
        assert one.arguments["partial"].numel() * 4 < 16 * 2**20
    config = launches[0].config
    assert launches[0].programs == math.ceil(16384 / config.block) * math.ceil(262144 / config.share)


def test_more_rows_than_a_grid_dimension_of_16_bits(device):
    if device == "cpu":
        pytest.skip("65537 interpreted rows take minutes; test_grids_of_many_rows reads the grids instead")
    hidden, weight, targets = (value.to(device) for value in head(65537, 16, 30))
    expected = torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(tiled_logps(hidden, weight, targets).logps, expected, rtol=0, atol=1e-5)


def test_the_table_fits_its_architectures():
    tabled = [
        (arch, dtype) for kernel, arch, dtype in launch.TABLE if kernel == "tiled_logps" and arch != "interpreter"
    ]
    assert {arch for arch, _ in tabled} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    # sm_86 and sm_89 take the row of sm_80 and have 99 KiB
    for arch, dtype in [*tabled, *itertools.product(("sm_86", "sm_89", "sm_103", "sm_121"), ("bfloat16", "float32"))]:
        dtype = getattr(torch, dtype.replace("*", "bfloat16"))
        config = launch.launch_config("tiled_logps", arch, dtype)
        assert config.share % config.columns == 0
        assert config.tile_bytes(dtype.itemsize) <= launch.shared_memory_limit(arch), (arch, dtype)
    assert launch.launch_config("tiled_logps", "sm_90", torch.float32).depth == 16
    assert launch.shared_memory_limit("sm_200") == 65536


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, "hidden: expected a matrix"),
        ({"hidden": torch.zeros(2, 8).double()}, TypeError, "hidden: expected float32, bfloat16 or float16"),
        ({"hidden": torch.zeros(8, 2).T}, ValueError, "hidden: expected contiguous rows, got column stride 2"),
        ({"hidden": torch.zeros(3, 8)}, ValueError, r"targets: expected shape \[3\] like the rows of hidden"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight: expected shape \[V >= 1, 8\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight: expected shape \[V >= 1, 8\]"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets: expected int64, got int32"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, ValueError, r"rows: expected shape \[2\]"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \[5\]"),
        ({"inv_temperature": -1.0}, ValueError, "inv_temperature: expected a finite number above 0, got -1.0"),
        ({"inv_temperature": torch.ones(3)}, ValueError, r"inv_temperature: expected shape \[2\]"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0"),
        ({"adapter": (torch.zeros(2, 3), torch.zeros(5, 4))}, ValueError, r"adapter\[1\]: expected shape"),
        ({"adapter": (torch.zeros(1, 3), torch.zeros(5, 3))}, ValueError, r"adapter\[0\]: expected 2 rows"),
        ({"adapter": (torch.zeros(2, 3).half(),) * 2}, ValueError, r"adapter\[0\]: expected 2 rows of torch.float32"),
    ],
)
def test_bad_arguments_are_named(device, change, error, message):
    options = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(5, 8), "targets": torch.zeros(2, dtype=torch.int64)}
    given = {name: moved(value, device) for name, value in (options | change).items()}
    with pytest.raises(error, match=message):
        tiled_logps(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)
