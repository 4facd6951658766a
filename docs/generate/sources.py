"""What source files say about themselves, read without running them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import tokenize
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A hyper-parameter: the class that declares it, its text, and its default (dataclasses.MISSING: none)."""

    name: str
    owner: type
    text: str
    default: Any


def fields_of(cls: type) -> list[Field]:
    """The dataclass fields of `cls` in order, each with the docstring of the class nearest to `cls` that has one."""
    texts: dict[str, tuple[type, str]] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            texts.update({name: (owner, text) for name, text in _field_texts(owner).items()})
    return [Field(field.name, *texts[field.name], field.default) for field in dataclasses.fields(cls)]


def _field_texts(cls: type) -> dict[str, str]:
    path = inspect.getsourcefile(cls)
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    found = {}
    for declared, text in itertools.pairwise(body):
        if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
            continue
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
            found[declared.target.id] = " ".join(inspect.cleandoc(str(text.value.value)).split())
    return found


def comments_above(source: str, names: set[str]) -> dict[str, str]:
    """The comment above each string key of `names` in `source`; a row without one shares that of the row above it."""
    found: dict[str, str] = {}
    lines: list[str] = []
    fresh = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = [*([] if fresh else lines), token.string.lstrip("# ")]
            fresh = False
        elif token.type == tokenize.STRING and (name := ast.literal_eval(token.string)) in names - set(found):
            found[name], fresh = " ".join(lines), True
    return found
