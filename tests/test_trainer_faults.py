"""Faults put into runs of the tiny model: each ends in one sentence or goes on as documented; what is saved stays."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    arguments,
    differences,
    no_pictures,  # noqa: F401
    outcome,
    prepared,
    repeatable,
    reward_file,
    trained,
)

import repo_ops
from repo_ops.cli import main
from repo_ops.trainer import checkpoint, progress
from repo_ops.trainer.checkpoint import newest_whole, steps_of
from repo_ops.trainer.learner import Learner
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import EngineError
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.rollout.sampler import Sampler

SHORT: dict[str, Any] = {"steps": 2, "heldout_size": 0}


def ends(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    """Exit status and standard error of the console script; 0 where it came back."""
    status = 0
    try:
        main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().err


def one_sentence(error: str) -> str:
    """The sentence for the user, without the line that says where the traceback lies."""
    lines = [line for line in error.splitlines() if line.startswith("repo-ops train: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0].removeprefix("repo-ops train: ")


# ---- before the first step: status 2, nothing begun ----


def model_folder(folder: Path) -> Path:
    model, tokenizer = load_model("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def changed_model(change: Callable[[Path], object]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        change(model_folder(folder / "model"))
        return {"model": folder / "model"}

    return make


def config_file(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "run.yaml").write_text(text)
        return {"config": folder / "run.yaml"}

    return make


def rewarded_by(source: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"reward": reward_file(folder, source)}


def blocked(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("not a folder")
    return {"output_dir": folder / "file" / "run"}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "key that is not there": (config_file("stepps: 3\n"), "unknown key 'stepps'; did you mean 'steps'?"),
    "YAML that is none": (config_file("steps: [3\n"), "config: expected a readable YAML file"),
    "objective that is not there": (lambda _: {"objective": "grop"}, "objective: expected one of "),
    "strategy that is not there": (lambda _: {"replay": "varianc"}, "strategy: "),
    "negative save_steps": (lambda _: {"save_steps": -1}, "save_steps: expected at least 0, got -1"),
    "no checkpoint kept": (lambda _: {"keep_last": 0}, "keep_last: expected at least 1, got 0"),
    "output that cannot be written": (blocked, "output_dir: expected a folder that can be written"),
    "resume from nowhere": (lambda folder: {"resume": folder / "no"}, "manifest.json is missing"),
    "model folder without weights": (changed_model(lambda f: (f / "model.safetensors").unlink()), "model: "),
    "model weights cut off": (changed_model(lambda f: cut_in_half(f / "model.safetensors")), "model: "),
    "model settings garbled": (changed_model(lambda f: (f / "config.json").write_text("{")), "model: "),
    "model without tokenizer": (changed_model(lambda f: (f / "tokenizer.json").unlink()), "model: "),
    "reward file that is no Python": (rewarded_by("def reward(:\n"), "cannot be loaded: SyntaxError"),
    "reward file that raises": (
        rewarded_by("raise RuntimeError('no licence')\n"),
        "cannot be loaded: RuntimeError: no licence",
    ),
    "reward file without the function": (rewarded_by("x = 1\n"), "reward: expected a function 'reward'"),
    "hub without login": (lambda _: {"push_to_hub": "some/model"}, "push_to_hub: expected a login"),
    "hub with a bad name": (lambda _: {"push_to_hub": "a/b/c"}, "push_to_hub: expected organisation/name"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_before_the_first_step(tmp_path: Path, capsys, monkeypatch, fault: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    make, sentence = REFUSED[fault]
    settings = {**SHORT, **{name: str(value) for name, value in make(tmp_path).items()}}
    config = ["--config", settings.pop("config")] if "config" in settings else []
    folder = Path(str(settings.pop("output_dir", tmp_path / "run")))
    status, error = ends(capsys, [*arguments(folder, **settings), *config])
    assert status == 2
    assert sentence in error
    assert "Traceback" not in error
    assert not (folder / "metrics.jsonl").exists()
    if not config and "save_steps" not in settings and "keep_last" not in settings:
        one_sentence(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with checkpoints of both."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    trained(folder, **SHORT, save_steps=1)
    return folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "output_dir: expected one without checkpoints for a new run"),
        ({"resume": "auto", "lr": 1.0}, "lr: expected 0.001 as in checkpoint"),
        ({"resume": "auto", "seed": 1, "group_size": 2}, "seed: expected 0 as in checkpoint"),
        ({"resume": "auto", "task_args.length": 3}, "task_args: expected {} as in checkpoint"),
        ({"resume": "auto", "steps": 1}, "steps: expected at least 2, which the checkpoint has, got 1"),
        ({"resume": "auto", "schedule": "linear"}, "schedule: expected 'constant' as in checkpoint"),
        ({"resume": "auto", "replay": "recency"}, "replay: expected 'random' as in checkpoint"),
        ({"resume": "{}/checkpoints/step-00000001"}, "resume: expected the newest checkpoint of"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused_and_changes_nothing(
    saved: Path, capsys, settings: dict[str, Any], sentence: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    settings = {name: value.format(saved) if isinstance(value, str) else value for name, value in settings.items()}
    status, error = ends(capsys, arguments(saved, **{**SHORT, **settings}))
    assert status == 2
    assert one_sentence(error).startswith(sentence)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


def test_the_same_folder_with_another_model_in_it_is_refused(tmp_path: Path, capsys) -> None:
    model = model_folder(tmp_path / "model")
    settings = {**SHORT, "model": str(model)}
    trained(tmp_path / "run", **settings, save_steps=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    status, error = ends(capsys, arguments(tmp_path / "run", **settings, resume="auto"))
    assert status == 2
    assert "is absent" in one_sentence(error) or "where it is absent" in one_sentence(error)


def test_only_damaged_checkpoints_are_left_alone(saved: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2):
        cut_in_half(tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "rank-0.pt")
    status, error = ends(capsys, arguments(tmp_path / "run", **SHORT, resume="auto"))
    assert status == 2
    assert "expected a whole checkpoint in" in one_sentence(error)
    assert "got only damaged ones" in error
    assert steps_of(tmp_path / "run" / "checkpoints") == [2, 1]


# ---- rewards ----


def test_a_missing_column_is_named(tmp_path: Path, capsys) -> None:
    reward = reward_file(tmp_path, "def reward(prompts, completions, *, solution, **_):\n    return [0.0]\n")
    status, error = ends(capsys, arguments(tmp_path / "run", **SHORT, reward=reward))
    assert status == 2
    assert "expected the data to have a column 'solution', got ['answer']" in one_sentence(error)


SOURCE = "def reward(prompts, completions, **columns):\n    "
# what the function does, how many of 16 samples are scored, and what is said of the others
COSTS_SAMPLES = {
    "one too few": ("return [1.0] * (len(prompts) - 1)", 0, "returned 0 rewards for 1 completions"),
    "nothing": ("return None", 0, "returned NoneType, expected a list of numbers or None"),
    "one number": ("return 1.0", 0, "returned float, expected a list of numbers or None"),
    "NaN": ("return [float('nan')] * len(prompts)", 0, "returned nan, expected a finite number or None"),
    "infinity": ("return [float('inf')] * len(prompts)", 0, "returned inf, expected a finite number or None"),
    "words": ("return ['good'] * len(prompts)", 0, "returned 'good', expected a finite number or None"),
    "raises": ("raise RuntimeError('server gone')", 0, "RuntimeError: server gone"),
    "raises once": ("if len(prompts) == 16: raise RuntimeError\n    return [1.0] * len(prompts)", 16, ""),
    "leaves all out": ("return [None] * len(prompts)", 0, ""),
    "is always the same": ("return [1.0] * len(prompts)", 16, ""),
    "hangs": ("while True: pass", 0, "16 of 16 samples left out at a deadline"),
}


@pytest.mark.parametrize("fault", COSTS_SAMPLES)
def test_a_reward_that_fails_costs_samples_and_not_the_run(tmp_path: Path, capsys, caplog, fault: str) -> None:
    body, scored, sentence = COSTS_SAMPLES[fault]
    timeout = 0.5 if fault == "hangs" else None
    words = arguments(tmp_path / "run", **SHORT, reward=reward_file(tmp_path, SOURCE + body), reward_timeout=timeout)
    status, error = ends(capsys, words)
    assert (status, "Traceback" in error) == (0, False)
    lines = read_metrics(tmp_path / "run")[1:]
    assert [line["reward/scored"] for line in lines] == [scored, scored]
    assert [line["learner/skipped"] for line in lines] == [1, 1]
    assert sentence in caplog.text


# ---- numbers that are none ----


def test_advantages_that_are_nan_end_the_run_and_reach_no_checkpoint(tmp_path: Path, capsys, monkeypatch) -> None:
    real, calls = repo_ops.group_advantages, []

    def broken(rewards: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        found = real(rewards, *args, **kwargs)
        return found if len(calls) < 3 else found * torch.nan  # the first call checks the settings

    trained(tmp_path / "one", steps=1, heldout_size=0, save_steps=1)
    monkeypatch.setattr("repo_ops.group_advantages", broken)
    status, error = ends(capsys, arguments(tmp_path / "two", **SHORT, save_steps=1))
    assert status == 1
    assert one_sentence(error).startswith("advantages: expected finite numbers")
    assert "Traceback" in (tmp_path / "two" / "traceback.txt").read_text()
    monkeypatch.setattr("repo_ops.group_advantages", real)
    one, two = (prepared(tmp_path / name, **SHORT, resume="auto") for name in ("one", "two"))
    assert two.resumed_at == 1
    assert differences(outcome(two), outcome(one)) == []


def test_too_many_steps_that_are_not_finite_lose_nothing_of_those_before(tmp_path: Path, capsys, monkeypatch) -> None:
    real = Learner.step

    def poisoned(self, sequences, *, lr):
        return {**real(self, sequences, lr=lr), "learner/nonfinite": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", poisoned)
        status, error = ends(capsys, arguments(tmp_path, **SHORT, nonfinite_limit=1))
    assert status == 1
    assert one_sentence(error).startswith("1 steps in a row were not finite (nonfinite_limit); the last batch is in")
    assert "Step 1 is saved in" in error
    (line,) = read_metrics(tmp_path)[1:]
    assert (line["learner/nonfinite"], line["reward/scored"]) == (1, 16)
    train(prepared(tmp_path, **SHORT, resume="auto"))
    assert [each["step"] for each in read_metrics(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_policy_that_computes_nan_is_said_in_a_sentence(tmp_path: Path, capsys, top_k: int) -> None:
    words = arguments(
        tmp_path / "run", **SHORT, lr=1e38, top_k=top_k, objective="grpo", replay=None, reward="prefix_match"
    )
    status, error = ends(capsys, words)
    assert status == 1
    assert one_sentence(error).startswith("engine: expected finite logits, got NaN or infinity from the model")
    assert "Step 1 is saved in" in error


def test_a_model_that_computes_nan_is_refused_at_the_start(tmp_path: Path, capsys) -> None:
    model, tokenizer = load_model("tiny")
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    name = ["--model", str(tmp_path / "model")]
    status, error = ends(capsys, [*arguments(tmp_path / "run", **SHORT), *name])
    assert status == 2
    assert one_sentence(error).startswith("model: expected finite log-probabilities, got NaN or infinity from ")
    status, error = ends(capsys, ["evaluate", *name, "--task", "reverse", "--threads", "1"])
    assert status == 1
    assert error.startswith("repo-ops evaluate: engine: expected finite logits, got NaN or infinity from the model")
    assert len(error.splitlines()) == 1


# ---- the disk ----


class FullDisk:
    """Files cannot grow beyond `limit` bytes inside: the kernel itself refuses, as it does on a full disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, capsys, monkeypatch, background: bool
) -> None:
    write = checkpoint.write

    def on_a_full_disk(folder, snapshot, **kwargs):
        if snapshot.step < 2:
            return write(folder, snapshot, **kwargs)
        with FullDisk(100_000):
            return write(folder, snapshot, **kwargs)

    monkeypatch.setattr(checkpoint, "write", on_a_full_disk)
    words = arguments(tmp_path, steps=3, heldout_size=0, save_steps=1, save_async=background)
    main(words)
    said = capsys.readouterr().out
    assert "step 2: the checkpoint could not be written (" in said
    assert "the newest is that of step 1" in said
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert newest_whole(tmp_path / "checkpoints", pytest.fail).step == 1


