"""Log-probabilities over the tokens that a truncated sampler kept: a gathered product instead of a vocabulary.

A sampler with top-k, top-p or min-p renormalises over the tokens it keeps, so the policy's log-probability must be
taken over the same set; over the whole vocabulary every importance ratio is biased. Rows are taken a chunk at a time,
and gathered a second time in the backward: ids and logits of all of them would not fit a small memory budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repo_ops.arguments import Layout, check_device, check_values
from repo_ops.first_order import first_order
from repo_ops.head.gemm import without_autocast
from repo_ops.head.inputs import HeadInputs, Scaling, Wanted, rounded
from repo_ops.head.plan import Plan

MAX_SUPPORT = 512
NOT_KEPT = -1


class SupportStats(NamedTuple):
    """Statistics of each live row over the ids that were kept, [N]; None what was not asked for."""

    logps: Tensor
    """Of the target; attached."""
    entropy: Tensor | None
    """Attached."""
    sum_p2: Tensor | None
    is_argmax: Tensor | None


def statistics(head: HeadInputs, support_ids: Tensor, where: Layout, plan: Plan, wanted: Wanted) -> SupportStats:
    """Statistics over `support_ids` [*targets, K], NOT_KEPT for padding, of the rows of `where`, which are `head`'s.

    The target is always kept, so that a row without any id has log-probability 0.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, an id out of range or twice in a row, or a sharded vocabulary.
    """
    if head.tp_group is not None:
        raise ValueError("support_ids: expected None with tp_group; a support is small, so gather the head's rows")
    if head.accumulates:
        raise ValueError("support_ids: expected None with options.accumulate_weight_grad; leave that one False")
    if not isinstance(support_ids, Tensor) or support_ids.dtype not in (torch.int64, torch.int32):
        got = support_ids.dtype if isinstance(support_ids, Tensor) else type(support_ids).__name__
        raise TypeError(f"support_ids: expected int64 token ids, -1 for padding, got {got}")
    if tuple(support_ids.shape[:-1]) != where.shape or not 0 < support_ids.shape[-1] <= MAX_SUPPORT:
        raise ValueError(
            f"support_ids: expected shape {[*where.shape, 'K']} with 0 < K <= {MAX_SUPPORT}, "
            f"got {list(support_ids.shape)}"
        )
    check_device("support_ids", support_ids, head.targets.device, "targets")
    flat = support_ids.reshape(-1, support_ids.shape[-1])
    return SupportStats(*_OverSupport.apply(*head.tensors, head, flat, _chunk_rows(head, flat, plan), wanted))


class _OverSupport(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, head, support_ids, rows, wanted = arguments
        found = []
        with without_autocast(head.hidden):
            for chunk in _chunks(head, rows):
                given = _given(head, support_ids, chunk)
                _check_ids(given, len(head.weight))
                ids, kept = _with_target(head, given, chunk)
                found.append(_reduced(_log_p(head, ids, kept, chunk)[0], wanted))
        joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)]
        stats = SupportStats(*joined)  # type: ignore[arg-type]
        ctx.save_for_backward(*tensors, support_ids, stats.entropy)
        ctx.head, ctx.rows = head, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values for values in stats[2:] if values is not None))
        return tuple(stats)

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, support_ids, entropy = ctx.saved_tensors
        head, needs = ctx.head, ctx.needs_input_grad
        # a row's gradient is written once; those of weights and bias are sums
        grads = [
            torch.zeros_like(tensor, dtype=tensor.dtype if i in (0, 3) else head.exact_dtype)
            if tensor is not None and needs[i]
            else None
            for i, tensor in enumerate(tensors)
        ]
        with without_autocast(head.hidden):
            for chunk in _chunks(head, ctx.rows):
                ids, kept = _with_target(head, _given(head, support_ids, chunk), chunk)
                log_p, slope = _log_p(head, ids, kept, chunk)
                dlogits = _dlogits(
                    log_p,
                    None if dlogps is None else dlogps[chunk],
                    None if dentropy is None else (dentropy[chunk], entropy[chunk]),
                ).mul_(slope)
                _add(grads, head, ids, chunk, dlogits)
        found = [None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return (*found, None, None, None, None)


def _chunk_rows(head: HeadInputs, support_ids: Tensor, plan: Plan) -> int:
    """Rows whose ids, logits and gathered weights fit the memory of a tile of the plan."""
    K, exact = support_ids.shape[1] + 1, head.exact_dtype.itemsize
    # weights as they are and in full precision, or the outer products of the weight's gradient with a copy in its sums
    gathered = sum(2 * exact * weight.shape[1] for _, weight in head.products)
    row_bytes = K * (gathered + 8 * 4 + exact * 6)
    return max(1, plan.rows * len(head.weight) * plan.tile_dtype.itemsize // row_bytes)


def _chunks(head: HeadInputs, rows: int) -> Iterator[slice]:
    """Slices of live rows; one of no rows where there are none."""
    for start in range(0, max(head.num_rows, 1), rows):
        yield slice(start, min(start + rows, head.num_rows))


def _given(head: HeadInputs, support_ids: Tensor, chunk: slice) -> Tensor:
    """[C, K] int64 ids of some live rows, as they were given for every position."""
    return head.rows_of(support_ids, chunk).to(torch.int64)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    ok = ((ids >= NOT_KEPT) & (ids < vocab_size)).all()
    check_values("support_ids", ok, f"ids from 0 to {vocab_size - 1}, -1 for padding", "pad with -1")
    in_order = ids.sort(1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NOT_KEPT)
    check_values("support_ids", ~twice.any(), "each id once a row", "a token listed twice would count twice")


def _with_target(head: HeadInputs, given: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """[C, K + 1] ids, the target first, with any id in places that were not kept; bool, which were."""
    target = head.targets[chunk, None]
    kept = torch.cat([torch.ones_like(target, dtype=torch.bool), (given != NOT_KEPT) & (given != target)], 1)
    return torch.cat([target, given], 1).clamp_min_(0), kept


def _log_p(head: HeadInputs, ids: Tensor, kept: Tensor, chunk: slice) -> tuple[Tensor, Tensor | float]:
    """[C, K + 1] log-probabilities among what was kept, -inf elsewhere; what d log_p / d (hidden weight^T) adds."""
    z = None
    for hidden, weight in head.products:
        rows, columns = (x.to(head.exact_dtype) for x in _operands(head, hidden, weight, ids, chunk))
        part = torch.bmm(columns, rows[:, :, None])[:, :, 0]
        z = part if z is None else z.add_(part)
    assert z is not None
    scaling = head.scaling(chunk)
    if scaling.bias is not None:
        z.add_(scaling.bias[ids])
    slope = scaling.factor()
    if scaling.softcap is None:
        z.mul_(slope)
    else:
        capped = z.mul_(scaling.logit_scale / scaling.softcap).tanh_()
        slope = (1 - capped.square()).mul_(slope)
        z = capped.mul_(Scaling(None, scaling.inv_temperature, scaling.softcap, None).factor())
    return z.masked_fill_(~kept, -float("inf")).log_softmax(1), slope


def _operands(head: HeadInputs, hidden: Tensor, weight: Tensor, ids: Tensor, chunk: slice) -> list[Tensor]:
    """[C, D] states of the chunk's rows, [C, K + 1, D] the head's rows of their ids."""
    return rounded(head.rounds_to, head.rows_of(hidden, chunk), weight[ids])


def _reduced(log_p: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """What `SupportStats` holds, of some rows."""
    p = log_p.exp() if wanted.entropy or wanted.sum_p2 else None
    return (
        log_p[:, 0].clone(),  # a view would keep all of it
        None if p is None or not wanted.entropy else -(p * _finite(log_p)).sum(1),
        None if p is None or not wanted.sum_p2 else p.square().sum(1),
        log_p[:, 0] >= log_p.amax(1) if wanted.is_argmax else None,
    )


def _dlogits(log_p: Tensor, dlogps: Tensor | None, dentropy: tuple[Tensor, Tensor] | None) -> Tensor:
    """[C, K + 1] gradient of the logits; `dentropy` with the entropies."""
    p = log_p.exp()
    if dlogps is None:
        grad = torch.zeros_like(p)
    else:
        grad = p * -dlogps[:, None]
        grad[:, 0] = dlogps * -torch.expm1(log_p[:, 0])
    if dentropy is not None:
        coefficient, entropy = dentropy
        grad.sub_(_finite(log_p).add_(entropy[:, None]).mul_(p).mul_(coefficient[:, None]))
    return grad


def _finite(log_p: Tensor) -> Tensor:
    """A copy without -inf, where p log p is 0 and not 0 * -inf."""
    return log_p.clamp_min(torch.finfo(log_p.dtype).min)


def _add(grads: list[Tensor | None], head: HeadInputs, ids: Tensor, chunk: slice, dlogits: Tensor) -> None:
    """Add a chunk's share to gradients in the order of `head.tensors`."""
    dbias = grads[2]
    for (hidden, weight), dhidden, dweight in zip(head.products, grads[::3], grads[1::3], strict=False):
        if dhidden is None and dweight is None:
            continue
        rows, columns = _operands(head, hidden, weight, ids, chunk)
        if dhidden is not None:
            grad = torch.bmm(dlogits[:, None, :], columns.to(dlogits.dtype))[:, 0]
            dhidden[chunk if head.rows is None else head.rows[chunk]] = grad.to(dhidden.dtype)
        del columns
        if dweight is not None:
            outer = dlogits[:, :, None] * rows.to(dlogits.dtype)[:, None, :]
            # index_put sorts where index_add would use atomics: the same bits on every run
            dweight.index_put_((ids.reshape(-1),), outer.reshape(-1, weight.shape[1]), accumulate=True)
    if dbias is not None:
        dbias.index_put_((ids.reshape(-1),), dlogits.reshape(-1), accumulate=True)
