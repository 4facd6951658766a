"""The constants of a call under Liger's names, and the objective of this library that they ask for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from repo_ops.objectives import Objective, get_objective
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

REDUCTIONS = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "const",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "vespo": "token-mean",
}
"""How each loss type averages tokens."""
LEVELS = {"token": "token", "sequence": "sequence_mean"}
COUNTED_OVER_RANKS = ("dapo", "cispo", "vespo")
"""Loss types that divide by the tokens of the step, per process; the only ones that read num_items_in_batch."""
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")


@dataclass(frozen=True)
class Settings:
    """The constants of one call, under Liger's names."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self) -> None:
        loss, level = self.loss_type, self.importance_sampling_level
        if loss not in REDUCTIONS:
            raise ValueError(f"loss_type: expected one of {', '.join(REDUCTIONS)}, got {loss!r}")
        if level not in LEVELS:
            raise ValueError(f"importance_sampling_level: expected 'token' or 'sequence', got {level!r}")
        if level == "sequence" and loss in TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"importance_sampling_level: Sequence-level importance sampling is not supported for loss_type={loss!r}"
                ", as in Liger; use 'token'"
            )
        if not self.beta >= 0:
            raise ValueError(f"beta: expected a number >= 0, got {self.beta}")
        if loss == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: expected a number of tokens for loss_type 'dr_grpo', got None")
        if self.delta is not None and loss in TOKEN_LEVEL_ONLY:
            warnings.warn(f"delta: loss_type {loss!r} does not read it, here as in Liger", stacklevel=4)

    def objective(self, beta: float) -> Objective:
        """This library's objective with KL weight `beta`."""
        common: dict[str, Any] = {"reduction": REDUCTIONS[self.loss_type], "beta": beta}
        common["kl"] = "unbiased" if self.use_bias_correction_kl else "k3"
        if self.loss_type == "dr_grpo":
            common["max_length"] = self.max_completion_length
        if self.loss_type == "cispo":
            return _CappedWeight(cap=self.epsilon_high, **common)
        if self.loss_type == "sapo":
            return get_objective("sapo", tau_pos=self.sapo_temperature_pos, tau_neg=self.sapo_temperature_neg, **common)
        if self.loss_type == "vespo":
            return get_objective(
                "vespo",
                k_pos=self.vespo_k_pos,
                lambda_pos=max(self.vespo_lambda_pos, 1e-4),
                k_neg=self.vespo_k_neg,
                lambda_neg=max(self.vespo_lambda_neg, 1e-4),
                **common,
            )
        widths = {"eps_low": min(self.epsilon_low, 1.0), "eps_high": self.epsilon_high}  # a ratio is never below 0
        level = LEVELS[self.importance_sampling_level]
        return get_objective("grpo", delta=self.delta, ratio_level=level, **widths, **common)


@dataclass(frozen=True, kw_only=True)
class _CappedWeight(Objective):
    """CISPO with its cap as a value of the ratio, which may lie below 1, Liger's default of 0.2 included."""

    zero_at_zero_advantage: ClassVar[bool] = True
    cap: float

    def __call__(self, tokens: Tokens) -> Tensor:
        return weighted_logps(
            tokens.logps, tokens.advantages, tokens.log_ratio.detach().clamp_max(70.0).exp().clamp_max(self.cap)
        )
