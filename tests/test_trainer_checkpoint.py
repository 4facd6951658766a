"""Checkpoints: a run that was cut off anywhere goes on as if it had not been, and what is saved stays readable."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import arguments, differences, no_pictures, outcome, prepared, repeatable, reward_file, trained  # noqa: F401

from repo_ops.cli import main
from repo_ops.trainer.checkpoint import newest_whole, read, steps_of
from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.learner import Learner
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.resume import snapshot

TESTS = Path(__file__).parent
SCRIPT = Path(sys.executable).with_name("repo-ops")


def started(folder: Path, until: int, number: int, **settings: object) -> subprocess.CompletedProcess[str]:
    """The console script, which gets the signal `number` as soon as it has logged step `until` and has a checkpoint."""
    command = [str(SCRIPT), *arguments(folder, **settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            logged = metrics.exists() and f'{{"step": {until},' in metrics.read_text()
            if logged and steps_of(folder / "checkpoints"):
                process.send_signal(number)
                break
            time.sleep(0.005)
        out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@dataclass
class Whole:
    """A run that nobody disturbed: its settings, and what it ended with."""

    settings: dict[str, Any]
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    settings = {"steps": 8, "eval_steps": 3, "reward": reward_file(folder)}
    return Whole(settings, trained(folder / "run", **settings, save_steps=None))


@pytest.mark.slow
def test_killed_stopped_and_resumed_is_bit_for_bit_the_run_that_was_left_alone(tmp_path: Path, whole: Whole) -> None:
    settings = {**whole.settings, "save_steps": 1, "save_async": True}
    killed = started(tmp_path, 2, signal.SIGKILL, **settings)
    assert killed.returncode == -signal.SIGKILL
    assert 1 <= steps_of(tmp_path / "checkpoints")[0] < 8
    stopped = started(tmp_path, 4, signal.SIGTERM, **settings, resume="auto")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM after step" in stopped.stderr
    assert 4 <= steps_of(tmp_path / "checkpoints")[0] < 8
    run = prepared(tmp_path, **settings, resume="auto")
    train(run)
    assert differences(outcome(run), whole.outcome) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_died_repeats_the_rest_exactly(tmp_path: Path, monkeypatch, whole: Whole, background: bool) -> None:
    settings = {**whole.settings, "save_steps": 3, "save_async": background}
    step, made = Learner.step, []

    def dies_in_step_5(self, *args, **kwargs):
        made.append(1)
        if len(made) == 5:
            raise RuntimeError("the power went out")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", dies_in_step_5)
    with pytest.raises(RuntimeError, match="the power went out"):
        main(arguments(tmp_path, **settings))
    monkeypatch.setattr(Learner, "step", step)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    run = prepared(tmp_path, **settings, resume="auto")
    assert run.resumed_at == 3
    train(run)
    assert differences(outcome(run), whole.outcome) == []


def test_a_run_goes_on_in_another_folder_and_longer(tmp_path: Path) -> None:
    reward = reward_file(tmp_path)
    all_four = trained(tmp_path / "whole", steps=4, reward=reward, heldout_size=0)
    trained(tmp_path / "a", steps=2, save_steps=2, reward=reward, heldout_size=0)
    from_a = {"steps": 4, "reward": reward, "heldout_size": 0, "save_steps": 4}
    longer = trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoints" / "step-00000002"), **from_a)
    assert differences(longer, all_four) == []
    assert steps_of(tmp_path / "b" / "checkpoints") == [4]
    assert steps_of(tmp_path / "a" / "checkpoints") == [2]
    # a finished run has nothing left to do, and says the same again
    assert differences(trained(tmp_path / "b", resume="auto", **from_a), all_four) == []


def test_the_first_rank_alone_reads_the_metrics(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert snapshot(run, 1).metrics == b'{"step": 0}\n'
    run.learner.ranks = Ranks(rank=1, size=2)
    assert snapshot(run, 1).metrics == b""


def test_nothing_was_learned_yet_and_still_the_optimizer_comes_back(tmp_path: Path) -> None:
    reward = reward_file(tmp_path, "def reward(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    at_once = trained(tmp_path / "whole", steps=2, reward=reward, heldout_size=0)
    trained(tmp_path / "a", steps=1, save_steps=1, reward=reward, heldout_size=0)
    resumed = trained(tmp_path / "a", steps=2, reward=reward, heldout_size=0, resume="auto")
    assert differences(resumed, at_once) == []
    assert at_once["optimizer"]["state"] == {}  # AdamW has not counted a step that never was


def test_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".draft-step-00000007").mkdir(parents=True)  # of a process that was killed while it wrote
    trained(tmp_path, steps=5, save_steps=2, keep_last=2, heldout_size=0)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
    assert newest_whole(folder, pytest.fail).step == 5


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "run"
    trained(folder, steps=2, save_steps=1, heldout_size=0)
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated tensors": ("__0_0.distcp", truncate, r"__0_0.distcp has \d+ bytes instead of \d+"),
    "a flipped bit": ("__0_0.distcp", flip, "the content of __0_0.distcp has changed since it was written"),
    "tensors missing": ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    "metadata missing": (".metadata", Path.unlink, ".metadata is missing"),
    "state of the rank missing": ("rank-0.pt", Path.unlink, "rank-0.pt is missing"),
    "manifest missing": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "manifest cut off": ("manifest.json", truncate, "manifest.json cannot be read"),
    "manifest of something else": ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(two_steps: Path, tmp_path: Path, damage: str) -> None:
    name, harm, sentence = DAMAGE[damage]
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "checkpoints", folder)
    harm(folder / "step-00000002" / name)
    said: list[str] = []
    assert newest_whole(folder, said.append).step == 1
    assert len(said) == 1
    assert re.search(sentence, said[0])
    assert said[0].endswith("put aside as step-00000002.damaged, that of step 1 is used instead")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002.damaged"]


def test_a_run_resumes_from_the_checkpoint_before_the_damaged_one(two_steps: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    truncate(tmp_path / "run" / "checkpoints" / "step-00000002" / "__0_0.distcp")
    main(arguments(tmp_path / "run", steps=2, save_steps=1, heldout_size=0, resume="auto"))
    said = capsys.readouterr().out
    assert "put aside as step-00000002.damaged, that of step 1 is used instead" in said
    assert "goes on from step 1 " in said
    assert repeatable(tmp_path / "run") == repeatable(two_steps)
    assert read(tmp_path / "run" / "checkpoints" / "step-00000002").step == 2  # written anew


def test_the_manifest_says_what_the_run_was(two_steps: Path) -> None:
    manifest = json.loads((two_steps / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert manifest["step"] == 2
    assert manifest["world_size"] == 1
    assert manifest["settings"]["lr"] == 1e-3
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp", "rank-0.pt", "metrics.jsonl"}


def launched(mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """worker_checkpoint.py on two ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(TESTS / "worker_checkpoint.py"), mode, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_ranks_stop_together_go_on_exactly_and_one_rank_can_take_over(tmp_path: Path) -> None:
    reward_file(tmp_path)
    done = launched("stop", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):  # the signal came to rank 1 alone
        assert f"rank{rank} resumed at 4" in done.stdout
        assert f"rank{rank} equal" in done.stdout, done.stdout
    assert "rank1 stopped by SIGTERM after step 4" in done.stdout
    assert "rank0 stopped by a signal to another rank after step 4" in done.stdout
    saved = tmp_path / "cut" / "checkpoints" / "step-00000004"
    files = {"__0_0.distcp", "__1_0.distcp", ".metadata", "rank-0.pt", "rank-1.pt", "metrics.jsonl"}
    assert set(read(saved).manifest["files"]) == files
    one = prepared(
        tmp_path / "one", steps=6, eval_steps=4, reward=f"{tmp_path / 'reward.py'}:reward", resume=str(saved)
    )
    assert "the checkpoint is of 2 ranks, here are 1: results differ by rounding" in one.notes
    train(one)
    expected = torch.load(tmp_path / "final.pt", weights_only=True)
    worst = max((one.model.state_dict()[name] - value).abs().max().item() for name, value in expected.items())
    assert worst < 1e-6


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_leaves_its_checkpoints(tmp_path: Path) -> None:
    done = launched("kill", tmp_path)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "repo-ops train: rank 0 lost another rank, which ended before it" in done.stderr
    run = prepared(tmp_path, steps=6, heldout_size=0, save_steps=1, resume="auto")
    assert run.resumed_at == 3
    train(run)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
