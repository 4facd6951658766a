"""JSON over HTTP to one server, many requests at a time; every failure is a sentence and nothing waits for ever."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from repo_ops.trainer.rollout import EngineError, GenerationStopped

CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.2
# of a server behind a proxy, or one that starts or is full: worth another try
BUSY = frozenset({429, 502, 503, 504})


class RequestError(EngineError):
    """No answer that can be used.

    Attributes:
        status: of the server's answer; None where there was no connection, or it broke off.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JsonClient:
    """Sends JSON to a server.

    Args:
        url: http://host:port or https://..., without a path or with the path that comes before every other.
        retries: how often a request is sent again where the server was gone or busy, after 1, 2, 4... seconds.
        token: sent as a bearer token, if any.
        connections: most requests under way at a time.
    """

    def __init__(self, url: str, *, retries: int, token: str | None, connections: int) -> None:
        self.url = url.rstrip("/")
        self.retries = retries
        self.connections = connections
        self._parts = urllib.parse.urlsplit(self.url)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._open: set[http.client.HTTPConnection] = set()
        self._closing = threading.Event()

    def ask(self, path: str, body: Any = None, *, timeout: float) -> Any:
        """The server's JSON answer, or None where it is empty: to a GET, or where there is a body to a POST of it.

        Args:
            timeout: in seconds. A request that was too slow is not sent again: it would only add to the server's load.
        Raises:
            RequestError: no connection, or the server answered with an error, on the last try too.
            EngineError: no answer in time, or one that is no JSON.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body, timeout)
            except RequestError as error:
                lasting = error.status is not None and error.status not in BUSY
                if lasting or attempt == self.retries or self._closing.wait(2.0**attempt):
                    raise
        raise AssertionError

    def ask_all(
        self, path: str, bodies: Sequence[Any], *, timeout: float, should_stop: Callable[[], bool]
    ) -> list[Any]:
        """Answers to all bodies, sent at the same time. The first failure, or a stop, breaks off the others.

        vLLM drops a request whose connection is closed.

        Raises:
            EngineError: as `ask`. GenerationStopped: should_stop came true.
        """
        pool = ThreadPoolExecutor(max_workers=max(1, min(len(bodies), self.connections)))
        try:
            answers = [pool.submit(self.ask, path, body, timeout=timeout) for body in bodies]
            pending: set[Future[Any]] = set(answers)
            while pending:
                if should_stop():
                    raise GenerationStopped
                done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for answer in done:
                    answer.result()
            return [answer.result() for answer in answers]
        finally:
            self._closing.set()
            for connection in list(self._open):
                with suppress(OSError, AttributeError):
                    connection.sock.shutdown(2)  # wakes the thread that reads from it
            pool.shutdown(wait=True, cancel_futures=True)
            self._closing.clear()

    def _once(self, path: str, body: Any, timeout: float) -> Any:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        where = f"engine: {method} {self.url}{path}"
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=min(CONNECT_SECONDS, timeout))
        self._open.add(connection)
        try:
            connection.connect()
            if self._closing.is_set():
                raise RequestError(f"{where}: broken off")
            connection.sock.settimeout(timeout)
            connection.request(method, self._parts.path + path, data, self._headers)
            answer = connection.getresponse()
            content = answer.read()
        except TimeoutError as error:
            if connection.sock is None:
                raise RequestError(f"{where}: no connection within {CONNECT_SECONDS:.0f} s; is the host up?") from error
            raise EngineError(
                f"{where}: no answer within {timeout:g} s; the server is too slow or hangs, see its log, or raise "
                "--engine_args.timeout (for weights sync_timeout)"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise RequestError(f"{where}: the server is gone ({reason}); see its log, and start it again") from error
        finally:
            self._open.discard(connection)
            connection.close()
        text = content.decode(errors="replace")
        if answer.status != 200:
            raise RequestError(f"{where}: status {answer.status}: {_message(text)}", answer.status)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise EngineError(f"{where}: expected JSON, got {text[:80]!r}") from error


def _message(text: str) -> str:
    """What an error's body says: vLLM's {"error": {"message": ...}}, FastAPI's {"detail": ...}, or its beginning."""
    try:
        body = json.loads(text)
        body = body.get("error", body.get("detail", body))
        return str(body.get("message", body) if isinstance(body, dict) else body)[:500]
    except (ValueError, AttributeError):
        return text[:200].strip() or "no reason given"
