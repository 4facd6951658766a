"""Every objective through the fused head equals `policy_loss` on float64 log-probabilities, loss and gradients."""

import dataclasses
import importlib

import objective_cases as cases
import pytest
import torch
from golden_head import head_of

import repo_ops
from repo_ops.head import plan
from repo_ops.objectives import as_objective, get_objective
from repo_ops.objectives.base import Objective
from repo_ops.tokens import Tokens

fused_module = importlib.import_module("repo_ops.linear_policy_loss")  # the package has a function of that name
MODIFIED = {
    "grpo": {"sampler_weight": "sequence_truncate", "sampler_max": 1.5, "beta": 0.1, "entropy_coef": 0.01},
    "dapo": {"top_entropy_quantile": 0.4, "sampler_weight": "token_mask", "sampler_min": 0.5, "sampler_max": 1.5},
    "gspo": {"off_policy_mask": 0.0, "kl": "unbiased", "beta": 0.1, "eps_low": 0.2, "eps_high": 0.2},
    "spo": {"form": "cross_entropy"},
}
SETTINGS = [*((name, {}) for name in cases.NAMES), *MODIFIED.items()]


def _expected(objective, given, head, **more):
    hidden, weight, targets = (x.clone() for x in head)
    tensors = [hidden.requires_grad_(), weight.requires_grad_()]
    every = torch.log_softmax(hidden @ weight.t(), -1)
    logps = every.gather(-1, targets[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(-1)
    result = repo_ops.policy_loss(logps, entropy=entropy, **given.arguments(objective), **more)
    return [result.loss.detach(), *torch.autograd.grad(result.loss, tensors)]


def _fused(objective, given, head, dtype=torch.float64, **more):
    hidden, weight, targets = head
    tensors = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)]
    result = repo_ops.linear_policy_loss(*tensors, targets, **given.arguments(objective, dtype), **more)
    result.loss.backward()
    return [result.loss.detach().double(), *(x.grad.double() for x in tensors)]


def _given(name, objective):
    given = cases.suited(name, cases.batch(), objective)
    head = head_of(given.tokens.logps[None], None)
    hidden, weight, targets = head[0][0], head[1], head[2][0]
    # some sequences without advantage, which the fused head leaves out
    owner = torch.arange(len(given.lengths)).repeat_interleave(given.lengths)
    advantages = torch.where((owner == 0) | (owner == 4), 0.0, given.tokens.advantages)
    return cases.Batch(dataclasses.replace(given.tokens, advantages=advantages), given.off_policy), (
        hidden,
        weight,
        targets,
    )


def _tiles_of(monkeypatch, rows):
    real = plan.make_plan
    monkeypatch.setattr(fused_module, "make_plan", lambda *a: dataclasses.replace(real(*a), rows=rows))


@pytest.mark.parametrize(("name", "hyper"), SETTINGS)
def test_float32_in_one_tile(name, hyper):
    objective = cases.make(name, **hyper)
    given, head = _given(name, objective)
    want = _expected(objective, given, head, off_policy=given.off_policy)
    got = _fused(objective, given, head, torch.float32, off_policy=given.off_policy)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5 * float(w.abs().max()))


@pytest.mark.parametrize(("name", "hyper"), SETTINGS)
@pytest.mark.parametrize("rows", [7, 10])  # the longest sequence has 9 tokens: it fits in a tile, and it does not
def test_float64_in_tiles(monkeypatch, name, hyper, rows):
    objective = cases.make(name, **hyper)
    given, head = _given(name, objective)
    _tiles_of(monkeypatch, rows)
    want, got = _expected(objective, given, head), _fused(objective, given, head)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchored(Objective):
    """A user's own: REINFORCE with a squared anchor to the reference."""

    requires = ("ref_logps",)
    strength: float = 0.5

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        drift = tokens.logps - tokens.ref_logps
        return self.strength * drift.square() - tokens.advantages * tokens.logps


def _length_weighted(tokens: Tokens) -> torch.Tensor:
    return -tokens.advantages * tokens.logps * tokens.spread(tokens.lengths.double())


def test_a_users_own_objective_runs_in_one_sweep(monkeypatch):
    given, head = _given("mine", Anchored())
    _tiles_of(monkeypatch, 7)
    want = _expected(Anchored(), given, head)

    def second_sweep(*_, **__):
        raise AssertionError("a token objective needs no pass for its statistics")

    with monkeypatch.context() as patched:
        patched.setattr(fused_module.sweep, "statistics", second_sweep)
        got = _fused(Anchored(), given, head)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    # a function may read anything in the micro-batch, and pays for it with that pass
    by_function = as_objective(_length_weighted)
    for g, w in zip(_fused(by_function, given, head), _expected(by_function, given, head)):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_metrics_of_modifiers_and_objectives_are_there():
    objective = get_objective("bapo", sampler_weight="token_mask", sampler_max=1.2, off_policy_mask=0.1)
    given, head = _given("bapo", objective)
    found = repo_ops.linear_policy_loss(*head, **given.arguments(objective)).metrics
    bounds = {"bapo/low", "bapo/high", "bapo/measure", "bapo/evaluations", "clip_low", "clip_high"}
    assert bounds | {"sampler_weight", "off_policy_kept", "sampler_unknown"} <= found.keys()
    shown = repo_ops.summarize(found)
    assert 0 < shown["sampler_weight"] < 1.2
    assert 0 < shown["off_policy_kept"] < 1
    assert 1.2 <= shown["bapo/high"] <= 3
