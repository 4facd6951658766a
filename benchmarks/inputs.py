"""The same GRPO step for every method: hidden states, head, targets, mask, advantages, old log-probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repo_ops.benchmarks.shapes import Shape

__all__ = ["EPS", "Case", "Inputs", "make_inputs"]

EPS = 0.2
"""Clip width of the GRPO loss, both sides."""
ENTROPY_COEF = 0.01
"""Weight of the entropy bonus in cases that have one."""
_ROWS_AT_A_TIME = 64

DeadKind = Literal["masked", "zero_advantage"]


@dataclass(frozen=True)
class Case:
    """One row of a benchmark's grid."""

    shape: Shape
    dtype: str = "float32"
    dead: float = 0.0
    """Share of rows that carry no gradient."""
    dead_kind: DeadKind = "masked"
    """"masked": sequences end early, at uneven lengths. "zero_advantage": whole sequences have advantage 0."""
    frozen: bool = False
    """Whether the head is frozen, as under LoRA."""
    entropy: bool = False
    """Whether the loss has an entropy bonus, with its gradient."""
    length: int = 64
    """T, tokens of a sequence."""
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [str(self.shape), self.dtype]
        if self.dead:
            kind = "masked" if self.dead_kind == "masked" else "of zero advantage"
            parts.append(f"{self.dead_share:.0%} {kind}")
        parts += ["frozen head"] * self.frozen + ["entropy bonus"] * self.entropy
        return ", ".join(parts)

    @property
    def dead_share(self) -> float:
        """`dead`, or as near to it as whole sequences come."""
        batch = self.shape.rows // min(self.length, self.shape.rows)
        return round(self.dead * batch) / batch if self.dead_kind == "zero_advantage" else self.dead

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Case:
        """The case that `to_dict` described."""
        return cls(**{**plain, "shape": Shape(**plain["shape"])})


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a method gets. Gradients arrive in hidden.grad and weight.grad."""

    case: Case
    hidden: Tensor  # [B, T, D], requires grad
    weight: Tensor  # [V, D], requires grad unless the head is frozen
    targets: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] float32
    advantages: Tensor  # [B] float32
    old_logps: Tensor  # [B, T] float32

    def clear(self) -> None:
        """Drop the gradients of the last step, as zero_grad(set_to_none=True) does."""
        self.hidden.grad = self.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are there now."""
        return sum(x.grad.nbytes for x in (self.hidden, self.weight) if x.grad is not None)


def make_inputs(case: Case, *, seed: int = 0) -> Inputs:
    """The inputs of `case`, the same for the same seed.

    Targets have probabilities from about e^-8 to nearly 1, as sampled tokens do. Log-ratios lie in +-0.1 for nine
    tokens in ten and at +-0.4 for the tenth (clipped where the advantage says so): far from the clip bounds, so that
    rounding cannot flip which tokens are clipped, and gradients stay comparable.

    Raises:
        ValueError: the rows do not make whole sequences.
    """
    shape, length = case.shape, min(case.length, case.shape.rows)
    if shape.rows % length:
        raise ValueError(f"length: expected a divisor of {shape.rows} rows, got {length}; choose another with --length")
    batch, dtype = shape.rows // length, getattr(torch, case.dtype)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.vocab, shape.hidden, generator=random).mul_(2 / shape.hidden**0.5).to(dtype)
    targets = torch.randint(0, shape.vocab, (batch, length), generator=random)
    pull = torch.rand(batch, length, 1, generator=random) * 10 + 5  # what it adds to the target's logit, |weight| = 2
    hidden = torch.randn(batch, length, shape.hidden, generator=random)
    hidden.addcmul_(pull / 4, weight[targets].float())
    hidden = hidden.to(dtype)
    mask, advantages = _live(case, batch, length, random)
    small = (torch.rand(batch, length, generator=random) - 0.5) * 0.2
    far = torch.where(torch.rand(batch, length, generator=random) < 0.5, -0.4, 0.4)
    log_ratio = torch.where(torch.rand(batch, length, generator=random) < 0.1, far, small)
    device = torch.device(case.device)
    hidden, weight, targets = hidden.to(device), weight.to(device), targets.to(device)
    old_logps = _logps(hidden.flatten(0, 1), weight, targets.flatten()).view(batch, length) - log_ratio.to(device)
    return Inputs(
        case,
        hidden.requires_grad_(),
        weight.requires_grad_(not case.frozen),
        targets,
        mask.to(device),
        advantages.to(device),
        old_logps,
    )


def _live(case: Case, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """mask [B, T] and advantages [B]; the share of dead rows is the case's as closely as whole sequences allow."""
    mask, advantages = torch.ones(batch, length), torch.randn(batch, generator=random)
    if case.dead_kind == "zero_advantage":
        advantages[torch.randperm(batch, generator=random)[: round(case.dead_share * batch)]] = 0.0
    elif case.dead:
        keep = torch.rand(batch, generator=random) + 0.1  # uneven lengths, each at least 1, with the wanted sum
        wanted = round((1 - case.dead) * batch * length)
        lengths = (keep / keep.sum() * wanted).long().clamp(1, length)
        while (missing := wanted - int(lengths.sum())) != 0:
            at = int(torch.randint(0, batch, (1,), generator=random))
            moved = int(lengths[at]) + (1 if missing > 0 else -1)
            lengths[at] = min(max(moved, 1), length)
        mask = (torch.arange(length) < lengths[:, None]).float()
    return mask, advantages


@torch.no_grad()
def _logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] float32 log-probabilities, by the plain formula, a few rows at a time."""
    wide, found = weight.float(), []
    for rows, wanted in zip(hidden.split(_ROWS_AT_A_TIME), targets.split(_ROWS_AT_A_TIME), strict=True):
        logits = rows.float() @ wide.T
        found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found)
