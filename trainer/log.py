"""What a run says: metrics.jsonl always, trackers on request, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.samples import SAMPLES_FILE, SampleRow, sample_table, spread, write_completions, write_samples
from repo_ops.trainer.trackers import Tracker, tracked_names

__all__ = ["METRICS_FILE", "RunLog", "read_metrics", "read_record", "write_record"]

METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"


class RunLog:
    """Writes one line a step to folder/metrics.jsonl and shows the step; use it in a `with` block.

    Step 0 holds the evaluation before training. Each line is flushed, so a run that dies leaves its steps.

    Args:
        config: of the run; how often and what is shown, and whether all completions are kept.
        name: shown before the bar, and in plain lines.
        trackers: get every metric too.
        resumed_at: step of the checkpoint that the run goes on from; later lines of an earlier try are dropped. None: a
            new run, whose files replace those of an older one.
        silent: say and write nothing; for every rank but the first.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        name: str,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
        resumed_at: int | None = None,
        silent: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.name = name
        self.console = Console(quiet=True) if silent else console or Console()
        self.trackers = trackers
        self.silent = silent
        self.step_done: Callable[[int], None] = lambda step: None
        """Called with the number of each step once it is recorded."""
        self.lines: list[dict[str, Any]] = []
        if not silent:
            _keep_steps(folder / SAMPLES_FILE, resumed_at)
            self.lines += _keep_steps(folder / METRICS_FILE, resumed_at)
        path = Path(os.devnull) if silent else folder / METRICS_FILE
        self._file = path.open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=silent or not self.console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=config.steps, status="")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        for tracker in self.trackers:
            tracker.close(kind is not None)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step and show them."""
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()}}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log(step, tracked_names(metrics))
        self._progress.update(self._task, completed=step, status=_status(metrics))
        if not self.console.is_terminal and self._due(step, self.config.log_steps):
            self.say(f"{self.name}  step {step:>3}/{self.config.steps}  {_status(metrics)}")
        self.step_done(step)

    def completions(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Show and keep the completions of a step, as far as the settings ask for them."""
        if self.silent:
            return
        if self.config.save_completions:
            write_completions(self.folder, step, rows)
        if self._due(step, self.config.sample_steps) and rows:
            chosen = spread(rows, self.config.sample_rows)
            write_samples(self.folder, chosen)
            self.console.print(sample_table(chosen, title=f"step {step}: {len(chosen)} of {len(rows)} completions"))

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.steps)


def _keep_steps(path: Path, resumed_at: int | None) -> list[dict[str, Any]]:
    """The lines of a jsonl file up to that step, which the file is cut down to; none where the run is new.

    A last line that was half written when the process died is dropped.
    """
    if resumed_at is None:
        path.unlink(missing_ok=True)
        return []
    kept = [line for line in _lines(path) if line["step"] <= resumed_at] if path.exists() else []
    new = path.with_suffix(".part")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    new.replace(path)
    return kept


def _lines(path: Path) -> list[dict[str, Any]]:
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in [*whole, *([rest] if rest else [])]]
    except json.JSONDecodeError:
        return [json.loads(line) for line in whole]  # raises again where the damage is not at the end


def _status(metrics: Mapping[str, float]) -> str:
    shown = (
        ("reward/mean", "reward {:.3f}"),
        ("groups/effective", "effective groups {:.0%}"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("eval/sampled_mean", "held-out {:.3f}"),
    )
    return "  ".join(text.format(metrics[name]) for name, text in shown if name in metrics)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of folder/metrics.jsonl."""
    return _lines(folder / METRICS_FILE)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write folder/run.json: what a report says of a run beside its metrics."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote; {} where there is none."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
