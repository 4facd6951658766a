"""run.json: what a report says of a run beside its metrics: machine, versions, memory, how it ended."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_ops.doctor import device_names, package_versions
from repo_ops.trainer.footprint import memory_at_rest

if TYPE_CHECKING:
    from repo_ops.trainer.run import Run

__all__ = ["RECORD_FILE", "end_record", "has_reference", "read_record", "start_record"]

RECORD_FILE = "run.json"


def start_record(run: Run) -> None:
    """Write the record of a run that begins."""
    record = {
        "describe": run.describe(),
        "steps": run.config.steps,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "resumed_at": run.resumed_at,
        "ended": None,
        "ranks": run.learner.ranks.size,
        "device": f"{run.learner.ranks.device} ({', '.join(device_names())})",
        "platform": platform.platform(),
        "versions": package_versions(),
        "memory_at_rest": memory_at_rest(run.model, reference=has_reference(run)),
    }
    _write(run.folder, record)


def has_reference(run: Run) -> bool:
    """Whether a second model is kept for the KL; adapters that are switched off need none."""
    return run.learner.reference not in (None, run.learner.backbone)


def end_record(folder: Path, how: str) -> None:
    """Add to the record how the run ended."""
    _write(folder, {**read_record(folder), "ended": how})


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a run's folder; {} where there is none."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
