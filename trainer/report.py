"""report.png: one picture of a run, or of several runs over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_ops.trainer.log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_report"]

# Okabe and Ito's colours, which stay apart for every kind of colour vision
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
TIME_COLOURS = {"generate": "#56B4E9", "learner": "#E69F00", "rest": "#999999"}
WINDOW = 5
Lines = Sequence[Mapping[str, Any]]


def draw_report(runs: Mapping[str, Path], path: Path, *, title: str | None = None) -> Path:
    """Writes a picture of the runs' metrics to `path` and returns it.

    Args:
        runs: name of a run -> its folder with metrics.jsonl; at most four.
        title: above the picture; the runs' names by default.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    if not 1 <= len(runs) <= len(RUN_COLOURS):
        raise ValueError(f"runs: expected 1 to {len(RUN_COLOURS)}, got {len(runs)}")
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    figure.suptitle(title or " and ".join(runs), fontsize=15, fontweight="bold")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    axes = figure.subplots(2, 3).flatten()
    for draw, ax in zip((_reward, _effective, _ess, _length, _time, _memory), axes, strict=True):
        draw(ax, metrics)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _reward(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    """Training reward, and held-out reward where it was measured."""
    for size, colour, (name, lines) in zip((11, 7, 4, 2), RUN_COLOURS, metrics.items()):  # equal values stay visible
        steps, values = _series(lines, "reward/mean")
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        ax.plot(steps, _smooth(values), color=colour, linewidth=2.2, label=f"{name}, train")
        steps, values = _series(lines, "eval/sampled_mean")
        if steps:
            ax.plot(
                steps, values, "o:", color=colour, markersize=size, markerfacecolor="none", label=f"{name}, held-out"
            )
    _style(ax, f"Reward (bold: mean of {WINDOW} steps)", "mean reward", unit_range=True)


def _effective(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    """Share of prompts that give any gradient."""
    kinds = (("groups/effective", "-", "together"), ("groups/effective_on", "--", "on-policy"),
             ("groups/effective_off", ":", "off-policy"))  # fmt: skip
    for colour, (name, lines) in zip(RUN_COLOURS, metrics.items()):
        replays = any(line.get("groups/effective_off") for line in lines)
        for key, dash, kind in kinds if replays else kinds[:1]:
            steps, values = _series(lines, key)
            width = 2.2 if kind == "together" else 1.5
            label = f"{name}, {kind}" if replays else f"{name}, all on-policy"
            ax.plot(steps, _smooth(values), dash, color=colour, linewidth=width, label=label)
    _style(ax, f"Effective groups (mean of {WINDOW} steps)", "share of the step's prompts", unit_range=True)


def _ess(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    """Effective sample size of replayed tokens."""
    drawn = False
    for colour, (name, lines) in zip(RUN_COLOURS, metrics.items()):
        steps, values = _series(lines, "off_policy/ess")
        if steps:
            ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            ax.plot(steps, _smooth(values), color=colour, linewidth=2.2, label=name)
            drawn = True
    _style(ax, "Effective sample size of replayed tokens", "share of the tokens; 1 = on-policy", unit_range=True)
    if not drawn:
        ax.set_xticks([])
        ax.text(0.5, 0.5, "nothing was replayed", ha="center", va="center", transform=ax.transAxes, color="0.4")


def _length(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    for colour, (name, lines) in zip(RUN_COLOURS, metrics.items()):
        steps, values = _series(lines, "completions/mean_length")
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        ax.plot(steps, _smooth(values), color=colour, linewidth=2.2, label=name)
    _style(ax, "Completion length", "mean tokens, stop token included")
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])


def _time(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    """Seconds of the whole run in each part of the step."""
    totals = {part: [sum(_series(lines, f"time/{part}")[1]) for lines in metrics.values()] for part in TIME_COLOURS}
    longest = max(map(sum, zip(*totals.values(), strict=True)))
    left = [0.0] * len(metrics)
    for part, seconds in totals.items():
        bars = ax.barh(list(metrics), seconds, left=left, height=0.5, color=TIME_COLOURS[part], label=part)
        # a number only where its part of the bar is wide enough to hold it
        ax.bar_label(bars, [f"{s:.0f} s" if s > 0.07 * longest else "" for s in seconds], label_type="center")
        left = [done + s for done, s in zip(left, seconds, strict=True)]
    ax.margins(x=0.1)
    ax.set_ylim(len(metrics) - 0.2, -0.8)
    ax.set_title("Time of the training steps", loc="left", fontsize=11)
    ax.set_xlabel("seconds")
    ax.legend(loc="upper right", ncols=3, frameon=False, fontsize=9)


def _memory(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    for colour, (name, lines) in zip(RUN_COLOURS, metrics.items()):
        steps, values = _series(lines, "memory/peak_mb")
        ax.plot(steps, [value / 1024 for value in values], color=colour, linewidth=2.2, label=name)
    _style(ax, "Peak memory of each step", "GiB")
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])


def _style(ax: Axes, title: str, ylabel: str, *, unit_range: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    if unit_range:  # headroom, so that the legend hides no line
        ax.set_ylim(-0.03, 1.33)
        ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", ncols=2 if unit_range else 1, fontsize=9, frameon=False)


def _series(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last WINDOW values at each place (of those there are, at the start)."""
    return [sum(values[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(values))]
