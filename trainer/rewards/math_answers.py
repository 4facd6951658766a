"""Reward for mathematical answers, compared as mathematics: 1/2 equals 0.5 and \\frac{1}{2}."""

from __future__ import annotations

import importlib.util
import json
import logging
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# The child imports sympy before it answers; on a loaded machine that alone took 8 s.
START_SECONDS = 120.0


class MathVerify:
    """1.0 where math-verify finds the completion equal to the column `answer`, 0.0 where not.

    The comparison runs in a child process that is killed at the deadline: expressions exist that keep a parser busy for
    ever. Such a completion gets None (left out, since nothing is known about it) and counts in `timeouts`; the next one
    finds a fresh child.

    Args:
        seconds: deadline of one comparison.
    Raises:
        ImportError: math-verify is not installed.
    """

    _child: subprocess.Popen[bytes] | None = None

    def __init__(self, seconds: float = 5.0) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds: expected > 0, got {seconds}")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("reward 'math_verify': expected the package math-verify; pip install math-verify")
        self.seconds = seconds
        self.timeouts = 0

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
    ) -> list[float | None]:
        return [self._compare(wanted, text) for wanted, text in zip(answer, completions, strict=True)]

    def close(self) -> None:
        """Ends the child process; the next comparison starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def __del__(self) -> None:
        self.close()

    def _compare(self, answer: str, completion: str) -> float | None:
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps([answer, completion]).encode() + b"\n")
            child.stdin.flush()
            reply = _reply(child, self.seconds)
        except (TimeoutError, BrokenPipeError, EOFError) as error:
            # a child out of memory dies without a word: for the completion that is the same as a time-out
            self.close()
            self.timeouts += 1
            log.warning("reward math_verify: no verdict within %g s (%s), left out", self.seconds, type(error).__name__)
            return None
        if "error" in reply:
            raise ValueError(f"math_verify could not compare {completion!r} with {answer!r}: {reply['error']}")
        if not reply["parsed"]:
            raise ValueError(f"answer: expected a mathematical expression, got {answer!r}; clean the data")
        return float(reply["correct"])

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("math_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            _reply(self._child, START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise RuntimeError(
                f"reward 'math_verify': its child process did not start ({type(error).__name__}); "
                "try `python -c 'import math_verify'`"
            ) from error
        return self._child


def _reply(child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """One line of JSON from the child. Raises TimeoutError at the deadline, EOFError when the child is gone."""
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    line = b""
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not ready.select(deadline - time.monotonic()):
                raise TimeoutError
            piece = child.stdout.read1()  # type: ignore[attr-defined]
            if not piece:
                raise EOFError
            line += piece
    return json.loads(line)
