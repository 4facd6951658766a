"""What an objective sees: the live tokens of some sequences, packed one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Per-token tensors without padding: masked tokens never reach an objective.

    Only `logps` and `entropy` carry a gradient. Objectives of scope "token" may be shown any slice of a sequence;
    those of scope "sequence" see whole sequences, those of scope "batch" the whole micro-batch.
    """

    logps: Tensor
    """[N] log-probabilities under the current policy."""
    old_logps: Tensor
    """[N] log-probabilities at the start of the step; `logps` detached where none were given: the ratio is 1."""
    advantages: Tensor
    """[N], constant."""
    lengths: Tensor | None
    """[S] int64, tokens of each whole sequence, in order; None where sequences may be cut (scope "token")."""
    ref_logps: Tensor | None = None
    """[N] log-probabilities under the frozen reference policy."""
    sampler_logps: Tensor | None = None
    """[N] log-probabilities that the inference engine reported; `old_logps` where it reported no finite number."""
    sampler_known: Tensor | None = None
    """[N] bool, False where the engine reported no finite number."""
    entropy: Tensor | None = None
    """[N] entropy of the current policy's next-token distribution, in nats."""
    off_policy: Tensor | None = None
    """[N] bool, True for tokens of replayed sequences."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[N, ...] whatever else an objective reads, by name; values given per sequence are repeated for its tokens."""

    @property
    def log_ratio(self) -> Tensor:
        """[N] logps - old_logps, attached."""
        return self.logps - self.old_logps

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[S] sum of `values` [N] over each sequence; 0 for an empty one."""
        return torch.segment_reduce(values, "sum", lengths=self._whole_sequences(), unsafe=True)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[S] mean of `values` [N] over each sequence; 0 for an empty one."""
        return self.sequence_sum(values) / self._whole_sequences().clamp_min(1)

    def positions(self) -> Tensor:
        """[N] int64, how many tokens of its own sequence come before each token."""
        lengths = self._whole_sequences()
        return torch.arange(len(self.logps), device=lengths.device) - self.spread(lengths.cumsum(0) - lengths)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[N] the value of each token's own sequence, from [S]."""
        lengths = self._whole_sequences()
        owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
            lengths, output_size=len(self.logps)
        )
        return per_sequence[owner]

    def with_logps(self, logps: Tensor, entropy: Tensor | None) -> Tokens:
        """The same tokens with other (attached) log-probabilities and entropies."""
        return replace(self, logps=logps, entropy=entropy)

    def _whole_sequences(self) -> Tensor:
        if self.lengths is None:
            raise TypeError(
                "objective: reads a whole sequence but declares scope 'token'; set scope = 'sequence' on its class"
            )
        return self.lengths
