"""How drift from the reference policy is penalised: per-token estimators of KL(policy || reference).

With x = ref_logps - logps. Source: http://joschu.net/blog/kl-approx.html for k1, k2, k3; arXiv 2402.03300 uses k3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repo_ops.terms.bounded_exp import LIMIT, bounded_exp
from repo_ops.tokens import Tokens


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """-x: unbiased value, may be negative; its gradient is 1 whatever the reference."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """x^2 / 2; gradient -x, the gradient of the true KL on-policy."""
    return (ref_logps - logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """exp(x) - x - 1, never negative; gradient 1 - exp(x). Beyond x = 70 the exponential counts as exp(70)."""
    x = ref_logps - logps
    excess = (x - LIMIT).clamp_min(0.0).detach()
    return torch.expm1(x - excess) - x


def absolute(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """|x|; gradient -sign(x), 0 at x = 0."""
    return (ref_logps - logps).abs()


def k3_plus(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2 (straight-through)."""
    gradient = k2(logps, ref_logps)
    return gradient + (k3(logps, ref_logps) - gradient).detach()


def unbiased(logps: Tensor, ref_logps: Tensor, old_logps: Tensor) -> Tensor:
    """r k3 with r = exp(logps - old_logps) attached; gradient -r x, unbiased where tokens come from the old policy.

    Source: DeepSeek-V3.2, arXiv 2512.02556; TRL's `use_bias_correction_kl`.
    """
    return bounded_exp(logps - old_logps, LIMIT / 2) * k3(logps, ref_logps)


def _of_two(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tokens], Tensor]:
    def penalty(tokens: Tokens) -> Tensor:
        assert tokens.ref_logps is not None
        return estimator(tokens.logps, tokens.ref_logps)

    return penalty


def _unbiased(tokens: Tokens) -> Tensor:
    assert tokens.ref_logps is not None
    return unbiased(tokens.logps, tokens.ref_logps, tokens.old_logps)


KL: dict[str, Callable[[Tokens], Tensor]] = {
    "k1": _of_two(k1),
    "k2": _of_two(k2),
    "k3": _of_two(k3),
    "abs": _of_two(absolute),
    "k3_plus": _of_two(k3_plus),
    "unbiased": _unbiased,
}
"""Estimators by name, [N] of Tokens, attached to tokens.logps."""
