"""The numbers that sum a run up, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show_run", "summarize_run", "summary_rows", "summary_table"]


def summarize_run(lines: Sequence[Mapping[str, Any]], *, window: int = 5) -> dict[str, float]:
    """What the final table shows of a run: reward at both ends (mean of `window` steps), held-out, groups, seconds."""
    steps = [line for line in lines if "reward/mean" in line]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    found: dict[str, float] = {}
    if steps:
        rewards = [line["reward/mean"] for line in steps]
        found["reward, first steps"] = fmean(rewards[:window])
        found["reward, last steps"] = fmean(rewards[-window:])
        replays = any(line["groups/effective_off"] for line in steps)  # else all effective groups are fresh
        for name in ("groups/effective", *(("groups/effective_on", "groups/effective_off") if replays else ())):
            found[name] = fmean([line[name] for line in steps])
        for name in ("time/generate", "time/learner", "time/rest"):
            found[name] = sum(line[name] for line in steps)
        found["memory/peak_mb"] = max(line["memory/peak_mb"] for line in steps)
        ess = [line["off_policy/ess"] for line in steps if line.get("off_policy/ess") is not None]
        if ess:
            found["off_policy/ess"] = fmean(ess)
    for when, line in zip(("before", "after"), (evaluated[:1], evaluated[-1:])):
        # a mean over nothing is logged as None; a resumed run may evaluate other things than it began with
        found |= {f"{k} {when}": v for each in line for k, v in each.items() if k.startswith("eval/") and v is not None}
    return found


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
    for row in summary_rows(runs):
        table.add_row(*row)
    return table


def summary_rows(runs: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Label and one number a run, for each number that at least one run's `summarize_run` has."""
    return [
        [label, *(form.format(run[key]) if key in run else "-" for run in runs.values())]
        for key, label, form in _ROWS
        if any(key in run for run in runs.values())
    ]


def show_run(found: Mapping[str, float], *, folder: Path, console: Console | None = None) -> None:
    """The final table of one run, and where its files are."""
    console = console or Console()
    console.print(summary_table({"": found}, title="Result"))
    if found.get("groups/effective") == 0:
        why = "nothing was learned: no step had a prompt whose completions got different rewards (see report.html)"
        console.print(why, highlight=False, soft_wrap=True)
    model = " and model" if (folder / "model").exists() else ""
    console.print(f"metrics, report.html{model}: {folder}", highlight=False, soft_wrap=True)
