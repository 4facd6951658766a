"""Runs of the tiny model through the real path, and what two runs of the same steps must agree in."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.resume import random_states
from repo_ops.trainer.run import Run, prepare

# 4 of 8 prompts a step: they come round at step 3, so that replay begins within a few steps
TINY = {
    "model": "tiny",
    "task": "reverse",
    "prompts_per_step": 4,
    "group_size": 4,
    "train_size": 8,
    "heldout_size": 2,
    "heldout_samples": 2,
    "lr": 1e-3,
    "autocast": False,
    "threads": 1,
    "device": "cpu",
    "save_model": False,
    "objective": "repo",
    "replay": "random",
    "replay_num": 4,
    "replay_min_size": 4,
    "sample_steps": 0,
    "reward_timeout": None,  # in this process: the random states of others are no business of a checkpoint
}
CLOCK = ("time/", "memory/", "tokens_per_second", "mfu")  # what two runs of the same seed may differ in

# draws on every generator of the process, so that a run whose random states were not put back earns other rewards
NOISY_REWARD = """
import random
import numpy
import torch

def reward(prompts, completions, **columns):
    noise = [random.random() + float(numpy.random.rand()) + float(torch.rand(())) for _ in completions]
    return [(len(text) % 3) + part for text, part in zip(completions, noise)]
"""


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """A report takes longer than such a run, and has tests of its own. To be imported by a module of tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_report", "write_page"):
            patch.setattr(f"repo_ops.trainer.reporting.{name}", lambda *_, **__: None)
        yield


def reward_file(folder: Path, source: str = NOISY_REWARD) -> str:
    """The --reward that names a function of this source."""
    path = folder / "reward.py"
    path.write_text(source)
    return f"{path}:reward"


def arguments(folder: Path, **settings: object) -> list[str]:
    """`repo-ops train ...` as a list of words for `repo_ops.cli.main`."""
    words = ["train", "--output_dir", str(folder)]
    for name, value in {**TINY, **settings}.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def prepared(folder: Path, **settings: Any) -> Run:
    return prepare(TrainConfig(output_dir=str(folder), **{**TINY, **settings}))


def trained(folder: Path, **settings: Any) -> dict[str, Any]:
    """Everything that a later step would depend on, after a whole run; and its metrics."""
    run = prepared(folder, **settings)
    train(run)
    return outcome(run)


def outcome(run: Run) -> dict[str, Any]:
    assert run.buffer is not None
    return {
        "parameters": {name: value.clone() for name, value in run.model.state_dict().items()},
        "optimizer": copy.deepcopy(run.learner.optimizer.state_dict()),
        "random": random_states(run.learner.ranks.device),
        "buffer": run.buffer.state_dict(),
        "prompts": run.prompts.state_dict(),
        "next prompts": [example.prompt for example in run.prompts.take()],
        "metrics": repeatable(run.folder),
    }


def repeatable(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in read_metrics(folder)]


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Places at which two nested values differ, bit by bit."""
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return [f"{where}: keys {list(found)} instead of {list(expected)}"]
        return [d for key in expected for d in differences(found[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} instead of {len(expected)}"]
        return [d for i, value in enumerate(expected) for d in differences(found[i], value, f"{where}[{i}]")]
    if isinstance(expected, torch.Tensor):
        if isinstance(expected, DTensor):
            found, expected = found.to_local(), expected.to_local()
        return [] if found.dtype == expected.dtype and torch.equal(found, expected) else [f"{where}: tensors differ"]
    return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]
