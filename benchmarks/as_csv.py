"""A result file of the comparison as a sheet: a line for each method in each case."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

from repo_ops.benchmarks.accuracy import Errors

__all__ = ["write_csv"]


def write_csv(report: dict[str, Any], path: Path) -> None:
    """Writes `report`, what `compare.main` keeps as json, to `path`: ms, MiB, and nothing where a number is unknown."""
    lines = [_line(report["machine"], case, row) for case in report["cases"] for row in case["rows"]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _line(machine: dict[str, Any], found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    case = dict(found["case"])
    shape = case.pop("shape")
    line = {"machine": machine["device"], "date": machine["date"], **shape, **case, "live_share": found["live_share"]}
    line |= {"method": row["method"], "label": row["label"]}
    for part in ("forward", "backward", "both"):
        line |= {f"{part}_{name}": row[part][name] for name in ("median", "q1", "q3")}
    line |= {name: row[name] for name in ("peak_mib", "gradient_mib")}
    errors = row["errors"] or {}
    line |= {f"{field.name}_error": errors.get(field.name) for field in fields(Errors)}
    return line | {"wrong": "; ".join(row["wrong"])}
