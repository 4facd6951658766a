"""Runs one function in a process of its own, which `child.Child` starts and may kill. The standard library alone:

what the function needs is imported by the function's own file, so a child costs no more memory than that.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import random
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    """Answers requests over the connection whose descriptor stands on the command line, until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the caller, who closes the connection
    connection = Connection(int(sys.argv[1]))
    name, sys.path[:] = connection.recv()  # what the caller can import, the function can
    try:
        function = load_function(name)
        known = signature_of(function)
    except ValueError as error:
        connection.send(("refused", str(error)))
        return
    connection.send(("ready", known))
    while True:
        try:
            args, kwargs, seed = connection.recv()
        except EOFError:
            return
        try:
            seed_generators(seed)
            connection.send(("returned", plain(call(function, *args, **kwargs))))
        except Exception as error:
            connection.send(("raised", describe(error)))


def seed_generators(seed: int) -> None:
    """Seeds the generators of Python, and of numpy and torch if the function has imported them."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def load_function(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/to/file.py:function" names.

    Raises:
        ValueError: no such module, file or function, or the module raises when it is imported.
    """
    where, _, attribute = name.rpartition(":")
    try:
        function = getattr(_module(name, where), attribute, None)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"reward: {name!r} cannot be loaded: {describe(error)}") from error
    if not callable(function):
        raise ValueError(f"reward: expected a function {attribute!r} in {where}, found {function!r}")
    return function


def _module(name: str, where: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reward: expected an importable module in {name!r}, got: {error}; install it, put its folder on "
                f"PYTHONPATH, or name the file: path/to/file.py:function"
            ) from error
    path = Path(where).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"reward: expected a Python file, got {where!r}; check the path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; an async one is run to its end."""
    result = function(*args, **kwargs)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The names and kinds of its parameters and which may be left out, without the objects that hang on them."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None) for p in parameters]
    return inspect.Signature(bare)


def plain(values: Any) -> Any:
    """Arrays and tensors as lists: the caller need not have the library that they are of."""
    return values.tolist() if hasattr(values, "tolist") else values


def describe(error: BaseException) -> str:
    """Type, message and place of an exception, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


if __name__ == "__main__":
    main()
