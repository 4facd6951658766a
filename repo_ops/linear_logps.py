"""Log-probability and entropy of each token, without storing logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from repo_ops import arguments
from repo_ops.head import gemm, sweep
from repo_ops.head.inputs import HeadInputs, RowStats
from repo_ops.head.plan import Plan, make_plan
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
        options: backend, memory budget and precision.
    Returns:
        TokenStats(logps, entropy), float32 (float64 for float64 inputs).
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree; the message names the argument.
    """
    where = arguments.layout(targets, mask, None)
    head = arguments.head_inputs(
        hidden, weight, targets, where, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    plan = make_plan(head, options or Options())
    logps, entropy = _LinearLogps.apply(head.hidden, weight, bias, head, plan, with_entropy)
    return TokenStats(where.put(logps), where.put(entropy) if with_entropy else None)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadInputs, plan: Plan, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        with gemm.without_autocast(hidden):
            stats = sweep.statistics(head, plan, with_entropy=with_entropy)
        ctx.save_for_backward(hidden, weight, bias, *stats)
        ctx.head, ctx.plan = head, plan
        ctx.set_materialize_grads(False)
        return stats.logps, stats.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        *_, logps, row_max, log_sum, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grads = sweep.Gradients(ctx.head, need_hidden, need_weight, need_bias)
        stats = RowStats(logps, row_max, log_sum, entropy)
        if dlogps is None:
            dlogps = torch.zeros_like(logps)
        with gemm.without_autocast(logps):
            sweep.gradients(ctx.head, ctx.plan, stats, dlogps, dentropy, grads)
        return (*grads.finish(), None, None, None)
