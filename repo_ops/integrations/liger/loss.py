"""Liger's class, and its functional form."""

from __future__ import annotations

import torch
from torch import Tensor

from repo_ops.arguments import check_shape
from repo_ops.integrations.liger.settings import Settings
from repo_ops.integrations.liger.step import (
    Step,
    constant,
    live_tokens,
    num_items_of,
    options_for,
    reference_logps,
    sampler_ratio,
)
from repo_ops.integrations.liger.terms import loss_and_logps, metrics_of
from repo_ops.options import Options


class LigerFusedLinearGRPOFunction:
    """Liger's functional form: `apply` takes what its autograd function takes, in the same order."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: float | Tensor | None = None,
        *,
        options: Options | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics) as `LigerFusedLinearGRPOLoss` returns them; arguments as there."""
        settings = Settings(
            beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, delta, use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        mask = live_tokens(attention_mask, selected_token_ids)
        check_shape("advantages", advantages, (len(mask),), "the sequences")
        ref_logps = None
        if use_ref_model:
            ref_head = (ref_input, ref_weight, ref_bias)
            ref_logps = reference_logps(
                settings, ref_per_token_logps, ref_head, selected_token_ids, mask, float(temperature), options
            )
        step = Step(
            mask,
            advantages.detach().to(torch.float32),
            ref_logps,
            constant(old_per_token_logps),
            None if vllm_is_ratio is None else sampler_ratio(vllm_is_ratio.detach(), mask),
            num_items_of(settings, mask, num_items_in_batch),
        )
        head = {"bias": bias, "temperature": float(temperature), "options": options_for(_input, options)}
        loss, logps = loss_and_logps(settings, step, _input, weight, selected_token_ids, head)
        return loss.to(torch.float32), tuple(metric.to(torch.float32) for metric in metrics_of(settings, step, logps))


liger_fused_linear_grpo = LigerFusedLinearGRPOFunction.apply


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """A GRPO-family loss from hidden states, called as Liger's class of this name is.

    Args:
        beta: weight of the KL penalty to the reference. compiled: accepted; nothing needs compiling, as no graph over
            the vocabulary exists, so True and False are the same. chunk_size: accepted; the head cuts rows by its own
            memory plan, not by sequences.
        use_ref_model: whether reference log-probabilities or reference hidden states are given. epsilon_low,
            epsilon_high: clip widths; for "cispo" epsilon_high is the cap itself (5.0 is usual).
        loss_type: grpo, bnpo, dr_grpo (needs max_completion_length), dapo, cispo, sapo, luspo or vespo.
        importance_sampling_level: "token", or "sequence" (GSPO; not for cispo, sapo, vespo).
        sapo_temperature_pos, sapo_temperature_neg, vespo_*: of the loss types they name. temperature: divides logits.
        delta: upper bound on the ratio for negative advantages. use_bias_correction_kl: multiply the KL by the ratio.
        options: not Liger's: how the head is computed. None: logits of bfloat16 products are rounded to bfloat16, as
            by Liger. `Options()` leaves them in float32, exact, and so does every other.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        options: Options | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            if given[name] is not None and given[name] <= 0:
                raise ValueError(f"{name} must be positive, got {given[name]}")
        vars(self).update(given)  # one attribute a setting, named and changeable as Liger's
        self._settings = tuple(given)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics): a scalar with a graph, and (KL where beta != 0, fraction of clipped tokens), detached.

        The caller divides by the number of gradient-accumulation steps, except for dapo, cispo and vespo given
        `num_items_in_batch`. These three take a mean over the ranks of torch.distributed where it is initialised: an
        all-reduce of one number where `num_items_in_batch` is not given.

        Args:
            _input: [B, T, H]. lin_weight: [V, H]. selected_token_ids, attention_mask (0 or 1): [B, T].
            advantages: [B]. bias: [V]. old_per_token_logps: [B, T]; None: on-policy, the ratio is 1.
            ref_per_token_logps: [B, T], or else ref_input [B, T, H], ref_weight [V, H] and ref_bias [V].
            vllm_is_ratio: [B], [B, 1] or [B, T], a constant weight on the policy loss.
            num_items_in_batch: tokens of the whole step, all micro-batches and ranks; read by dapo, cispo and vespo.
        Raises:
            TypeError, ValueError: shapes or values disagree; the message names the argument.
        """
        return LigerFusedLinearGRPOFunction.apply(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch, **{name: getattr(self, name) for name in self._settings},
        )  # fmt: skip
