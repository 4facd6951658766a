"""What a real run leaves and says when all goes well, when memory runs out, and when numbers are not finite."""

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from repo_ops.cli import main
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.learner import Learner, ScoredSequence
from repo_ops.trainer.log import read_record
from repo_ops.trainer.loop import train
from repo_ops.trainer.nonfinite import NonfiniteGuard
from repo_ops.trainer.out_of_memory import explain, is_out_of_memory
from repo_ops.trainer.run import Run, prepare
from repo_ops.trainer.samples import read_samples

SMALL = TrainConfig(
    model="tiny",
    task="reverse",
    steps=3,
    prompts_per_step=4,
    group_size=4,
    train_size=4,
    heldout_size=0,
    objective="repo",
    replay="recency",
    replay_num=4,
    replay_min_size=4,
    beta=0.1,
    lr=1e-4,
    autocast=False,
    threads=1,
    save_model=False,
)


def prepared(folder: Path, **settings: object) -> Run:
    return prepare(replace(SMALL, output_dir=str(folder), **settings))  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def test_a_run_leaves_completions_a_profile_a_record_and_a_page(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    console = quiet()
    run = prepared(tmp_path, sample_steps=2, sample_rows=3, save_completions=True, profile_steps=(2, 2))
    train(run, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("3 of 16 completions") == 0
    assert said.count("step 2: 3 of 32 completions") == 1
    assert said.count("step 3: 3 of 32 completions") == 1

    tables = [parquet.read_table(tmp_path / "completions" / f"step_{step:06d}.parquet") for step in (1, 2, 3)]
    assert [table.num_rows for table in tables] == [16, 32, 32]  # from step 2 on, 4 replayed for each prompt
    rows = tables[1].to_pylist()
    assert sum(row["replayed"] for row in rows) == 16
    assert {row["version"] for row in rows if row["replayed"]} == {0}
    first = tables[0].to_pylist()
    answers = {example.prompt: example.columns["answer"] for example in run.task.train}
    assert [row["reward"] for row in first] == [float(row["completion"] == answers[row["prompt"]]) for row in first]
    replayed = {(row["prompt"], row["completion"], row["logp"]) for row in rows if row["replayed"]}
    assert replayed <= {(row["prompt"], row["completion"], row["logp"]) for row in first}
    shown = read_samples(tmp_path)
    assert [row["step"] for row in shown] == [2, 2, 2, 3, 3, 3]
    assert all(row in tables[row["step"] - 1].to_pylist() for row in shown)

    record = read_record(tmp_path)
    parameters = sum(p.numel() for p in run.model.parameters())
    names = ("weights", "gradients", "AdamW's averages", "reference model")
    assert record["memory_at_rest"] == dict(zip(names, (4 * parameters * n for n in (1, 1, 2, 1))))
    assert record["ended"] == "finished"
    assert record["versions"]["torch"] == torch.__version__
    trace = json.loads((tmp_path / "profile" / "steps_2_2.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])
    assert "3 of 3 steps; finished" in (tmp_path / "report.html").read_text()


def test_a_profile_of_a_run_that_goes_on_holds_what_is_left_of_its_steps(tmp_path: Path, monkeypatch) -> None:
    for name in ("draw_report", "write_page"):
        monkeypatch.setattr(f"repo_ops.trainer.reporting.{name}", lambda *_, **__: None)
    saved = {"sample_steps": 0, "save_steps": 1, "resume": "auto"}
    train(prepared(tmp_path, **saved, steps=1), console=quiet())
    files = {}
    for steps, profile in ((2, (2, 2)), (4, (2, 3)), (5, (1, 4))):
        console = quiet()
        train(prepared(tmp_path, **saved, steps=steps, profile_steps=profile), console=console)
        files[steps] = sorted(path.name for path in (tmp_path / "profile").glob("*.json"))
    assert files == {2: ["steps_2_2.json"], 4: ["steps_2_2.json", "steps_3_3.json"], 5: files[4]}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "profile_steps: nothing is recorded of 1 to 4, the run goes on from step 4" in said


def test_a_profile_that_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Learner, "step", raising(ValueError("a mistake"), 3))
    with pytest.raises(ValueError, match="a mistake"):
        train(prepared(tmp_path, sample_steps=0, profile_steps=(2, 3)), console=quiet())
    assert [path.name for path in (tmp_path / "profile").glob("*.json")] == ["steps_2_2.json"]


def raising(error: Exception, at_step: int):
    """A learner's step that raises in the place of step `at_step`."""
    original, calls = Learner.step, []

    def step(self: Learner, sequences: list[ScoredSequence], *, lr: float) -> dict[str, float]:
        calls.append(1)
        if len(calls) == at_step:
            raise error
        return original(self, sequences, lr=lr)

    return step


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError("no room"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_allocators_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_them() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RunFailed("engine: status 500: CUDA out of memory"))  # a server's, with its own words


def test_out_of_memory_says_what_was_largest_and_what_helps(tmp_path: Path, monkeypatch) -> None:
    error = ERRORS[0]
    run = prepared(tmp_path, sample_steps=0)
    monkeypatch.setattr(Learner, "step", raising(error, 2))
    with pytest.raises(RunFailed) as failed:
        train(run, console=quiet())
    first, largest, _, *knobs = str(failed.value).splitlines()
    assert first.startswith("out of memory on cpu while learning: ")
    assert str(error).splitlines()[0] in first
    sizes = [float(part.rsplit(" ", 1)[1]) for part in largest.partition(": ")[2].split(", ")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(knobs) == 3
    assert any(line.startswith("  --micro_batch_tokens ") for line in knobs)
    assert any(line.startswith("  --recompute_layers true") for line in knobs)
    assert all("saves about" in line for line in knobs)
    assert "1 of 3 steps; stopped: out of memory on cpu while learning" in (tmp_path / "report.html").read_text()


def test_out_of_memory_is_explained_without_peft_too(tmp_path: Path, monkeypatch) -> None:
    run = prepared(tmp_path, sample_steps=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    said = explain(run, ERRORS[0])
    assert "  --beta 0 (no reference model): saves about" in said
    assert "lora" not in said


def test_out_of_memory_while_generating_names_what_generation_needs(tmp_path: Path, monkeypatch, capsys) -> None:
    def generate(*arguments: object, **settings: object) -> None:
        torch.empty(1 << 50)

    from repo_ops.trainer.rollout.hf import HFGenerate

    monkeypatch.setattr(HFGenerate, "_generate_batch", generate)
    words = ["--model", "tiny", "--task", "reverse", "--heldout_size", "0", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        main(["train", *words, "--steps", "1", "--threads", "1"])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("repo-ops train: out of memory on cpu while generating: ")
    assert "micro_batch_tokens" not in said
    assert "Traceback" not in said


def broken_gradient(run: Run) -> None:
    """From now on one gradient of the model has a NaN."""
    weight = dict(run.model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("nan")))


def test_steps_that_are_not_finite_are_dumped_and_end_the_run(tmp_path: Path, monkeypatch) -> None:
    run = prepared(tmp_path, nonfinite_limit=2, steps=9)
    broken_gradient(run)
    before = [p.clone() for p in run.model.parameters()]
    console = quiet()
    with pytest.raises(RunFailed, match="2 steps in a row were not finite"):
        train(run, console=console)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.replace("\n", "").count("the parameters were left as they were") == 2
    dump = torch.load(tmp_path / "nonfinite" / "step_1.pt", weights_only=True)
    assert dump["nonfinite_gradients"] == {"model.layers.1.mlp.down_proj.weight": 128}  # one row of [64, 128]
    assert dump["nonfinite_parameters"] == {}
    assert len(dump["token_ids"]) == len(dump["logps"]) == len(dump["advantages"]) == 16
    for tokens, logps, sampler in zip(dump["token_ids"], dump["logps"], dump["sampler_logps"]):
        assert len(tokens) == len(logps)
        torch.testing.assert_close(logps, sampler, rtol=0, atol=1e-4)  # the policy that sampled them, computed anew
    assert "first model.layers.1.mlp.down_proj.weight (128)" in dump["summary"]
    assert read_record(tmp_path)["ended"].startswith("stopped: 2 steps in a row")


def test_a_dump_compares_log_probabilities_over_the_tokens_that_were_kept(tmp_path: Path) -> None:
    settings = {"replay": None, "objective": "grpo", "top_k": 3, "temperature": 1.5, "nonfinite_limit": 1}
    run = prepared(tmp_path, **settings)
    broken_gradient(run)
    with pytest.raises(RunFailed):
        train(run, console=quiet())
    dump = torch.load(tmp_path / "nonfinite" / "step_1.pt", weights_only=True)
    for logps, sampler in zip(dump["logps"], dump["sampler_logps"], strict=True):
        torch.testing.assert_close(logps, sampler, rtol=0, atol=1e-4)


def test_the_count_begins_anew_after_a_good_step(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    said: list[str] = []
    guard = NonfiniteGuard(run.learner, tmp_path, limit=2, say=said.append)
    sequences = [ScoredSequence((5, 6), (7, 3), float("nan"), group=0)]
    good, bad = (
        {"learner/nonfinite": 0.0},
        {"learner/nonfinite": 1.0, "loss": float("nan"), "grad_norm": 1.0, "lr": 0.0},
    )
    for step, metrics in enumerate([bad, good, bad, good], 1):
        guard.check(step, sequences, metrics)
    assert len(said) == 2
    summary = torch.load(tmp_path / "nonfinite" / "step_3.pt", weights_only=True)["summary"]
    assert "sequences with advantages that are not finite: [0]" in summary
    guard.check(5, sequences, bad)
    with pytest.raises(RunFailed, match=r"step_6\.pt"):
        guard.check(6, sequences, bad)


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    absent = {"pyarrow", "wandb"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a))
    with pytest.raises(ImportError, match="report_to: needs the package wandb; pip install wandb"):
        prepared(tmp_path / "a", report_to="wandb")
    with pytest.raises(ImportError, match="save_completions: needs the package pyarrow; pip install pyarrow"):
        prepared(tmp_path / "a", save_completions=True)
    assert not (tmp_path / "a").exists()
