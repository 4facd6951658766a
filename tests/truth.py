"""The float64 truth: every formula written out plainly, sequence by sequence, for tests to compare the library with.

Nothing here is taken from the library: settings are passed as papers state them, and gradients come from autograd over
full logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# What each name stands for, from its paper; a test that passes no setting compares the library's defaults with these.
PUBLISHED: dict[str, dict[str, Any]] = {
    "grpo": {"surrogate": "clip", "reduction": "seq-mean-token-mean", "eps_low": 0.2, "eps_high": 0.2},
    "dr_grpo": {"surrogate": "clip", "reduction": "const", "eps_low": 0.2, "eps_high": 0.2},
    "dapo": {"surrogate": "clip", "reduction": "token-mean", "eps_low": 0.2, "eps_high": 0.28},
    "bnpo_loss_type": {"surrogate": "clip", "reduction": "token-mean", "eps_low": 0.2, "eps_high": 0.2},
    "cispo": {"surrogate": "cispo", "reduction": "token-mean", "eps_low": 1.0, "eps_high": 4.0},
    "gspo": {"surrogate": "gspo", "reduction": "seq-mean-token-mean", "eps_low": 3e-4, "eps_high": 4e-4},
    "repo": {
        "surrogate": "clip", "reduction": "seq-mean-token-mean", "eps_low": 0.2, "eps_high": 0.2,
        "kl_reduction": "token-mean",
    },
}  # fmt: skip


def scores(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[..., V] logits as the model defines them, divided by the temperature (a number, [B] or per token)."""
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        x = x + bias.double()
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().reshape(*temperature.shape, *[1] * (x.ndim - temperature.ndim))
    return x / temperature


