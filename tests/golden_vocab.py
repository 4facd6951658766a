"""Golden cases that start from logits: the entropy bonus and the divergence over the top K tokens."""

from __future__ import annotations

from typing import Any

import torch
from golden_names import NotCoveredError

import repo_ops
from repo_ops.logit_offsets import logit_offsets
from repo_ops.terms import divergence

Case = dict[str, Any]


def vocab_errors(case: Case) -> float:
    """Largest |got - want| / (|want| + 1e-3) over what the case expects, in float64."""
    rules = {"entropy_bonus": _entropy_bonus, "dppo_topk_tv": _topk, "dppo_topk_kl": _topk}
    if case["objective"] not in rules:
        raise NotCoveredError(f"no rule for {case['objective']!r}")
    got = rules[case["objective"]](case)
    worst = 0.0
    for name, value in got.items():
        want = torch.tensor(case["expected"][name], dtype=torch.float64)
        worst = max(worst, float(((value - want).abs() / (want.abs() + 1e-3)).max()))
    return worst


def _entropy_bonus(case: Case) -> dict[str, torch.Tensor]:
    # with the identity as head, hidden states are logits
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64, requires_grad=True)
    objective = repo_ops.get_objective("dapo", entropy_coef=case["hyper"]["entropy_coef"])
    result = repo_ops.linear_policy_loss(
        logits,
        torch.eye(logits.shape[-1], dtype=torch.float64),
        torch.zeros(logits.shape[:2], dtype=torch.int64),
        torch.zeros(len(logits), dtype=torch.float64),
        objective=objective,
    )
    result.loss.backward()
    assert result.entropy is not None
    assert logits.grad is not None
    return {"loss": result.loss.detach(), "entropy": result.entropy, "dlogits": logits.grad}


def _topk(case: Case) -> dict[str, torch.Tensor]:
    inputs, hyper = case["inputs"], case["hyper"]
    kind = case["objective"].rsplit("_", 1)[1]
    targets = torch.tensor(inputs["tokens"])
    both = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("logits", "behaviour_logits"))
    current, behaviour = (torch.log_softmax(logits, -1) for logits in both)
    ids = divergence.support_ids(behaviour.topk(hyper["K"], -1).indices, targets)
    logps, old_logps = (every.gather(-1, targets[..., None])[..., 0] for every in (current, behaviour))
    logps.requires_grad_()
    extras = {"topk_behaviour_logps": behaviour.gather(-1, ids)}
    # with the identity as head, hidden states are logits
    extras["topk_offsets"] = logit_offsets(current, torch.eye(current.shape[-1], dtype=torch.float64), targets, ids)
    objective = repo_ops.get_objective(
        "dppo_topk", divergence=kind, delta_low=hyper["delta"], delta_high=hyper["delta"]
    )
    advantages = torch.tensor(inputs["A"], dtype=torch.float64)
    result = repo_ops.policy_loss(logps, advantages, objective=objective, old_logps=old_logps, extras=extras)
    (dlogps,) = torch.autograd.grad(result.loss, logps)
    found = {
        "topk_ids": ids,
        "divergence": divergence.SUPPORT[kind](current.gather(-1, ids), behaviour.gather(-1, ids)),
        "full_divergence": divergence.SUPPORT[kind](current, behaviour),
        # a support of the sampled token alone: without the 1e-8 that the official binary form adds to the rest
        "binary_divergence": divergence.SUPPORT[kind](logps[..., None], old_logps[..., None]),
        "keep": (dlogps != 0).double(),
        "logp": logps,
        "behaviour_logp": old_logps,
        "loss": result.loss,
        "dlogp": dlogps,
    }
    return {name: value.detach() for name, value in found.items()}
