"""Any objective in place of OpenRLHF's PolicyLoss.

    from repo_ops.integrations.openrlhf import PolicyLoss
    self.actor_loss_fn = PolicyLoss(get_objective("gspo"))  # in ppo_actor.py, where openrlhf.models.PolicyLoss is made

Who divides: this loss, by the counts of the global batch that OpenRLHF passes, times dp_size, because the mean that
the ranks take of gradients divides by it again. KL and entropy terms are added by the actor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from repo_ops.integrations.means import means
from repo_ops.objectives import Objective
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import NumItems, counts_tokens


class ActorLoss(NamedTuple):
    """What the actor unpacks."""

    loss: Tensor
    clip_ratio: Tensor
    ppo_kl: Tensor
    vllm_kl: Tensor | None


class PolicyLoss(nn.Module):
    """OpenRLHF's actor loss with `objective`, averaged as that objective is.

    Raises:
        ValueError: the objective has a KL or entropy term, or reads more than log-probabilities of the sampler.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective: expected an objective, got {objective!r}; get_objective(name) makes one of a name"
            )
        if objective.beta or objective.entropy_coef:
            raise ValueError("objective: expected beta = entropy_coef = 0, as OpenRLHF's actor adds both terms itself")
        if unknown := sorted(objective.reads - {"old_logps", "sampler_logps"}):
            raise ValueError(f"objective: reads {', '.join(unknown)}, which OpenRLHF does not hand to its loss")
        self.objective = objective

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> ActorLoss:
        """(loss, fraction clipped, mean of old - current, mean of sampler - old or None); tensors are [B, A].

        Raises:
            ValueError: dp_size > 1 without the count of the global batch that the objective divides by.
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        needed, name = batch_num_tokens, "batch_num_tokens"
        if not counts_tokens(self.objective.reduction):
            needed, name = global_batch_size, "global_batch_size"
        if dp_size > 1 and needed is None:
            raise ValueError(f"{name}: expected the global batch's count with dp_size = {dp_size}, got None")
        found = policy_loss(
            log_probs,
            advantages,
            objective=self.objective,
            mask=mask,
            old_logps=old_log_probs,
            sampler_logps=rollout_log_probs if "sampler_logps" in self.objective.reads else None,
            num_items=NumItems(
                len(mask) if global_batch_size is None else global_batch_size,
                mask.sum() if batch_num_tokens is None else batch_num_tokens,
            ),
        )
        values = means(found.metrics)
        clipped = [value for name, value in values.items() if name in ("clip_low", "clip_high", "capped_high")]
        sampled = None if rollout_log_probs is None else _mean(rollout_log_probs - old_log_probs, mask)
        return ActorLoss(
            dp_size * found.loss,
            sum(clipped, found.loss.new_zeros(())).detach(),
            _mean(old_log_probs - log_probs, mask),
            sampled,
        )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).detach().sum() / mask.sum().clamp_min(1)
