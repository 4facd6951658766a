"""How far a run has come, when its state goes to disk, and how it ends when it is asked to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from repo_ops.trainer.checkpoint import Checkpoints
from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.nonfinite import NotFinite
from repo_ops.trainer.resume import CHECKPOINTS, moment, snapshot
from repo_ops.trainer.rollout import EngineError, GenerationStopped
from repo_ops.trainer.stop import Interrupted, Stopped, StopSignals

if TYPE_CHECKING:
    from repo_ops.trainer.log import RunLog
    from repo_ops.trainer.run import Run

__all__ = ["Progress"]


class Progress:
    """Saves a run every `save_steps` steps, after the last one, and when a signal stops it; use it in a `with` block.

    A step counts from `learned` on. What runs inside `droppable` is thrown away when a signal comes, and done again
    after a resume; a step that has been learned but not yet concluded is saved as such, and its line is written.

    Args:
        log: gets the line of every step, and a sentence where a checkpoint could not be written.
    Raises:
        Stopped: on leaving the block, where a signal ended the run.
    """

    done: int
    """Steps that were learned; 0 before the first."""
    unfinished: Mapping[str, float] | None
    """Metrics of that step, while it is not concluded; {} before the first."""

    def __init__(self, run: Run, log: RunLog) -> None:
        config, folder = run.config, run.folder / CHECKPOINTS
        self.run = run
        self.log = log
        self.done, self.unfinished = 0, {}
        if run.resumed is not None:
            self.done, self.unfinished = run.resumed.step, run.resumed.manifest["unfinished"]
        own = run.resumed is not None and run.resumed.folder.parent.resolve() == folder.resolve()
        self._checkpoints = Checkpoints(
            folder, keep=config.keep_last, background=config.save_async, say=log.say, latest=self.done if own else None
        )
        self._stop = StopSignals(listen=config.save_steps is not None, at_once=run.learner.ranks.size == 1)
        self._at: dict[str, Any] | None = None

    def __enter__(self) -> Progress:
        self._stop.__enter__()
        self.run.engine.should_stop = lambda: self._stop.received is not None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checkpoints.finish()
            if kind is Interrupted:
                raise self._stopped() from None
            if isinstance(error, (EngineError, NotFinite)):
                raise self._saved(error) from error
        finally:
            self._stop.__exit__(kind, error, trace)
            if self.unfinished:
                with suppress(OSError):  # a full disk is not what ended the run
                    self._write_line({})

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Around generation and rewards: a signal ends them where they stand, on all ranks or on none."""
        self._at = moment(self.run)
        try:
            with self._stop.interruptible():
                yield
        except (Interrupted, GenerationStopped):
            pass
        self._check()

    def learned(self, step: int, metrics: Mapping[str, float]) -> None:
        """The parameters have made this step; only its evaluation is still to come.

        Until then `metrics` may still change. However the run goes on, they are written down.
        """
        self.done, self.unfinished, self._at = step, metrics, None

    def concluded(self, evaluation: Mapping[str, float]) -> None:
        """Nothing of the step is left to do: its line is written, it is saved where that is due, and the run ends here
        if it was asked to.
        """
        self._write_line(evaluation)
        self._at = None
        every, last = self.run.config.save_steps, self.done == self.run.config.steps
        if every and self.done and (last or self.done % every == 0):
            self._save()
        if not last:  # behind the last step there is only the export, which is worth waiting for
            self._check()

    def _write_line(self, evaluation: Mapping[str, float]) -> None:
        line, self.unfinished = {**(self.unfinished or {}), **evaluation}, None
        self.log.step(self.done, line)

    def _check(self) -> None:
        """Raises Interrupted on every rank if a signal has come on any: they stop together, after the same step."""
        if any(self.run.learner.ranks.gather(self._stop.received is not None)):
            raise Interrupted

    def _save(self) -> None:
        self._checkpoints.finish()
        if self._checkpoints.latest != self.done:
            self._checkpoints.save(snapshot(self.run, self.done, at=self._at, unfinished=self.unfinished))

    def _saved(self, error: RunFailed) -> RunFailed:
        """The error, after what the run has learned was saved: it is of use without the step or the engine that failed.

        All ranks raise such errors together.
        """
        if self.run.config.save_steps is None or self.done == 0:
            return error
        return type(error)(f"{error}. Step {self.done} {self._saved_where()}")

    def _stopped(self) -> Stopped:
        why = f"stopped by {self._stop.received or 'a signal to another rank'}"
        if self.done == 0:
            return Stopped(f"{why} before the first step was done; there is nothing to save", saved=True)
        where = self._saved_where()
        return Stopped(f"{why} after step {self.done}, which {where}", saved=self._checkpoints.latest == self.done)

    def _saved_where(self) -> str:
        """Saves the step, and says how that went."""
        self._save()
        self._checkpoints.finish()
        if self._checkpoints.latest != self.done:
            return "could not be saved"
        return f"is saved in {self.run.folder / CHECKPOINTS}; --resume auto goes on from there"
