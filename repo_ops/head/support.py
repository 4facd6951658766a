"""Log-probabilities over the tokens that a truncated sampler kept: a gathered product instead of a vocabulary.

A sampler with top-k, top-p or min-p renormalises over the tokens it keeps, so the policy's log-probability must be
taken over the same set; over the whole vocabulary every importance ratio is biased. [N, K] logits with K <= 512 are
small, so everything after the gathered product is ordinary PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repo_ops.arguments import Layout, check_values
from repo_ops.head.gemm import without_autocast
from repo_ops.head.inputs import HeadInputs, Wanted
from repo_ops.head.plan import Plan

MAX_SUPPORT = 512
NOT_KEPT = -1


def checked(support_ids: Tensor, head: HeadInputs, where: Layout) -> Tensor:
    """[N, K + 1] ids of the live rows: the target, then the others that were kept, NOT_KEPT for padding.

    The target is always kept, so that a row without any id has log-probability 0.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, an id out of range, or a sharded vocabulary.
    """
    if head.tp_group is not None:
        raise ValueError("support_ids: expected None with tp_group; a support is small, so gather the head's rows")
    if head.accumulates:
        raise ValueError("support_ids: expected None with options.accumulate_weight_grad; leave that one False")
    if not isinstance(support_ids, Tensor) or support_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError("support_ids: expected int64 token ids, -1 for padding")
    if tuple(support_ids.shape[:-1]) != where.shape or not 0 < support_ids.shape[-1] <= MAX_SUPPORT:
        raise ValueError(
            f"support_ids: expected shape {[*where.shape, 'K']} with 0 < K <= {MAX_SUPPORT}, "
            f"got {list(support_ids.shape)}"
        )
    flat = support_ids.reshape(-1, support_ids.shape[-1]).to(torch.int64)
    live = flat if where.rows is None else flat.index_select(0, where.rows)
    ok = ((live >= NOT_KEPT) & (live < len(head.weight))).all()
    check_values("support_ids", ok, f"ids from 0 to {len(head.weight) - 1}, -1 for padding", "pad with -1")
    in_order = live.sort(1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NOT_KEPT)
    check_values("support_ids", ~twice.any(), "each id once a row", "a token listed twice would count twice")
    target = head.targets[:, None]
    return torch.cat([target, torch.where(live == target, NOT_KEPT, live)], 1)


def statistics(
    head: HeadInputs, ids: Tensor, plan: Plan, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """[N] log-probability of the target within `ids` [N, K + 1] and entropy over them, attached; sum p^2; argmax."""
    kept = ids != NOT_KEPT
    ids = ids.clamp_min(0)
    z = sum(_GatheredProduct.apply(*product, ids, head, plan) for product in head.products)
    assert isinstance(z, Tensor)
    if head.bias is not None:
        z = z + head.bias[ids].to(z.dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    inv = head.inv_temperature
    z = z * (inv[:, None] if isinstance(inv, Tensor) else inv)
    log_p = torch.where(kept, z, -float("inf")).log_softmax(1)
    # 0 * -inf in value and gradient, where a token was not kept
    finite = torch.where(kept, log_p, 0.0)
    return (
        log_p[:, 0],
        -(finite.exp() * finite * kept).sum(1) if wanted.entropy else None,
        log_p.detach().exp().square().sum(1) if wanted.sum_p2 else None,
        log_p[:, 0] >= log_p.amax(1) if wanted.is_argmax else None,
    )


class _GatheredProduct(torch.autograd.Function):
    """[N, K] dot products of each live row with its own K rows of the weight, in float32, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, head: HeadInputs, plan: Plan) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.head, ctx.rows = head, _chunk_rows(ids, weight, plan)
        found = hidden.new_empty(ids.shape, dtype=head.exact_dtype)
        with without_autocast(hidden):
            for chunk in _chunks(ids, ctx.rows):
                rows = head.rows_of(hidden, chunk).to(found.dtype)
                found[chunk] = torch.bmm(weight[ids[chunk]].to(found.dtype), rows[:, :, None])[:, :, 0]
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        head, dtype = ctx.head, dlogits.dtype
        dhidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(ids, ctx.rows):
            if dhidden is not None:
                with without_autocast(hidden):
                    grad = torch.bmm(dlogits[chunk, None, :], weight[ids[chunk]].to(dtype))[:, 0]
                dhidden[chunk if head.rows is None else head.rows[chunk]] = grad.to(dhidden.dtype)
            if dweight is not None:
                outer = dlogits[chunk, :, None] * head.rows_of(hidden, chunk).to(dtype)[:, None, :]
                # index_put sorts where index_add would use atomics: the same bits on every run
                dweight.index_put_((ids[chunk].reshape(-1),), outer.reshape(-1, weight.shape[1]), accumulate=True)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _chunk_rows(ids: Tensor, weight: Tensor, plan: Plan) -> int:
    """Rows whose gathered weights, in both precisions, fit the memory of a tile of the plan."""
    row_bytes = 3 * ids.shape[1] * weight.shape[1] * 4
    return max(1, plan.rows * len(weight) * plan.tile_dtype.itemsize // row_bytes)


def _chunks(ids: Tensor, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, len(ids))) for start in range(0, len(ids), rows)]
