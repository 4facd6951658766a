"""Sequences that have drifted too far to learn from as mistakes.

keep = A >= 0, or mean_t(sampler_logps - logps) <= threshold. Source: DeepSeek-V3.2, arXiv 2512.02556.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.scope import Scope
from repo_ops.tokens import Tokens


@dataclass(frozen=True)
class OffPolicyMask:
    """The factor of each token's policy loss, 1 or 0; dropped tokens stay in the denominators."""

    name: ClassVar[str] = "off_policy_kept"
    reads: ClassVar[tuple[str, ...]] = ("sampler_logps",)
    scope: ClassVar[Scope] = "sequence"
    per_token: ClassVar[bool] = False

    threshold: float

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N], detached."""
        assert tokens.sampler_logps is not None
        drift = tokens.spread(tokens.sequence_mean(tokens.sampler_logps - tokens.logps.detach()))
        return ((tokens.advantages >= 0) | (drift <= self.threshold)).to(tokens.logps.dtype)
