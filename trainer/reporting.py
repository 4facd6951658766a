"""What surrounds the loop: the log with its trackers, words for what goes wrong, the report however a run ends."""

from __future__ import annotations

import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from repo_ops.doctor import device_names, package_versions
from repo_ops.trainer.footprint import memory_at_rest
from repo_ops.trainer.log import RunLog, write_record
from repo_ops.trainer.out_of_memory import explained
from repo_ops.trainer.profile import profiled
from repo_ops.trainer.report import draw_report, write_page
from repo_ops.trainer.trackers import Opening, open_trackers, tracker_names

if TYPE_CHECKING:
    from rich.console import Console

    from repo_ops.trainer.run import Run

__all__ = ["reporting"]


@contextmanager
def reporting(run: Run, *, name: str, console: Console | None = None) -> Iterator[RunLog]:
    """The log of a run. Leaving it, in whatever way, writes report.png and report.html.

    Args:
        name: of the run, in the progress bar and in the report.
    Raises:
        RunFailed: memory ran out inside; the message says what was largest and what helps.
    """
    config, folder, ranks = run.config, run.folder, run.learner.ranks
    record, trackers = record_of(run), []
    if ranks.is_first:
        write_record(folder, record)
        opening = Opening(folder, config.project, folder.resolve().name, asdict(config), run.last_logged)
        trackers = open_trackers(tracker_names(config.report_to), opening)
    log = RunLog(
        folder,
        config,
        name=name,
        console=console,
        trackers=trackers,
        resumed_at=run.resumed_at,
        silent=not ranks.is_first,
    )
    steps = config.profile_steps if ranks.is_first else None
    profile = profiled(steps, folder / "profile", ranks.device, resumed_at=run.resumed_at, say=log.say)
    record["ended"] = "finished"
    try:
        with log, explained(run), profile as log.step_done:
            yield log
    except BaseException as error:
        record["ended"] = f"stopped: {str(error) or type(error).__name__}"
        raise
    finally:
        if ranks.is_first:
            with _undisturbed():
                write_record(folder, record)
                picture = draw_report({name: folder}, folder / "report.png", title=run.describe())
                write_page({name: folder}, folder / "report.html", picture=picture)


def record_of(run: Run) -> dict[str, Any]:
    """What run.json says of a run that begins."""
    device = run.learner.ranks.device
    return {
        "describe": run.describe(),
        "steps": run.config.steps,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "resumed_at": run.resumed_at,
        "ended": None,
        "ranks": run.learner.ranks.size,
        "device": f"{device} ({', '.join(device_names())})",
        "platform": platform.platform(),
        "versions": package_versions(),
        "memory_at_rest": memory_at_rest(run.model, reference=run.learner.keeps_reference),
    }


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without SIGTERM, which torchrun sends as soon as another rank has ended with an error."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
