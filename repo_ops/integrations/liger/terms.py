"""Loss and metrics as Liger defines them, padding that counts and KL at sequence level included."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from repo_ops.arguments import check_values
from repo_ops.integrations import given_weight
from repo_ops.integrations.liger.settings import REDUCTIONS, Settings
from repo_ops.integrations.liger.step import Step
from repo_ops.kl import k3
from repo_ops.linear_logps import linear_logps
from repo_ops.linear_policy_loss import linear_policy_loss
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import sequence_weights


def loss_and_logps(
    settings: Settings, step: Step, hidden: Tensor, weight: Tensor, ids: Tensor, head: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss, and detached log-probabilities [B, T], NaN where none was needed."""
    beta = settings.beta if step.ref_logps is not None else 0.0
    matrix = settings.loss_type == "luspo" and (settings.importance_sampling_level == "token" or beta)
    sequence_kl = beta and settings.use_bias_correction_kl and settings.importance_sampling_level == "sequence"
    if not matrix and not sequence_kl:
        found = linear_policy_loss(
            hidden, weight, ids, num_items=step.num_items, **_policy_arguments(settings, step, beta), **head
        )
        return found.loss, found.logps
    if settings.loss_type == "luspo":
        vocabulary = (ids >= 0) & (ids < len(weight))
        remedy = "luspo counts padding, as in Liger; pad with a token"
        check_values("selected_token_ids", vocabulary.all(), f"ids from 0 to {len(weight) - 1}, masked or not", remedy)
    # LUSPO's padding and the KL at sequence level are no sum over live tokens: 4 passes instead of 3
    logps = linear_logps(hidden, weight, ids, mask=None if settings.loss_type == "luspo" else step.mask, **head).logps
    if settings.loss_type == "luspo" and settings.importance_sampling_level == "token":
        loss = _padded_luspo(settings, step, logps)
    else:
        arguments = _policy_arguments(settings, step, 0.0)
        loss = policy_loss(logps, num_items=step.num_items, **arguments).loss
    if beta:
        kl = _kl(settings, step, logps)
        loss = loss + beta * (_kl_weights(settings, step, kl.dtype) * kl).sum()
    return loss, logps.detach()


def _policy_arguments(settings: Settings, step: Step, beta: float) -> dict[str, Any]:
    """Keywords of `policy_loss` and `linear_policy_loss`."""
    objective, extras = settings.objective(beta), None
    if step.ratio is not None:
        objective, ratio = given_weight.with_given_weight(objective), step.ratio
        if settings.loss_type == "vespo":
            ratio = given_weight.vespo_weight(ratio)  # over all columns, masked ones too
        elif settings.loss_type == "luspo" and settings.importance_sampling_level == "sequence":
            ratio = ratio.reshape(len(ratio), -1).to(torch.float32).mean(1)  # over all columns
        extras = {given_weight.NAME: ratio}
    return {
        "objective": objective,
        "extras": extras,
        "advantages": step.advantages,
        "mask": step.mask,
        "old_logps": step.old_logps,
        "ref_logps": step.ref_logps if beta else None,
    }


def _padded_luspo(settings: Settings, step: Step, logps: Tensor) -> Tensor:
    """(1 / (B T)) sum over all columns of the token's loss times its sequence's length: padding counts."""
    arguments = _policy_arguments(settings, step, 0.0)
    arguments["objective"] = dataclasses.replace(arguments["objective"], reduction="token-sum")
    arguments["advantages"] = step.advantages * step.lengths
    return policy_loss(logps, **{**arguments, "mask": None}).loss / step.mask.numel()


def _log_weights(settings: Settings, step: Step, logps: Tensor) -> Tensor:
    """Logarithm of the ratio, [B, T], or [B, 1] at sequence level; attached, 0 where masked."""
    old = logps.detach() if step.old_logps is None else step.old_logps
    log_ratio = torch.where(step.mask, logps - old, 0.0)
    if settings.importance_sampling_level == "token":
        return log_ratio
    return log_ratio.sum(1, keepdim=True) / step.lengths.clamp_min(1)[:, None]


def _kl(settings: Settings, step: Step, logps: Tensor) -> Tensor:
    """[B, T] penalty, attached; 0 where masked, except for LUSPO, which counts padding."""
    assert step.ref_logps is not None
    everywhere = settings.loss_type == "luspo"
    # where masked the reference may hold anything, and 0 times infinity is no number
    ref_logps = step.ref_logps if everywhere else torch.where(step.mask, step.ref_logps, logps.detach())
    kl = k3(logps, ref_logps)
    if not settings.use_bias_correction_kl:
        return kl
    if everywhere and settings.importance_sampling_level == "token":
        return kl * (logps - (logps.detach() if step.old_logps is None else step.old_logps)).exp()
    return kl * _log_weights(settings, step, logps).exp()


def _kl_weights(settings: Settings, step: Step, dtype: torch.dtype) -> Tensor:
    """[B, T] what each token's KL counts in the loss."""
    if settings.loss_type == "luspo":
        return (step.lengths.to(dtype) / step.mask.numel())[:, None].expand(step.mask.shape)
    reduction, length = REDUCTIONS[settings.loss_type], settings.max_completion_length
    weights = sequence_weights(reduction, step.lengths, step.num_items, max_length=length, dtype=dtype)
    return torch.where(step.mask, weights[:, None], 0.0)


@torch.no_grad()
def metrics_of(settings: Settings, step: Step, logps: Tensor) -> tuple[Tensor, ...]:
    """(mean KL over live tokens where beta != 0, fraction of live tokens that are clipped)."""
    count = step.mask.sum().clamp_min(1)
    found = []
    if settings.beta:
        kl = logps.new_zeros(step.mask.shape) if step.ref_logps is None else _kl(settings, step, logps)
        found.append(torch.where(step.mask, kl, 0.0).sum() / count)
    ratio, rising = _log_weights(settings, step, logps).exp(), step.advantages[:, None] > 0
    if settings.loss_type == "cispo":
        clipped = (ratio > settings.epsilon_high) & rising
    elif settings.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        below = (ratio < 1 - settings.epsilon_low) & (step.advantages[:, None] < 0)
        clipped = below | ((ratio > 1 + settings.epsilon_high) & rising)
    return (*found, (clipped & step.mask).sum() / count)
