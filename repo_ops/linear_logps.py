"""Log-probability and entropy of each token, without storing logits."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from repo_ops.linear_stats import linear_stats
from repo_ops.options import Options


class TokenStats(NamedTuple):
    """Statistics of each position, float32 in the shape of targets; 0 where mask is 0."""

    logps: Tensor
    """Log-probability of the target, in nats, never above 0."""
    entropy: Tensor | None
    """Entropy of the next-token distribution, in nats; None unless asked for."""


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    with_entropy: bool = False,
    support_ids: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
) -> TokenStats:
    """Log-probability of each target token (and entropy), differentiable, with one tile of logits alive at a time.

    Equals, for logits = hidden @ weight.T + bias in float32,
    log_softmax(softcap * tanh(logits * logit_scale / softcap) / temperature, -1).gather(-1, targets).
    The backward recomputes the tiles: 4 passes of N V D multiply-adds in all, 1 where no gradient is wanted. Rows whose
    gradient arrives as 0 skip the gradient GEMMs.

    Args:
        hidden: [B, T, D] or packed [N, D], floating. Position i predicts targets[i]; shift before calling.
        weight: [V, D], the head. A frozen one (requires_grad False) gets no gradient buffer.
        targets: [B, T] or [N] int64 token ids.
        bias: [V] or None.
        temperature: divides the logits; one number > 0, one per sequence [B] (padded inputs), or the shape of targets.
        softcap: final logit softcap (Gemma 2: 30), or None. logit_scale: multiplies the logits before the softcap.
        mask: 1 for tokens to compute, in the shape of targets; others cost nothing and return 0.
        with_entropy: also return the entropy, with its exact gradient.
        adapter: a low-rank addition u @ B.T to the logits, (u [..., r], B [V, r]); for LoRA on the head
            u = scaling * hidden @ A.T, whose graph leads to A and hidden.
        tp_group: ranks that hold consecutive, perhaps unequal, shards of the vocabulary (weight, bias and B are this
            rank's rows); hidden and targets are the same on all. The gradient of hidden is summed over the ranks.
        support_ids: [..., K] int64, the tokens that a truncated sampler (top-k, top-p, min-p) kept, -1 for padding;
            log-probabilities and entropies are those of the softmax over them and the target.
        options: backend, memory budget and precision; under autocast see `Options.operand_dtype`.
    Returns:
        TokenStats(logps, entropy), float32 (float64 for float64 inputs).
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree; the message names the argument.
    """
    found = linear_stats(
        hidden,
        weight,
        targets,
        statistics=("entropy",) if with_entropy else (),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        support_ids=support_ids,
        adapter=adapter,
        tp_group=tp_group,
        options=options,
    )
    return TokenStats(found.logps, found.entropy)
