"""This library's objectives and head inside verl (0.9): policy losses by name, and the fused log-probability kernel.

verl imports whatever an installed package names in the entry-point group `verl.plugins`; repo-ops names
`repo_ops.integrations.verl_plugin`, so that every Ray worker has the losses without a line of code:

    actor_rollout_ref.actor.policy_loss.loss_mode=repo_ops/dapo

Who divides: verl. Its `loss_agg_mode` and the counts of the global batch (config.global_batch_info) are used, times
dp_size because FSDP averages; an objective's own reduction is not read. KL and entropy terms are verl's too.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.integrations.given_weight import NAME, vespo_weight, with_given_weight
from repo_ops.integrations.means import means
from repo_ops.linear_logps import linear_logps
from repo_ops.metrics import Metrics
from repo_ops.objectives import Objective, get_objective, objective_names, vespo
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import NumItems

__all__ = ["install_head", "linear_cross_entropy", "register", "register_objective", "verl_policy_loss"]

logger = logging.getLogger(__name__)

PREFIX = "repo_ops/"
REDUCTIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-sum",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "const",
    "seq-mean-token-mean": "seq-mean-token-mean",
}
"""verl's loss_agg_mode -> how tokens are averaged here."""
LOSS_ARGUMENTS = [
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
]  # fmt: skip
"""What verl 0.9 passes to a policy loss."""
HEAD_ARGUMENTS = ["ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
"""The forward of verl 0.9's fused kernel."""


def verl_policy_loss(objective: Objective, *, widths_of_verl: bool = False) -> Callable[..., Any]:
    """`objective` as a verl policy loss: f(old_log_prob, log_prob, ...) -> (loss, metrics as floats).

    With `widths_of_verl`, `actor.clip_ratio_low` and `clip_ratio_high` are its eps_low and eps_high where it has those,
    and `clip_ratio_c` its delta where that is set, as in verl's own losses.

    Raises:
        TypeError: no objective. ValueError: it adds a KL or entropy term, or reads what verl does not pass to a
            policy loss.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective: expected an objective, got {objective!r}; get_objective(name, ...) makes one of a name"
        )
    if objective.beta or objective.entropy_coef:
        raise ValueError(
            f"objective: expected beta = entropy_coef = 0, got {objective.beta} and {objective.entropy_coef}; verl "
            "adds both terms itself (actor.use_kl_loss with kl_loss_coef, actor.entropy_coeff)"
        )
    if unknown := sorted(objective.reads - {"old_logps"}):
        raise ValueError(
            f"objective: expected one that reads no more than old_logps, which is all that verl hands to a policy "
            f"loss, got one that reads {', '.join(unknown)}; choose another"
        )

    told: set[str] = set()

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(
                "config: expected verl's ActorConfig, which holds the counts of the global batch, got None"
            )
        if loss_agg_mode not in told and REDUCTIONS.get(loss_agg_mode) != objective.reduction:
            told.add(loss_agg_mode)
            logger.warning(
                "repo_ops: %s: tokens are averaged by verl's loss_agg_mode=%r; the objective's own way is %r",
                type(objective).__module__.rpartition(".")[2],
                loss_agg_mode,
                objective.reduction,
            )
        mask = response_mask.bool()
        chosen = _with_widths(objective, config) if widths_of_verl else objective
        chosen, num_items, factor = _as_verl_averages(chosen, loss_agg_mode, mask, config.global_batch_info)
        extras = None
        if rollout_is_weights is not None:
            chosen, weight = with_given_weight(chosen), rollout_is_weights
            extras = {NAME: vespo_weight(weight, mask) if isinstance(chosen, vespo.Objective) else weight}
        found = policy_loss(
            log_prob,
            advantages,
            objective=chosen,
            mask=mask,
            old_logps=old_log_prob,
            num_items=num_items,
            extras=extras,
        )
        return factor * found.loss, _floats(found.metrics, log_prob, old_log_prob, mask)

    return loss


def register_objective(name: str, objective: Objective, *, widths_of_verl: bool = False) -> None:
    """Make `objective` a verl policy loss called `name`, for actor.policy_loss.loss_mode.

    Call it in a module named by VERL_USE_EXTERNAL_MODULES, so that every worker does.

    Raises:
        ValueError: the name is taken, or the objective reads what verl does not pass.
    """
    core_algos = _core_algos()
    if name in core_algos.POLICY_LOSS_REGISTRY:
        raise ValueError(f"name: expected one that verl does not have yet, got {name!r}; choose another")
    core_algos.register_policy_loss(name)(verl_policy_loss(objective, widths_of_verl=widths_of_verl))


def register() -> list[str]:
    """Names under which this library's objectives are now verl policy losses: "repo_ops/" and the objective's name.

    Objectives that read more than old log-probabilities (the sampler's, entropies) are left out. Checks a loss against
    verl's own numbers and says at WARNING level what was registered. A second call changes nothing.

    Raises:
        ImportError: verl is missing. RuntimeError: its interface is another one, or the check failed.
    """
    core_algos = _core_algos()
    registered = []
    for name in objective_names():
        try:
            function = verl_policy_loss(get_objective(name, **_needed(name)), widths_of_verl=True)
        except ValueError:  # it reads what verl does not pass; told in the docs of this function
            continue
        registered.append(PREFIX + name)
        if PREFIX + name not in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.register_policy_loss(PREFIX + name)(function)
    error = _check_loss(core_algos)
    logger.warning(
        "repo_ops: registered %d policy losses for verl (actor.policy_loss.loss_mode=%s ...); a loss differs from "
        "verl's own by %.1e",
        len(registered),
        PREFIX + "grpo",
        error,
    )
    return registered


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) [N] of flattened tokens, called as verl's fused kernel is; both differentiable.

    Args:
        hidden: [..., H]. weight: [V, H], this rank's shard where `dist_process_group` has more than one rank.
        labels: [...] int64. temperature: a number > 0. reduction: of the log-probabilities: none, sum or mean.
        dist_process_group: vocabulary-parallel ranks. The gradient of hidden is then a share of the whole, for the
            host to add up over the ranks (Megatron does where it gathers sequence-parallel hidden states).
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: expected 'none', 'sum' or 'mean', got {reduction!r}")
    flat = hidden.reshape(-1, hidden.shape[-1])
    group = dist_process_group
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if group is not None:
        flat = _ScaledGradient.apply(flat, 1.0 / dist.get_world_size(group))
    found = linear_logps(flat, weight, labels.reshape(-1), temperature=temperature, with_entropy=True, tp_group=group)
    assert found.entropy is not None
    logps = found.logps if reduction == "none" else getattr(found.logps, reduction)()
    return logps, found.entropy


def install_head() -> None:
    """Put `linear_cross_entropy` where verl looks for its fused kernel, on this process; says so at WARNING level.

    It runs where verl is told actor_rollout_ref.model.use_fused_kernels=True and
    fused_kernel_options.impl_backend=triton. Checks values and gradients against full logits first.

    Raises:
        ImportError: verl is missing. RuntimeError: its kernel has another interface, or the check failed.
    """
    try:
        from verl.utils.kernel import linear_cross_entropy as module
    except ImportError as error:
        raise ImportError(f"verl is needed for its fused kernel to be replaced; pip install verl ({error})") from error
    if getattr(module, "linear_cross_entropy", None) is linear_cross_entropy:
        return
    _check_signature("verl.utils.kernel.linear_cross_entropy", module.LinearCrossEntropy.forward, HEAD_ARGUMENTS)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    difference = _check_head(device)
    module.linear_cross_entropy = linear_cross_entropy
    logger.warning(
        "repo_ops: verl's fused linear_cross_entropy is now repo_ops' (backend triton of use_fused_kernels); its "
        "log-probabilities, entropies and gradients differ from float64 full logits by %.1e on %s",
        difference,
        device,
    )


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _core_algos() -> Any:
    try:
        from verl.trainer.ppo import core_algos
    except ImportError as error:
        raise ImportError(f"verl is needed to register policy losses with it; pip install verl ({error})") from error
    _check_signature("a policy loss of verl", core_algos.compute_policy_loss_vanilla, LOSS_ARGUMENTS)
    return core_algos


def _check_signature(what: str, function: Callable[..., Any], expected: list[str]) -> None:
    found = list(inspect.signature(function).parameters)
    if found != expected:
        raise RuntimeError(
            f"{what}: expected arguments {', '.join(expected)} as in verl 0.9, got {', '.join(found)}; "
            "use another verl, or another repo-ops"
        )


def _needed(name: str) -> dict[str, Any]:
    """Settings without which the objective cannot be made; verl's loss_agg_mode replaces them."""
    return {"max_length": 1} if name == "dr_grpo" else {}


def _with_widths(objective: Objective, config: Any) -> Objective:
    """The objective with the clip widths of verl's configuration, where it has such fields."""
    fields = {field.name for field in dataclasses.fields(objective)}
    widths: dict[str, Any] = {}
    for ours, theirs in (("eps_low", "clip_ratio_low"), ("eps_high", "clip_ratio_high")):
        width = getattr(config, theirs, None)
        width = getattr(config, "clip_ratio", None) if width is None else width
        if ours in fields and width is not None:
            widths[ours] = width
    if getattr(objective, "delta", None) is not None:
        widths["delta"] = config.get("clip_ratio_c", 3.0)
    return dataclasses.replace(objective, **widths)


def _as_verl_averages(
    objective: Objective, loss_agg_mode: str, mask: Tensor, info: Mapping[str, Any]
) -> tuple[Objective, NumItems, float]:
    """The objective averaged by `loss_agg_mode`, the counts to divide by, and what the loss is multiplied with."""
    if loss_agg_mode not in REDUCTIONS:
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(REDUCTIONS)}, got {loss_agg_mode!r}")
    dp_size = info.get("dp_size") or 1
    tokens, sequences = info.get("batch_num_tokens"), info.get("global_batch_size")
    missing = tokens is None if loss_agg_mode == "token-mean" else sequences is None
    if dp_size > 1 and missing and loss_agg_mode != "token-sum":
        name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
        raise ValueError(
            f"config.global_batch_info: expected {name} with dp_size = {dp_size} and loss_agg_mode {loss_agg_mode!r}, "
            "got None; pass the count of the global batch, as verl's actor does"
        )
    if tokens is None:
        tokens = mask.sum()
    if sequences is None:
        sequences = mask.any(1).sum()
    max_length = objective.max_length
    if loss_agg_mode == "seq-mean-token-sum-norm":
        max_length = info.get("loss_scale_factor") or mask.shape[1]
    averaged = dataclasses.replace(objective, reduction=REDUCTIONS[loss_agg_mode], max_length=max_length)
    return averaged, NumItems(sequences, tokens), float(dp_size)


def _floats(metrics: Metrics, log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> dict[str, float]:
    """What verl averages over micro-batches and ranks: means over tokens, the same keys every time."""
    values = {f"actor/repo_ops/{name}": value for name, value in means(metrics).items()}
    drift = torch.where(mask, old_log_prob - log_prob, 0.0).detach().sum() / mask.sum().clamp_min(1)
    clipped = [value for name, value in values.items() if name.endswith(("/clip_low", "/clip_high"))]
    values = {"actor/ppo_kl": drift, "actor/pg_clipfrac": sum(clipped, torch.zeros_like(drift)), **values}
    return dict(zip(values, torch.stack([value.to(drift) for value in values.values()]).tolist(), strict=True))


def _check_loss(core_algos: Any) -> float:
    """Largest difference from verl's own clipped loss, with its own averaging; refuses one that is not rounding."""
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantages = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 5, generator=generator) < 0.7
    worst = 0.0
    for mode, reduction in REDUCTIONS.items():
        info = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8, "loss_scale_factor": 7}
        checked = verl_policy_loss(get_objective("grpo", eps_high=0.28, reduction=reduction, max_length=7))
        ours, _ = checked(old, log_prob, advantages, mask, mode, SimpleNamespace(global_batch_info=info))
        ratio = (log_prob - old).exp()
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        theirs = core_algos.agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **info)
        worst = max(worst, float((ours - theirs).abs()))
    return _small_enough("a loss", worst)


def _check_head(device: torch.device) -> float:
    """Largest difference of the head's values and gradients from full logits in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 128, generator=generator) / 8 for n in (9, 300))
    labels = torch.randint(0, 300, (1, 9), generator=generator).to(device)
    results = []
    for fused in (True, False):
        dtype = torch.float32 if fused else torch.float64
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        if fused:
            logps, entropy = linear_cross_entropy(leaves[0][None], leaves[1], labels, 0.7, "none")
        else:
            log_probs = (leaves[0] @ leaves[1].T / 0.7).log_softmax(-1)
            logps, entropy = log_probs.gather(1, labels.T)[:, 0], -(log_probs.exp() * log_probs).sum(1)
        grads = torch.autograd.grad((logps + entropy).sum(), leaves)
        results.append([x.detach().double() for x in (logps, entropy, *grads)])
    return _small_enough("the head", max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))


def _small_enough(what: str, error: float) -> float:
    if not error < 1e-3:
        raise RuntimeError(f"repo_ops in verl: {what} differs from its definition by {error:.1e}; it was not installed")
    return error
