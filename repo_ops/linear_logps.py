"""Log-probability and entropy of each token, without storing logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import Layout, layout
from repo_ops.head import gemm, support, sweep
from repo_ops.head.gradients import Gradients
from repo_ops.head.inputs import RowStats
from repo_ops.head.plan import make_plan
from repo_ops.head_arguments import HeadSettings, head_inputs
from repo_ops.options import Options, as_options


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
        options: backend, memory budget and precision.
    Returns:
        TokenStats(logps, entropy), float32 (float64 for float64 inputs).
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree; the message names the argument.
    """
    where = layout(targets, mask, None)
    settings = HeadSettings(bias, temperature, softcap, logit_scale, adapter, tp_group)
    logps, entropy = head_logps(hidden, weight, targets, where, settings, with_entropy, support_ids, options)
    return TokenStats(where.put(logps), None if entropy is None else where.put(entropy))


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    where: Layout,
    settings: HeadSettings,
    with_entropy: bool,
    support_ids: Tensor | None,
    options: Options | None,
) -> tuple[Tensor, Tensor | None]:
    """[L] log-probabilities and entropies of the live tokens of `where`, attached."""
    head = head_inputs(hidden, weight, targets, where, settings)
    plan = make_plan(head, as_options(options))
    if support_ids is not None:
        return support.logps(head, support.checked(support_ids, head, where), plan, with_entropy)
    return _LinearLogps.apply(*head.tensors, head, plan, with_entropy)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, head, plan, with_entropy = arguments
        with gemm.without_autocast(head.hidden):
            stats = sweep.statistics(head, plan, with_entropy=with_entropy)
        ctx.save_for_backward(*tensors, *stats)
        ctx.head, ctx.plan = head, plan
        ctx.set_materialize_grads(False)
        return stats.logps, stats.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        num_tensors = len(ctx.head.tensors)
        stats = RowStats(*ctx.saved_tensors[num_tensors:])
        grads = Gradients(ctx.head, ctx.needs_input_grad[:num_tensors])
        if dlogps is None:
            dlogps = torch.zeros_like(stats.logps)
        with gemm.without_autocast(dlogps):
            sweep.gradients(ctx.head, ctx.plan, stats, dlogps, dentropy, grads)
        return (*grads.finish(), None, None, None)
