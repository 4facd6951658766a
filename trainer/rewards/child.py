"""A function in a process of its own that is killed at a deadline.

Nothing milder ends every hang: a regular expression or a power of integers keeps Python's lock, so that neither an
alarm nor another thread gets a turn, and a thread cannot be stopped from outside at all.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import random
import subprocess
import sys
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["CallFailed", "Child", "ChildLost"]

# The child imports what the function needs before it answers; sympy alone took 8 s on a loaded machine.
START_SECONDS = 120.0


class CallFailed(Exception):  # noqa: N818
    """The function raised; the message says what and where."""


class ChildLost(Exception):  # noqa: N818
    """No answer: the deadline passed, or the process ended by itself. The next call starts another."""

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Child:
    """The function `name` ("module:function" or "file.py:function"), sync or async, in a child process.

    It is called like the function. The process starts with the first `start` or call, and again with the next one after
    it was lost. Arguments and results are pickled. What the function prints appears as usual; what it keeps in memory
    is lost with the process.

    Args:
        seconds: deadline of one call.
    """

    _process: subprocess.Popen[bytes] | None = None
    _connection: Connection
    _sent = 0.0
    _allowed = 0.0
    _waiting = False

    def __init__(self, name: str, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds: expected > 0, got {seconds}")
        self.name = name
        self.seconds = seconds
        self.__signature__ = inspect.Signature()  # until it is started

    def start(self) -> Child:
        """Itself, its process started unless it runs.

        Raises:
            ValueError: it finds no such function, or does not come up.
        """
        if self._process is not None:
            return self
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(theirs.fileno())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        # at the end of this process too: a function that hangs would never see that nobody waits any more
        self._kill = weakref.finalize(self, _end, self._process)
        theirs.close()
        try:
            self._send((self.name, sys.path), START_SECONDS)
            kind, found = self._receive()
        except ChildLost as lost:
            raise ValueError(f"reward: the process for {self.name!r} did not start: {lost}") from None
        if kind == "refused":
            self.close()
            raise ValueError(found)
        self.__signature__ = found
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; raises as `result`."""
        self.begin(*args, **kwargs)
        return self.result()

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """Sends a call, so that several functions work at the same time; `result` waits for what comes of it.

        The child's random generators are seeded from this process's first, so that a run which goes on from a
        checkpoint, where that state is kept, meets the same numbers.
        """
        if self._waiting:  # for the answer to a call that was interrupted
            self.close()
        self.start()
        self._send((args, kwargs, random.getrandbits(32)), self.seconds)

    def result(self) -> Any:
        """What the function returned to the call that was begun.

        Raises:
            CallFailed: it raised.
            ChildLost: the deadline passed, or the process ended.
        """
        kind, value = self._receive()
        if kind == "raised":
            raise CallFailed(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._kill()
            self._connection.close()
            self._process, self._waiting = None, False

    def _send(self, message: tuple[Any, ...], seconds: float) -> None:
        self._allowed, self._sent, self._waiting = seconds, time.monotonic(), True
        with contextlib.suppress(OSError):  # it has ended: what waits for the answer finds out
            self._connection.send(message)

    def _receive(self) -> tuple[str, Any]:
        assert self._process is not None
        try:
            if self._connection.poll(max(0.0, self._sent + self._allowed - time.monotonic())):
                answer = self._connection.recv()
                self._waiting = False
                return answer
        except (EOFError, OSError):
            status = self._process.wait()
            self.close()
            raise ChildLost(f"its process ended with status {status}", timed_out=False) from None
        self.close()
        raise ChildLost(f"no answer within {self._allowed:g} s", timed_out=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
