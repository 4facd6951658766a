"""What a run has to remember: taken into a snapshot after a step, put back when the run goes on."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repo_ops.trainer.checkpoint import METRICS, Checkpoint, Snapshot, newest_whole, read, steps_of
from repo_ops.trainer.config import TrainConfig, changed_settings, settings_as_json
from repo_ops.trainer.distributed import Ranks

if TYPE_CHECKING:
    from repo_ops.trainer.run import Run

__all__ = ["CHECKPOINTS", "checkpoint_of", "moment", "restore", "snapshot"]

CHECKPOINTS = "checkpoints"
LIBRARIES = ("torch", "transformers", "repo-ops")
OF_TRAINED: dict[str, Any] = {"ignore_frozen_params": True, "strict": False}
"""Options of DCP: what is not trained is made again from the settings."""


def moment(run: Run) -> dict[str, Any]:
    """What making completions and rewards may change: the random states of this process, and the data position.

    Small enough to be taken before each step, so that a step that is dropped half-way leaves no trace.
    """
    return {"random": random_states(run.learner.ranks.device), "prompts": run.prompts.state_dict()}


def snapshot(
    run: Run, step: int, *, at: Mapping[str, Any] | None = None, unfinished: Mapping[str, float] | None = None
) -> Snapshot:
    """The run after `step` optimizer steps.

    Args:
        at: `moment` before the following step, where that was begun and dropped; None: now.
        unfinished: metrics of the step, where its line is still to be written, and its evaluation to be made.
    """
    from torch.distributed.checkpoint import state_dict

    optimizer, options = run.learner.optimizer, state_dict.StateDictOptions(**OF_TRAINED)
    sharded: dict[str, Any] = {"model": state_dict.get_model_state_dict(run.model, options=options)}
    if optimizer.state:  # before the first real step there is none, and asking for it would make AdamW count one
        sharded["optimizer"] = state_dict.get_optimizer_state_dict(run.model, optimizer, options=options)
    own = {**(at or moment(run)), "buffer": None if run.buffer is None else run.buffer.state_dict()}
    header = {
        "settings": settings_as_json(run.config),
        "versions": {name: version(name) for name in LIBRARIES},
        "unfinished": None if unfinished is None else dict(unfinished),
    }
    metrics = run.folder / METRICS
    kept = metrics.read_bytes() if run.learner.ranks.is_first and metrics.exists() else b""
    return Snapshot(step, sharded, own, header, kept)


def checkpoint_of(config: TrainConfig, ranks: Ranks, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run is to go on from; None for a new run. The first rank looks, for all.

    Args:
        say: gets a sentence for each damaged checkpoint that was passed over.
    Raises:
        ValueError: none where one is asked for by its path, a setting that would alter the run differs from the saved
            one, or a new run would write into the folder of an earlier one.
    """
    return ranks.from_first(lambda: _chosen(config, Path(config.output_dir) / CHECKPOINTS, say))


def _chosen(config: TrainConfig, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    steps = steps_of(folder)
    if config.resume is None:
        if steps:
            raise ValueError(
                f"output_dir: expected one without checkpoints for a new run, got {config.output_dir} with that of "
                f"step {steps[0]}; --resume auto goes on from it, another --output_dir begins anew"
            )
        return None
    if config.resume == "auto":
        found = newest_whole(folder, say)
        if found is None:
            say(f"no checkpoint in {folder}: the run starts from the beginning")
            return None
    else:
        found = read(Path(config.resume).expanduser())
        if steps and steps[0] > found.step:
            raise ValueError(
                f"resume: expected the newest checkpoint of {folder}, that of step {steps[0]}, got that of step "
                f"{found.step}; choose another --output_dir to go on from an earlier one"
            )
    _check_settings(config, found)
    for name, saved in found.manifest["versions"].items():
        if saved != version(name):
            say(f"the checkpoint is from {name} {saved}, here is {version(name)}: results may differ by rounding")
    return found


def _check_settings(config: TrainConfig, checkpoint: Checkpoint) -> None:
    if changed := changed_settings(checkpoint.manifest["settings"], config):
        name, saved, now = changed[0]
        others = f" (and {', '.join(other for other, *_ in changed[1:])})" if changed[1:] else ""
        raise ValueError(
            f"{name}: expected {saved!r} as in checkpoint {checkpoint.folder}, got {now!r}{others}; a run goes on with "
            "its own settings, start a new one from the exported model to change them"
        )
    if checkpoint.step > config.steps:
        raise ValueError(f"steps: expected at least {checkpoint.step}, which the checkpoint has, got {config.steps}")


def restore(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Puts the run back to where the checkpoint was taken; returns sentences about what could not be put back.

    Every rank reads its shards, and more or fewer ranks than saved are fine. The buffers are dealt out again then,
    each prompt to its home rank, and the results are those of the saved run but for rounding.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    _load_weights(run, checkpoint)
    states, ranks = checkpoint.own_states(), run.learner.ranks
    mine = states[min(ranks.rank, len(states) - 1)]
    run.prompts.load_state_dict(mine["prompts"])
    if ranks.rank < len(states):
        set_random_states(mine["random"], ranks.device)
    if run.buffer is not None:
        if len(states) == ranks.size:
            run.buffer.load_state_dict(mine["buffer"])
        else:
            run.buffer.load_state_dicts([state["buffer"] for state in states], keep=ranks.keeps)
    said = [f"goes on from step {checkpoint.step} ({checkpoint.folder})"]
    if len(states) != ranks.size:
        said.append(f"the checkpoint is of {len(states)} ranks, here are {ranks.size}: results differ by rounding")
    if ranks.is_first:
        (run.folder / METRICS).write_bytes((checkpoint.folder / METRICS).read_bytes())
    return said


def _load_weights(run: Run, checkpoint: Checkpoint) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load, state_dict

    optimizer, options = run.learner.optimizer, state_dict.StateDictOptions(**OF_TRAINED)
    reader = FileSystemReader(checkpoint.folder)
    saved = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {"model": state_dict.get_model_state_dict(run.model, options=options)}
    _check_model(state["model"], saved, checkpoint)
    if any(name.startswith("optimizer.") for name in saved):
        state["optimizer"] = state_dict.get_optimizer_state_dict(run.model, optimizer, options=options)
        moments = state["optimizer"]["state"]
        for name in list(moments):  # a parameter that never had a gradient has no moments
            if not any(f"optimizer.state.{name}.{key}" in saved for key in moments[name]):
                del moments[name]
    with warnings.catch_warnings():  # DCP says at every load of a run without ranks that it has none
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=reader)
    state_dict.set_model_state_dict(run.model, state["model"], options=options)
    if "optimizer" in state:
        state_dict.set_optimizer_state_dict(run.model, optimizer, state["optimizer"], options=options)


def _check_model(model: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    shapes = {name[len("model.") :]: tuple(each.size) for name, each in saved.items() if name.startswith("model.")}
    mine = {name: tuple(value.shape) for name, value in model.items()}
    if shapes != mine:
        name = next(name for name in [*mine, *shapes] if shapes.get(name) != mine.get(name))
        raise ValueError(
            f"model: expected the one of checkpoint {checkpoint.folder}, where {name} is {shapes.get(name, 'absent')}, "
            f"got one where it is {mine.get(name, 'absent')}"
        )


def random_states(device: torch.device) -> dict[str, Any]:
    """State of every generator that has one per process: Python, torch, the device, numpy where it is loaded."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy"] = [name, keys.tolist(), *rest]
    return found


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Puts the generators into these states; those of a device that is not here are left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(tuple(states["numpy"]))