def refuses_to_write(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stop_that_cannot_be_saved_says_so(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_write", refuses_to_write)
    step = Learner.step

    def stopped_step(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", stopped_step)
    status, error = ends(capsys, arguments(tmp_path, **SHORT))
    assert status == 1
    assert one_sentence(error) == "stopped by SIGTERM after step 1, which could not be saved"


@pytest.mark.parametrize("where", ["repo_ops.trainer.log.RunLog.step", "repo_ops.trainer.publish.export_model"])
def test_metrics_or_the_model_that_cannot_be_written_end_the_run_in_one_sentence(
    tmp_path: Path, capsys, monkeypatch, where: str
) -> None:
    words = arguments(tmp_path, **{**SHORT, "save_model": True}, save_steps=1)
    main(words)  # of an earlier run: its model and its checkpoints must survive
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(where, refuses_to_write)
    status, error = ends(capsys, [*words, "--resume", "auto", "--steps", "3"])
    assert status == 1
    assert "No space left on device" in one_sentence(error)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    assert newest_whole(tmp_path / "checkpoints", pytest.fail).step >= 2


# ---- signals ----


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = {"steps": 4, "eval_steps": 3, "reward": reward_file(folder)}
    return settings, trained(folder / "run", **settings)


def signal_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int, then: Any = None) -> None:
    """Sends SIGTERM to this process at the given call of owner.name, and then calls `then` or the real one."""
    real, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            if then is not None:
                then()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# phase: where the signal comes, at which call of it, and which step is saved
PHASES: dict[str, tuple[Any, str, int, int]] = {
    "generation of step 3": (HFGenerate, "_generate_batch", 2 + 3, 2),
    "a token of step 1": (Sampler, "draw", 14, 0),
    "rewards of step 3": (Rewards, "score", 2 + 3, 2),
    "learner of step 2": (Learner, "step", 2, 2),
    "save of step 2": (progress, "snapshot", 2, 2),
    "evaluation of step 3": (HFGenerate, "_generate_batch", 2 + 3 + 1, 3),
    "evaluation before step 1": (HFGenerate, "_generate_batch", 1, 0),
    "log of step 2": ("repo_ops.trainer.log", "_status", 5, 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_ends_well_and_loses_nothing(
    tmp_path: Path, capsys, monkeypatch, undisturbed, phase: str
) -> None:
    settings, expected = undisturbed
    owner, name, call, saved_step = PHASES[phase]
    owner = __import__("importlib").import_module(owner) if isinstance(owner, str) else owner
    every = 1 if "save" in phase else 0
    with monkeypatch.context() as patch:
        signal_in(patch, owner, name, call=call)
        status, error = ends(capsys, arguments(tmp_path, **settings, save_steps=every))
    assert status == 0
    assert one_sentence(error).startswith("stopped by SIGTERM ")
    assert steps_of(tmp_path / "checkpoints") == ([saved_step] if saved_step and not every else [2, 1] if every else [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before the run
    run = prepared(tmp_path, **settings, resume="auto")
    train(run)
    assert differences(outcome(run), expected) == []


# what fails behind the learner of which step, in a run that evaluates after steps 3 and 4
BEHIND_THE_LEARNER = {"weights of step 2": 2, "evaluation of step 3": 3, "evaluation of step 4": 4}


@pytest.mark.parametrize("what", BEHIND_THE_LEARNER)
def test_an_engine_that_fails_behind_the_learner_costs_nothing_of_the_step(
    tmp_path: Path, capsys, monkeypatch, undisturbed, what: str
) -> None:
    settings, expected = undisturbed
    step = BEHIND_THE_LEARNER[what]
    real = (HFGenerate.sync, HFGenerate.generate)

    def sync(self, version):
        real[0](self, version)
        if "weights" in what and version == step:
            raise EngineError("engine: the server is gone")

    def generate(self, prompts, settings):
        if settings.greedy and self.version == step:
            raise EngineError("engine: the server is gone")
        return real[1](self, prompts, settings)

    with monkeypatch.context() as patch:
        patch.setattr(HFGenerate, "sync", sync)
        patch.setattr(HFGenerate, "generate", generate)
        status, error = ends(capsys, arguments(tmp_path, **settings))
    assert status == 1
    assert f"the server is gone. Step {step} is saved in" in one_sentence(error)
    # the record of the run that ended has all of the step but the evaluation
    whole = {k: v for k, v in expected["metrics"][step].items() if not k.startswith("eval/")}
    assert repeatable(tmp_path) == [*expected["metrics"][:step], whole]
    run = prepared(tmp_path, **settings, resume="auto")
    assert (run.resumed_at, run.last_logged) == (step, step - 1)
    train(run)
    assert differences(outcome(run), expected) == []


def test_a_reward_that_hangs_is_left_when_a_signal_comes(tmp_path: Path, capsys, monkeypatch) -> None:
    signal_in(monkeypatch, Rewards, "score", call=2, then=hang)
    status, error = ends(capsys, arguments(tmp_path, **SHORT))
    assert status == 0
    assert "after step 1, which is saved in" in one_sentence(error)


def hang() -> None:
    time.sleep(1000)


def test_the_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch) -> None:
    def impatient(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(Learner, "step", impatient)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(tmp_path, **SHORT))


def test_without_checkpoints_signals_are_nobodys_business(tmp_path: Path, monkeypatch) -> None:
    seen = []
    step = Learner.step

    def looked_at(self, *args, **kwargs):
        seen.append(signal.getsignal(signal.SIGTERM))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", looked_at)
    main(arguments(tmp_path, **SHORT, save_steps=None))
    assert seen == [signal.SIG_DFL] * 2
