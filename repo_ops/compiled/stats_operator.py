"""`linear_stats` and `linear_logps` as nodes of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repo_ops.arguments import layout
from repo_ops.compiled import gradients
from repo_ops.compiled.arguments import HeadArguments
from repo_ops.compiled.calls import constants_of, kept
from repo_ops.head import support, sweep
from repo_ops.head.inputs import RowStats, Wanted, exact_dtype
from repo_ops.head.plan import make_plan
from repo_ops.head_arguments import head_inputs
from repo_ops.linear_stats import head_stats, stats_gradients


def linear_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, arguments: HeadArguments, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `repo_ops.linear_stats` returns, as nodes of the graph that is being traced."""
    others, is_number = arguments.tensors(), not isinstance(arguments.temperature, Tensor)
    call = kept(
        hidden.device.type, arguments.softcap, arguments.logit_scale, arguments.options, is_number,
        (wanted[0], wanted[1], wanted[2]),
    )  # fmt: skip
    logps, *found = _Stats.apply(hidden, weight, *others, targets, call)
    entropy, sum_p2, is_argmax = (values if want else None for values, want in zip(found, wanted, strict=True))
    return logps, entropy, sum_p2, is_argmax


class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *others, targets, call = arguments
        found = torch.ops.repo_ops.linear_stats(hidden, weight, targets, others, call)
        logps, entropy, sum_p2, is_argmax, row_max, log_sum = found
        ctx.save_for_backward(hidden, weight, *others, targets, logps, row_max, log_sum, entropy)
        ctx.call = call
        ctx.mark_non_differentiable(sum_p2, is_argmax)
        return logps, entropy, sum_p2, is_argmax

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor, dentropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, *others, targets, logps, row_max, log_sum, entropy = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        grads = torch.ops.repo_ops.linear_stats_backward(
            hidden, weight, targets, others, [logps, row_max, log_sum, entropy], dlogps, dentropy, ctx.call, needs
        )
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*found, None, None, None, None, None)


torch.library.define(
    "repo_ops::linear_stats",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, int call)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("repo_ops::linear_stats", "default")
def _stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: list[Tensor | None], call: int
) -> tuple[Tensor, ...]:
    constants = constants_of(call)
    mask, support_ids = others[4:]
    where = layout(targets, mask, None)
    rounds_to = constants.options.operand_dtype
    head = head_inputs(hidden, weight, targets, where, constants.settings(others), rounds_to=rounds_to)
    head = head.with_copies() if support_ids is None else head
    wanted = Wanted(*constants.wanted)
    plan = make_plan(head, constants.options, wanted)
    if support_ids is None:
        stats = sweep.statistics(head, plan, wanted=wanted)
        found = [stats.logps, stats.entropy, stats.sum_p2, stats.is_argmax, stats.row_max, stats.log_sum]
    else:
        found = [*support.statistics(head, support_ids, where, plan, wanted), None, None]
    absent = hidden.new_empty
    return tuple(
        absent(0, dtype=torch.bool if i == 3 else head.exact_dtype) if values is None else where.put(values)
        for i, values in enumerate(found)
    )


@torch.library.register_fake("repo_ops::linear_stats")
def _stats_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: list[Tensor | None], call: int
) -> tuple[Tensor, ...]:
    exact, has_support = exact_dtype(hidden, weight), others[5] is not None
    there = (True, *constants_of(call).wanted, not has_support, not has_support)
    return tuple(
        hidden.new_empty(targets.shape if present else 0, dtype=torch.bool if i == 3 else exact)
        for i, present in enumerate(there)
    )


torch.library.define(
    "repo_ops::linear_stats_backward",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, Tensor[] stats, Tensor? dlogps, Tensor? dentropy,"
    " int call, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("repo_ops::linear_stats_backward", "default")
def _stats_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    stats: list[Tensor],
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    call: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    constants, tensors = constants_of(call), [hidden, weight, *others[:3]]
    mask, support_ids = others[4:]
    where = layout(targets, mask, None)
    arriving = [None if d is None or not d.numel() else where.take(d) for d in (dlogps, dentropy)]
    d_logps, d_entropy = arriving
    if support_ids is None:
        rounds_to = constants.options.operand_dtype
        head = head_inputs(hidden, weight, targets, where, constants.settings(others), rounds_to=rounds_to)
        head = head.with_copies()
        plan = make_plan(head, constants.options, Wanted(*constants.wanted))
        logps, row_max, log_sum, entropy = (where.take(s) if s.numel() else None for s in stats)
        assert logps is not None
        assert row_max is not None
        assert log_sum is not None
        known = RowStats(logps, row_max, log_sum, entropy)
        return gradients.shaped(stats_gradients(head, plan, known, d_logps, d_entropy, needs), tensors, needs)
    with gradients.autograd_on():
        leaves = [t.detach().requires_grad_(need) if t is not None else None for t, need in zip(tensors, needs)]
        settings = constants.settings([*leaves[2:], *others[3:]])
        assert leaves[0] is not None
        assert leaves[1] is not None
        wanted = Wanted(*constants.wanted)
        found = head_stats(leaves[0], leaves[1], targets, where, settings, wanted, support_ids, constants.options)
        pairs = [(out, grad) for out, grad in zip(found[:2], arriving) if out is not None and grad is not None]
        grads = gradients.of_leaves([out for out, _ in pairs], leaves, [grad for _, grad in pairs])
    return gradients.shaped(grads, tensors, needs)


@torch.library.register_fake("repo_ops::linear_stats_backward")
def _stats_backward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: list[Tensor | None], *rest: Any
) -> tuple[Tensor, ...]:
    tensors, needs = [hidden, weight, *others[:3]], rest[-1]
    return tuple(gradients.empty(tensors, needs, [None if t is None else t.dtype for t in tensors]))
