"""report.png and report.html: everything about one run, or several side by side, in one file without outside parts."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_ops.trainer.log import METRICS_FILE, read_metrics, read_record
from repo_ops.trainer.samples import evenly, read_samples
from repo_ops.trainer.summary import summarize_run, summary_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_report", "main", "write_page"]

# Okabe and Ito's colours, which stay apart for every kind of colour vision
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
TIME_COLOURS = {"generate": "#56B4E9", "learner": "#E69F00", "rest": "#999999"}
WINDOW = 5
MIB = 1 << 20
SAMPLED_STEPS = 5
"""Steps whose completions are shown: the first, the last, and some between."""
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
    reward, effective, ess, length, time, memory = figure.subplots(2, 3).flatten()
    # markers of several sizes: equal values stay visible
    for size, colour, (name, lines) in zip((11, 7, 4, 2), RUN_COLOURS, metrics.items()):
        _plot(reward, lines, "reward/mean", colour, f"{name}, train")
        look: dict[str, Any] = {"marker": "o", "markersize": size, "markerfacecolor": "none", "linestyle": ":"}
        _plot(reward, lines, "eval/sampled_mean", colour, f"{name}, held-out", window=1, linewidth=1.5, **look)
        replays = any(line.get("groups/effective_off") for line in lines)
        label = "together" if replays else "all on-policy"
        _plot(effective, lines, "groups/effective", colour, f"{name}, {label}", faint=False)
        for key, dash, label in (("on", "--", "on-policy"), ("off", ":", "off-policy")) if replays else ():
            look = {"faint": False, "linestyle": dash, "linewidth": 1.5}
            _plot(effective, lines, f"groups/effective_{key}", colour, f"{name}, {label}", **look)
        _plot(ess, lines, "off_policy/ess", colour, name)
        _plot(length, lines, "completions/mean_length", colour, name)
        _plot(memory, lines, "memory/peak_mb", colour, name, window=1, scale=1 / 1024)
    if not ess.lines:
        ess.set_xticks([])
        ess.text(0.5, 0.5, "nothing was replayed", ha="center", va="center", transform=ess.transAxes, color="0.4")
    _style(reward, f"Reward (bold: mean of {WINDOW} steps)", "mean reward", unit_range=True)
    _style(effective, f"Effective groups (mean of {WINDOW} steps)", "share of the step's prompts", unit_range=True)
    _style(ess, "Effective sample size of replayed tokens", "share of the tokens; 1 = on-policy", unit_range=True)
    _style(length, "Completion length", "mean tokens, stop token included")
    _style(memory, "Peak memory of each step", "GiB")
    _draw_time(time, metrics)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _plot(
    ax: Axes,
    lines: Lines,
    key: str,
    colour: str,
    label: str,
    *,
    window: int = WINDOW,
    scale: float = 1.0,
    faint: bool = True,
    **look: Any,
) -> None:
    """One metric of one run, if it has it: the mean of the last `window` values, and behind it faintly the values."""
    steps, values = _series(lines, key)
    if not steps:
        return
    # at the start, of those values that there are
    means = [scale * sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    if faint and window > 1:
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    ax.plot(steps, means, color=colour, label=label, **{"linewidth": 2.2, **look})


def _series(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _style(ax: Axes, title: str, ylabel: str, *, unit_range: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("step")
    if ax.lines:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    if unit_range:  # headroom, so that the legend hides no line
        ax.set_ylim(-0.03, 1.33)
        ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    else:
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    if ax.lines:
        ax.legend(loc="upper left", ncols=2 if unit_range else 1, fontsize=9, frameon=False)


def _draw_time(ax: Axes, metrics: Mapping[str, Lines]) -> None:
    """Seconds of the whole run in each part of the step."""
    totals = [_seconds(lines) for lines in metrics.values()]
    longest = max(map(sum, totals))
    left = [0.0] * len(metrics)
    for (part, colour), seconds in zip(TIME_COLOURS.items(), zip(*totals)):
        bars = ax.barh(list(metrics), seconds, left=left, height=0.5, color=colour, label=part)
        # a number only where its part of the bar is wide enough to hold it
        ax.bar_label(bars, [f"{s:.0f} s" if s > 0.07 * longest else "" for s in seconds], label_type="center")
        left = [done + s for done, s in zip(left, seconds)]
    ax.margins(x=0.1)
    ax.set_ylim(len(metrics) - 0.2, -0.8)
    ax.set_title("Time of the training steps", loc="left", fontsize=11)
    ax.set_xlabel("seconds")
    ax.legend(loc="upper right", ncols=3, frameon=False, fontsize=9)


def _seconds(lines: Lines) -> list[float]:
    return [sum(_series(lines, f"time/{part}")[1]) for part in TIME_COLOURS]


PAGE = """\
<!doctype html>
{% macro table(heads, rows) %}<table>
<tr><th></th>{% for head in heads %}<th class=n>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class=n>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p.what { color: #555; margin: .1rem 0; white-space: pre-line; } img { width: 100%; height: auto; }
table { border-collapse: collapse; }
td, th { text-align: left; white-space: pre-wrap; padding: .25rem .8rem .25rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #999; } td { border-bottom: 1px solid #e4e4e4; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
table.samples { width: 100%; table-layout: fixed; } table.samples .n { width: 6rem; }
table.samples .short { width: 7rem; } table.samples pre { max-height: 16rem; overflow-y: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem 1.5rem; }
.curves figure { margin: 0; } .curves figcaption { font-size: 13px; overflow-wrap: anywhere; }
.curves svg { width: 100%; height: 4.5rem; display: block; background: #f7f7f7; }
.curves polyline { fill: none; stroke-width: 2; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.curves small { color: #666; font-variant-numeric: tabular-nums; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .4em 0 1em; vertical-align: -.1em; }
</style></head>
<body>
<h1>{{ title }}</h1>
{% for run in runs %}
{% if runs[1:] %}<h3>{{ run.name }}</h3>{% endif %}
<p class="what">{{ run.record.describe }}</p>
<p class="what">{{ run.done }} of {{ run.record.steps or run.done }} steps; {{ run.record.ended or
    "not ended, or ended without a word" }}</p>
<p class="what">started {{ run.record.started or "unknown" }} on {{ run.record.device or "unknown" }}</p>
{% endfor %}
<h2>Result</h2>
{{ table(names, result) }}
<h2>Curves</h2><img alt="reward, effective groups, time, memory" src="data:image/png;base64,{{ picture }}">
{% for run in runs if run.samples %}
<h2>Completions{% if runs[1:] %} of {{ run.name }}{% endif %}</h2>
{% for step in run.sampled %}
<details{% if loop.last %} open{% endif %}><summary>step {{ step }}</summary><table class=samples>
<tr><th>prompt</th><th>completion</th><th class=n>reward</th><th class=n>advantage</th><th class=short>from</th></tr>
{% for row in run.samples if row.step == step %}
<tr><td><pre>{{ row.prompt }}</pre></td><td><pre>{{ row.completion }}</pre></td>
<td class=n>{{ "%.3g" % row.reward }}</td><td class=n>{{ "%+.2f" % row.advantage }}</td>
<td>{% if row.replayed %}replay, {{ row.step - 1 - row.version }} old{% else %}fresh{% endif %}</td></tr>
{% endfor %}
</table></details>
{% endfor %}
{% endfor %}
{% if memory %}<h2>Memory that stays from step to step, MiB</h2>{{ table(names, memory) }}{% endif %}
{% if time %}<h2>Time of the training steps</h2>{{ table(parts, time) }}{% endif %}
<details><summary>Every metric</summary>
<p>{% for run in runs if runs[1:] %}<span class="key" style="background:{{ run.colour }}"></span>{{ run.name }}
{% endfor %}</p>
<div class="curves">{% for curve in curves %}
<figure><figcaption>{{ curve.name }}</figcaption><svg viewBox="0 0 200 60" preserveAspectRatio="none">
{% for colour, points in curve.lines %}<polyline points="{{ points }}" stroke="{{ colour }}"/>{% endfor %}</svg>
<small>{{ curve.range }}</small></figure>
{% endfor %}</div></details>
<h2>Settings</h2>
{% for run in runs if run.settings %}
<details><summary>{{ run.name }}</summary><pre>{{ run.settings }}</pre></details>
{% endfor %}
{% if versions %}<details><summary>Versions</summary>{{ table(names, versions) }}</details>{% endif %}
</body></html>
"""


def write_page(runs: Mapping[str, Path], path: Path, *, picture: Path, title: str | None = None) -> Path:
    """Writes the page to `path` and returns it.

    Args:
        runs: name of a run -> its folder, as for `draw_report`.
        picture: their report.png, which becomes part of the page.
        title: above it; the runs' names by default.
    """
    from jinja2 import Environment

    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    records = [read_record(folder) for folder in runs.values()]
    shown = []
    for name, folder, record, colour in zip(runs, runs.values(), records, RUN_COLOURS):
        samples, settings = read_samples(folder), folder / "config.yaml"
        run: dict[str, Any] = {"name": name, "record": record, "colour": colour, "samples": samples}
        run["sampled"] = sorted(set(evenly(sorted({row["step"] for row in samples}), SAMPLED_STEPS)))
        run["done"] = max((line["step"] for line in metrics[name]), default=0)
        run["settings"] = settings.read_text(encoding="utf-8") if settings.exists() else ""
        shown.append(run)
    memory = _rows([record.get("memory_at_rest", {}) for record in records], 0)
    if memory:
        memory.append(["together", *map(sum, list(zip(*memory))[1:])])
    versions = _rows([record.get("versions", {}) for record in records], "-")
    if versions:
        versions.append(["platform", *(record.get("platform", "-") for record in records)])
    time = []
    for name, lines in metrics.items():
        seconds = _seconds(lines)
        if whole := sum(seconds):
            time.append([name, *(f"{s:.1f} s ({s / whole:.0%})" for s in seconds), f"{whole:.1f} s"])
    keys = sorted({key for lines in metrics.values() for line in lines for key in line} - {"step"})
    page = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE)
        .render(
            title=title or " and ".join(runs),
            names=list(runs),
            runs=shown,
            picture=base64.b64encode(picture.read_bytes()).decode(),
            result=summary_rows({name: summarize_run(lines) for name, lines in metrics.items()}),
            memory=[[label, *(f"{size / MIB:.1f}" for size in sizes)] for label, *sizes in memory],
            parts=[*TIME_COLOURS, "together"],
            time=time,
            curves=[curve for key in keys if (curve := _curve(key, metrics))],
            versions=versions,
        )
    )
    path.write_text(page, encoding="utf-8")
    return path


def _rows(columns: Sequence[Mapping[str, Any]], missing: Any) -> list[list[Any]]:
    """A row for each key that any column has: the key, and its value in each column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key, missing) for column in columns)] for key in keys]


def _curve(key: str, metrics: Mapping[str, Lines]) -> dict[str, Any] | None:
    """A small picture of one metric, the runs over each other; None where it was never a number."""
    series = [_series(lines, key) for lines in metrics.values()]
    steps, values = (list(chain.from_iterable(each)) for each in zip(*series))
    if not values:
        return None
    left, low = min(steps), min(values)
    width, height = (max(steps) - left) or 1, (max(values) - low) or 1.0
    drawn = []
    for colour, points in zip(RUN_COLOURS, series):
        places = [f"{4 + 192 * (x - left) / width:.1f},{56 - 52 * (y - low) / height:.1f}" for x, y in zip(*points)]
        # a line of no length is drawn as the dot of its round ends
        drawn.append((colour, " ".join(places * 2 if len(places) == 1 else places)))
    last = ", ".join(f"{found[-1]:.4g}" for _, found in series if found)
    return {"name": key, "lines": drawn, "range": f"{low:.4g} to {max(values):.4g}; last {last}"}


def main(arguments: Sequence[str]) -> None:
    """Make the report of a finished run again, or of several side by side."""
    parser = argparse.ArgumentParser(prog="repo-ops report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help=f"folders of runs, at most {len(RUN_COLOURS)}")
    parser.add_argument("--output", type=Path, help="report.html to write, its picture beside it (default: in the run)")
    options = parser.parse_args(arguments)
    if len(options.runs) > len(RUN_COLOURS):
        parser.error(f"expected at most {len(RUN_COLOURS)} runs, got {len(options.runs)}")
    for folder in options.runs:
        if not (folder / METRICS_FILE).exists():
            parser.error(f"expected folders with {METRICS_FILE}, got {folder}")
    if len(options.runs) > 1 and options.output is None:
        parser.error("several runs need --output FILE.html")
    names = [folder.resolve().name for folder in options.runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in options.runs]
    runs = dict(zip(names, options.runs, strict=True))
    path = options.output or options.runs[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(write_page(runs, path, picture=draw_report(runs, path.with_suffix(".png"))))
