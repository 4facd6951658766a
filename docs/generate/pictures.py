"""The pictures: one per objective, and all of them in a gallery."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from coefficients import RATIOS, Curve, curve
from PIL import Image

from repo_ops.objectives import Objective

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion: told apart with any colour vision, and in grey by their lightness
RISES, FALLS, INK = "#0072B2", "#D55E00", "#333333"
TICKS = [0.2, 0.5, 1, 2, 5]
LIMIT = 4.4
COLUMNS = 8


def draw(objectives: Mapping[str, Objective], sections: Mapping[str, list[str]], folder: Path) -> None:
    """<folder>/img/<name>.png of every objective, and <folder>/gallery.png with `sections` of names."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    curves = {name: (curve(made, 1.0), curve(made, -1.0)) for name, made in objectives.items()}
    for name, made in objectives.items():
        _save(_single(name, made, *curves[name]), folder / "img" / f"{name}.png", 32)
    _save(_gallery(curves, sections), folder / "gallery.png", 32)


def _single(name: str, objective: Objective, positive: Curve, negative: Curve) -> Figure:
    figure, axes = plt.subplots(figsize=(5.4, 3.0), dpi=100, layout="constrained")
    _plot(axes, positive, negative, width=1.8)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xlabel("p / p_ref" if name == "spo" else "ratio r = p / p_old", color=INK)
    axes.set_ylabel("d loss / d logp", color=INK)
    axes.set_title(name, fontsize=11, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _gallery(curves: Mapping[str, tuple[Curve, Curve]], sections: Mapping[str, list[str]]) -> Figure:
    places, headings, rows = _arranged(sections)
    inches = 0.65 + 1.52 * len(rows) + 0.46 * sum(rows)
    tops = [inches - 0.55 - 1.52 * row - 0.46 * sum(rows[: row + 1]) for row in range(len(rows))]
    figure = plt.figure(figsize=(14.4, inches), dpi=100)
    line = {"y": 1 - 0.24 / inches, "color": INK, "va": "center"}
    figure.text(0.02, s="d loss / d logp against the ratio", fontsize=15, **line)
    figure.text(0.30, s="A = +1", fontsize=15, weight="bold", **{**line, "color": RISES})
    figure.text(0.37, s="A = −1", fontsize=15, weight="bold", **{**line, "color": FALLS})
    note = "dashed: another token of the sequence, where it differs.  Grey: ratio 1, coefficient 0"
    figure.text(0.45, s=note, fontsize=11.5, **line)
    for section, (row, column) in headings.items():
        at = _left(column) - 0.018, (tops[row] + 0.13) / inches
        figure.text(*at, section, fontsize=13, color=INK, weight="bold", va="center")
    for name, (row, column) in places.items():
        axes = figure.add_axes((_left(column), (tops[row] - 1.3) / inches, 0.104, 1.07 / inches))
        _plot(axes, *curves[name], width=1.6)
        axes.set_title(name, fontsize=9.5 if len(name) < 20 else 8.5, color=INK, pad=3)
        axes.set_xticks([0.2, 1, 5], ["0.2", "1", "5"])
        axes.set_yticks([-3, 0, 3], ["−3", "0", "3"] if column == 0 else ["", "", ""])
    return figure


def _left(column: int) -> float:
    return 0.033 + column * 0.1215


def _arranged(
    sections: Mapping[str, list[str]],
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]], list[bool]]:
    """(row, column) of each name and of each section's heading, and whether a row has headings.

    A section goes on in the row of the one before where all of it fits there.
    """
    places: dict[str, tuple[int, int]] = {}
    headings: dict[str, tuple[int, int]] = {}
    rows: list[bool] = []
    free = 0
    for section, names in sections.items():
        starts = COLUMNS - free if len(names) <= free and rows[-1] else 0
        for place, name in enumerate(names, starts):
            if place % COLUMNS == 0:
                rows.append(place == 0)
            places[name] = len(rows) - 1, place % COLUMNS
        headings[section] = places[names[0]]
        free = -(starts + len(names)) % COLUMNS
    return places, headings, rows


def _plot(axes: Axes, positive: Curve, negative: Curve, *, width: float) -> None:
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.axvline(1, color="#BBBBBB", linewidth=0.8, zorder=0)
    for found, color, text in ((negative, FALLS, "A = −1"), (positive, RISES, "A = +1")):
        axes.plot(RATIOS, found.moved, color=color, linewidth=width, label=text, solid_capstyle="butt")
        if found.neighbour is not None and not found.neighbour.allclose(found.moved):
            dashes = {"linewidth": 0.75 * width, "linestyle": (0, (2, 1.5)), "label": f"{text}, neighbour"}
            axes.plot(RATIOS, found.neighbour, color=color, **dashes)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlim(0.2, 5)
    axes.set_ylim(-LIMIT, LIMIT)
    axes.set_xticks(TICKS)
    axes.tick_params(colors=INK, labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path, colors: int) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    # few colours: a quarter of the bytes, and nothing that the eye misses
    image = Image.open(buffer).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
