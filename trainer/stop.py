"""Signals that ask a run to stop: it saves and ends well instead of dying with its work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "StopSignals", "Stopped"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A stop signal came while something ran that can be thrown away and done again.

    Not an Exception: a reward function that catches those must not swallow it.
    """


class Stopped(Exception):  # noqa: N818
    """The run ended before its last step because it was asked to. The message says what was saved.

    Args:
        saved: whether all that had been done is in a checkpoint.
    """

    def __init__(self, message: str, *, saved: bool) -> None:
        super().__init__(message)
        self.saved = saved


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered; `received` is the name of the first, else None.

    Elsewhere than in the main thread Python allows no handlers; none are set there. A second Ctrl-C ends the process at
    once, except under torchrun, which itself hands signals on.

    Args:
        listen: False sets no handlers anywhere.
        at_once: whether `interruptible` may raise in the midst of things. With several ranks it must not: one rank
            would leave a collective operation that the others wait in.
    """

    def __init__(self, *, listen: bool = True, at_once: bool = True) -> None:
        self.received: str | None = None
        self._listen = listen and threading.current_thread() is threading.main_thread()
        self._at_once = at_once
        self._interruptible = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._listen:
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what may be dropped half-way: a signal ends it where it stands, also a reward function that hangs.

        Raises:
            Interrupted: a signal came before or inside. It can get lost in a callback of Python's own; `received`
                cannot, so look there too.
        """
        self._interruptible = self._at_once
        try:
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or signal.Signals(number).name
        if again and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        if self._interruptible:
            raise Interrupted
