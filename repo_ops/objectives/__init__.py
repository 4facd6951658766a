"""Objectives by name. A file of this folder is an objective; `recipes.py` names variations.

Adding one is adding a file: there is no registry.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from repo_ops.objectives.base import Objective
from repo_ops.objectives.recipes import RECIPES
from repo_ops.scope import SCOPES
from repo_ops.tokens import Tokens

_NOT_OBJECTIVES = {"base", "recipes"}
_ALIVE: WeakValueDictionary[tuple[Any, ...], Objective] = WeakValueDictionary()
"""Class and settings -> the objective, while somebody holds it."""


def objective_names() -> list[str]:
    """Names that `get_objective` knows, sorted."""
    return sorted(_files(tuple(__path__)) | set(RECIPES))


@functools.cache  # a loss is called by name many times a second, and a folder is slow to list
def _files(folders: tuple[str, ...]) -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(folders)) - _NOT_OBJECTIVES


def get_objective(name: str, **hyper: Any) -> Objective:
    """The objective called `name` with its hyper-parameters changed to `hyper`; for equal ones the same object.

    Raises:
        ValueError: unknown name or hyper-parameter (with the nearest known one), or a value out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"objective: expected a name, got {type(name).__name__} {name!r}")
    if name not in objective_names():
        raise ValueError(f"objective: expected one of {', '.join(objective_names())}, got {name!r}{_nearest(name)}")
    module, preset = RECIPES.get(name, (name, {}))
    cls = importlib.import_module(f"{__name__}.{module}").Objective
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in hyper:
        if key not in fields:
            raise ValueError(f"{key}: objective {name!r} has {', '.join(sorted(fields))}{_nearest(key, fields)}")
    return _shared(cls, {**preset, **hyper})


def _shared(cls: type[Objective], settings: dict[str, Any]) -> Objective:
    # torch.compile traces anew for every new object, and gives up after a few: one made in each step has to be the same
    key = (cls, *((name, type(settings[name]), settings[name]) for name in sorted(settings)))
    try:
        found = _ALIVE.get(key)
    except TypeError:  # a value that cannot be hashed
        return cls(**settings)
    if found is None:
        found = _ALIVE[key] = cls(**settings)
    return found


def as_objective(objective: str | Objective | Callable[[Tokens], Tensor]) -> Objective:
    """An `Objective` from a name, an object, or a plain function of Tokens.

    A function is taken to need the whole micro-batch (two sweeps over the vocabulary) unless its attribute `scope` says
    "token" or "sequence"; its tokens are averaged by "token-mean".
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return get_objective(objective)
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(
            f"objective: expected a name, an Objective or a function of Tokens, got {objective!r}; "
            "make an instance of a class first"
        )
    scope = getattr(objective, "scope", "batch")
    if scope not in SCOPES:
        raise ValueError(f"objective.scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    function = objective

    class FunctionObjective(Objective):
        def __call__(self, tokens: Tokens) -> Tensor:
            return function(tokens)

    FunctionObjective.scope = scope
    return FunctionObjective()


def _nearest(name: str, known: list[str] | None = None) -> str:
    found = difflib.get_close_matches(name, known or objective_names(), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
