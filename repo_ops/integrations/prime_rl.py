"""Any objective as prime-rl's custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "repo_ops.integrations.prime_rl.loss"

    [trainer.loss.kwargs]
    objective = "cispo"
    eps_high = 4.0

Who divides: prime-rl, by the tokens of the whole step, and it undoes the mean that FSDP takes over ranks. The function
sees one sequence and returns a sum over its tokens, so every objective is averaged over tokens here.
"""

from __future__ import annotations

from typing import Any

import torch

from repo_ops.integrations.given_weight import NAME, with_given_weight
from repo_ops.integrations.means import means
from repo_ops.objectives import get_objective
from repo_ops.policy_loss import policy_loss


def loss(inputs: Any, *, objective: str = "dppo_prime_rl", **hyper: Any) -> Any:
    """prime-rl's LossOutputs(loss, metrics) of one sequence: a sum over its tokens, and means over them.

    The engine's log-probabilities are the old ones of the ratio (the policy that sampled), reference log-probabilities
    are read where beta > 0 or the objective needs them, and `loss_weights` multiply each token's loss.

    Args:
        inputs: LossInputs with 1-D trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask and
            loss_weights. objective, hyper: as in `get_objective`.
    Raises:
        ImportError: prime-rl is missing. ValueError: the objective reads what prime-rl does not give (entropies), or a
            reduction is asked for.
    """
    try:
        from prime_rl.trainer.rl.loss import LossOutputs
    except ImportError as error:
        raise ImportError(f"prime-rl is needed for its LossOutputs; install prime-rl ({error})") from error
    for name in ("reduction", "kl_reduction"):
        if name in hyper:
            raise ValueError(f"{name}: expected none, got {hyper[name]!r}; prime-rl divides by the tokens of the step")
    chosen = get_objective(objective, **hyper, reduction="token-sum", kl_reduction=None)
    logps, extras = inputs.trainer_logprobs, None
    if inputs.loss_weights is not None:
        if chosen.beta:
            raise ValueError("loss_weights: expected None with beta > 0, got weights, which would miss the KL term")
        chosen, extras = with_given_weight(chosen), {NAME: inputs.loss_weights}
    found = policy_loss(
        logps,
        inputs.advantages,
        objective=chosen,
        mask=inputs.loss_mask,
        old_logps=inputs.inference_logprobs,
        ref_logps=inputs.ref_logprobs if "ref_logps" in chosen.reads else None,
        extras=extras,
        cu_seqlens=torch.tensor([0, len(logps)], device=logps.device),
    )
    return LossOutputs(loss=found.loss, metrics=means(found.metrics))
