"""kernels/tune.py: what it tries, what it keeps, and that a call is the same with it and without."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next line does

from repo_ops.kernels import launch, tune
from repo_ops.kernels.clipped_ratio import clipped_ratio
from repo_ops.kernels.launch import interpreting
from repo_ops.kernels.logit_rows import row_grads_, row_stats, stats_launch
from repo_ops.kernels.tiled_logps import tiled_logps

KERNELS = ("row_stats", "row_grads", "ratio_tokens", "ratio_sequences", "tiled_logps", "tiled_logps_uneven")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "xpu", "sm_200")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit_the_device_and_hold_the_row_of_the_table(kernel, architecture):
    for dtype in (torch.float32, torch.bfloat16):
        found = tune.candidates(kernel, architecture, dtype)
        assert len(found) == len(set(found)) >= 3
        assert launch.launch_config(kernel, architecture, dtype) in found
        limit = launch.shared_memory_limit(architecture)
        assert all(config.tile_bytes(dtype.itemsize) <= limit for config in found)
        for config in found:
            # powers of two, as tl.arange asks; shares of whole tiles, and warps that can divide the block
            for size in (config.block, config.columns, config.depth, config.num_warps):
                assert size & (size - 1) == 0
            assert config.columns == 0 or config.share % config.columns == 0


def test_large_tiles_stay_away_from_small_shared_memory():
    large = max(config.tile_bytes(2) for config in tune.candidates("tiled_logps", "sm_90", torch.bfloat16))
    assert launch.shared_memory_limit("sm_120") < large <= launch.shared_memory_limit("sm_90")


def make(config):
    tile = torch.zeros(2, 40, device="meta")
    return stats_launch(tile, tile.new_zeros(2, dtype=torch.int64), config=config, architecture="sm_90")


def test_the_fastest_is_kept_and_printed_as_a_row(capsys):
    wanted = tune.candidates("row_stats", "sm_90", torch.float32)[2]

    def milliseconds(launches, device):
        (one,) = launches
        assert one.arguments["BLOCK"] == one.config.block
        return 1.5 if one.config == wanted else 2.5

    best = tune.fastest("row_stats", "sm_90", torch.float32, make, torch.device("cpu"), milliseconds=milliseconds)
    assert (best.block, best.num_warps) == (wanted.block, wanted.num_warps)
    assert best.device == "cpu"
    printed = capsys.readouterr().err
    row = printed.split("  # ")[0]
    names = {"Config": launch.Config}
    assert eval("{" + row + "}", names) == {("row_stats", "sm_90", "float32"): best}
    assert "1.5 ms; the table's row 2.5 ms" in printed


def test_a_candidate_that_does_not_fit_is_passed_over():
    def milliseconds(launches, device):
        if launches[0].config.num_warps > 4:
            raise tune.triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 1.0

    best = tune.fastest("row_stats", "sm_90", torch.float32, make, torch.device("cpu"), milliseconds=milliseconds)
    assert best.num_warps == 4
    with pytest.raises(RuntimeError, match="row_stats: no candidate configuration runs on cpu"):
        tune.fastest("row_stats", "sm_90", torch.float32, make, torch.device("cpu"), milliseconds=_never)


def _never(launches, device):
    raise tune.triton.runtime.errors.OutOfResources(2, 1, "shared memory")


def everything():
    """What every kernel that can be tuned says of one input."""
    torch.manual_seed(0)
    tile, targets = torch.randn(3, 300), torch.tensor([0, 7, 299])
    stats = row_stats(tile, targets)
    found = [*stats[:3], row_grads_(tile.clone(), targets, stats, torch.ones(3))]
    for D in (64, 20):
        found += tiled_logps(torch.randn(3, D), torch.randn(300, D), targets)[:3]
    token, starts = torch.randn(40), torch.tensor([0, 15, 40])
    for level in ("token", "sequence"):
        sizes = None if level == "token" else starts
        options = {"old_logps": token + 0.1, "low": 0.8, "high": 1.2, "level": level, "cu_seqlens": sizes}
        found += clipped_ratio(token, -token, **options)[:3]
    return found


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.skipif(not interpreting(), reason="a GPU is present: its own times would choose")
def test_tuning_is_off_by_default_and_leaves_the_numbers_alone(monkeypatch, capsys):
    plain = everything()
    assert tune._CHOSEN == {}
    monkeypatch.setenv("REPO_OPS_TUNE", "1")
    monkeypatch.setattr(tune, "_CHOSEN", {})
    timed = []

    def milliseconds(launches, device):
        # runs what it times, as a benchmark would: nothing that it writes may reach the call's own tensors
        if launches[0].kernel.__name__ != "row_stats_kernel":
            for one in launches:
                one.run(device)
        timed.append(launches[0].config)
        return len(timed) * 1.0

    few = {
        "row_stats": 3,
        "row_grads": 2,
        "ratio_tokens": 2,
        "ratio_sequences": 1,
        "tiled_logps": 1,
        "tiled_logps_uneven": 1,
    }
    monkeypatch.setattr(tune, "candidates", lambda k, a, d: [launch.launch_config(k, a, d)] * few[k])
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    tuned = everything()
    assert {kernel for kernel, _, _ in tune._CHOSEN} == set(KERNELS)
    assert len(timed) == sum(few.values())
    assert capsys.readouterr().err.count("ms; the table's row") == len(KERNELS)
    for a, b in zip(plain, tuned):
        assert torch.equal(a, b)
    everything()
    assert len(timed) == sum(few.values())  # each is timed once a process


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is present")
    assert tune.main() == 2
    assert "expected a GPU that torch can use, found none" in capsys.readouterr().err
