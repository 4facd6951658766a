"""What every objective shares: scope, how tokens are averaged, how drift is penalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from repo_ops.kl import KL
from repo_ops.metrics import Metrics, extreme, stat
from repo_ops.reduce import REDUCTIONS, ROW_NORMS
from repo_ops.tokens import Tokens

Scope = Literal["token", "sequence", "batch"]
SCOPES = ("token", "sequence", "batch")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A per-token policy loss and the settings that all objectives have in common.

    A subclass states `__call__(tokens) -> [N]` per-token losses, unreduced, and declares below what it reads.
    """

    scope: ClassVar[Scope] = "token"
    """"token": a token's coefficient d loss / d logp needs that token only, so its gradient is formed in one sweep over
    the vocabulary. "sequence": needs its whole sequence. "batch": needs every token of the micro-batch."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Arguments that must be given, of old_logps, ref_logps, sampler_logps, entropy."""

    zero_at_zero_advantage: ClassVar[bool] = False
    """Whether a token with advantage 0 has loss 0 and gradient 0 whatever else it holds; such tokens are skipped."""

    reduction: str = "token-mean"
    """How tokens are averaged: a key of repo_ops.reduce.REDUCTIONS."""

    max_length: int | None = None
    """The constant length of reductions "const" and "const-nobatch": the generation budget, in tokens."""

    beta: float = 0.0
    """Weight of the KL penalty to the reference policy; 0 (most recent recipes), 0.001 (R1), 0.04 (DeepSeekMath)."""

    kl: str = "k3"
    """Estimator of that KL: k1, k2 or k3. Replayed tokens never get a KL term."""

    kl_reduction: str | None = None
    """How the KL is averaged over on-policy tokens; None: like the loss."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus -entropy_coef * H on on-policy tokens, averaged like the loss; usually 0 to 0.01."""

    row_norm: str = "paper"
    """With replayed rows: "paper" divides on- and off-policy parts by their own number of sequences; "official_code"
    divides both by all sequences together."""

    def __post_init__(self) -> None:
        choices = {"reduction": tuple(REDUCTIONS), "kl": tuple(KL), "row_norm": ROW_NORMS}
        if self.kl_reduction is not None:
            choices["kl_reduction"] = tuple(REDUCTIONS)
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("beta", "entropy_coef"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field}: expected a finite number >= 0, got {getattr(self, field)}")
        if self.max_length is not None and not self.max_length > 0:
            raise ValueError(f"max_length: expected tokens > 0, got {self.max_length}")
        if self.max_length is None and any((r or "").startswith("const") for r in (self.reduction, self.kl_reduction)):
            raise ValueError(f"max_length: expected the generation budget for reduction {self.reduction!r}, got None")

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N] per-token loss, unreduced, attached to tokens.logps."""
        raise NotImplementedError

    def metrics(self, tokens: Tokens) -> Metrics:
        """Detached sums and counts over the given tokens; subclasses add their own."""
        log_ratio = tokens.log_ratio.detach()
        ratio = log_ratio.exp()
        groups: dict[str, Tensor | None] = {"": None}
        if tokens.off_policy is not None:
            groups = {"": ~tokens.off_policy, "off_policy/": tokens.off_policy}
        found: Metrics = {}
        for prefix, where in groups.items():
            found[f"{prefix}ratio"] = stat(ratio, where)
            found[f"{prefix}ratio_squared"] = stat(ratio.square(), where)
            found[f"{prefix}ratio_max"] = extreme(ratio, "max", where)
            found[f"{prefix}ratio_min"] = extreme(ratio, "min", where)
            found[f"{prefix}approx_kl"] = stat(torch.expm1(log_ratio) - log_ratio, where)
            for name, gate in self.gates(tokens).items():
                found[f"{prefix}{name}"] = stat(gate, where)
        return found

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        """Named [N] bool: tokens whose gradient the objective switched off; reported as fractions."""
        return {}


def check_width(name: str, value: float | None, *, low: bool = False) -> None:
    """Refuse a clip width that is negative or, below 1, wider than 1 (a ratio cannot be negative)."""
    if value is None:
        return
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a width >= 0 around ratio 1 (0.2 clips at 0.8 or 1.2), got {value}")
    if low and value > 1:
        raise ValueError(f"{name}: expected a width <= 1 (a ratio is never below 0), got {value}")
