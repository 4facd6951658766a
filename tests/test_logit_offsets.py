"""Offsets of a few logits against the whole row, and DPPO's divergence over the top K in one sweep."""

import importlib

import pytest
import torch

import repo_ops
from repo_ops.logit_offsets import logit_offsets
from repo_ops.terms.divergence import support_ids

fused_module = importlib.import_module("repo_ops.linear_policy_loss")
SHAPE, V, D, K = (3, 5), 40, 8, 4


def _head():
    hidden = torch.randn(*SHAPE, D, dtype=torch.float64)
    weight, behaviour = (torch.randn(V, D, dtype=torch.float64) for _ in range(2))
    return hidden, weight, weight + 0.3 * behaviour, torch.randint(V, SHAPE)


@pytest.mark.parametrize("budget", [1, 1 << 25])  # a block of one row, and one block
def test_equals_the_whole_row(monkeypatch, budget):
    module = importlib.import_module("repo_ops.logit_offsets")
    monkeypatch.setattr(module, "BLOCK_BYTES", budget)
    hidden, weight, _, targets = _head()
    bias, ids = torch.randn(V, dtype=torch.float64), torch.randint(V, (*SHAPE, K))
    settings = {"bias": bias, "temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
    z = 5.0 * torch.tanh(1.3 * (hidden @ weight.t() + bias) / 5.0) / 0.7
    every = torch.log_softmax(z, -1)
    want = every.gather(-1, ids) - every.gather(-1, targets[..., None])
    torch.testing.assert_close(logit_offsets(hidden, weight, targets, ids, **settings), want)
    logps = repo_ops.linear_logps(hidden, weight, targets, **settings).logps
    torch.testing.assert_close(
        logit_offsets(hidden, weight, targets, ids, **settings) + logps[..., None], every.gather(-1, ids)
    )


@pytest.mark.parametrize("asked_by", ["autocast", "argument"])
def test_operands_are_rounded_as_those_of_the_head(asked_by):
    hidden, weight, _, targets = (x.float() if x.is_floating_point() else x for x in _head())
    ids, given = torch.randint(V, (*SHAPE, K)), torch.bfloat16 if asked_by == "argument" else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked_by == "autocast"):
        found = logit_offsets(hidden, weight, targets, ids, operand_dtype=given)
        options = repo_ops.Options(operand_dtype=given)
        logps = repo_ops.linear_logps(hidden, weight, targets, options=options).logps
    every = torch.log_softmax(hidden.bfloat16().double() @ weight.bfloat16().double().t(), -1)
    torch.testing.assert_close((found + logps[..., None]).double(), every.gather(-1, ids), rtol=0, atol=1e-5)


def test_shapes_are_checked():
    hidden, weight, _, targets = _head()
    with pytest.raises(ValueError, match="ids: expected shape"):
        logit_offsets(hidden, weight, targets, torch.zeros(3, 4, K, dtype=torch.int64))


def test_dppo_topk_in_one_sweep(monkeypatch):
    hidden, weight, old_weight, targets = _head()
    current, behaviour = (torch.log_softmax(hidden @ w.t(), -1) for w in (weight, old_weight))
    ids = support_ids(behaviour.topk(K, -1).indices, targets)
    objective = repo_ops.get_objective("dppo_topk", delta_low=0.1, delta_high=0.1)
    arguments = {
        "advantages": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64),
        "old_logps": behaviour.gather(-1, targets[..., None])[..., 0],
        "extras": {
            "topk_offsets": logit_offsets(hidden, weight, targets, ids),
            "topk_behaviour_logps": behaviour.gather(-1, ids),
        },
        "objective": objective,
    }
    logps = current.gather(-1, targets[..., None])[..., 0].requires_grad_()
    want = repo_ops.policy_loss(logps, **arguments)
    want.loss.backward()
    # the rule by its definition, over the K ids and the rest
    p, q = (
        torch.cat([x.gather(-1, ids).exp(), 1 - x.gather(-1, ids).exp().sum(-1, keepdim=True)], -1)
        for x in (current, behaviour)
    )
    far, moved = (p - q).abs().sum(-1) / 2 > 0.1, logps.detach() - arguments["old_logps"]
    masked = far & (moved * arguments["advantages"][:, None] > 0)
    assert 0 < int(masked.sum()) < masked.numel()
    assert torch.equal(logps.grad == 0, masked)

    def second_sweep(*_, **__):
        raise AssertionError("the offsets make a pass for statistics needless")

    monkeypatch.setattr(fused_module.sweep, "statistics", second_sweep)
    got = repo_ops.linear_policy_loss(hidden.clone().requires_grad_(), weight, targets, **arguments)
    torch.testing.assert_close(got.loss, want.loss)
