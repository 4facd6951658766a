"""Weights that a host computed itself (truncated importance sampling), as a factor of any objective's policy loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from repo_ops.objectives import Objective, vespo
from repo_ops.scope import Scope
from repo_ops.terms.modifier import Modifier
from repo_ops.tokens import Tokens

NAME = "given_weight"
"""The entry of extras that holds the weights, [B] or in the shape of targets."""


@dataclass(frozen=True)
class GivenWeight:
    """extras["given_weight"], as a factor of each token's policy loss; KL and entropy terms do not get it."""

    name: ClassVar[str] = NAME
    scope: ClassVar[Scope] = "token"
    reads: ClassVar[tuple[str, ...]] = (NAME,)
    per_token: ClassVar[bool] = True

    def __call__(self, tokens: Tokens) -> Tensor:
        return tokens.extras[NAME]


def with_given_weight(objective: Objective) -> Objective:
    """The same objective, weighted by extras["given_weight"].

    VESPO weighs sequences by W, so there it is a term of log W instead: the logarithm of the weight, one per sequence.
    """
    cls: Any = type(objective)

    class Weighted(cls):
        @property
        def modifiers(self) -> tuple[Modifier, ...]:
            return (*super().modifiers, GivenWeight())

    class WeightedVespo(cls):
        requires = (NAME,)

        def sequence_log_ratio(self, tokens: Tokens) -> Tensor:
            return super().sequence_log_ratio(tokens) + tokens.sequence_mean(tokens.extras[NAME])

    weighted: Any = WeightedVespo if isinstance(objective, vespo.Objective) else Weighted
    return weighted(**{field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)})


def vespo_weight(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B] logarithm of the product of `weight` [B] or [B, T] over a sequence (its tokens under `mask`), for VESPO."""
    log_weight = weight.log().clamp(vespo.LOG_FLOOR, vespo.LOG_LIMIT)
    if mask is not None and log_weight.ndim == 2:
        log_weight = log_weight * mask
    return log_weight.reshape(len(weight), -1).sum(1)
