"""How the golden files spell an objective and its hyper-parameters, in the names of this library.

A case's objective is looked up by its longest known beginning ("gspo_wide_clip" is "gspo"), so that files may add
settings of their own under a longer name. A hyper-parameter that no row below mentions is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Case = dict[str, Any]

# words about a case that are no settings
REMARKS = {"agg", "note", "inner", "order", "quantile", "cap_action", "A", "lower", "kl", "eps"}
COMMON = {
    name: name
    for name in (
        "eps_low",
        "eps_high",
        "beta",
        "max_len:max_length",
        "loss_scale_factor:max_length",
        "clip_ratio_c:delta",
        "tau",
    )
}
COMMON = {name.split(":")[0]: name.split(":")[-1] for name in COMMON}
REDUCTIONS = {
    # the longest beginning wins
    "token-mean": "token-mean",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "token-sum-const": "const",
    "token-sum-const-nobatch": "const-nobatch",
    "token-sum / global token count": "token-mean",
    # a reduction that belongs to the objective
    "mean over rows": None,
    "mean over sequences": None,
    "mean_i(T_i * seqloss_i)": None,
}


class NotCoveredError(Exception):
    """A case that this library has no name for."""


@dataclass(frozen=True)
class Call:
    """An objective by our name, with our hyper-parameters and arguments of the call beside the fixture's."""

    objective: str
    hyper: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    advantages: Any = None
    """Instead of the fixture's A."""


@dataclass(frozen=True)
class Rule:
    """What the cases that begin with a name stand for."""

    objective: str
    keys: dict[str, str] = field(default_factory=dict)
    """Their hyper-parameter -> ours, beside COMMON; "" for one that `more` looks at."""
    fixed: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Case, Call], Call] = lambda case, call: call


def translate(case: Case) -> Call:
    """The call that a loss case stands for.

    Raises:
        NotCoveredError: an objective or hyper-parameter that no rule knows.
    """
    names = [name for name in RULES if f"{case['objective']}_".startswith(f"{name}_")]
    if not names:
        raise NotCoveredError(f"no objective of this library is called {case['objective']!r}")
    rule = RULES[max(names, key=len)]
    hyper = dict(rule.fixed)
    if reduction := _reduction(case["hyper"].get("agg")):
        hyper["reduction"] = reduction
    for key, value in case["hyper"].items():
        if key == "eps" and "eps" not in rule.keys:
            hyper |= {"eps_low": value, "eps_high": value}
        name = rule.keys.get(key, COMMON.get(key))
        if name:
            hyper[name] = value
        elif name is None and key not in REMARKS:
            raise NotCoveredError(f"hyper-parameter {key!r} of {case['objective']!r} has no counterpart")
    return rule.more(case, Call(rule.objective, hyper))


def _reduction(agg: str | None) -> str | None:
    if agg is None:
        return None
    found = [name for name in REDUCTIONS if agg.startswith(name)]
    if not found:
        raise NotCoveredError(f"aggregation {agg!r} is unknown")
    return REDUCTIONS[max(found, key=len)]


def _with(call: Call, **changes: Any) -> Call:
    return Call(**{**call.__dict__, **changes})


def _replay(case: Case, call: Call) -> Call:
    hyper = case["hyper"]
    online = hyper.get("is_online", "odd")
    rows = len(case["A"])
    off_policy = [not on for on in online] if isinstance(online, list) else [i % 2 == 1 for i in range(rows)]
    reductions = {"grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dr_grpo": "const"}
    changed = {
        **call.hyper,
        "reduction": reductions[hyper["loss_type"]],
        "row_norm": {"paper": "paper", "code": "official_code"}[hyper["row_norm"]],
    }
    arguments = {"off_policy": off_policy, "off_policy_coef": hyper["off_policy_loss_coef"]}
    return _with(call, hyper=changed, arguments=arguments)


def _behaviour(case: Case, call: Call) -> Call:
    behaviour = {"oldlogp": "old_logps", "samplogp": "sampler_logps"}[case["hyper"].get("behaviour", "oldlogp")]
    return _with(call, hyper={**call.hyper, "behaviour": behaviour})


