"""From an objective and log-probabilities to the scalar loss, and to what one token's logits must receive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from repo_ops.kl import KL
from repo_ops.metrics import Metrics, stat
from repo_ops.objectives.base import KernelTerms, Objective
from repo_ops.reduce import NumItems, NumItemsLike, counts_tokens, resolve_num_items, sequence_weights
from repo_ops.tokens import Tokens


@dataclass(frozen=True, eq=False)
class SequenceWeights:
    """What each token of sequence i counts in the step's loss, per term; [B]."""

    policy: Tensor
    on_policy: Tensor
    """Like `policy`, without replayed sequences: entropy bonus."""
    kl: Tensor

    @classmethod
    def of(
        cls,
        objective: Objective,
        lengths: Tensor,
        *,
        off_policy: Tensor | None,
        off_policy_coef: float,
        num_items: NumItemsLike | None,
        dtype: torch.dtype = torch.float32,
    ) -> SequenceWeights:
        """Weights of sequences with `lengths` [B] live tokens, `off_policy` [B] bool marking replayed ones."""
        kl_reduction = objective.kl_reduction or objective.reduction
        counted_apart = counts_tokens(kl_reduction) != counts_tokens(objective.reduction)
        if objective.beta and counted_apart and not (num_items is None or isinstance(num_items, NumItems)):
            raise ValueError(
                f"num_items: the KL is averaged by {kl_reduction!r}, the loss by {objective.reduction!r}, which divide "
                "by different counts; pass repo_ops.NumItems(sequences, tokens, ...)"
            )
        counts = resolve_num_items(num_items, lengths, off_policy, objective.reduction)

        def weights(reduction: str, coef: float) -> Tensor:
            return sequence_weights(
                reduction,
                lengths,
                counts,
                off_policy=off_policy,
                off_policy_coef=coef,
                row_norm=objective.row_norm,
                max_length=objective.max_length,
                dtype=dtype,
            )

        on_policy = weights(objective.reduction, 0.0) if off_policy is not None else None
        policy = weights(objective.reduction, off_policy_coef)
        kl = weights(kl_reduction, 0.0) if objective.beta else policy
        return cls(policy, policy if on_policy is None else on_policy, kl)

    def spread(self, owner: Tensor) -> TokenWeights:
        """Weights of tokens whose sequences are `owner` [N] int64."""
        return TokenWeights(self.policy[owner], self.on_policy[owner], self.kl[owner])


class TokenWeights(NamedTuple):
    """What each token counts in the step's loss, per term; [N]."""

    policy: Tensor
    on_policy: Tensor
    kl: Tensor

    def slice(self, rows: slice) -> TokenWeights:
        """The weights of some tokens."""
        return TokenWeights(*(weight[rows] for weight in self))


def step_loss(objective: Objective, tokens: Tokens, weights: TokenWeights) -> Tensor:
    """0-d: the tokens' share of the step's loss, attached to tokens.logps and tokens.entropy."""
    loss = _weighted_sum(weights.policy, policy_losses(objective, tokens))
    if objective.beta:
        # a replayed token has no KL, so its reference must not be able to overflow (0 * inf in the backward)
        assert tokens.ref_logps is not None
        ref_logps = torch.where(weights.kl != 0, tokens.ref_logps, tokens.logps.detach())
        loss = loss + objective.beta * _weighted_sum(weights.kl, KL[objective.kl](replace(tokens, ref_logps=ref_logps)))
    if objective.entropy_coef:
        assert tokens.entropy is not None
        loss = loss - objective.entropy_coef * _weighted_sum(weights.on_policy, tokens.entropy)
    return loss


def policy_losses(objective: Objective, tokens: Tokens) -> Tensor:
    """[N] per-token losses with the objective's modifiers, attached; 0 where a modifier is, even if they overflowed.

    A token without a finite sampler log-probability carries none where the objective reads them: that token only, and
    it stays in the denominators.
    """
    losses, factors = objective(tokens), _factors(objective, tokens)
    return losses if factors is None else torch.where(factors != 0, factors * losses, 0.0)


