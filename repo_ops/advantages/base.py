"""What every advantage estimator is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.advantages.rows import Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimator:
    """Turns the rewards of a step into advantages. Subclass it, or pass any function of `Rows`.

    A function that is not a subclass is taken to have the class attributes below.
    """

    needs_lengths: ClassVar[bool] = False
    """Whether `lengths` must be given."""
    takes_parts: ClassVar[bool] = False
    """Whether rewards may be [B, K], K parts that the estimator treats one by one."""
    mixed_refusal: ClassVar[str | None] = None
    """Why replayed rows cannot share statistics with on-policy rows; None where they can."""

    def __call__(self, rows: Rows) -> Tensor:
        """[B] float64 advantages; the value at rows without a reward does not matter."""
        raise NotImplementedError

    def check(self, rows: Rows) -> None:
        """Raise a ValueError if rewards or hyper-parameters do not suit these rows; called for CPU tensors only."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name}: expected {'>= 0' if zero else '> 0'}, got {value}")


def check_per_row(name: str, value: object, rows: Rows) -> None:
    if isinstance(value, Tensor) and value.shape != rows.rewards.shape:
        raise ValueError(
            f"{name}: expected shape {list(rows.rewards.shape)} like rewards, got {list(value.shape)}; "
            "give every row the value of its prompt"
        )
