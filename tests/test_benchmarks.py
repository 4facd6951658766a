"""The benchmarks run, and every method in them computes the same loss and gradients. Time is never asserted on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repo_ops.benchmarks import compare, methods, report
from repo_ops.benchmarks.accuracy import Errors, errors, truth
from repo_ops.benchmarks.inputs import Case, Inputs, make_inputs
from repo_ops.benchmarks.measure import interleave, spread
from repo_ops.benchmarks.methods import METHODS, Step, grpo_loss
from repo_ops.benchmarks.peak import peak_bytes
from repo_ops.benchmarks.shapes import MODELS, Shape, quick_shape, shape_named

ROOT = Path(__file__).resolve().parents[1]
# 4 sequences of 8, an odd vocabulary, and a D that no vector width divides
SMALL = Shape("custom", 32, 19, 307)
CASES = {
    "dense": Case(SMALL, length=8),
    "masked": Case(SMALL, length=8, dead=0.3),
    "zero advantage": Case(SMALL, length=8, dead=0.7, dead_kind="zero_advantage"),
    "frozen": Case(SMALL, length=8, frozen=True),
    "entropy": Case(SMALL, length=8, entropy=True),
    "bfloat16": Case(SMALL, length=8, dtype="bfloat16"),
}
# torch.compile takes a minute to compile: the comparison itself checks that method whenever it is run
QUICK = [name for name, method in METHODS.items() if method.exact_work and not method.compiles]
PAIRS = [
    (case, name)
    for case in CASES
    for name in QUICK
    if METHODS[name].only_dtype in (None, CASES[case].dtype) and (METHODS[name].entropy or not CASES[case].entropy)
]


def step_of(method: str, inputs: Inputs) -> Step:
    inputs.clear()
    step = METHODS[method].build(inputs)()
    step.backward()
    return step


@pytest.mark.parametrize(("case", "method"), PAIRS)
def test_methods_agree_with_float64(case: str, method: str) -> None:
    if why := METHODS[method].why_not(CASES[case]):
        pytest.skip(why)
    inputs = make_inputs(CASES[case])
    found = errors(step_of(method, inputs), inputs, truth(inputs))
    assert found.too_large(CASES[case].dtype) == []
    assert found.logp is None or found.logp < (1e-5 if CASES[case].dtype == "float32" else 0.1)
    assert (found.dweight is None) == CASES[case].frozen
    assert (inputs.weight.grad is None) == CASES[case].frozen


@pytest.mark.parametrize("case", [name for name in CASES if name != "bfloat16"])
def test_truth_is_what_autograd_in_float64_says(case: str) -> None:
    inputs = make_inputs(CASES[case])
    exact = truth(inputs)
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    log_probs = torch.log_softmax(hidden @ weight.T, -1)
    logps = log_probs.gather(-1, inputs.targets[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1) if CASES[case].entropy else None
    loss = grpo_loss(logps, inputs, entropy)
    loss.backward()
    assert exact.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(exact.logps, logps.detach())
    torch.testing.assert_close(exact.dhidden, hidden.grad.flatten(0, 1)[exact.rows], rtol=1e-9, atol=1e-12)
    if exact.dweight is not None:
        torch.testing.assert_close(exact.dweight, weight.grad[exact.entries], rtol=1e-9, atol=1e-12)


def test_wrong_work_is_called_wrong() -> None:
    inputs = make_inputs(CASES["dense"])
    exact = truth(inputs)
    step = step_of("naive", inputs)
    inputs.weight.grad *= 1.001  # an error of a thousandth is ten times the limit
    assert [text.split()[0] for text in errors(step, inputs, exact).too_large("float32")] == ["dweight"]
    assert Errors(float("nan"), None, 0.0, None).too_large("float32") == ["loss nan"]


def test_dead_rows_have_the_share_that_was_asked_for() -> None:
    for share in (0.3, 0.7):
        masked = make_inputs(Case(Shape("custom", 160, 5, 11), length=16, dead=share))
        assert 1 - masked.mask.mean().item() == pytest.approx(share)
        assert masked.mask.sum(1).min() >= 1
        zero = make_inputs(Case(Shape("custom", 160, 5, 11), length=16, dead=share, dead_kind="zero_advantage"))
        assert (zero.advantages == 0).float().mean().item() == pytest.approx(share)


def test_log_ratios_keep_away_from_the_clip_bounds_and_some_are_clipped() -> None:
    inputs = make_inputs(Case(Shape("custom", 512, 16, 101), length=16))
    ratio = (truth(inputs).logps - inputs.old_logps).exp()
    assert (ratio - 0.8).abs().min() > 0.05
    assert (ratio - 1.2).abs().min() > 0.05
    clipped = ((ratio > 1.2) & (inputs.advantages[:, None] > 0)) | ((ratio < 0.8) & (inputs.advantages[:, None] < 0))
    assert 0.01 < clipped.float().mean() < 0.15


def test_shapes_by_name() -> None:
    assert shape_named("SmolLM2-135M") == Shape("SmolLM2-135M", 1024, 576, 49152)
    assert shape_named("Qwen3-0.6B") == Shape("Qwen3-0.6B", 512, 1024, 151936)
    assert shape_named("Llama-3-8B").vocab == 128256 // 4  # 2 GB of float32 head: cut on a CPU
    assert str(shape_named("Llama-3-8B")).startswith("Llama-3-8B (V / 4) N=")
    assert shape_named("Llama-3-8B", device="cuda") == Shape("Llama-3-8B", 8192, 4096, 128256)
    assert shape_named("Qwen3-8B:32").rows == 32
    assert shape_named("7x5x11") == Shape("custom", 7, 5, 11)
    for wrong in ("SmolLM", "SmolLM2-135M:0", "SmolLM2-135M:many", "7x5", "0x5x11"):
        with pytest.raises(ValueError, match="shapes: expected MODEL"):
            shape_named(wrong)
    assert all(quick_shape(model).rows % 64 == 0 for model in MODELS)  # whole sequences of the default length


def test_spread_is_median_and_quartiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.q1, found.q3) == (3.0, 2.0, 4.0)


def test_methods_are_timed_in_turns_and_cleared_before_each() -> None:
    calls: list[str] = []
    forwards = {name: (lambda name=name: (calls.append(name), lambda: calls.append("back"))[1]) for name in "ab"}
    times = interleave(forwards, rounds=3, clear=lambda: calls.append("clear"))
    assert {len(t.forward) for t in times.values()} == {len(t.both) for t in times.values()} == {3}
    assert calls[0::3] == ["clear"] * 6
    assert calls[2::3] == ["back"] * 6
    assert [sorted(calls[i : i + 6][1::3]) for i in (0, 6, 12)] == [["a", "b"]] * 3  # each round runs every method


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_counts_what_is_freed_within_the_step_and_only_that_step() -> None:
    mib = 1 << 20
    standing = torch.ones(64 * mib // 4)

    def step() -> torch.Tensor:
        scratch = torch.ones(48 * mib // 4)
        kept = torch.ones(16 * mib // 4)
        del scratch
        return kept

    found, _ = peak_bytes(step)
    assert 60 * mib < found < 72 * mib  # 48 + 16, not the 64 that stood before, not the 16 that are left
    assert standing[0] == 1


def test_one_command_prints_a_table_and_keeps_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "found.json"
    shape, chosen = "32x16x211", ["floor", "ours", "naive"]
    sheet = tmp_path / "folder" / "found.csv"
    files = ["--json", str(out), "--csv", str(sheet)]
    arguments = ["--shapes", shape, "--length", "8", "--rounds", "2", "--methods", *chosen, *files]
    assert compare.main([*arguments, "--no-memory", "--dead", "0", "50", "--dead-kind", "zero_advantage"]) == 0
    text = capsys.readouterr().out
    assert text.count("ours: linear_policy_loss") == 2
    assert "50% of zero advantage" in text
    assert "left out" not in text
    found = json.loads(out.read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert [len(case["rows"]) for case in found["cases"]] == [3, 3]
    row = found["cases"][0]["rows"][1]
    assert (row["method"], len(row["both"]["ms"]), row["wrong"]) == ("ours", 2, [])
    with sheet.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["dead"]) for line in lines] == [
        (name, dead) for dead in ("0.0", "0.5") for name in chosen
    ]
    assert float(lines[1]["both_median"]) == row["both"]["median"]
    assert float(lines[1]["dhidden_error"]) == row["errors"]["dhidden"]
    assert (lines[0]["rows"], lines[0]["vocab"], lines[0]["dhidden_error"]) == ("32", "211", "")  # bare GEMMs: no loss
    pytest.importorskip("matplotlib")
    assert report.main([str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("native", [True, False])
def test_bare_gemms_run_in_a_dtype_that_the_processor_multiplies(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "multiplies", lambda dtype, device: native or dtype == torch.float32)
    found = compare.compare(CASES["bfloat16"], ["floor"], rounds=1, memory=False)
    assert found["title"].endswith("bfloat16" if native else "bfloat16, bare GEMMs in float32")
    inputs, made = make_inputs(CASES["bfloat16"]), []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append((a.dtype, b.dtype, out.dtype)) or out)
    METHODS["floor"].build(inputs)().backward()
    assert made == [(torch.bfloat16 if native else torch.float32,) * 3] * 3
    assert (METHODS["naive"].why_not(CASES["bfloat16"]) is None) == native
    assert METHODS["naive"].why_not(CASES["dense"]) is None


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    # 64 x 64 x 8192: the head's gradient alone is 2 MiB, full logits are 2 MiB more and their softmax another
    case = Case(Shape("custom", 64, 64, 8192), length=32)
    script = ROOT / "benchmarks" / "memory_of.py"
    request = json.dumps({"method": "naive", "case": case.to_dict()})
    done = subprocess.run([sys.executable, script, "--child", request], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gradient_bytes"] == 4 * 64 * (64 + 8192)
    assert found["peak_bytes"] > found["gradient_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "GPT-9"], "expected MODEL"),
        (["--rounds", "0"], "--rounds >= 1"),
        (["--dead", "100"], "--dead < 100"),
        (["--methods", "mine"], "invalid choice"),
    ],
)
def test_mistakes_in_settings_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_rows_that_are_not_whole_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="length: expected a divisor of 10 rows"):
        make_inputs(Case(Shape("custom", 10, 4, 7), length=4))


def test_a_learner_step_equals_that_of_trl(tmp_path, capsys):
    from repo_ops.benchmarks import learner_step

    file = tmp_path / "step.json"
    sides = ["--model", "tiny", "--settings", "tiny", "--sides", "ours", "trl"]
    assert learner_step.main([*sides, "--rounds", "1", "--no-memory", "--json", str(file)]) == 0  # 1 where they differ
    (case,) = json.loads(file.read_text())["cases"]
    ours, trl = case["rows"]
    assert 0 < ours["tokens"] < trl["tokens"] == 3 * 2 * (4 + 3)
    assert trl["loss_apart"] <= 1e-5
    assert 0 < trl["gradients_apart"] <= 1e-4
    assert "TRL GRPOTrainer" in capsys.readouterr().out


def test_three_steps_of_trl_with_our_head_are_those_without_it(tmp_path, capsys):
    pytest.importorskip("trl")
    from repo_ops.benchmarks import trl_trainers

    file = tmp_path / "trl.json"
    file.write_text('{"rows": ["times of an earlier run"]}')
    arguments = ["--model", "tiny", "--rounds", "0", "--train_steps", "3", "--json", str(file)]
    assert trl_trainers.main(arguments) == 0  # 1 where the two took another course
    found = json.loads(file.read_text())
    assert found["rows"] == ["times of an earlier run"]
    for row in found["training"]["rows"]:
        assert row["same_completions"]
        assert row["logps_apart"][0] <= 1e-6  # the same weights; later they are as far apart as gradients were
        assert max(row["gradients_apart"]) <= 2e-6
        for exact in row["logps_from_float64"].values():
            assert len(exact) == 3
            assert 0 < max(exact) <= 5e-6
        assert row["parameters_beyond_1e-6"] == 0
        assert row["moved_largest"] > 1e-5
        assert row["head_calls"] == {"installed": {"ours": 3, "trl": 0}, "not installed": {"ours": 0, "trl": 3}}
        assert trl_trainers.differs({"rows": [], "training": {"rows": [row | {"same_rewards": False}]}})
        calls = row["head_calls"] | {"not installed": {"ours": 3, "trl": 0}}
        assert trl_trainers.differs({"rows": [], "training": {"rows": [row | {"head_calls": calls}]}})
    assert "calls of our head + TRL's, not installed | 0 + 3 | 0 + 3" in capsys.readouterr().out
