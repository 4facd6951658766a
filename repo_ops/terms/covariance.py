"""How much a token drives entropy: the product of its centred advantage and its centred log-probability."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.terms import across_ranks
from repo_ops.tokens import Tokens


def covariance(tokens: Tokens, group: dist.ProcessGroup | None) -> Tensor:
    """[N] (A - mean A)(logps - mean logps), detached, means over the micro-batches of `group`.

    Source: arXiv 2505.22617.
    """
    logps = tokens.logps.detach()
    centred = tokens.advantages - across_ranks.mean(tokens.advantages, group)
    return centred * (logps - across_ranks.mean(logps, group))


def largest(scores: Tensor, fraction: float, group: dist.ProcessGroup | None) -> Tensor:
    """[N] bool: the max(1, int(fraction * tokens)) largest of finite `scores`, over the micro-batches of `group`."""
    everyone = across_ranks.gathered(scores, group)
    if not len(everyone):
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = everyone.topk(max(1, int(fraction * len(everyone)))).values[-1]
    return (scores >= threshold) & scores.isfinite()
