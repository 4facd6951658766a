"""How much of a micro-batch must be seen before one token's coefficient is known."""

from __future__ import annotations

from typing import Literal

Scope = Literal["token", "sequence", "batch"]
SCOPES: tuple[Scope, ...] = ("token", "sequence", "batch")


def widest(*scopes: Scope) -> Scope:
    """The one that includes the others."""
    return max(scopes, key=SCOPES.index)
