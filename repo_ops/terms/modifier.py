"""What any objective's per-token loss may be multiplied by."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from repo_ops.scope import Scope
from repo_ops.tokens import Tokens


class Modifier(Protocol):
    """A detached factor of each token's policy loss, whatever the objective; KL and entropy terms do not get it."""

    @property
    def name(self) -> str:
        """Of the metric that holds its mean."""

    @property
    def scope(self) -> Scope:
        """What must be seen for it."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Arguments that it needs."""

    @property
    def per_token(self) -> bool:
        """Whether tokens of one sequence may get different factors."""

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N] factors, detached."""
