"""Runs golden cases of the kinds "advantage" and "selection": what we compute beside what the file expects.

`compared(case)` gives pairs (name, got, expected) of nested lists; a name that no rule below knows is an error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from repo_ops.advantages import group_advantages, soft_overlong_penalty
from repo_ops.advantages.estimators.bnpo import beta_density
from repo_ops.advantages.estimators.red_weight import weighted
from repo_ops.group_edits import repo_rephrase
from repo_ops.replay.strategies import get_strategy

Pair = tuple[str, Any, Any]
Case = dict[str, Any]


def compared(case: Case) -> list[Pair]:
    """Everything that a case expects and that we compute."""
    return list(_RULES[case["objective"]](case))


def agrees(got: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> bool:
    """Whether nested lists of numbers agree in shape and value."""
    if isinstance(expected, list):
        return len(got) == len(expected) and all(agrees(g, e, rtol, atol) for g, e in zip(got, expected))
    if expected is None or got is None:
        return got is expected
    return math.isclose(got, expected, rel_tol=rtol, abs_tol=atol)


def advantages(rewards: list, groups: list[int] | None = None, **arguments: Any) -> list[float]:
    """`group_advantages` in float64 on lists; one group unless `groups` says otherwise."""
    values = torch.tensor(rewards, dtype=torch.float64)
    ids = torch.zeros(len(rewards), dtype=torch.long) if groups is None else torch.tensor(groups)
    for name in ("lengths", "off_policy"):
        if name in arguments:
            arguments[name] = torch.tensor(arguments[name])
    return group_advantages(values, ids, **arguments).tolist()


def _normalization(hyper: Case) -> dict[str, Any]:
    std = hyper.get("std", "unbiased")
    settings: dict[str, Any] = {"normalize": std is not None, "unbiased": std != "population"}
    return {**settings, "eps": hyper["eps"]} if "eps" in hyper else settings


def _grpo(case: Case) -> Iterator[Pair]:
    yield "A", advantages(case["inputs"]["rewards"], **_normalization(case["hyper"])), case["expected"]["A"]


def _group_of_one(case: Case) -> Iterator[Pair]:
    inputs = case["inputs"]
    got = advantages(inputs["rewards"], group_of_one="reward", eps=inputs["eps"])
    yield "A", got, case["expected"]["A"]


def _named(estimator: str, *inputs: str, **fixed: Any) -> Callable[[Case], Iterator[Pair]]:
    """A rule that passes the named inputs on and compares A."""

    def rule(case: Case) -> Iterator[Pair]:
        given = case["inputs"]
        arguments = {**fixed, **{name: given[name] for name in inputs}}
        yield (
            "A",
            advantages(given["rewards"], given.get("group"), estimator=estimator, **arguments),
            case["expected"]["A"],
        )

    return rule


def _remax(case: Case) -> Iterator[Pair]:
    inputs = case["inputs"]
    got = advantages(inputs["rewards"], estimator="remax", greedy_rewards=inputs["greedy_reward"])
    yield "A", got, case["expected"]["A"]


def _asymre(case: Case) -> Iterator[Pair]:
    got = advantages(case["inputs"]["rewards"], estimator="asymre", shift=case["hyper"]["baseline_shift"])
    yield "A", got, case["expected"]["A"]


def _gpg(case: Case) -> Iterator[Pair]:
    inputs, f_norm = case["inputs"], case["hyper"]["f_norm"]
    got = advantages(inputs["rewards"], inputs["group"], estimator="gpg", alpha="nonzero_rewards", f_norm=f_norm)
    yield "A", got, case["expected"]["A"]


def _passk(case: Case) -> Iterator[Pair]:
    rewards, expected = case["inputs"]["rewards"], case["expected"]
    yield "A", advantages(rewards, estimator="passk", eps=case["hyper"]["eps"]), expected["A"]
    yield "A_unnormalised", advantages(rewards, estimator="passk", normalize=False), expected["A_unnormalised"]


def _bnpo(case: Case) -> Iterator[Pair]:
    hyper = {key: case["hyper"][key] for key in ("min_value", "max_value")}
    hyper["max_weight"] = case["hyper"]["weight_clamp"][1]
    yield "A", _by_group([case["inputs"]["groups"]], **hyper), case["expected"]["A"]


def _bnpo_parts(case: Case) -> Iterator[Pair]:
    inputs, expected = case["inputs"], case["expected"]
    parts = [inputs[name] for name in sorted(inputs)]
    yield "A", _by_group(parts), expected["A"]
    for k, part in enumerate(parts):
        yield f"A{k + 1}", _by_group([part]), expected[f"A{k + 1}"]


def _by_group(parts: list[list[list[float]]], **hyper: Any) -> list[list[float]]:
    """BNPO of groups of rewards, one list of groups for each reward part, as lists by group."""
    ids = [g for g, group in enumerate(parts[0]) for _ in group]
    flat = [[reward for group in part for reward in group] for part in parts]
    rewards = flat[0] if len(parts) == 1 else [list(row) for row in zip(*flat)]
    got = advantages(rewards, ids, estimator="bnpo", **hyper)
    return [[a for a, owner in zip(got, ids) if owner == g] for g in range(len(parts[0]))]


def _beta_density(case: Case) -> Iterator[Pair]:
    p = sum(case["inputs"]["rewards"]) / len(case["inputs"]["rewards"])
    shape = torch.tensor(1.5, dtype=torch.float64)
    density = beta_density(torch.tensor(p, dtype=torch.float64), shape, shape).item()
    yield "density", density, case["expected"]["beta_pdf_1p5"]
    yield "ratio", density / math.sqrt(p * (1 - p)), case["expected"]["ratio_to_sqrt_p1mp"]


def _red_drop(case: Case) -> Iterator[Pair]:
    keep = torch.tensor(case["inputs"]["keep"], dtype=torch.bool)
    normalize = case["hyper"]["std_normalize"]
    got = advantages(case["inputs"]["rewards"], estimator="red_drop", keep=keep, normalize=normalize)
    yield "A", got, case["expected"]["A"]


def _red_weight(case: Case) -> Iterator[Pair]:
    given = torch.tensor(case["inputs"]["A"], dtype=torch.float64)
    yield "W", weighted(given, case["hyper"]["temp"]).tolist(), case["expected"]["W"]


def _replayed(mode: str) -> Callable[[Case], Iterator[Pair]]:
    def rule(case: Case) -> Iterator[Pair]:
        on, off = case["inputs"]["on_rewards"], case["inputs"]["off_rewards"]
        flags = [False] * len(on) + [True] * len(off)
        got = advantages(on + off, mode=mode, off_policy=flags, **_normalization(case["hyper"]))
        yield "A_on", got[: len(on)], case["expected"]["A_on"]
        yield "A_off", got[len(on) :], case["expected"]["A_off"]

    return rule


def _single_replay(case: Case) -> Iterator[Pair]:
    # the file records the official code's NaN; a single replay has nothing to be compared with, so ours is 0
    assert case["expected"]["A_off"] == ["nan"]
    yield "A_off", advantages(case["inputs"]["off_rewards"], off_policy=[True]), [0.0]


def _rephrase(case: Case) -> Iterator[Pair]:
    inputs, hyper, expected = case["inputs"], case["hyper"], case["expected"]
    before = inputs["rewards_before"]
    group = repo_rephrase(
        before, before, "rephrased", inputs["rephrased_reward"], rho=hyper["rho"], delta=hyper["delta"]
    )
    yield "fail_rate", group.fail_rate, expected["fail_rate"]
    yield "replaced_index", group.replaced, expected["replaced_index"]
    yield "rewards_after", group.rewards, expected.get("rewards_after", before)
    yield "A", advantages(group.rewards, **_normalization(hyper)), expected["A"]


def _overlong(case: Case) -> Iterator[Pair]:
    hyper = case["hyper"]
    lengths = torch.tensor(case["inputs"]["lengths"])
    got = soft_overlong_penalty(lengths, max_length=hyper["L_max"], cache=hyper["L_cache"]).tolist()
    yield "penalty", got, case["expected"]["penalty"]


def _selected(strategy: str) -> Callable[[Case], Iterator[Pair]]:
    def rule(case: Case) -> Iterator[Pair]:
        scores = case["inputs"]["scores_oldest_first"]
        k = case["hyper"].get("k", len(scores))
        got = get_strategy(strategy)([], scores, k, random.Random(0))
        yield "indices", list(got), case["expected"]["indices"]

    return rule


_RULES: dict[str, Callable[[Case], Iterator[Pair]]] = {
    "grpo_trl": _grpo,
    "grpo_verl": _grpo,
    "dr_grpo": _grpo,
    "zero_variance_grpo": _grpo,
    "group_of_one_verl": _group_of_one,
    "rloo": _named("rloo"),
    "opo": _named("opo", "lengths"),
    "passk_verl_2503.19595": _passk,
    "bnpo": _bnpo,
    "bnpo_with_allwrong_group": _bnpo,
    "bnpo_multi_reward": _bnpo_parts,
    "bnpo_alpha_beta_1.5_is_grpo": _beta_density,
    "reinforce_pp_verl": _named("reinforce_pp", "lengths"),
    "reinforce_pp_baseline_verl": _named("reinforce_pp_baseline", "lengths"),
    "remax": _remax,
    "gpg_verl": _gpg,
    "asymre": _asymre,
    "red_drop_given_keep": _red_drop,
    "red_weight_effective": _red_weight,
    "repo_replay_split": _replayed("split"),
    "repo_replay_mixed": _replayed("mixed"),
    "repo_replay_off_single": _single_replay,
    "repo_rephrase": _rephrase,
    "repo_rephrase_gate_closed": _rephrase,
    "dapo_overlong": _overlong,
    "repo_replay_max_variance": _selected("variance"),
    "repo_replay_highest": _selected("reward"),
    "repo_replay_recent": _selected("recency"),
    "repo_replay_all": _selected("full_scope"),
}
