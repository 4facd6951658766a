"""Whether an objective may be handed advantages that the host has divided by its counts."""

from __future__ import annotations

import dataclasses

import torch

from repo_ops.objectives import Objective
from repo_ops.policy_loss import policy_loss

_FACTOR = 2.0**-12
"""About one over the tokens of a step. A power of two, so that it rounds nothing by itself."""


def is_proportional(objective: Objective) -> bool:
    """Whether loss and gradient scale with the advantages, found by computing both of a few tokens twice.

    The tokens' ratios lie inside and outside of every usual clip range, for advantages of both signs. `objective` reads
    log-probabilities alone, and is averaged by a constant or not at all.
    """
    random = torch.Generator().manual_seed(0)
    shape = (6, 32)
    logps = (-8 * torch.rand(shape, generator=random, dtype=torch.float64)).requires_grad_()
    drift = torch.tensor([[0.01], [0.1], [0.3], [1.0], [0.03], [0.5]], dtype=torch.float64)
    old_logps = logps.detach() + drift * torch.randn(shape, generator=random, dtype=torch.float64)
    advantages = torch.tensor([1.5, -1.0, 0.5, -2.0, 3.0, -0.5], dtype=torch.float64)
    alone = dataclasses.replace(objective, process_group=None)
    found = []
    for factor in (1.0, _FACTOR):
        loss = policy_loss(
            logps,
            factor * advantages,
            objective=alone,
            old_logps=old_logps,
            sampler_logps=old_logps - 0.05 if "sampler_logps" in alone.reads else None,
        ).loss
        (gradient,) = torch.autograd.grad(loss, logps)
        found.append(torch.cat([gradient.flatten(), loss.detach()[None]]))
    whole, small = found
    return bool(torch.allclose(_FACTOR * whole, small, rtol=1e-9, atol=1e-12 * _FACTOR))
