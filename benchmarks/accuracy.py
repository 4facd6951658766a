"""How far a method is from float64: loss, log-probabilities, and both gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repo_ops.benchmarks.inputs import Inputs
from repo_ops.benchmarks.methods import Step, grpo_loss

__all__ = ["Errors", "Truth", "errors", "truth"]

_CHUNK_BYTES = 1 << 28
_ROWS = 256
_ENTRIES = 4096

LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2), "float16": (1e-2, 2e-2)}
"""(loss, gradients) beyond which a method did other work than the rest; the printed errors are the finer instrument."""


@dataclass(frozen=True, eq=False)
class Truth:
    """float64 results from the very inputs, rounded as they are. Gradients of some rows and vocabulary entries only:
    that costs one float64 pass instead of three."""

    loss: float
    logps: Tensor  # [B, T] float64
    rows: Tensor  # indices of hidden rows
    dhidden: Tensor  # [rows, D]
    entries: Tensor  # indices of vocabulary entries
    dweight: Tensor | None  # [entries, D]


@dataclass(frozen=True)
class Errors:
    """Distances from float64. None: the method does not give that number."""

    loss: float | None
    """|loss - truth| / max(1, |truth|)."""
    logp: float | None
    """Largest |logp - truth| over live rows, in nats."""
    dhidden: float | None
    """|dH - truth| / |truth| (Frobenius)."""
    dweight: float | None

    def too_large(self, dtype: str) -> list[str]:
        """Which of them exceed the limits of `dtype`; NaN does."""
        loss, gradient = LIMITS[dtype]
        limits = {"loss": loss, "dhidden": gradient, "dweight": gradient}
        values = {name: getattr(self, name) for name in limits}
        return [f"{name} {v:.1e}" for name, v in values.items() if v is not None and not v <= limits[name]]


@torch.no_grad()
def truth(inputs: Inputs) -> Truth:
    """The loss and its gradients in float64, a chunk of rows at a time."""
    hidden = inputs.hidden.detach().flatten(0, 1).double()
    weight = inputs.weight.detach().double()
    targets = inputs.targets.flatten()
    chunk = max(1, _CHUNK_BYTES // (8 * len(weight)))
    spans = [slice(start, min(start + chunk, len(hidden))) for start in range(0, len(hidden), chunk)]
    logps, log_z = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
    entropy = hidden.new_zeros(len(hidden))
    for span in spans:
        logits = hidden[span] @ weight.T
        log_z[span] = logits.logsumexp(-1)
        logps[span] = logits.gather(1, targets[span, None])[:, 0] - log_z[span]
        if inputs.case.entropy:
            logits -= log_z[span, None]
            entropy[span] = -(logits.exp() * logits).sum(-1)
    loss, dlogps, dentropy = _coefficients(inputs, logps, entropy)
    rows = torch.linspace(0, len(hidden) - 1, min(_ROWS, len(hidden)), device=hidden.device).long()
    spread = torch.linspace(0, len(weight) - 1, min(_ENTRIES, len(weight)), device=hidden.device).long()
    entries = torch.cat([spread, targets]).unique()[: 2 * _ENTRIES]

    def dlogits(which: Tensor, columns: Tensor | slice) -> Tensor:
        log_p = hidden[which] @ weight[columns].T - log_z[which, None]
        p = log_p.exp()
        column = torch.arange(len(weight), device=hidden.device)[columns]
        one_hot = (targets[which, None] == column).double()
        return dlogps[which, None] * (one_hot - p) - dentropy[which, None] * p * (log_p + entropy[which, None])

    dhidden = torch.cat([dlogits(part, slice(None)) @ weight for part in rows.split(chunk)])
    dweight = None
    if inputs.weight.requires_grad:
        everything = torch.arange(len(hidden), device=hidden.device)
        dweight = hidden.new_zeros(len(entries), hidden.shape[1])
        for part in everything.split(chunk):
            dweight += dlogits(part, entries).T @ hidden[part]
    return Truth(loss, logps.view(inputs.targets.shape), rows, dhidden, entries, dweight)


def _coefficients(inputs: Inputs, logps: Tensor, entropy: Tensor) -> tuple[float, Tensor, Tensor]:
    """loss, d loss / d logps [N], d loss / d entropy [N]."""
    with torch.enable_grad():
        leaves = [x.view(inputs.targets.shape).clone().requires_grad_() for x in (logps, entropy)]
        loss = grpo_loss(leaves[0], inputs, leaves[1] if inputs.case.entropy else None)
        dlogps, dentropy = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.item(), dlogps.flatten(), torch.zeros_like(entropy) if dentropy is None else dentropy.flatten()


def errors(step: Step, inputs: Inputs, exact: Truth) -> Errors:
    """The errors of a step whose backward has run."""
    logp = None
    if step.logps is not None:
        live = (inputs.mask > 0) & ~step.logps.isnan()  # NaN: a row left out because its advantage is 0
        logp = (step.logps.double() - exact.logps)[live].abs().max().item()
    assert inputs.hidden.grad is not None
    dhidden = _relative(inputs.hidden.grad.flatten(0, 1)[exact.rows], exact.dhidden)
    dweight = None
    if exact.dweight is not None:
        assert inputs.weight.grad is not None
        dweight = _relative(inputs.weight.grad[exact.entries], exact.dweight)
    loss = None if step.loss is None else abs(step.loss.item() - exact.loss) / max(1.0, abs(exact.loss))
    return Errors(loss, logp, dhidden, dweight)


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
