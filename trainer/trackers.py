"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["TRACKERS", "Opening", "Tracker", "check_installed", "open_trackers", "tracked_names", "tracker_names"]

# What dashboards of TRL call the same numbers, so that runs of both lie over each other.
KNOWN_AS = {
    "reward/mean": "reward",
    "reward/std": "reward_std",
    "lr": "learning_rate",
    "sampler_ratio": "sampling/importance_sampling_ratio/mean",
    "sampler_gap_abs": "sampling/sampling_logp_difference/mean",
}


@dataclass(frozen=True)
class Opening:
    """What a tracker is told of a run before its first step."""

    folder: Path
    """Of the run; local files of a tracker lie in it."""
    project: str
    name: str
    settings: Mapping[str, Any]
    resumed_at: int | None = None
    """Last step that was logged before, where a run goes on from a checkpoint; None: a new run."""

    @cached_property
    def run_id(self) -> str:
        """Names the run at its trackers; kept in folder/run_id, so that a resumed run goes on under the same."""
        path = self.folder / "run_id"
        if self.resumed_at is None or not path.exists():
            path.write_text(secrets.token_hex(4))
        return path.read_text()


class Tracker(NamedTuple):
    """An open tracker."""

    log: Callable[[int, dict[str, float]], None]
    """Of a step and its metrics."""
    close: Callable[[bool], None]
    """Of whether the run failed."""


def _tensorboard(run: Opening) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # steps after the checkpoint were written once already; TensorBoard forgets them
    purge = None if run.resumed_at is None else run.resumed_at + 1
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
    if run.resumed_at is None:
        writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in run.settings.items()))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, lambda failed: writer.close())


def _wandb(run: Opening) -> Tracker:
    import wandb

    opened = wandb.init(
        project=run.project,
        name=run.name,
        id=run.run_id,
        resume="allow",
        dir=str(run.folder),
        config=dict(run.settings),
        settings=wandb.Settings(console="off"),  # it would copy every redraw of the progress bar
    )
    # its own step counter only goes up: the steps since the checkpoint, made again, would be dropped
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return Tracker(
        lambda step, metrics: opened.log({"step": step, **metrics}),
        lambda failed: opened.finish(exit_code=int(failed)),
    )


def _trackio(run: Opening) -> Tracker:
    import trackio

    name = f"{run.name}-{run.run_id}"  # it knows a run by its name alone
    opened = trackio.init(project=run.project, name=name, config=dict(run.settings), resume="allow", embed=False)
    return Tracker(lambda step, metrics: opened.log(metrics, step=step), lambda failed: opened.finish())


# A new tracker is one function and one row here; its name is also that of its package.
TRACKERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The names in a list, or in a string with commas.

    Raises:
        ValueError: one is not in TRACKERS.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to: expected names out of {', '.join(TRACKERS)}, got {name!r}")
    return names


def check_installed(names: Sequence[str], *, option: str) -> None:
    """Raises ImportError, with the command that helps, where one of the packages is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{option}: needs the package {name}; pip install {name}")


def open_trackers(names: Sequence[str], run: Opening) -> list[Tracker]:
    """The named trackers, ready for the first step."""
    return [TRACKERS[name](run) for name in names]


def tracked_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as trackers get them: eval/* as they are, all others under train/ and by TRL's names for them."""
    return {
        name if name.startswith("eval/") else f"train/{KNOWN_AS.get(name, name)}": value
        for name, value in metrics.items()
    }
