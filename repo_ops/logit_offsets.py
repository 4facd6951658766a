"""Logits of a few tokens relative to the sampled one: K of V columns, so nothing of size V."""

from __future__ import annotations

import torch
from torch import Tensor

from repo_ops.arguments import check_shape
from repo_ops.head.gemm import without_autocast
from repo_ops.head.inputs import exact_dtype, rounded
from repo_ops.options import Options

BLOCK_BYTES = 1 << 25
"""Of gathered rows of the head at a time."""


@torch.no_grad()
def logit_offsets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    operand_dtype: torch.dtype | None = None,
) -> Tensor:
    """[..., K] log p(ids) - log p(targets) under the head, without a gradient.

    Equals (z.gather(-1, ids) - z.gather(-1, targets[..., None])) for the head's logits z. With the log-probability of
    the target it gives those of the ids, which is how `dppo_topk` stays at one sweep over the vocabulary. Reads
    (K + 1) D numbers of the head per position.

    Args:
        hidden: [..., D]. weight: [V, D]. targets: [...] int64, under a mask any id in range.
        ids: [..., K] int64, usually repo_ops.terms.divergence.support_ids(topk_ids, targets).
        bias, temperature, softcap, logit_scale: as in `linear_logps`. operand_dtype: as in `Options`.
    Raises:
        ValueError: shapes disagree.
    """
    check_shape("targets", targets, hidden.shape[:-1], "hidden without its last axis")
    check_shape("ids", ids, (*targets.shape, ids.shape[-1]), "targets and an axis of K")
    dtype, rounds_to = exact_dtype(hidden, weight), Options(operand_dtype=operand_dtype).rounds_to(hidden.device.type)
    states = hidden.reshape(-1, hidden.shape[-1])
    wanted = torch.cat([targets[..., None], ids], -1).reshape(len(states), -1)
    found = states.new_empty(wanted.shape, dtype=dtype)
    rows = max(1, BLOCK_BYTES // (wanted.shape[1] * weight.shape[1] * dtype.itemsize))
    for start in range(0, len(states), rows):
        block = wanted[start : start + rows]
        columns, vectors = rounded(rounds_to, weight[block], states[start : start + rows, :, None])
        with without_autocast(states):
            found[start : start + rows] = torch.bmm(columns.to(dtype), vectors.to(dtype))[..., 0]
    if bias is not None:
        found += bias[wanted]
    found *= logit_scale
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    found /= temperature
    return (found[:, 1:] - found[:, :1]).reshape(ids.shape)
