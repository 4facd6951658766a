"""The settings of a GRPOConfig as an objective of ours: what maps is mapped, everything else is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repo_ops.objectives import Objective, get_objective

if TYPE_CHECKING:
    from repo_ops.integrations.trl.config import RePOConfig

__all__ = ["mapping", "objective_of", "refuse_unread"]

CLIPPED = ("grpo", "dr_grpo", "dapo", "luspo")
TOKEN_MEAN = {"reduction": "token-mean"}
# (loss_type, importance_sampling_level) -> our objective and what its name does not say
LOSSES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("grpo", "token"): ("grpo", {}),
    ("dr_grpo", "token"): ("dr_grpo", {}),
    ("dapo", "token"): ("dapo", {}),
    ("luspo", "token"): ("grpo", {"reduction": "seq-mean-token-sum"}),
    ("cispo", "token"): ("cispo", TOKEN_MEAN),
    ("sapo", "token"): ("sapo", {}),
    ("vespo", "token"): ("vespo", {}),
    ("grpo", "sequence"): ("gspo", {}),
    ("dr_grpo", "sequence"): ("dr_grpo", {"ratio_level": "sequence_mean"}),
    ("dapo", "sequence"): ("dapo", {"ratio_level": "sequence_mean"}),
    ("luspo", "sequence"): ("luspo", {}),
    ("cispo", "sequence"): ("cispo", {"ratio_level": "sequence_mean", **TOKEN_MEAN}),
    ("vespo", "sequence"): ("vespo", {}),  # its weight is the sequence's anyway: TRL does not read the level
}
SAPO = {"sapo_temperature_pos": "tau_pos", "sapo_temperature_neg": "tau_neg"}
VESPO = {f"vespo_{name}": name for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
SAMPLER = {
    "vllm_importance_sampling_mode": "sampler_weight",
    "vllm_importance_sampling_clip_min": "sampler_min",
    "vllm_importance_sampling_clip_max": "sampler_max",
}
# what describes TRL's loss; with an objective of ours these stay at their defaults
OF_TRLS_LOSS = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    *SAPO,
    *VESPO,
)
# what our loss never reads, whatever the objective, and what does that work here
NEVER = {
    "top_entropy_quantile": "objective='high_entropy', or objective_args={'top_entropy_quantile': ...}, does this",
    "entropy_coef": "objective_args={'entropy_coef': ...} adds a bonus, averaged like the loss",
    "use_adaptive_entropy": "only TRL's own loss has it",
}


def objective_of(config: RePOConfig) -> Objective:
    """The objective that `config` describes: by name in `objective`, else TRL's loss_type and what belongs to it.

    Raises:
        ValueError: an option that this loss would not read is set; the message names it.
    """
    hyper = mapping("objective_args", config.objective_args)
    if config.objective is None:
        if hyper:
            raise ValueError(f"objective_args: expected none without objective, got {hyper}; name the objective too")
        name, hyper = _of_trls_loss(config)
    else:
        name = config.objective
        for option in OF_TRLS_LOSS:
            _expect_default(config, option, f"objective {name!r} does not read it; use objective_args")
        if config.beta and hyper.get("beta", config.beta) != config.beta:
            raise ValueError(f"beta: expected {config.beta} in objective_args too, got {hyper['beta']}; set beta alone")
        hyper = ({"beta": config.beta} if config.beta else {}) | hyper
    if config.use_vllm and config.vllm_importance_sampling_correction:
        if (own := _get(config, name, hyper).sampler_weight) is not None and "sampler_weight" not in hyper:
            raise ValueError(
                f"vllm_importance_sampling_correction: expected False with objective {name!r}, which corrects by "
                f"itself ({own}), got True"
            )
        for theirs, ours in SAMPLER.items():
            if ours in hyper:
                raise ValueError(
                    f"objective_args: expected no {ours} with vllm_importance_sampling_correction, got "
                    f"{hyper[ours]!r}; set {theirs}, or switch that correction off"
                )
            hyper[ours] = getattr(config, theirs)
    return _get(config, name, hyper)


def _get(config: RePOConfig, name: str, hyper: dict[str, Any]) -> Objective:
    """The objective, with the length of completions for a reduction by a constant that names none."""
    try:
        return get_objective(name, **hyper)
    except ValueError as error:
        if "max_length" in hyper or not str(error).startswith("max_length"):
            raise
        return get_objective(name, **hyper, max_length=config.max_completion_length)


def mapping(name: str, value: dict[str, Any] | str) -> dict[str, Any]:
    """A copy of the hyper-parameters; TRL has read those that came as JSON on a command line."""
    if isinstance(value, str):
        raise TypeError(f"{name}: expected a dict, or JSON that starts with a brace, got {value!r}")
    return dict(value)


def refuse_unread(config: RePOConfig) -> None:
    """Refuse the options that our loss reads under no objective.

    Raises:
        ValueError: one of them is not at its default.
    """
    for option, remedy in NEVER.items():
        _expect_default(config, option, remedy)


def _of_trls_loss(config: RePOConfig) -> tuple[str, dict[str, Any]]:
    loss, level = config.loss_type, config.importance_sampling_level
    if (loss, level) not in LOSSES:
        remedy = "objective=... chooses any objective of repo_ops"
        if levels := [at for name, at in LOSSES if name == loss]:
            raise ValueError(
                f"importance_sampling_level: expected {levels[0]!r} with loss_type {loss!r}, got {level!r}; {remedy}"
            )
        known = ", ".join(sorted({name for name, _ in LOSSES}))
        reason = ", which averages over a micro-batch, and replayed and live rows change that" if loss == "bnpo" else ""
        raise ValueError(f"loss_type: expected one of {known}, got {loss!r}{reason}; {remedy}")
    name, preset = LOSSES[loss, level]
    hyper = dict(preset)
    read = {"loss_type", "importance_sampling_level", "use_bias_correction_kl", "off_policy_mask_threshold"}
    if loss in CLIPPED:
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        hyper |= {"eps_low": config.epsilon, "eps_high": high, "delta": config.delta}
        read |= {"epsilon", "epsilon_high", "delta"}
    elif loss == "cispo":
        hyper["eps_high"] = _cap_of_cispo(config) - 1
        read |= {"epsilon_high"}
    elif loss == "sapo":
        hyper |= {ours: getattr(config, theirs) for theirs, ours in SAPO.items()}
        read |= set(SAPO)
    elif loss == "vespo":
        hyper |= {ours: getattr(config, theirs) for theirs, ours in VESPO.items()}
        read |= set(VESPO)
    for option in OF_TRLS_LOSS:
        if option not in read:
            _expect_default(config, option, f"loss_type {loss!r} does not read it")
    if config.beta:
        hyper["beta"] = config.beta
        if config.use_bias_correction_kl:
            if level == "sequence":
                raise ValueError(
                    "use_bias_correction_kl: expected False at importance_sampling_level 'sequence', got True; here "
                    "that correction is each token's own ratio, TRL would take its sequence's"
                )
            hyper["kl"] = "unbiased"
    if config.off_policy_mask_threshold is not None:
        hyper["off_policy_mask"] = config.off_policy_mask_threshold
    return name, hyper


def _cap_of_cispo(config: RePOConfig) -> float:
    if config.epsilon_high is None or config.epsilon_high < 1:
        raise ValueError(
            "epsilon_high: expected the largest ratio, at least 1 (ScaleRL: 5.0), with loss_type 'cispo', got "
            f"{config.epsilon_high}; TRL would take epsilon for it and shrink every gradient"
        )
    return config.epsilon_high


def _expect_default(config: RePOConfig, option: str, remedy: str) -> None:
    default = type(config).__dataclass_fields__[option].default
    if getattr(config, option) != default:
        raise ValueError(f"{option}: expected its default {default!r}, got {getattr(config, option)!r}; {remedy}")
