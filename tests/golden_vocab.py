"""Golden cases that start from logits: the entropy bonus and the divergence over the top K tokens."""

from __future__ import annotations

from typing import Any

import torch
from golden_names import NotCoveredError

import repo_ops

Case = dict[str, Any]


def vocab_errors(case: Case) -> float:
    """Largest |got - want| / (|want| + 1e-3) over what the case expects, in float64."""
    rules = {"entropy_bonus": _entropy_bonus}
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
