"""A head whose log-probabilities, and entropies where asked for, are given numbers.

The fused path starts from hidden states, the golden files from log-probabilities. With an orthogonal weight [V, V] any
logits are some hidden state's, so hidden = logits @ weight gives exactly the wanted numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

VOCABULARY = 5
"""Small, and more than the 3 that let the probability beside the target be shared unevenly."""
WITH_ENTROPY = 64
"""Enough entries for entropies from 0.7 to 1.2 beside a target of probability 0.8."""


class UnreachableError(Exception):
    """No logits have these numbers."""


def head_of(logps: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [B, T, V], weight [V, V], targets [B, T]) in float64, whose log-probabilities are `logps` [B, T].

    Raises:
        UnreachableError: a log-probability above 0, or an entropy that no distribution with that probability has.
    """
    size = VOCABULARY if entropy is None else WITH_ENTROPY
    generator = torch.Generator().manual_seed(0)
    weight, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    targets = torch.randint(size, logps.shape, generator=generator)
    logits = torch.empty(*logps.shape, size, dtype=torch.float64)
    for where in torch.cartesian_prod(*(torch.arange(n) for n in logps.shape)).tolist():
        place = tuple(where)
        wanted = None if entropy is None else float(entropy[place])
        logits[place] = _row(float(logps[place]), int(targets[place]), size, wanted)
    shift = torch.randn(*logps.shape, 1, generator=generator, dtype=torch.float64)
    return (logits + shift) @ weight, weight, targets


def ranked(entropy: Tensor, logps: Tensor) -> Tensor:
    """Entropies in the same order, ties kept, that a head of WITH_ENTROPY entries can have beside `logps` [N]."""
    spread = math.log(WITH_ENTROPY - 1)
    p = logps.exp()
    binary = -(p * logps + (1 - p) * torch.log1p(-p))
    low, high = float(binary.max()) + 1e-3, float((binary + (1 - p) * spread).min()) - 1e-3
    if not low < high:
        raise UnreachableError("no common range of entropies beside these log-probabilities")
    order = torch.unique(entropy, return_inverse=True)[1].double()
    return low + (high - low) * order / order.max().clamp_min(1)


def _row(logp: float, target: int, size: int, entropy: float | None) -> Tensor:
    if logp > 0:
        raise UnreachableError(f"log-probability {logp} is above 0")
    rest = math.log(max(-math.expm1(logp), 1e-300))
    steepness = 0.3 if entropy is None else _steepness(logp, size, entropy)
    others = rest + torch.log_softmax(-steepness * torch.arange(size - 1, dtype=torch.float64), 0)
    return torch.cat([others[:target], torch.tensor([logp], dtype=torch.float64), others[target:]])


def _steepness(logp: float, size: int, entropy: float) -> float:
    """How unevenly the rest is shared for the row to have `entropy`, by bisection."""
    low, high = 0.0, 50.0
    p = math.exp(logp)
    binary = -(p * logp + (1 - p) * math.log1p(-p))
    for _ in range(200):
        middle = (low + high) / 2
        log_share = torch.log_softmax(-middle * torch.arange(size - 1, dtype=torch.float64), 0)
        found = binary - (1 - p) * float((log_share.exp() * log_share).sum())
        low, high = (middle, high) if found > entropy else (low, middle)
    return low
