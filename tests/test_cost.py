"""Predicted costs, against numbers worked by hand and published ones."""

import json

import pytest

from repo_ops import cli
from repo_ops.cost import DEVICES, METHODS, head_shape, predict

ONE_SWEEP, H100 = METHODS["repo-ops, one sweep"], DEVICES["H100"]


def test_three_passes_at_the_published_shape():
    # 3 * 2 * 8192 * 4096 * 128256 = 25.8 TFLOP at 728 TFLOP/s: 35.5 ms; 8 bytes a logit at 3.0 TB/s: 2.8 ms
    cost = predict(ONE_SWEEP, H100, 8192, 4096, 128256, frozen=False)
    assert cost.gemm_milliseconds == pytest.approx(35.5, abs=0.1)
    assert cost.milliseconds == pytest.approx(35.5 + 2.8, abs=0.1)
    assert cost.milliseconds / cost.gemm_milliseconds <= 1.15


def test_small_tiles_make_the_weight_gradient_bound_by_bandwidth():
    small = predict(ONE_SWEEP, H100, 8192, 4096, 128256, frozen=False, rows=256)
    large = predict(ONE_SWEEP, H100, 8192, 4096, 128256, frozen=False, rows=2048)
    assert small.milliseconds > 1.3 * large.milliseconds
    assert small.tile_bytes == large.tile_bytes / 8


def test_a_frozen_head_saves_a_pass_and_its_gradient():
    frozen = predict(ONE_SWEEP, H100, 8192, 4096, 128256, frozen=True)
    trained = predict(ONE_SWEEP, H100, 8192, 4096, 128256, frozen=False)
    assert frozen.gemm_milliseconds == pytest.approx(trained.gemm_milliseconds * 2 / 3)
    assert frozen.gradient_bytes == 2 * 8192 * 4096


def test_full_logits_grow_with_the_tokens_and_a_tile_does_not():
    sizes = [predict(METHODS["full logits"], H100, n, 4096, 151936, frozen=False).tile_bytes for n in (8192, 16384)]
    tiles = [predict(ONE_SWEEP, H100, n, 4096, 151936, frozen=False).tile_bytes for n in (8192, 16384)]
    assert sizes[1] == 2 * sizes[0] == 2 * 12 * 8192 * 151936
    assert tiles[0] == tiles[1] == 4 * 2048 * 151936


def test_the_shape_comes_from_a_name_or_a_folder(tmp_path):
    assert head_shape("Qwen/Qwen3-8B") == (4096, 151936)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 7, "vocab_size": 11}))
    assert head_shape(str(tmp_path)) == (7, 11)
    with pytest.raises(ValueError, match="model: expected a folder"):
        head_shape("gpt-9")


def test_the_command_prints_every_method_and_says_that_it_predicts(capsys):
    cli.main(["plan", "--model", "Llama-3-8B", "--dead", "0.5"])
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert all(name in printed for name in METHODS)


def test_the_command_knows_the_devices_that_people_have(capsys):
    cli.main(["plan", "--model", "Qwen3-8B", "--device", "all"])
    printed = capsys.readouterr().out
    for device in ("A100", "H100", "H200", "B200", "MI300X", "L4", "RTX4090"):
        assert f"bfloat16, {device}: predicted" in printed


def test_the_command_refuses_an_unknown_model(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "--model", "gpt-9"])
    assert "model: expected a folder" in capsys.readouterr().err