def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy), both in the shape of targets."""
    log_p = scores(hidden, weight, **head).log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return log_p.gather(-1, targets.long()[..., None])[..., 0], entropy


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    *,
    objective: str = "grpo",
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    off_policy: Tensor | None = None,
    off_policy_coef: float = 1.0,
    counts: tuple[float, float, float, float] | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    max_length: int | None = None,
    row_norm: str = "paper",
    **settings: Any,
) -> Tensor:
    """The scalar loss of `objective` for [B, T] log-probabilities; inputs in any precision, arithmetic in float64.

    counts: (sequences, tokens, replayed sequences, replayed tokens) of the whole step; None: those of this call.
    """
    published = {**PUBLISHED[objective], **settings}
    surrogate, reduction = published["surrogate"], published["reduction"]
    kl_reduction = published.get("kl_reduction") or reduction
    B, T = logps.shape
    live = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    replayed = [False] * B if off_policy is None else off_policy.tolist()
    losses, drifts, entropies = [], [], []
    for i in range(B):
        m = live[i]
        logp = logps[i].double()[m]
        old = logp.detach() if old_logps is None else old_logps[i].double()[m]
        A = advantages[i].double().expand(T)[m] if advantages.ndim == 1 else advantages[i].double()[m]
        losses.append(_surrogate(surrogate, logp, old, A, published["eps_low"], published["eps_high"], delta))
        if beta:
            drifts.append(_drift(kl, ref_logps[i].double()[m] - logp))
        if entropy_coef:
            entropies.append(entropy[i].double()[m])
    if counts is None:
        lengths = live.sum(1).tolist()
        counts = (
            sum(not r for r in replayed), sum(n for n, r in zip(lengths, replayed) if not r),
            sum(replayed), sum(n for n, r in zip(lengths, replayed) if r),
        )  # fmt: skip
    parts = {"counts": counts, "max_length": max_length, "row_norm": row_norm, "replayed": replayed}
    total = _reduced(losses, reduction, kind=False, **parts) + off_policy_coef * _reduced(
        losses, reduction, kind=True, **parts
    )
    if beta:
        total = total + beta * _reduced(drifts, kl_reduction, kind=False, **parts)
    if entropy_coef:
        total = total - entropy_coef * _reduced(entropies, reduction, kind=False, **parts)
    return total + 0.0 * logps.double().sum()


def _surrogate(
    name: str, logp: Tensor, old: Tensor, A: Tensor, eps_low: float, eps_high: float, delta: float | None
) -> Tensor:
    ratio = (logp - old).exp()
    if name == "gspo":
        ratio = (logp - old).mean().exp().expand_as(logp) if len(logp) else ratio
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    if name == "cispo":
        return -clipped.detach() * A * logp
    loss = -torch.minimum(ratio * A, clipped * A)
    return loss if delta is None else torch.where(A < 0, torch.minimum(loss, -delta * A), loss)


def _drift(kl: str, x: Tensor) -> Tensor:
    return {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x}[kl]


def _reduced(
    values: list[Tensor],
    reduction: str,
    *,
    kind: bool,
    counts: tuple[float, float, float, float],
    max_length: int | None,
    row_norm: str,
    replayed: list[bool],
) -> Tensor:
    """The reduction of one kind of sequence, fresh (False) or replayed (True)."""
    rows = [v for v, r in zip(values, replayed) if r == kind]
    sequences, tokens = (counts[2], counts[3]) if kind else (counts[0], counts[1])
    if row_norm == "official_code":
        sequences = counts[0] + counts[2]
    sequences, tokens = max(sequences, 1), max(tokens, 1)
    zero = torch.zeros((), dtype=torch.float64)
    total = sum((row.sum() for row in rows), zero)
    if reduction == "seq-mean-token-mean":
        return sum((row.mean() for row in rows if len(row)), zero) / sequences
    divisor = {
        "token-mean": tokens,
        "seq-mean-token-sum": sequences,
        "const": sequences * (max_length or math.nan),
        "const-nobatch": max_length or math.nan,
        "token-sum": 1.0,
    }
    return total / divisor[reduction]


@dataclass
class Case:
    """Inputs of one call and their float64 truth."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    off_policy: Tensor | None = None
    head: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh float64 leaves of what can need a gradient, from the same rounded values; 0 for junk under a mask."""
        hidden = self.hidden.detach().double()
        if self.mask is not None:
            hidden = torch.where(self.mask[..., None], hidden, 0.0)
        given = {"hidden": hidden, "weight": self.weight, "bias": self.bias}
        return {k: v.detach().double().requires_grad_() for k, v in given.items() if v is not None}

    def loss(self, **objective: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(loss, logps, entropy, gradients by name) of `policy_loss` over the head."""
        leaves = self.leaves()
        logps, entropy = token_stats(targets=self.targets.clamp_min(0), **leaves, **self.head)
        value = policy_loss(
            logps, self.advantages, mask=self.mask, old_logps=self.old_logps, ref_logps=self.ref_logps,
            entropy=entropy, off_policy=self.off_policy, **objective,
        )  # fmt: skip
        grads = torch.autograd.grad(value, list(leaves.values()))
        return value.detach(), logps.detach(), entropy.detach(), dict(zip(leaves, grads))

    def stats(self, dlogps: Tensor, dentropy: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(logps, entropy, gradients by name of sum(dlogps * logps + dentropy * entropy)) over live tokens."""
        leaves = self.leaves()
        logps, entropy = token_stats(targets=self.targets.clamp_min(0), **leaves, **self.head)
        live = torch.ones_like(logps) if self.mask is None else self.mask.double()
        value = ((dlogps.double() * logps + dentropy.double() * entropy) * live).sum()
        grads = torch.autograd.grad(value, list(leaves.values()))
        return (logps * live).detach(), (entropy * live).detach(), dict(zip(leaves, grads))


def make_case(
    B: int,
    T: int,
    D: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    lengths: list[int] | None = None,
    replayed: int = 0,
    spread: float = 3.0,
    seed: int = 0,
    **head: Any,
) -> Case:
    """Random inputs whose logits have standard deviation `spread`; junk where `lengths` masks.

    Old log-probabilities lie at ratios e^{-0.6, -0.1, 0.05, 0.5}: on both sides of every usual clip bound and far from
    all of them, so that rounding cannot flip a clip. The last `replayed` sequences are off-policy. Ids at both ends
    occur.
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, generator=g, dtype=torch.float64) * spread / math.sqrt(D)).to(weight_dtype or dtype)
    b = torch.randn(V, generator=g, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, V, (B, T), generator=g)
    if targets.numel() > 1:
        targets.view(-1)[0], targets.view(-1)[-1] = V - 1, 0
    advantages = torch.randn(B, generator=g)
    logps, _ = token_stats(hidden, weight, targets, bias=b, **head)
    steps = torch.tensor([-0.6, -0.1, 0.05, 0.5], dtype=torch.float64)
    old = logps - steps[torch.randint(0, 4, (B, T), generator=g)]
    ref = logps + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)
    case = Case(hidden, weight, targets, advantages, b, None, old.float(), ref.float(), head=head)
    if dtype == torch.float64:
        case.old_logps, case.ref_logps = old, ref
    if lengths is not None:
        case.mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
        case.hidden = torch.where(case.mask[..., None], case.hidden, float("nan"))
        case.targets = torch.where(case.mask, case.targets, -100)
        case.old_logps = torch.where(case.mask, case.old_logps, float("nan"))
        case.ref_logps = torch.where(case.mask, case.ref_logps, float("nan"))
    if replayed:
        case.off_policy = torch.arange(B) >= B - replayed
    return case


def leaf(tensor: Tensor | None, wanted: bool = True) -> Tensor | None:
    """A copy with the same strides that collects its own gradient, if wanted."""
    return None if tensor is None else tensor.detach().clone().requires_grad_(wanted)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the plain norm where the truth is 0."""
    size = truth.double().norm().item()
    return (found.double() - truth.double()).norm().item() / (size or 1.0)
