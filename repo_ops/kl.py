"""How drift from the reference policy is penalised: per-token estimators of KL(policy || reference).

With x = ref_logps - logps. Source: http://joschu.net/blog/kl-approx.html for k1, k2, k3; arXiv 2402.03300 uses k3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """-x: unbiased value, may be negative; its gradient is 1 whatever the reference."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """x^2 / 2; gradient -x, the gradient of the true KL on-policy."""
    return (ref_logps - logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """exp(x) - x - 1, never negative; gradient 1 - exp(x)."""
    x = ref_logps - logps
    return torch.expm1(x) - x


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
