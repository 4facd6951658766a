"""What a run says: metrics.jsonl always, a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["RunLog", "read_metrics", "show_run", "summarize_run", "summary_table"]

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes one line a step to folder/metrics.jsonl and shows the step; use it in a `with` block.

    Step 0 holds the evaluation before training. Each line is flushed, so a run that dies leaves its steps.

    Args:
        name: shown before the bar, and in plain lines.
        every: print every so many steps where there is no terminal; the file gets all of them.
    """

    def __init__(self, folder: Path, *, name: str, steps: int, every: int = 1, console: Console | None = None) -> None:
        self.console = console or Console()
        self.name = name
        self.steps = steps
        self.every = every
        self._file = (folder / METRICS_FILE).open("w", encoding="utf-8")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=steps, status="")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()

    def say(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step and show them."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        self._progress.update(self._task, completed=step, status=_status(metrics))
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            self.say(f"{self.name}  step {step:>3}/{self.steps}  {_status(metrics)}")


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
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summarize_run(lines: Sequence[Mapping[str, Any]], *, window: int = 5) -> dict[str, float]:
    """What the final table shows of a run: reward at both ends (mean of `window` steps), held-out, groups, seconds."""
    steps = [line for line in lines if "reward/mean" in line]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    found: dict[str, float] = {}
    if steps:
        rewards = [line["reward/mean"] for line in steps]
        found["reward, first steps"] = _mean(rewards[:window])
        found["reward, last steps"] = _mean(rewards[-window:])
        for name in ("groups/effective_on", "groups/effective_off", "groups/effective"):
            found[name] = _mean([line[name] for line in steps])
        for name in ("time/generate", "time/learner", "time/rest"):
            found[name] = sum(line[name] for line in steps)
        found["memory/peak_mb"] = max(line["memory/peak_mb"] for line in steps)
        ess = [line["off_policy/ess"] for line in steps if line.get("off_policy/ess") is not None]
        if ess:
            found["off_policy/ess"] = _mean(ess)
    for name in sorted({name for line in evaluated for name in line if name.startswith("eval/")}):
        found[f"{name} before"] = evaluated[0][name]
        found[f"{name} after"] = evaluated[-1][name]
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_ROWS = (
    ("reward, first steps", "train reward, first 5 steps", "{:.3f}"),
    ("reward, last steps", "train reward, last 5 steps", "{:.3f}"),
    ("eval/sampled_mean before", "held-out reward, sampled, before", "{:.3f}"),
    ("eval/sampled_mean after", "held-out reward, sampled, after", "{:.3f}"),
    ("eval/greedy_mean before", "held-out reward, greedy, before", "{:.3f}"),
    ("eval/greedy_mean after", "held-out reward, greedy, after", "{:.3f}"),
    ("groups/effective", "prompts with a gradient", "{:.1%}"),
    ("groups/effective_on", "  from fresh completions", "{:.1%}"),
    ("groups/effective_off", "  from replayed ones", "{:.1%}"),
    ("off_policy/ess", "effective sample size of replayed tokens", "{:.3f}"),
    ("time/generate", "seconds generating", "{:.1f}"),
    ("time/learner", "seconds in the learner", "{:.1f}"),
    ("time/rest", "seconds for the rest", "{:.1f}"),
    ("memory/peak_mb", "peak memory, MiB", "{:.0f}"),
)


def summary_table(runs: Mapping[str, Mapping[str, float]], *, title: str, caption: str | None = None) -> Table:
    """A column for each run's `summarize_run`, a row for each number that at least one run has."""
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for key, label, form in _ROWS:
        if any(key in run for run in runs.values()):
            table.add_row(label, *(form.format(run[key]) if key in run else "-" for run in runs.values()))
    return table


def show_run(found: Mapping[str, float], *, folder: Path, console: Console | None = None) -> None:
    """The final table of one run, and where its files are."""
    console = console or Console()
    console.print(summary_table({"": found}, title="Result"))
    console.print(f"metrics, picture and model: {folder}", highlight=False, soft_wrap=True)
