"""Advantage estimators: one file an estimator, and the file's name is the estimator's name.

A file holds, in this order: a docstring (formula, source), a frozen dataclass `Estimator` (one field a
hyper-parameter), `reference` in plain Python, written independently, and `VECTORS` worked by hand. Where random rewards
do not suit the estimator, `random_case` makes some. A generic test finds the file and checks all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from repo_ops.advantages.base import Estimator
from repo_ops.advantages.rows import Rows


def estimator_names() -> list[str]:
    """The names that `group_advantages(estimator=...)` takes, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get_estimator(name: str, **hyper: Any) -> Estimator:
    """The estimator of estimators/<name>.py with its hyper-parameters changed to `hyper`.

    Raises:
        ValueError: unknown name or hyper-parameter (with the nearest known one), one missing, or one out of range.
    """
    names = estimator_names()
    if name not in names:
        raise ValueError(f"estimator: expected one of {', '.join(names)}, got {name!r}{_nearest(name, names)}")
    kind = import_module(f"{__name__}.{name}").Estimator
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for key in hyper:
        if key not in known:
            takes = ", ".join(known) if known else "no hyper-parameters"
            raise ValueError(f"{key}: unknown to estimator {name!r}, which takes {takes}{_nearest(key, known)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in hyper:
            raise ValueError(f"{field.name}: required by estimator {name!r}, got nothing; pass {field.name}=...")
    estimator: Estimator = kind(**hyper)
    return estimator


def as_estimator(
    estimator: str | Estimator | Callable[[Rows], Tensor], hyper: dict[str, Any]
) -> Estimator | Callable[[Rows], Tensor]:
    """An estimator from a name with its hyper-parameters, or the caller's own object as it is."""
    if isinstance(estimator, str):
        return get_estimator(estimator, **hyper)
    if isinstance(estimator, type) or not callable(estimator):
        raise TypeError(
            f"estimator: expected a name, an Estimator or a function of Rows, got {estimator!r}; "
            "make an instance of a class first"
        )
    if hyper:
        raise ValueError(
            f"{next(iter(hyper))}: hyper-parameters go with an estimator's name; this one is an object and has its own"
        )
    return estimator


def _nearest(name: str, known: list[str]) -> str:
    found = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
