"""Policy losses straight from hidden states: the gradient is formed while a tile of logits still exists.

Top to bottom: `arguments.layout` finds the live tokens; `loss_inputs` checks what the objective reads and weighs each
token (reduce.py); `head_inputs` checks the head, `make_plan` cuts its rows into tiles; `head/sweep.py` goes over them
and asks `step_loss.coefficients` for d loss / d logp of each row; `Gradients` gathers what the backward hands over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import Layout, check_values, layout
from repo_ops.first_order import first_order
from repo_ops.head import gemm, support, sweep
from repo_ops.head.gradients import FLOAT16, Gradients
from repo_ops.head.inputs import HeadInputs, RowStats, Wanted, exact_dtype
from repo_ops.head.plan import Plan, make_plan
from repo_ops.head_arguments import HeadSettings, head_inputs
from repo_ops.loss_inputs import LossInputs, ObjectiveLike, PolicyLoss, loss_inputs
from repo_ops.metrics import Stat
from repo_ops.objectives import Objective, as_objective
from repo_ops.options import Options, as_options
from repo_ops.reduce import NumItemsLike
from repo_ops.step_loss import coefficients, loss_metrics, step_loss
from repo_ops.tokens import Tokens


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: ObjectiveLike = "grpo",
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    off_policy: Tensor | None = None,
    off_policy_coef: float = 1.0,
    num_items: NumItemsLike | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support_ids: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    options: Options | None = None,
) -> PolicyLoss:
    """The loss of `objective` over a language-model head, with gradients formed inside the forward.

    Equals policy_loss(linear_logps(hidden, weight, targets, ...).logps, advantages, ...) and its gradients. Costs 3
    passes of N V D multiply-adds over live rows (2 with a frozen weight) for objectives of scope "token", and of scope
    "sequence" while sequences fit in a tile; 4 otherwise; 1 where no gradient is wanted. Rows that carry no gradient
    (masked; zero advantage without KL or entropy term) are not computed; denominators still count them.

    Args:
        hidden: [B, T, D], or packed [N, D] with `cu_seqlens`, floating. Position i predicts targets[i]: shift before.
        weight: [V, D], the head. targets: [B, T] or [N] int64 token ids.
        advantages: [B], one per sequence, or in the shape of targets. Constants.
        objective: a name (see objective_names), an Objective (get_objective, or your own), or a function of Tokens.
        mask: 1 for tokens that count, in the shape of targets.
        old_logps: log-probabilities at the start of the step, or those stored with replayed rows. None: on-policy, the
            ratio is 1 with the gradient of the current policy.
        ref_logps: log-probabilities of the frozen reference (objective with beta > 0).
        sampler_logps: those that the engine reported. A token where they are not finite has no policy loss under an
            objective that reads them; it stays in the denominators.
        extras: whatever else the objective reads, by name: [B], or the shape of targets and more axes.
        off_policy: [B] bool, True for replayed rows: the loss is J_on + off_policy_coef * J_off.
        num_items: what the whole step is divided by, when this call is one of several (micro-batches, ranks): a number
            (tokens for token-mean reductions, else sequences), a pair (on_policy, off_policy), or NumItems. The losses
            of the step's calls then add up to the step's loss. Where ranks average gradients, multiply by their number.
        cu_seqlens: [B + 1] boundaries of packed sequences.
        bias, temperature, softcap, logit_scale, support_ids, adapter, tp_group, options: as in `linear_logps`.
    Returns:
        PolicyLoss(loss, logps, entropy, metrics). Call backward on `loss` once; logps and entropy are detached.
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree, or something the objective reads is missing.
    Source: arXiv 2506.09340 for J_on + c J_off.
    """
    options = as_options(options)
    given = {
        "advantages": advantages,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "sampler_logps": sampler_logps,
        "off_policy": off_policy,
        "cu_seqlens": cu_seqlens,
    }
    if torch.compiler.is_compiling():
        # here, since it imports Dynamo; by its own name, since Dynamo of older torch takes no package with lazy names
        from repo_ops.compiled import HeadArguments
        from repo_ops.compiled import linear_policy_loss as traced

        head = HeadArguments(bias, temperature, softcap, logit_scale, mask, support_ids, adapter, tp_group, options)
        return traced(hidden, weight, targets, given, extras, num_items, head, off_policy_coef, objective)
    settings = HeadSettings(bias, temperature, softcap, logit_scale, adapter, tp_group)
    call = prepare(
        hidden, weight, targets, mask, settings, as_objective(objective), options,
        extras=extras, off_policy_coef=off_policy_coef, num_items=num_items, copies=support_ids is None, **given,
    )  # fmt: skip
    if support_ids is not None:
        return over_support(call, support_ids)
    return call.result(*_LinearPolicyLoss.apply(*call.head.tensors, call, torch.is_grad_enabled()))


@dataclass(frozen=True, eq=False)
class Call:
    """A checked call: what is swept over, and what the objective reads."""

    head: HeadInputs
    inputs: LossInputs
    plan: Plan
    where: Layout
    """Of the tokens under the mask; `inputs.where` leaves out those known to carry no gradient."""

    @property
    def wanted(self) -> Wanted:
        """The statistics that the objective reads beside log-probabilities."""
        return _wanted(self.inputs.objective)

    def tokens(self, logps: Tensor, entropy: Tensor | None) -> Tokens:
        """All live tokens with these log-probabilities."""
        return self.inputs.tokens(logps, entropy, slice(None), self.inputs.lengths)

    def result(self, loss: Tensor, logps: Tensor, entropy: Tensor | None) -> PolicyLoss:
        """What the caller gets: the loss of the live tokens with what tokens-less sequences add, placed statistics."""
        inputs = self.inputs
        loss = loss if inputs.constant is None else loss + inputs.constant
        metrics = loss_metrics(inputs.objective, self.tokens(logps, entropy))
        metrics["live"] = Stat(*(logps.new_tensor(float(n)) for n in (inputs.where.num_live, self.where.num_live)))
        placed = _placed(logps, inputs.where, self.where)
        assert placed is not None
        return PolicyLoss(loss, placed, _placed(entropy, inputs.where, self.where), metrics)


def _wanted(objective: Objective) -> Wanted:
    return Wanted(entropy="entropy" in objective.reads)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    settings: HeadSettings,
    objective: Objective,
    options: Options,
    *,
    cu_seqlens: Tensor | None,
    copies: bool,
    **given: Any,
) -> Call:
    """The checked call; `given` are the other arguments of `loss_inputs`.

    `copies`: whether operands are rounded now; those of a support are as they are gathered.

    Raises:
        TypeError, ValueError: as `linear_policy_loss`.
    """
    where = layout(targets, mask, cu_seqlens)
    inputs = loss_inputs(
        objective, where, drop_zero_advantage=not options.all_logps, dtype=exact_dtype(hidden, weight), **given
    )
    accumulate = options.accumulate_weight_grad
    head = head_inputs(
        hidden, weight, targets, inputs.where, settings,
        accumulate_weight_grad=accumulate, rounds_to=options.rounds_to(targets.device.type),
    )  # fmt: skip
    head = head.with_copies() if copies else head
    return Call(head, inputs, make_plan(head, options, _wanted(inputs.objective)), where)


def evaluate(call: Call, needs: Sequence[bool]) -> tuple[Tensor, RowStats, Gradients]:
    """The loss of the live tokens, their statistics, and the gradients of `call.head.tensors` that are needed.

    Gradients of float16 tensors are still float32: a gradient scaler multiplies them before they are rounded.
    """
    scale = None
    if call.plan.gradient_dtype == torch.float16 and call.plan.tile_dtype != torch.float16 and call.head.num_rows:
        # a token's weight is about 1 / rows, and times probabilities below float16's smallest number; a sum's weight is
        # 1, and times the number of rows above its largest
        scale = torch.exp2(-call.inputs.weights.policy.max().log2().floor())
    grads = Gradients(call.head, needs, late=FLOAT16, scale=scale)
    with gemm.without_autocast(call.head.hidden):
        loss, stats = _sweep(call, grads)
    return loss, stats, grads


def over_support(call: Call, support_ids: Tensor) -> PolicyLoss:
    """The loss over the tokens that a truncated sampler kept, by autograd: K logits a row are cheap to make twice."""
    logps, entropy, *_ = support.statistics(call.head, support_ids, call.inputs.where, call.plan, call.wanted)
    loss = step_loss(call.inputs.objective, call.tokens(logps, entropy), call.inputs.weights)
    return call.result(loss, logps.detach(), None if entropy is None else entropy.detach())


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        *tensors, call, grad_enabled = arguments
        needs = [grad_enabled and need for need in ctx.needs_input_grad[: len(tensors)]]
        loss, stats, grads = evaluate(call, needs)
        ctx.grads, ctx.weight, ctx.weight_grad = grads.finish(), tensors[1], grads.weight_grad
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(stats.logps, *([] if stats.entropy is None else [stats.entropy]))
        return loss, stats.logps, stats.entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_policy_loss: backward was called a second time; its gradients were formed in the forward and "
                "handed over by the first one, so call linear_policy_loss again"
            )
        grads, ctx.grads = ctx.grads, None
        if ctx.weight_grad is not None:
            _check_accumulated(ctx.weight, ctx.weight_grad, dloss)
        is_one = dloss.device.type == "cpu" and dloss.item() == 1.0  # elsewhere reading it would wait for the device
        scaled = [g if g is None or is_one else g.mul_(dloss.to(g.dtype)) for g in grads]
        return (*(g if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None, None)


def _check_accumulated(weight: Tensor, weight_grad: Tensor, dloss: Tensor) -> None:
    name = "options.accumulate_weight_grad"
    if weight.grad is not weight_grad:
        raise RuntimeError(
            f"{name}: expected the weight.grad that the loss added to, got another; call zero_grad before the loss, "
            "not between it and backward"
        )
    check_values(name, dloss == 1, "a backward from the loss itself, with gradient 1", "scale it by num_items instead")


def _sweep(call: Call, grads: Gradients) -> tuple[Tensor, RowStats]:
    """The loss and the statistics of live rows; gradients go to `grads`, in as few passes as the scope allows."""
    head, inputs, plan = call.head, call.inputs, call.plan
    by_kernel = plan.backend == "triton" and head.exact_dtype == torch.float32  # all that the kernel takes
    chunks = _chunks(call) if grads.wanted else None
    if chunks is None:
        stats = sweep.statistics(head, plan, wanted=call.wanted)
        tokens = call.tokens(stats.logps, stats.entropy)
        found = coefficients(inputs.objective, tokens, inputs.weights, by_kernel=by_kernel)
        if grads.wanted:
            sweep.gradients(head, plan, stats, found.dlogps, found.dentropy, grads)
        return found.loss, stats
    losses = [head.hidden.new_zeros((), dtype=head.exact_dtype)]

    def rule(rows: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
        tokens = inputs.tokens(stats.logps, stats.entropy, rows, chunks[rows.start, rows.stop])
        found = coefficients(inputs.objective, tokens, inputs.weights.slice(rows), by_kernel=by_kernel)
        losses.append(found.loss)
        return found.dlogps, found.dentropy

    spans = [slice(*span) for span in chunks]
    stats = sweep.one_sweep(head, plan, spans, rule, grads, wanted=call.wanted)
    return torch.stack(losses).sum(), stats


def _chunks(call: Call) -> dict[tuple[int, int], Tensor | None] | None:
    """(first row, end) -> lengths of the whole sequences in a chunk that its objective can judge by itself.

    Lengths are None for scope "token", which may cut sequences. None where there are no such chunks, so that
    coefficients need a sweep of their own.
    """
    scope, lengths, plan, num_rows = call.inputs.objective.reach, call.inputs.lengths, call.plan, call.head.num_rows
    if scope == "token":
        return {(chunk.start, chunk.stop): None for chunk in plan.chunks(num_rows)}
    if scope == "batch" and (num_rows > plan.rows or not num_rows):
        return None  # an empty micro-batch too takes part in statistics over ranks
    if num_rows <= plan.rows:
        return {(0, num_rows): lengths} if num_rows else {}
    chunks = plan.sequence_chunks(lengths.tolist())
    return None if chunks is None else {(r.start, r.stop): lengths[sequences] for r, sequences in chunks}


def _placed(values: Tensor | None, live: Layout, where: Layout) -> Tensor | None:
    """`values` of the live tokens in the shape of targets: 0 where masked, NaN where left out by their advantage."""
    if values is None or live is where:
        return None if values is None else where.put(values)
    assert live.rows is not None
    placed = where.put(values.new_full((where.num_live,), float("nan")))
    return placed.reshape(-1).index_copy(0, live.rows, values).reshape(where.shape)
