"""report.html: one file without outside parts that says everything about one run, or several side by side."""

from __future__ import annotations

import argparse
import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from repo_ops.trainer.log import METRICS_FILE, read_metrics
from repo_ops.trainer.report import RUN_COLOURS, draw_report
from repo_ops.trainer.run_record import read_record
from repo_ops.trainer.samples import SampleRow, read_samples
from repo_ops.trainer.summary import summarize_run, summary_rows

__all__ = ["main", "write_page"]

MIB = 1 << 20
SAMPLED_STEPS = 5
"""Steps whose completions are shown: the first, the last, and some between."""

STYLE = """
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
.curves small { color: #666; font-variant-numeric: tabular-nums; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
.key { display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em; }
"""


def write_page(runs: Mapping[str, Path], path: Path, *, picture: Path, title: str | None = None) -> Path:
    """Writes the page to `path` and returns it.

    Args:
        runs: name of a run -> its folder, as for `draw_report`.
        picture: their report.png, which becomes part of the page.
        title: above it; the runs' names by default.
    """
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    records = {name: read_record(folder) for name, folder in runs.items()}
    heading = title or " and ".join(runs)
    image = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        f"<h1>{escape(heading)}</h1>",
        *(_head_of(name, records[name], metrics[name], len(runs) > 1) for name in runs),
        "<h2>Result</h2>",
        _table(["", *runs], summary_rows({name: summarize_run(lines) for name, lines in metrics.items()})),
        f'<h2>Curves</h2><img alt="reward, effective groups, time, memory" src="data:image/png;base64,{image}">',
        *(_samples(name if len(runs) > 1 else "", read_samples(folder)) for name, folder in runs.items()),
        _memory(records),
        _time(metrics),
        f"<details><summary>Every metric</summary>{_curves(metrics)}</details>",
        _settings(runs),
        _versions(records),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def _head_of(name: str, record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], several: bool) -> str:
    done = max((line["step"] for line in lines), default=0)
    total = record.get("steps", done)
    said = [
        record.get("describe", ""),
        f"{done} of {total} steps; {record.get('ended') or 'not ended, or ended without a word'}",
        f"started {record.get('started', 'unknown')} on {record.get('device', 'unknown')}",
    ]
    before = [f"<h3>{escape(name)}</h3>"] if several else []
    return "".join([*before, *(f'<p class="what">{escape(line)}</p>' for line in said if line)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column text, the others numbers."""
    first = _cells("th", heads)
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    kinds = ["", *[" class=n"] * (len(texts) - 1)]
    return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))


def _samples(name: str, rows: Sequence[SampleRow]) -> str:
    """Completions of the first and the last step that showed some, and of some between."""
    if not rows:
        return ""
    steps = sorted({row["step"] for row in rows})
    chosen = sorted({steps[i * (len(steps) - 1) // max(1, SAMPLED_STEPS - 1)] for i in range(SAMPLED_STEPS)})
    parts = [f"<h2>Completions{escape(f' of {name}' if name else '')}</h2>"]
    for step in chosen:
        cells = "".join(_sample(row) for row in rows if row["step"] == step)
        parts.append(
            f"<details{' open' if step == chosen[-1] else ''}><summary>step {step}</summary><table class=samples>"
            '<tr><th>prompt</th><th>completion</th><th class="n">reward</th><th class="n">advantage</th>'
            f'<th class="short">from</th></tr>{cells}</table></details>'
        )
    return "".join(parts)


def _sample(row: SampleRow) -> str:
    origin = f"replay, {row['step'] - 1 - row['version']} old" if row["replayed"] else "fresh"
    return (
        f"<tr><td><pre>{escape(row['prompt'])}</pre></td><td><pre>{escape(row['completion'])}</pre></td>"
        f'<td class="n">{row["reward"]:.3g}</td><td class="n">{row["advantage"]:+.2f}</td><td>{origin}</td></tr>'
    )


def _memory(records: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(part for record in records.values() for part in record.get("memory_at_rest", {})))
    if not names:
        return ""
    found = {run: record.get("memory_at_rest", {}) for run, record in records.items()}
    rows = [[part, *(f"{parts.get(part, 0) / MIB:.1f}" for parts in found.values())] for part in names]
    rows.append(["together", *(f"{sum(parts.values()) / MIB:.1f}" for parts in found.values())])
    return "<h2>Memory that stays from step to step, MiB</h2>" + _table(["", *records], rows)


def _time(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = ("generate", "learner", "rest")
    rows = []
    for name, lines in metrics.items():
        seconds = [sum(line.get(f"time/{part}") or 0.0 for line in lines) for part in parts]
        whole = sum(seconds)
        if whole:
            rows.append([name, *(f"{s:.1f} s ({s / whole:.0%})" for s in seconds), f"{whole:.1f} s"])
    return "<h2>Time of the training steps</h2>" + _table(["", *parts, "together"], rows) if rows else ""


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A small picture of every metric, the runs over each other."""
    names = sorted({name for lines in metrics.values() for line in lines for name in line} - {"step"})
    keys = ""
    if len(metrics) > 1:
        keys = "".join(
            f'<span class="key" style="background:{colour}"></span>{escape(name)} &nbsp; '
            for colour, name in zip(RUN_COLOURS, metrics)
        )
    figures = []
    for name in names:
        series = [
            [(line["step"], line[name]) for line in lines if _is_number(line.get(name))] for lines in metrics.values()
        ]
        values = [value for points in series for _, value in points]
        if values:
            last = ", ".join(f"{points[-1][1]:.4g}" for points in series if points)
            figures.append(
                f"<figure><figcaption>{escape(name)}</figcaption>{_svg(series)}"
                f"<small>{min(values):.4g} to {max(values):.4g}; last {last}</small></figure>"
            )
    return f'<p>{keys}</p><div class="curves">{"".join(figures)}</div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _svg(series: Sequence[Sequence[tuple[int, float]]]) -> str:
    steps = [step for points in series for step, _ in points]
    values = [value for points in series for _, value in points]
    left, low = min(steps), min(values)
    width, height = (max(steps) - left) or 1, (max(values) - low) or 1.0
    lines = []
    for colour, points in zip(RUN_COLOURS, series):
        places = [f"{4 + 192 * (x - left) / width:.1f},{56 - 52 * (y - low) / height:.1f}" for x, y in points]
        if len(places) == 1:
            x, y = places[0].split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        elif places:
            style = 'fill="none" stroke-width="1.5" vector-effect="non-scaling-stroke"'
            lines.append(f'<polyline points="{" ".join(places)}" stroke="{colour}" {style}/>')
    return f'<svg viewBox="0 0 200 60" preserveAspectRatio="none">{"".join(lines)}</svg>'


def _settings(runs: Mapping[str, Path]) -> str:
    parts = ["<h2>Settings</h2>"]
    for name, folder in runs.items():
        path = folder / "config.yaml"
        if path.exists():
            text = escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{escape(name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _versions(records: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in records.values() for name in record.get("versions", {})))
    if not names:
        return ""
    rows = [[name, *(record.get("versions", {}).get(name, "-") for record in records.values())] for name in names]
    rows.append(["platform", *(record.get("platform", "-") for record in records.values())])
    return f"<details><summary>Versions</summary>{_table(['', *records], rows)}</details>"


def main(arguments: Sequence[str]) -> None:
    """Make the report of a finished run again, or of several side by side."""
    parser = argparse.ArgumentParser(prog="repo-ops report", description=(main.__doc__ or "").strip())
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
