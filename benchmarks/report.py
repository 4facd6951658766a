"""A picture of result files: time and peak memory of each method, a row of panels per case.

python benchmarks/report.py benchmarks/results/*.json     writes benchmarks/results/<same name>.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "main"]

OURS, PEER, FLOOR, GRADIENTS = "#c8452d", "#5b7c99", "#c9c9c9", 0.35
"""Colours of bars; gradients are the same colour at this opacity."""
NOT_A_METHOD = ("floor", "fresh_floor")


@dataclass(frozen=True)
class Bar:
    """One method in one case."""

    name: str
    label: str
    value: float
    q1: float
    q3: float
    peak: float | None
    gradients: float | None

    @property
    def colour(self) -> str:
        """Ours stand out, bare GEMMs recede."""
        if self.name in NOT_A_METHOD:
            return FLOOR
        return OURS if self.name.startswith("ours") else PEER


def bars_of(case: dict[str, Any]) -> list[Bar]:
    """The rows of a case of either kind of result file."""
    bars = []
    for row in case["rows"]:
        name = row.get("method") or row["side"]
        time = row.get("both", row)
        values = (time["median"], time["q1"], time["q3"])
        bars.append(Bar(name, row["label"], *values, row["peak_mib"], row["gradient_mib"]))
    return bars


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of `report` to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases, machine = report["cases"], report["machine"]
    unit = "s" if "side" in cases[0]["rows"][0] else "ms"
    heights = [0.9 + 0.3 * len(case["rows"]) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases),
        2,
        figsize=(13, sum(heights) + 0.8),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": [1.25, 1]},
    )
    for case, (left, right) in zip(cases, axes, strict=True):
        bars = bars_of(case)[::-1]
        _times(left, bars, unit)
        _memory(right, bars)
        left.set_title(case["title"], loc="left", fontsize=10, fontweight="bold")
    head = "Policy loss from hidden states, forward + backward" if unit == "ms" else "Learner step, loss + backward"
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    figure.suptitle(
        f"{head}\n{machine['device']}, {machine['threads']} threads, {machine['date'][:10]}; {versions}", fontsize=9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _times(axes: Axes, bars: list[Bar], unit: str) -> None:
    reference = next((bar for bar in bars if bar.name == "floor"), None)
    word = "x floor"
    if reference is None:
        reference, word = next(bar for bar in bars if bar.name.startswith("ours")), "x ours"
    places = range(len(bars))
    axes.barh(places, [bar.value for bar in bars], color=[bar.colour for bar in bars], height=0.7)
    lows, highs = ([abs(bar.value - at) for bar, at in zip(bars, ends, strict=True)] for ends in _quartiles(bars))
    axes.errorbar(
        [bar.value for bar in bars], places, xerr=[lows, highs], fmt="none", ecolor="black", elinewidth=1, capsize=2
    )
    for place, bar in zip(places, bars, strict=True):
        number = f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}"
        text = f"{number} {unit}  {bar.value / reference.value:.2f}{word}"
        space = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dotted line must not cross the numbers
        axes.annotate(
            text, (bar.q3, place), (6, 0), textcoords="offset points", va="center", fontsize=8, bbox=space, zorder=3
        )
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.axvline(reference.value, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"{unit}, median and quartiles", fontsize=8)
    axes.set_yticks(list(places), [bar.label for bar in bars])
    _tidy(axes, max(bar.q3 for bar in bars))


def _quartiles(bars: list[Bar]) -> tuple[list[float], list[float]]:
    return [bar.q1 for bar in bars], [bar.q3 for bar in bars]


def _memory(axes: Axes, bars: list[Bar]) -> None:
    if all(bar.peak is None for bar in bars):
        axes.axis("off")
        return
    for place, bar in enumerate(bars):
        if bar.peak is None or bar.gradients is None or bar.name in NOT_A_METHOD:
            continue  # bare GEMMs keep nothing that a loss would need
        axes.barh(place, bar.gradients, color=bar.colour, alpha=GRADIENTS, height=0.7)
        rest = max(0.0, bar.peak - bar.gradients)
        axes.barh(place, rest, left=bar.gradients, color=bar.colour, height=0.7)
        axes.text(max(bar.peak, bar.gradients), place, f"  {bar.peak:.0f}", va="center", fontsize=8)
    axes.set_xlabel("peak MiB beyond model and inputs; pale: the gradients themselves", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    _tidy(axes, max(bar.peak or 0.0 for bar in bars if bar.name not in NOT_A_METHOD))


def _tidy(axes: Axes, largest: float) -> None:
    axes.set_xlim(0, (largest or 1) * 1.3)  # room for the numbers behind the bars
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every result file that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="json files of the benchmarks")
    for path in parser.parse_args(arguments).results:
        report = json.loads(path.read_text())
        if "cases" not in report:
            print(f"{path}: a table, without a picture")
            continue
        if not report["cases"]:
            parser.error(f"{path}: expected at least one case, got none; the run was cut short")
        draw(report, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
