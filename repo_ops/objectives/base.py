"""What every objective shares: scope, how tokens are averaged, how drift is penalised, which tokens count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import check_number
from repo_ops.kl import KL
from repo_ops.metrics import Metrics, extreme, stat
from repo_ops.reduce import REDUCTIONS, ROW_NORMS
from repo_ops.scope import SCOPES, Scope, widest
from repo_ops.terms.entropy import HighEntropy
from repo_ops.terms.modifier import Modifier
from repo_ops.terms.off_policy_mask import OffPolicyMask
from repo_ops.terms.sampler import MODES, SamplerWeight
from repo_ops.tokens import Tokens

__all__ = ["SCOPES", "Modifier", "Objective", "Scope", "check_choice", "check_positive", "check_width"]


class KernelTerms(NamedTuple):
    """An objective as the terms that the Triton kernel of clipped ratios knows."""

    level: Literal["token", "sequence", "prefix"]
    low: float
    high: float
    delta: float | None
    kl: Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A per-token policy loss and the settings that all objectives have in common.

    A subclass states `__call__(tokens) -> [N]` per-token losses, unreduced, and declares below what it reads.
    """

    scope: ClassVar[Scope] = "token"
    """"token": a token's coefficient d loss / d logp needs that token only, so its gradient is formed in one sweep over
    the vocabulary. "sequence": needs its whole sequence. "batch": needs every token of the micro-batch."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Arguments that must be given: old_logps, ref_logps, sampler_logps, entropy, or the name of an entry of extras."""

    zero_at_zero_advantage: ClassVar[bool] = False
    """Whether a token with advantage 0 has loss 0 and gradient 0 whatever else it holds; such tokens are skipped. It
    stands for the `__call__` of its own class: a subclass with another loss has to say it again."""

    one_loss_per_sequence: ClassVar[bool] = False
    """Whether a sequence's loss is one number that cannot be weighted token by token."""

    reduction: str = "token-mean"
    """How tokens are averaged: a key of repo_ops.reduce.REDUCTIONS."""

    max_length: int | None = None
    """The constant length of reductions "const" and "const-nobatch": the generation budget, in tokens."""

    beta: float = 0.0
    """Weight of the KL penalty to the reference policy; 0 (most recent recipes), 0.001 (R1), 0.04 (DeepSeekMath)."""

    kl: str = "k3"
    """Estimator of that KL: k1, k2, k3, abs, k3_plus or unbiased. Replayed tokens never get a KL term."""

    kl_reduction: str | None = None
    """How the KL is averaged over on-policy tokens; None: like the loss."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus -entropy_coef * H on on-policy tokens, averaged like the loss; usually 0 to 0.01."""

    row_norm: str = "paper"
    """With replayed rows: "paper" divides on- and off-policy parts by their own number of sequences; "official_code"
    divides both by all sequences together."""

    sampler_weight: str | None = None
    """Correction for the engine's own probabilities, exp(old_logps - sampler_logps): "token", "sequence" or
    "geometric", then "_truncate" (TIS: limit the weight) or "_mask" (MIS: drop what is outside). None: none."""

    sampler_min: float | None = None
    """Lower limit of that weight; None: no limit. 0.5 for masks."""

    sampler_max: float | None = None
    """Upper limit of that weight; None: no limit. 2 (verl), 3 (TRL)."""

    off_policy_mask: float | None = None
    """Drop sequences with A < 0 whose mean of sampler_logps - logps exceeds this (DeepSeek-V3.2); 0.5. None: none."""

    top_entropy_quantile: float | None = None
    """Only this fraction of tokens, those of highest entropy, carries the policy loss; 0.2. None: all of them."""

    process_group: dist.ProcessGroup | None = None
    """Ranks whose micro-batches together are the batch of statistics over a batch; None: this rank's own."""

    def __post_init__(self) -> None:
        check_choice(self, "reduction", REDUCTIONS)
        check_choice(self, "kl", KL)
        check_choice(self, "row_norm", ROW_NORMS)
        if self.kl_reduction is not None:
            check_choice(self, "kl_reduction", REDUCTIONS)
        check_positive(self, "beta", "entropy_coef", zero=True)
        if self.max_length is not None:
            check_number("max_length", self.max_length, "tokens > 0", above=0)
        if self.max_length is None and any((r or "").startswith("const") for r in (self.reduction, self.kl_reduction)):
            raise ValueError(f"max_length: expected the generation budget for reduction {self.reduction!r}, got None")
        self._check_modifiers()

    def _check_modifiers(self) -> None:
        if self.sampler_weight is not None:
            check_choice(self, "sampler_weight", MODES)
        for name in ("sampler_min", "sampler_max"):
            if getattr(self, name) is not None and self.sampler_weight is None:
                raise ValueError(f"{name}: limits a weight that is off; set sampler_weight")
        low, high = self.sampler_min or 0.0, self.sampler_max
        if low < 0 or (high is not None and not high >= max(low, 1e-8)):
            raise ValueError(f"sampler_max: expected weights 0 <= sampler_min <= sampler_max, got {low} and {high}")
        if self.top_entropy_quantile is not None and not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile: expected a fraction in (0, 1], got {self.top_entropy_quantile}")
        for modifier in self.modifiers:
            if modifier.per_token and self.one_loss_per_sequence:
                raise ValueError(
                    f"{modifier.name}: a weight per token has no meaning where a sequence has one loss; "
                    "drop it, or choose an objective that is a sum over tokens"
                )
        if self.process_group is not None and self.reach != "batch":
            raise ValueError("process_group: nothing in this objective is computed over a batch; drop it")

    @property
    def modifiers(self) -> tuple[Modifier, ...]:
        """Detached factors of each token's policy loss."""
        found: list[Modifier] = []
        if self.sampler_weight is not None:
            found.append(SamplerWeight(self.sampler_weight, self.sampler_min, self.sampler_max))
        if self.off_policy_mask is not None:
            found.append(OffPolicyMask(self.off_policy_mask))
        if self.top_entropy_quantile is not None:
            found.append(HighEntropy(self.top_entropy_quantile, self.process_group))
        return tuple(found)

    @property
    def reach(self) -> Scope:
        """What must be seen for a token's coefficient: `scope`, widened by the settings."""
        return widest(self.scope, *(modifier.scope for modifier in self.modifiers))

    @property
    def reads(self) -> frozenset[str]:
        """Arguments that must be given: `requires`, and what the settings add."""
        settings = {"ref_logps": self.beta, "entropy": self.entropy_coef}
        read = (name for modifier in self.modifiers for name in modifier.reads)
        return frozenset({*self.requires, *read, *(name for name, weight in settings.items() if weight)})

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether tokens with advantage 0 carry nothing under these settings."""
        says = next(cls for cls in type(self).__mro__ if "zero_at_zero_advantage" in vars(cls))
        of_this_loss = says.__call__ is type(self).__call__
        return self.zero_at_zero_advantage and of_this_loss and not self.beta and not self.entropy_coef

    @property
    def kernel_terms(self) -> KernelTerms | None:
        """This loss, its KL included, as terms of repo_ops.kernels.clipped_ratio; None if it is not of that family."""
        return None

    def __call__(self, tokens: Tokens) -> Tensor:
        """[N] per-token loss, unreduced, attached to tokens.logps."""
        raise NotImplementedError

    def loss_without_tokens(self, advantages: Tensor, extras: Mapping[str, Tensor]) -> Tensor | None:
        """[B] loss of sequences that have no token; None: 0. A constant, so it matters to the value alone.

        Args:
            advantages: [B]. extras: those that were given per sequence, [B].
        """
        return None

    def metrics(self, tokens: Tokens) -> Metrics:
        """Detached sums and counts over the given tokens; subclasses add their own."""
        log_ratio = tokens.log_ratio.detach()
        ratio = log_ratio.exp()
        groups: dict[str, Tensor | None] = {"": None}
        if tokens.off_policy is not None:
            groups = {"": ~tokens.off_policy, "off_policy/": tokens.off_policy}
        found: Metrics = {modifier.name: stat(modifier(tokens)) for modifier in self.modifiers}
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


def check_choice(objective: Objective, field: str, allowed: Iterable[str]) -> None:
    """Refuse a setting that is none of `allowed`."""
    value, known = getattr(objective, field), tuple(allowed)
    if value not in known:
        raise ValueError(f"{field}: expected one of {', '.join(known)}, got {value!r}")


def check_positive(objective: Objective, *fields: str, zero: bool = False) -> None:
    """Refuse a setting that is not a finite number > 0 (>= 0 where `zero`)."""
    for field in fields:
        expected = f"a finite number {'>=' if zero else '>'} 0"
        check_number(field, getattr(objective, field), expected, low=0, above=-math.inf if zero else 0)


def check_width(name: str, value: float | None, *, low: bool = False) -> None:
    """Refuse a clip width that is negative or, below 1, wider than 1 (a ratio cannot be negative)."""
    if value is None:
        return
    check_number(name, value, "a width >= 0 around ratio 1 (0.2 clips at 0.8 or 1.2)", low=0)
    if low and value > 1:
        raise ValueError(f"{name}: expected a width <= 1 (a ratio is never below 0), got {value}")
