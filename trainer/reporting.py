"""What surrounds the loop: the log with its trackers, words for what goes wrong, the report however a run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from repo_ops.trainer.log import RunLog
from repo_ops.trainer.out_of_memory import explained
from repo_ops.trainer.profile import profiled
from repo_ops.trainer.report import draw_report, write_page
from repo_ops.trainer.run_record import end_record, start_record
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
    config, first = run.config, run.learner.ranks.is_first
    trackers = []
    if first:
        start_record(run)
        opening = Opening(run.folder, config.project, run.folder.resolve().name, asdict(config), run.last_logged)
        trackers = open_trackers(tracker_names(config.report_to), opening)
    log = RunLog(
        run.folder,
        name=name,
        steps=config.steps,
        every=config.log_steps,
        console=console,
        sample_steps=config.sample_steps,
        sample_rows=config.sample_rows,
        save_completions=config.save_completions,
        trackers=trackers,
        resumed_at=run.resumed_at,
        silent=not first,
    )
    how = "finished"
    profile = profiled(
        config.profile_steps if first else None,
        run.folder,
        run.learner.ranks.device,
        resumed_at=run.resumed_at,
        say=log.say,
    )
    try:
        with log, explained(run), profile as log.step_done:
            yield log
    except BaseException as error:
        how = f"stopped: {str(error) or type(error).__name__}"
        raise
    finally:
        if first:
            with _undisturbed():
                end_record(run.folder, how)
                picture = draw_report({name: run.folder}, run.folder / "report.png", title=run.describe())
                write_page({name: run.folder}, run.folder / "report.html", picture=picture)


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
