"""Liger's GRPO loss on this library's head: same names, arguments, results and normalisation as liger-kernel 0.8.5.

    from repo_ops.integrations.liger import LigerFusedLinearGRPOLoss  # instead of liger_kernel.chunked_loss

Nothing of Liger is needed or imported. What is the same, bit by bit of its behaviour: which tokens are averaged by what
(`num_items_in_batch`, the mean over ranks of DAPO's count), CISPO's cap `epsilon_high` as a value of the ratio, LUSPO
counting padding where its per-token losses are a matrix, VESPO counting the ratios of masked tokens, the metrics.

What differs, on purpose: log-probabilities are exact in float32 where Liger rounds 16-bit logits (`options` can ask for
that); a masked token cannot overflow into the loss, and no exponential beyond exp(70) enters it; gradients are handed
over once, so a second backward of one loss is refused; refused by name are a mask other than 0 and 1, widths, a `beta`
or a `vespo_k` below 0, a `delta` below 1 + epsilon_high, an FSDP-sharded weight, and ids outside the vocabulary in
padding that LUSPO counts.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import check_shape, check_values
from repo_ops.integrations import given_weight
from repo_ops.kl import k3
from repo_ops.linear_logps import linear_logps
from repo_ops.linear_policy_loss import linear_policy_loss
from repo_ops.objectives import Objective, get_objective
from repo_ops.options import Options
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import NumItems, sequence_weights
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

__all__ = ["LigerFusedLinearGRPOFunction", "LigerFusedLinearGRPOLoss", "liger_fused_linear_grpo"]

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
class _Settings:
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


@dataclass(frozen=True)
class _Step:
    """The tensors of one call, beside the head's."""

    mask: Tensor
    """[B, T] bool."""
    advantages: Tensor
    """[B] float32."""
    ref_logps: Tensor | None
    """[B, T]; None where there is no KL."""
    old_logps: Tensor | None
    ratio: Tensor | None
    """[B] or [B, T], the sampler's weight."""
    num_items: NumItems

    @property
    def lengths(self) -> Tensor:
        """[B] live tokens."""
        return self.mask.sum(1)


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
        settings = _Settings(
            beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, delta, use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        mask = _mask(attention_mask, selected_token_ids)
        check_shape("advantages", advantages, (len(mask),), "the sequences")
        head = {"temperature": float(temperature), "options": options}
        step = _Step(
            mask,
            advantages.detach().to(torch.float32),
            _ref_logps(settings, ref_per_token_logps, (ref_input, ref_weight, ref_bias), selected_token_ids, mask, head)
            if use_ref_model
            else None,
            _constant(old_per_token_logps),
            None if vllm_is_ratio is None else _sampler_ratio(vllm_is_ratio.detach(), mask),
            _num_items(settings, mask, num_items_in_batch),
        )
        loss, logps = _loss(settings, step, _input, weight, selected_token_ids, {"bias": bias, **head})
        return loss.to(torch.float32), tuple(metric.to(torch.float32) for metric in _metrics(settings, step, logps))


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
        options: not Liger's: how the head is computed. `Options(logits_dtype=torch.bfloat16)` rounds logits of bfloat16
            inputs as Liger does; None: they stay float32.
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


@dataclass(frozen=True, kw_only=True)
class _CappedWeight(Objective):
    """CISPO with its cap as a value of the ratio, which may lie below 1, Liger's default of 0.2 included."""

    zero_at_zero_advantage: ClassVar[bool] = True
    cap: float

    def __call__(self, tokens: Tokens) -> Tensor:
        return weighted_logps(
            tokens.logps, tokens.advantages, tokens.log_ratio.detach().clamp_max(70.0).exp().clamp_max(self.cap)
        )


def _mask(attention_mask: Tensor, ids: Tensor) -> Tensor:
    if ids.ndim != 2:
        raise ValueError(f"selected_token_ids: expected shape [B, T], got {list(ids.shape)}")
    check_shape("attention_mask", attention_mask, ids.shape, "selected_token_ids")
    mask = attention_mask != 0
    if attention_mask.device.type == "cpu" and bool((attention_mask != mask).any()):
        raise ValueError("attention_mask: expected 0 and 1; a weight goes into the advantages")
    return mask


def _constant(logps: Tensor | None) -> Tensor | None:
    """Given log-probabilities as Liger reads them: without a graph, in float32."""
    return None if logps is None else logps.detach().to(torch.float32)


def _ref_logps(
    settings: _Settings,
    given: Tensor | None,
    head: tuple[Tensor | None, Tensor | None, Tensor | None],
    ids: Tensor,
    mask: Tensor,
    arguments: dict[str, Any],
) -> Tensor | None:
    """[B, T] log-probabilities of the reference, from `given` or from its head; None where nothing reads them."""
    hidden, weight, bias = head
    if given is None and hidden is None:
        raise ValueError(
            "ref_per_token_logps: expected them or ref_input, because use_ref_model is True; got neither; "
            "pass use_ref_model=False"
        )
    if given is not None and hidden is not None:
        warnings.warn("Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=3)
    if not settings.beta or given is not None:
        return _constant(given) if settings.beta else None
    if hidden is None or weight is None:
        raise ValueError("ref_weight: expected the head [V, H] of the reference beside ref_input, got None")
    mask_given = None if settings.loss_type == "luspo" else mask
    with torch.no_grad():
        return linear_logps(hidden, weight, ids, bias=bias, mask=mask_given, **arguments).logps


def _sampler_ratio(ratio: Tensor, mask: Tensor) -> Tensor:
    """[B] or [B, T], from [B], [B, 1] or [B, T]."""
    B, T = mask.shape
    if tuple(ratio.shape) == (B, 1):
        return ratio[:, 0]
    if tuple(ratio.shape) not in ((B,), (B, T)):
        raise ValueError(f"vllm_is_ratio: expected shape [{B}], [{B}, 1] or [{B}, {T}], got {list(ratio.shape)}")
    return ratio


def _num_items(settings: _Settings, mask: Tensor, given: float | Tensor | None) -> NumItems:
    """What the loss divides by: this call's own counts, and for some loss types the step's tokens per process."""
    tokens = mask.sum().to(torch.float32)
    if settings.loss_type in COUNTED_OVER_RANKS:
        initialized = dist.is_available() and dist.is_initialized()
        if given is not None:
            tokens = torch.as_tensor(given, dtype=torch.float32, device=mask.device)
        elif initialized:
            dist.all_reduce(tokens)
        tokens = tokens / (dist.get_world_size() if initialized else 1)
    return NumItems(len(mask), tokens)


def _loss(
    settings: _Settings, step: _Step, hidden: Tensor, weight: Tensor, ids: Tensor, head: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The loss, and detached log-probabilities [B, T], NaN where none was needed."""
    beta = settings.beta if step.ref_logps is not None else 0.0
    matrix = settings.loss_type == "luspo" and (settings.importance_sampling_level == "token" or beta)
    sequence_kl = beta and settings.use_bias_correction_kl and settings.importance_sampling_level == "sequence"
    if not matrix and not sequence_kl:
        found = linear_policy_loss(
            hidden, weight, ids, num_items=step.num_items, **_policy_arguments(settings, step, beta), **head
        )
        return found.loss, found.logps
    if settings.loss_type == "luspo":
        vocabulary = (ids >= 0) & (ids < len(weight))
        remedy = "luspo counts padding, as in Liger; pad with a token"
        check_values("selected_token_ids", vocabulary.all(), f"ids from 0 to {len(weight) - 1}, masked or not", remedy)
    # LUSPO's padding and the KL at sequence level are no sum over live tokens: 4 passes instead of 3
    logps = linear_logps(hidden, weight, ids, mask=None if settings.loss_type == "luspo" else step.mask, **head).logps
    if settings.loss_type == "luspo" and settings.importance_sampling_level == "token":
        loss = _padded_luspo(settings, step, logps)
    else:
        arguments = _policy_arguments(settings, step, 0.0)
        loss = policy_loss(logps, num_items=step.num_items, **arguments).loss
    if beta:
        kl = _kl(settings, step, logps)
        loss = loss + beta * (_kl_weights(settings, step, kl.dtype) * kl).sum()
    return loss, logps.detach()


def _policy_arguments(settings: _Settings, step: _Step, beta: float) -> dict[str, Any]:
    """Keywords of `policy_loss` and `linear_policy_loss`."""
    objective, extras = settings.objective(beta), None
    if step.ratio is not None:
        objective, ratio = given_weight.with_given_weight(objective), step.ratio
        if settings.loss_type == "vespo":
            ratio = given_weight.vespo_weight(ratio)  # over all columns, masked ones too
        elif settings.loss_type == "luspo" and settings.importance_sampling_level == "sequence":
            ratio = ratio.reshape(len(ratio), -1).to(torch.float32).mean(1)  # over all columns
        extras = {given_weight.NAME: ratio}
    return {
        "objective": objective,
        "extras": extras,
        "advantages": step.advantages,
        "mask": step.mask,
        "old_logps": step.old_logps,
        "ref_logps": step.ref_logps if beta else None,
    }


def _padded_luspo(settings: _Settings, step: _Step, logps: Tensor) -> Tensor:
    """(1 / (B T)) sum over all columns of the token's loss times its sequence's length: padding counts."""
    arguments = _policy_arguments(settings, step, 0.0)
    arguments["objective"] = dataclasses.replace(arguments["objective"], reduction="token-sum")
    arguments["advantages"] = step.advantages * step.lengths
    return policy_loss(logps, **{**arguments, "mask": None}).loss / step.mask.numel()


def _log_weights(settings: _Settings, step: _Step, logps: Tensor) -> Tensor:
    """Logarithm of the ratio, [B, T], or [B, 1] at sequence level; attached, 0 where masked."""
    old = logps.detach() if step.old_logps is None else step.old_logps
    log_ratio = torch.where(step.mask, logps - old, 0.0)
    if settings.importance_sampling_level == "token":
        return log_ratio
    return log_ratio.sum(1, keepdim=True) / step.lengths.clamp_min(1)[:, None]


def _kl(settings: _Settings, step: _Step, logps: Tensor) -> Tensor:
    """[B, T] penalty, attached; 0 where masked, except for LUSPO, which counts padding."""
    assert step.ref_logps is not None
    everywhere = settings.loss_type == "luspo"
    # where masked the reference may hold anything, and 0 times infinity is no number
    ref_logps = step.ref_logps if everywhere else torch.where(step.mask, step.ref_logps, logps.detach())
    kl = k3(logps, ref_logps)
    if not settings.use_bias_correction_kl:
        return kl
    if everywhere and settings.importance_sampling_level == "token":
        return kl * (logps - (logps.detach() if step.old_logps is None else step.old_logps)).exp()
    return kl * _log_weights(settings, step, logps).exp()


def _kl_weights(settings: _Settings, step: _Step, dtype: torch.dtype) -> Tensor:
    """[B, T] what each token's KL counts in the loss."""
    if settings.loss_type == "luspo":
        return (step.lengths.to(dtype) / step.mask.numel())[:, None].expand(step.mask.shape)
    reduction, length = REDUCTIONS[settings.loss_type], settings.max_completion_length
    weights = sequence_weights(reduction, step.lengths, step.num_items, max_length=length, dtype=dtype)
    return torch.where(step.mask, weights[:, None], 0.0)


@torch.no_grad()
def _metrics(settings: _Settings, step: _Step, logps: Tensor) -> tuple[Tensor, ...]:
    """(mean KL over live tokens where beta != 0, fraction of live tokens that are clipped)."""
    count = step.mask.sum().clamp_min(1)
    found = []
    if settings.beta:
        kl = logps.new_zeros(step.mask.shape) if step.ref_logps is None else _kl(settings, step, logps)
        found.append(torch.where(step.mask, kl, 0.0).sum() / count)
    ratio, rising = _log_weights(settings, step, logps).exp(), step.advantages[:, None] > 0
    if settings.loss_type == "cispo":
        clipped = (ratio > settings.epsilon_high) & rising
    elif settings.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        below = (ratio < 1 - settings.epsilon_low) & (step.advantages[:, None] < 0)
        clipped = below | ((ratio > 1 + settings.epsilon_high) & rising)
    return (*found, (clipped & step.mask).sum() / count)
