"""Policy losses on log-probabilities that are already in hand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from repo_ops import arguments
from repo_ops.head.inputs import exact_dtype
from repo_ops.loss_inputs import ObjectiveLike, PolicyLoss, loss_inputs
from repo_ops.objectives import as_objective
from repo_ops.reduce import NumItemsLike
from repo_ops.step_loss import loss_metrics, step_loss


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    *,
    objective: ObjectiveLike = "grpo",
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    entropy: Tensor | None = None,
    off_policy: Tensor | None = None,
    off_policy_coef: float = 1.0,
    num_items: NumItemsLike | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """The loss of `objective` for log-probabilities [B, T] or packed [N]; gradients flow to `logps` and `entropy`.

    Args: as in `linear_policy_loss`; `entropy` in the shape of logps for objectives with an entropy bonus.
    Raises:
        TypeError, ValueError: shapes, dtypes or values disagree; the message names the argument.
    """
    chosen = as_objective(objective)
    if not isinstance(logps, Tensor):
        raise TypeError(f"logps: expected a tensor, got {type(logps).__name__}")
    arguments.check_float("logps", logps)
    where = arguments.layout(logps, mask, cu_seqlens, name="logps")
    inputs = loss_inputs(
        chosen,
        where,
        advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampler_logps=sampler_logps,
        extras=extras,
        off_policy=off_policy,
        off_policy_coef=off_policy_coef,
        num_items=num_items,
        drop_zero_advantage=False,
        dtype=exact_dtype(logps),
    )
    live = where.take(logps)
    arguments.check_values(
        "logps", ~live.isnan().any(), "numbers where mask is 1, got NaN", "look at the model's output"
    )
    live_entropy = None
    if entropy is not None:
        arguments.check_shape("entropy", entropy, logps.shape, "logps")
        live_entropy = where.take(entropy)
    elif "entropy" in chosen.reads:
        raise ValueError("entropy: expected a tensor, which this objective reads, got None")
    tokens = inputs.tokens(live, live_entropy, slice(None), inputs.lengths)
    loss = step_loss(chosen, tokens, inputs.weights)
    loss = loss if inputs.constant is None else loss + inputs.constant
    detached = where.put(live.detach())
    return PolicyLoss(loss, detached, None if entropy is None else entropy.detach(), loss_metrics(chosen, tokens))
