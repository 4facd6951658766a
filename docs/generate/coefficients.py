"""d loss / d logp against the ratio, from the objectives themselves by autograd.

A token whose behaviour probability is 0.15 is moved to ratios from 0.2 to 5. Objectives that judge whole sequences see
it as the first of two tokens, the other one at ratio 1; those that judge a batch see it beside eight fixed tokens.
Sampler and reference probabilities equal the behaviour's. Reduction, KL and entropy terms are left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repo_ops.objectives import Objective
from repo_ops.step_loss import policy_losses
from repo_ops.tokens import Tokens

BEHAVIOUR = 0.15
OTHER = 0.5
"""Behaviour probability of the other token that dppo_topk sees."""
RATIOS = torch.logspace(math.log10(0.2), math.log10(5.0), 281, dtype=torch.float64)

# around probability 0.03, so that covariances with them are below Clip-Cov's and the moved token stands out
PEER_LOGPS = torch.tensor([-3.9, -3.7, -3.6, -3.5, -3.4, -3.3, -3.2, -3.1], dtype=torch.float64)
PEER_RATIOS = torch.tensor([0.5, 0.8, 0.9, 1.0, 1.0, 1.1, 1.3, 2.0], dtype=torch.float64)
PEER_ADVANTAGES = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)


class Curve(NamedTuple):
    """Coefficients [R] at RATIOS."""

    moved: Tensor
    neighbour: Tensor | None
    """Of the second token of the sequence, where sequences matter."""


def curve(objective: Objective, advantage: float) -> Curve:
    """d loss / d logp of the moved token (and of its neighbour) with that advantage."""
    if objective.reach == "batch":
        return Curve(torch.stack([_beside_peers(objective, ratio, advantage) for ratio in RATIOS]), None)
    if objective.reach == "token":
        return Curve(_gradient(objective, _tokens(RATIOS, advantage, None)), None)
    pairs = torch.stack([RATIOS, torch.ones_like(RATIOS)], 1).reshape(-1)
    found = _gradient(objective, _tokens(pairs, advantage, torch.full((len(RATIOS),), 2)))
    return Curve(found[::2], found[1::2])


def reads_ratio(objective: Objective) -> bool:
    """Whether old_logps matter at all."""
    if "old_logps" in objective.reads or objective.reads & {"topk_behaviour_logps"}:
        return True
    ratios = torch.tensor([0.3, 0.7, 1.0, 1.1, 2.7, 0.5], dtype=torch.float64)
    given = _tokens(ratios, 1.0, torch.tensor([2, 4]))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    fields = {**vars(given), "advantages": signs, "lengths": None if objective.reach == "token" else given.lengths}
    moved = {**fields, "old_logps": given.old_logps - 0.4}
    return not torch.equal(_gradient(objective, Tokens(**fields)), _gradient(objective, Tokens(**moved)))


def own_metrics(objective: Objective) -> list[str]:
    """Names that the objective adds to those of every objective."""
    given = _tokens(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), 1.0, torch.tensor([3]))
    return sorted(set(objective.metrics(given)) - set(Objective.metrics(_Plain(), given)))


class _Plain(Objective):
    pass


def _tokens(ratios: Tensor, advantage: float, lengths: Tensor | None) -> Tokens:
    behaviour = torch.full_like(ratios, math.log(BEHAVIOUR))
    return _given(behaviour + ratios.log(), behaviour, torch.full_like(ratios, advantage), lengths)


def _given(logps: Tensor, behaviour: Tensor, advantages: Tensor, lengths: Tensor | None) -> Tokens:
    # of two likely tokens the second gives up or takes what the rest does, in proportion
    other = (OTHER * (1 - logps.exp()) / (1 - behaviour.exp())).log()
    extras = {
        "topk_offsets": torch.stack([torch.zeros_like(logps), other - logps], 1),
        "topk_behaviour_logps": torch.stack([behaviour, torch.full_like(logps, math.log(OTHER))], 1),
    }
    entropy = torch.full_like(logps, 0.5)
    entropy[0] = 2.0
    return Tokens(
        logps=logps,
        old_logps=behaviour,
        advantages=advantages,
        lengths=lengths,
        ref_logps=behaviour,
        sampler_logps=behaviour,
        sampler_known=torch.ones_like(logps, dtype=torch.bool),
        entropy=entropy,
        extras=extras,
    )


def _beside_peers(objective: Objective, ratio: Tensor, advantage: float) -> Tensor:
    behaviour = torch.cat([torch.tensor([math.log(BEHAVIOUR)], dtype=torch.float64), PEER_LOGPS - PEER_RATIOS.log()])
    logps = torch.cat([behaviour[:1] + ratio.log(), PEER_LOGPS])
    advantages = torch.cat([torch.tensor([advantage], dtype=torch.float64), PEER_ADVANTAGES])
    return _gradient(objective, _given(logps, behaviour, advantages, torch.ones(9, dtype=torch.int64)))[0]


def _gradient(objective: Objective, tokens: Tokens) -> Tensor:
    logps = tokens.logps.detach().requires_grad_()
    losses = policy_losses(objective, tokens.with_logps(logps, tokens.entropy))
    (found,) = torch.autograd.grad(losses.sum(), logps)
    return found