def _minpro(case: Case, call: Call) -> Call:
    # the clipped form names its widths, the other one its cap
    surrogate = "ppo" if "eps_high" in case["hyper"] else "cispo"
    return _with(call, hyper={**call.hyper, "surrogate": surrogate})


def _rec(case: Case, call: Call) -> Call:
    spelled = {
        "one-side": "one_side",
        "two-side": "two_side",
        "gspo-one-side": "sequence_one_side",
        "importance_sampling": "ratio",
        "truncated_importance_sampling": "truncated_ratio",
        "gspo_importance_sampling": "sequence_ratio",
        "forward-kl": "forward_kl",
    }
    hyper = {name: spelled.get(value, value) for name, value in call.hyper.items()}
    if hyper.get("clip", "none") == "none":  # a width that clips nothing is refused
        hyper = {k: v for k, v in hyper.items() if not k.startswith("eps_")}
    elif hyper["clip"] != "ring" and hyper.get("weight") != "truncated_ratio":
        hyper = {k: v for k, v in hyper.items() if not k.startswith("eps_ring")}
    return _with(call, hyper=hyper)


def _cispo_trl(case: Case, call: Call) -> Call:
    return _with(call, hyper={**call.hyper, "eps_high": case["hyper"]["eps_high_abs"] - 1})


def _cispo_verl(case: Case, call: Call) -> Call:
    # a width beyond 1 below ratio 1 bounds nothing
    return _with(call, hyper={**call.hyper, "eps_low": min(1.0, case["hyper"]["clip_ratio_low"])})


def _spo(case: Case, call: Call) -> Call:
    extra = case["inputs_extra"]
    return _with(call, advantages=extra["reward"], arguments={"extras": {"baseline": extra["Q0"]}})


def _only_kl(case: Case, call: Call) -> Call:
    return _with(call, advantages=[0.0] * len(case["A"]))


def _topr(case: Case, call: Call) -> Call:
    low, high = case["hyper"]["clip_neg"]
    return _with(call, hyper={**call.hyper, "weight_min": low, "weight_max": high})


def _mismatch(mode: str) -> Rule:
    return Rule("grpo", {"C_max": "sampler_max", "C_min": "sampler_min"}, {"sampler_weight": mode})


def _decoupled(case: Case, call: Call) -> Call:
    cap = case["hyper"]["behav_cap"]
    mode = "token_truncate" if cap is None else "token_mask"
    return _with(call, hyper={**call.hyper, "sampler_weight": mode, "sampler_max": cap})


def _kl(name: str) -> Rule:
    return Rule("grpo", {}, {"kl": name, "beta": 1.0}, _only_kl)


_REC = {
    "clip_mode": "clip",
    "weight": "weight",
    "epsilon_low": "eps_low",
    "epsilon_high": "eps_high",
    "epsilon_low_prime": "eps_ring_low",
    "epsilon_high_prime": "eps_ring_high",
    "regularizer": "regularizer",
    "regularizer_coef": "regularizer_coef",
    "temp": "advantage_temperature",
}
_REPLAY = {"loss_type": "", "off_policy_loss_coef": "", "row_norm": "", "is_online": ""}
_DPPO = {"form": "form", "ratio_cap": "ratio_cap", "behaviour": ""}
_BAPO = {
    "ratio_lower_start": "low_start",
    "ratio_lower_max": "low_max",
    "ratio_lower_step": "low_step",
    "ratio_upper_start": "high_start",
    "ratio_upper_max": "high_max",
    "ratio_upper_step": "high_step",
    "adv_ratio_target": "target",
    "eps": "",
    "a_low": "low_start",
    "b_low": "low_max",
    "step_low": "low_step",
    "a_high": "high_start",
    "b_high": "high_max",
    "step_high": "high_step",
    "rho0": "target",
}

