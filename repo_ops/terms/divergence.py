"""How far the policy has moved from the one that sampled a token, in probability mass: [N], detached inputs.

Source: arXiv 2602.04879; repository sail-sg/Stable-RL, core_algos.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TINY = 1e-8
"""Keeps the logarithm of the rest's mass finite where the token's probability is 1."""
_REST = 1e-12
"""Least mass of all tokens outside the support."""


def binary_tv(logps: Tensor, behaviour_logps: Tensor) -> Tensor:
    """|p - p_behaviour|: total variation when the vocabulary is the sampled token and the rest."""
    return (logps.exp() - behaviour_logps.exp()).abs()


def binary_kl(logps: Tensor, behaviour_logps: Tensor) -> Tensor:
    """KL(Bernoulli(p_behaviour) || Bernoulli(p))."""
    behaviour = behaviour_logps.exp()
    rest = (-torch.expm1(behaviour_logps) + _TINY).log() - (-torch.expm1(logps) + _TINY).log()
    return behaviour * (behaviour_logps - logps) + (1 - behaviour) * rest


def support_tv(logps: Tensor, behaviour_logps: Tensor) -> Tensor:
    """Total variation over K tokens and one bin for the rest, from log-probabilities [N, K] of both policies."""
    inside = (logps.exp() - behaviour_logps.exp()).abs().sum(-1)
    return (inside + (_rest(logps) - _rest(behaviour_logps)).abs()) / 2


def support_kl(logps: Tensor, behaviour_logps: Tensor) -> Tensor:
    """KL(behaviour || policy) over K tokens and one bin for the rest, from log-probabilities [N, K] of both."""
    inside = (behaviour_logps.exp() * (behaviour_logps - logps)).sum(-1)
    rest = _rest(behaviour_logps)
    return inside + rest * (rest.log() - _rest(logps).log())


def _rest(logps: Tensor) -> Tensor:
    return (1 - logps.exp().sum(-1)).clamp_min(_REST)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"tv": binary_tv, "kl": binary_kl}
SUPPORT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"tv": support_tv, "kl": support_kl}


def support_ids(topk_ids: Tensor, targets: Tensor) -> Tensor:
    """[..., K] ids to compare at: the behaviour's top K, with the sampled token in the last place where it is absent.

    Args:
        topk_ids: [..., K], most probable first. targets: [...], the sampled tokens.
    """
    absent = (topk_ids != targets[..., None]).all(-1)
    last = torch.where(absent, targets, topk_ids[..., -1])
    return torch.cat([topk_ids[..., :-1], last[..., None]], -1)
