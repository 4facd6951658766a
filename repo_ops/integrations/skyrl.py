"""Any objective as a SkyRL policy loss.

    from repo_ops.integrations.skyrl import skyrl_loss
    PolicyLossRegistry.register("repo_ops/gspo", skyrl_loss(get_objective("gspo")))  # skyrl's registry, before it syncs

Who divides: SkyRL, before the loss is called. Its `loss_reduction` is already a factor of the advantages, so the
function returns a sum over tokens, and the objective's loss has to be proportional to the advantages. `eps_clip_low`
and its kin are not read: the objective has its own settings. `off_policy_correction` is refused: `sampler_weight` of
the objective does that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from repo_ops.integrations.means import means
from repo_ops.integrations.proportional import is_proportional
from repo_ops.objectives import Objective
from repo_ops.policy_loss import policy_loss

CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)
"""What SkyRL's own losses read of its `off_policy_correction`; None where it is off."""


def skyrl_loss(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """f(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs) -> (masked sum, metrics).

    Raises:
        ValueError: the objective reads more than log-probabilities of the sampler, or its loss has a part that SkyRL's
            factor in the advantages would not reach: a KL or entropy term, a penalty or a threshold of its own. The
            function raises it where `config` asks for an off-policy correction.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an objective, got {objective!r}; get_objective(name) makes one of a name")
    if objective.beta or objective.entropy_coef:
        raise ValueError("objective: expected beta = entropy_coef = 0, as SkyRL adds both terms itself")
    if unknown := sorted(objective.reads - {"old_logps", "sampler_logps"}):
        raise ValueError(f"objective: reads {', '.join(unknown)}, which SkyRL does not hand to a policy loss")
    summed = dataclasses.replace(objective, reduction="token-sum")
    if not is_proportional(summed):
        raise ValueError(
            "objective: expected a loss proportional to the advantages, got that of "
            f"{type(objective).__module__.rpartition('.')[2]}; SkyRL has divided them by its token counts, and what "
            "does not scale with them would be as many times too large; choose an objective without such a part"
        )

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any = None,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        _refuse_correction(config)
        found = policy_loss(
            log_probs,
            advantages,
            objective=summed,
            mask=loss_mask,
            old_logps=old_log_probs,
            sampler_logps=rollout_logprobs if "sampler_logps" in summed.reads else None,
        )
        values = means(found.metrics)
        clipped = [value for name, value in values.items() if name in ("clip_low", "clip_high", "capped_high")]
        values["clip_ratio"] = sum(clipped, found.loss.new_zeros(()))
        numbers = torch.stack([value.to(torch.float32) for value in values.values()]).tolist()
        return found.loss, dict(zip(values, numbers, strict=True))

    return loss


def _refuse_correction(config: Any) -> None:
    correction = getattr(config, "off_policy_correction", None)
    read = correction.get if isinstance(correction, Mapping) else functools.partial(getattr, correction)
    for name in CORRECTIONS if correction is not None else ():
        if (value := read(name, None)) is not None:
            raise ValueError(
                f"off_policy_correction.{name}: expected None, got {value!r}, which this loss would not read; "
                "get_objective(..., sampler_weight='token_truncate', sampler_max=2.0) does such corrections"
            )