RULES: dict[str, Rule] = {
    "grpo": Rule("grpo"),
    "dapo": Rule("dapo"),
    "bnpo_loss_type": Rule("bnpo_loss_type"),
    "dr_grpo": Rule("dr_grpo"),
    "repo_replay": Rule("repo", _REPLAY, more=_replay),
    "dppo_binary_tv": Rule("dppo", {**_DPPO, "delta_low": "delta_low", "delta_high": "delta_high"}, more=_behaviour),
    "dppo_binary_kl": Rule(
        "dppo",
        {**_DPPO, "delta_low": "delta_low", "delta_high": "delta_high"},
        {"divergence": "kl"},
        _behaviour,
    ),
    "dppo_prime_rl": Rule(
        "dppo_prime_rl",
        {"mask_low": "delta_low", "mask_high": "delta_high", "adv_tau": "adv_tau", "kl_tau": "kl_tau"},
        more=_behaviour,
    ),
    "minpro": Rule(
        "minpro",
        {"form": "", "include_current": "include_current", "cap_prefix_at_1": "cap_prefix_at_1", "cap": "cap"},
        more=_minpro,
    ),
    "bapo_code": Rule("bapo", _BAPO, {"rule": "open_code"}),
    "bapo_paper": Rule("bapo", _BAPO, {"rule": "paper"}),
    "reinforce": Rule("reinforce", _REC, more=_rec),
    "rec": Rule("rec", _REC, more=_rec),
    "rep": Rule("rec", _REC, more=_rec),
    "red_weight": Rule("rec", _REC, more=_rec),
    "opmd": Rule("opmd"),
    "bnpo_official_actor": Rule("bnpo"),
    "dual_clip_ppo": Rule("dual_clip_ppo"),
    "opo_onpolicy": Rule("opo"),
    "spo_squared": Rule("spo", {"beta": "slope"}, {"form": "squared"}, _spo),
    "spo_cross_entropy": Rule("spo", {"beta": "slope", "clip_q_max": "q_max"}, {"form": "cross_entropy"}, _spo),
    "gspo": Rule("gspo"),
    "gspo_token": Rule("gspo_token"),
    "cispo_trl": Rule("cispo", {"eps_high_abs": ""}, more=_cispo_trl),
    "cispo_verl": Rule("cispo_verl", {"clip_ratio_low": "", "clip_ratio_high": "eps_high"}, more=_cispo_verl),
    "sapo": Rule("sapo", {"tau_pos": "tau_pos", "tau_neg": "tau_neg"}),
    "vespo": Rule("vespo", {k: k for k in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}),
    "luspo": Rule("luspo"),
    "gmpo": Rule("gmpo", {"log_eps_low": "eps_low", "log_eps_high": "eps_high"}),
    "rloo_sequence_clip": Rule("rloo"),
    "gpg": Rule("gpg"),
    "delta_two_sided": Rule("delta_two_sided", {"delta": "delta"}),
    "mismatch_token_truncate": _mismatch("token_truncate"),
    "mismatch_token_mask": _mismatch("token_mask"),
    "mismatch_seq_truncate": _mismatch("sequence_truncate"),
    "mismatch_seq_mask": _mismatch("sequence_mask"),
    "dsv32_offpolicy_mask": Rule("grpo", {"delta": "off_policy_mask"}),
    "dsv32_unbiased_kl": Rule("grpo", {}, {"kl": "unbiased"}),
    "kl_k1": _kl("k1"),
    "kl_k2": _kl("k2"),
    "kl_k3": _kl("k3"),
    "kl_abs": _kl("abs"),
    "kl_k3_plus": _kl("k3_plus"),
    "high_entropy_mask": Rule("grpo", {"top_entropy_quantile": "top_entropy_quantile"}),
    "decoupled_ppo": Rule("decoupled_ppo", {"behav_cap": ""}, more=_decoupled),
    "topr": Rule("topr", {"clip_neg": ""}, more=_topr),
    "kimi_squared": Rule("kimi", {}, {"form": "squared"}),
    "kimi_k15_gradient_form": Rule("kimi", {"form": ""}, {"form": "k1.5"}),
    "clip_cov": Rule("clip_cov", {"clip_cov_ratio": "fraction", "clip_cov_lb": "cov_min", "clip_cov_ub": "cov_max"}),
    "kl_cov": Rule("kl_cov", {"kl_cov_ratio": "fraction", "ppo_kl_coef": "kl_coef", "clip": ""}),
    "ppo_overflow": Rule("grpo", {"log_ratio_clamp": "log_ratio_clamp"}),
}
