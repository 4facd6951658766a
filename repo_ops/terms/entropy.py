"""What entropy decides: which tokens learn, and how strong the bonus is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.scope import Scope
from repo_ops.terms import across_ranks
from repo_ops.tokens import Tokens


@dataclass(frozen=True)
class HighEntropy:
    """The factor of each token's policy loss: 1 for the `fraction` of tokens with the highest entropy, 0 for the rest.

    The threshold is the (1 - fraction) quantile over the micro-batch, linearly interpolated and inclusive; dropped
    tokens stay in the denominators. Source: arXiv 2506.01939; TRL, `top_entropy_quantile`.
    """

    name: ClassVar[str] = "high_entropy_kept"
    reads: ClassVar[tuple[str, ...]] = ("entropy",)
    scope: ClassVar[Scope] = "batch"
    per_token: ClassVar[bool] = True

    fraction: float
    process_group: dist.ProcessGroup | None = None

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N], detached."""
        assert tokens.entropy is not None
        entropy = tokens.entropy.detach()
        everyone = across_ranks.gathered(entropy, self.process_group)
        return (entropy >= _quantile(everyone, 1 - self.fraction)).to(tokens.logps.dtype)


def _quantile(values: Tensor, q: float) -> Tensor:
    """0-d; torch.quantile refuses more than 16 million values."""
    if not len(values):
        return values.new_zeros(())
    place = q * (len(values) - 1)
    below = int(place)
    ordered = values.sort().values
    return torch.lerp(ordered[below], ordered[min(below + 1, len(values) - 1)], place - below)


@dataclass
class AdaptiveEntropy:
    """A bonus coefficient that rises while entropy is at or below its target, and falls above it.

    `update(entropy)` gives the coefficient for the next step: dataclasses.replace(objective, entropy_coef=...). The
    bonus is applied only while entropy is at or below the target. Source: arXiv 2505.22312.
    """

    target: float
    """Entropy to hold, in nats per token."""
    step: float = 0.005
    """How much the coefficient moves per update."""
    coef: float = 0.0
    """Where it starts, and where it is; never below 0."""

    def update(self, entropy: float) -> float:
        """The coefficient to use, given the mean entropy of the last step."""
        low = entropy <= self.target
        self.coef = max(0.0, self.coef + (self.step if low else -self.step))
        return self.coef if low else 0.0