def _factors(objective: Objective, tokens: Tokens) -> Tensor | None:
    """[N] product of the objective's modifiers, detached; None where there are none."""
    factors = [modifier(tokens) for modifier in objective.modifiers]
    if tokens.sampler_known is not None and "sampler_logps" in objective.reads:
        factors.append(tokens.sampler_known.to(tokens.logps.dtype))
    product = None
    for factor in factors:
        product = factor if product is None else product * factor
    return product


class Coefficients(NamedTuple):
    """The loss of some tokens and its derivatives: all that the vocabulary axis needs to know of an objective."""

    loss: Tensor
    """0-d."""
    dlogps: Tensor
    """[N] d loss / d logps."""
    dentropy: Tensor | None
    """[N] d loss / d entropy, None where the loss does not read it."""


def coefficients(
    objective: Objective, tokens: Tokens, weights: TokenWeights, *, by_kernel: bool = False
) -> Coefficients:
    """The loss of `tokens` and its derivatives, by autograd over [N] numbers.

    With `by_kernel`, objectives of the clipped-ratio family take one launch of the Triton kernel instead.
    """
    terms = objective.kernel_terms
    if by_kernel and terms is not None and tokens.entropy is None:
        return _kernel_coefficients(objective, terms, tokens, weights)
    with torch.enable_grad():
        logps = tokens.logps.detach().requires_grad_()
        entropy = None if tokens.entropy is None else tokens.entropy.detach().requires_grad_()
        loss = step_loss(objective, tokens.with_logps(logps, entropy), weights)
        if not loss.requires_grad:  # an objective that ignores logps altogether
            return Coefficients(loss, torch.zeros_like(logps), None)
        wanted = [logps] if entropy is None else [logps, entropy]
        dlogps, *dentropy = torch.autograd.grad(loss, wanted, allow_unused=True)
    return Coefficients(
        loss.detach(),
        torch.zeros_like(logps) if dlogps is None else dlogps,
        dentropy[0] if dentropy else None,
    )


def _kernel_coefficients(
    objective: Objective, terms: KernelTerms, tokens: Tokens, weights: TokenWeights
) -> Coefficients:
    from repo_ops.kernels.clipped_ratio import clipped_ratio

    cu_seqlens = None if tokens.lengths is None else torch.nn.functional.pad(tokens.lengths.cumsum(0), (1, 0))
    found = clipped_ratio(
        tokens.logps.detach(),
        tokens.advantages,
        old_logps=tokens.old_logps,
        low=terms.low,
        high=terms.high,
        level=terms.level,
        cu_seqlens=cu_seqlens,
        delta=terms.delta,
        ref_logps=tokens.ref_logps if objective.beta else None,
        kl=terms.kl,
        beta=objective.beta,
        weights=weights.policy,
        kl_weights=weights.kl if objective.beta else None,
        correction=_factors(objective, tokens),
    )
    return Coefficients(found.loss.sum(), found.dlogps, None)


def loss_metrics(objective: Objective, tokens: Tokens) -> Metrics:
    """What practitioners watch, over the live tokens: sums and counts, detached."""
    with torch.no_grad():
        tokens = replace(tokens, logps=tokens.logps.detach())
        found = objective.metrics(tokens)
        on_policy = None if tokens.off_policy is None else ~tokens.off_policy
        if tokens.ref_logps is not None:
            found["kl"] = stat(KL[objective.kl](tokens), on_policy)
        if tokens.entropy is not None:
            found["entropy"] = stat(tokens.entropy, on_policy)
        if tokens.sampler_logps is not None:
            gap = tokens.old_logps - tokens.sampler_logps
            found["sampler_ratio"] = stat(gap.exp(), tokens.sampler_known)
            found["sampler_gap_abs"] = stat(gap.abs(), tokens.sampler_known)
        if tokens.sampler_known is not None:
            found["sampler_unknown"] = stat(~tokens.sampler_known)
        return found


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"objective: expected per-token losses as a tensor, got {type(values).__name__}")
    if values.shape != weights.shape:
        raise ValueError(
            f"objective: expected a per-token loss of shape {list(weights.shape)}, got {list(values.shape)}; "
            "return unreduced losses"
        )
    # a weight of 0 takes the token out of the loss even if its value overflowed
    return torch.where(weights != 0, weights * values, 0.0).sum()
