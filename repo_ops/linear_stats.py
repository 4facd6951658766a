"""Statistics of each token's distribution over the vocabulary, without storing logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import Layout, layout
from repo_ops.first_order import first_order
from repo_ops.head import gemm, support, sweep
from repo_ops.head.gradients import Gradients
from repo_ops.head.inputs import HeadInputs, RowStats, Wanted
from repo_ops.head.plan import Plan, make_plan
from repo_ops.head_arguments import HeadSettings, head_inputs
from repo_ops.options import Options, as_options


class VocabularyStats(NamedTuple):
    """Statistics of each position in the shape of targets; float32, 0 where mask is 0; None what was not asked for."""

    logps: Tensor
    """Log-probability of the target, in nats, never above 0; differentiable."""
    entropy: Tensor | None = None
    """-sum p log p, in nats; differentiable."""
    sum_p2: Tensor | None = None
    """sum p^2 in (0, 1], the chance that two samples agree; detached."""
    is_argmax: Tensor | None = None
    """bool, whether no token is likelier than the target (greedy decoding would have chosen it)."""


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    statistics: Sequence[str] = ("entropy", "sum_p2", "is_argmax"),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    support_ids: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
) -> VocabularyStats:
    """Log-probability of each target, and what else is asked for, in the one sweep that `linear_logps` needs anyway.

    Equals, for log_p = log_softmax(logits, -1) of the head's logits: log_p.gather(-1, targets),
    -(log_p.exp() * log_p).sum(-1), log_p.exp().square().sum(-1) and log_p.argmax(-1) == targets. With sum p^2 and the
    log-probability one has |p - onehot|^2 = 1 - 2 p[target] + sum p^2, the squared norm of a token's logit gradient,
    which optimal baselines weigh by.

    Args:
        statistics: any of "entropy", "sum_p2", "is_argmax"; what is not named is not computed.
        hidden, weight, targets, the other arguments: as in `linear_logps`.
    Returns:
        VocabularyStats; logps and entropy carry gradients.
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree; the message names the argument.
    """
    wanted = _wanted(statistics)
    options = as_options(options)
    if torch.compiler.is_compiling():
        # here, since it imports Dynamo; by its own name, since Dynamo of older torch takes no package with lazy names
        from repo_ops.compiled import HeadArguments
        from repo_ops.compiled import linear_stats as traced

        head = HeadArguments(bias, temperature, softcap, logit_scale, mask, support_ids, adapter, tp_group, options)
        return VocabularyStats(*traced(hidden, weight, targets, head, wanted))
    where = layout(targets, mask, None)
    settings = HeadSettings(bias, temperature, softcap, logit_scale, adapter, tp_group)
    found = head_stats(hidden, weight, targets, where, settings, wanted, support_ids, options)
    logps, *others = found
    return VocabularyStats(where.put(logps), *(None if values is None else where.put(values) for values in others))


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    where: Layout,
    settings: HeadSettings,
    wanted: Wanted,
    support_ids: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """[L] log-probabilities and entropies (attached), sum p^2 and argmax hits of the live tokens of `where`."""
    accumulate = options.accumulate_weight_grad
    head = head_inputs(
        hidden, weight, targets, where, settings,
        accumulate_weight_grad=accumulate, rounds_to=options.rounds_to(targets.device.type),
    )  # fmt: skip
    if support_ids is not None:
        return support.statistics(head, support_ids, where, make_plan(head, options, wanted), wanted)
    head = head.with_copies()
    plan = make_plan(head, options, wanted)
    return _LinearStats.apply(*head.tensors, head, plan, wanted)


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, head, plan, wanted = arguments
        with gemm.without_autocast(head.hidden):
            stats = sweep.statistics(head, plan, wanted=wanted)
        ctx.save_for_backward(*tensors, *stats)
        ctx.head, ctx.plan = head.without_copies(), plan  # they would live as long as the results
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values for values in (stats.sum_p2, stats.is_argmax) if values is not None))
        return stats.logps, stats.entropy, stats.sum_p2, stats.is_argmax

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        num_tensors = len(ctx.head.tensors)
        stats = RowStats(*ctx.saved_tensors[num_tensors:])
        grads = stats_gradients(ctx.head, ctx.plan, stats, dlogps, dentropy, ctx.needs_input_grad[:num_tensors])
        return (*grads, None, None, None)


def stats_gradients(
    head: HeadInputs,
    plan: Plan,
    stats: RowStats,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `head.tensors`, those that are needed, from those of logps and entropy [L].

    `plan` is that of `head.with_copies()`.
    """
    head = head.with_copies()
    grads = Gradients(head, needs)
    if dlogps is None:
        dlogps = torch.zeros_like(stats.logps)
    with gemm.without_autocast(dlogps):
        sweep.gradients(head, plan, stats, dlogps, dentropy, grads)
    return grads.finish()


def _wanted(statistics: Sequence[str]) -> Wanted:
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    for name in names:
        if name not in Wanted._fields:
            known = ", ".join(map(repr, Wanted._fields))
            raise ValueError(f"statistics: expected names out of {known}, got {name!r}")
    return Wanted("entropy" in names, "sum_p2" in names, "is_argmax" in names)
