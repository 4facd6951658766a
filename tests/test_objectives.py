"""Every file of repo_ops/objectives keeps what it declares: vectors, reference, scope, hyper-parameters, edges."""

import dataclasses
import inspect
import math
from pathlib import Path

import objective_cases as cases
import pytest
import torch

import repo_ops
from repo_ops.objectives import RECIPES, get_objective
from repo_ops.objectives.base import Objective
from repo_ops.tokens import Tokens

SETTINGS = [
    (
        name,
        {k: v for k, v in setting.items() if k in {f.name for f in dataclasses.fields(cases.module(name).Objective)}},
    )
    for name in cases.FILES
    for setting in (
        {},
        {"ratio_level": "sequence_sum", "delta": 2.0, "log_ratio_clamp": 0.5},
        {"ratio_level": "prefix_min"},
        {"form": {"spo": "cross_entropy", "kimi": "k1.5"}.get(name, "repo"), "divergence": "kl", "kl_tau": 0.1},
        {"symmetric": True, "adv_tau": 0.5, "anchor": "sampler_logps"},
        {"surrogate": "ppo", "rule": "open_code", "cap_prefix_at_1": True, "delta": 1.5},
        {"include_current": True},
        {"clip": "sequence_one_side", "weight": "truncated_ratio", "regularizer": "k2"},
        {"clip": "ring", "weight": "sequence_ratio", "eps_ring_low": 0.3, "eps_ring_high": 0.4},
        {"clip": "two_side", "weight": "advantage"},
        {"target": 0.99},
    )
    if setting.keys() <= {f.name for f in dataclasses.fields(cases.module(name).Objective)} or not setting
]


def _columns(vector):
    """A vector's input as sequences of tokens, whichever of the three shapes it is written in."""
    logps, old_logps, advantages, *named = vector
    if not isinstance(logps, list):
        return [[logps]], [[old_logps]], [advantages], named[0] if named else {}
    if not isinstance(logps[0], list):
        return [logps], [old_logps], [advantages], named[0] if named else {}
    return logps, old_logps, advantages, named[0] if named else {}


def _tokens(vector):
    logps, old_logps, advantages, named = _columns(vector)
    lengths = torch.tensor([len(row) for row in logps])

    def flat(rows):
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

    n = int(lengths.sum())
    given, extras = {}, {}
    for name, value in named.items():
        tensor = torch.tensor(value, dtype=torch.float64)
        if name.startswith("topk"):
            tensor = tensor.expand(n, -1)
        target = given if name in {f.name for f in dataclasses.fields(Tokens)} else extras
        target[name] = tensor.expand(n) if tensor.ndim == 0 else tensor
    spread = torch.tensor(advantages, dtype=torch.float64).repeat_interleave(lengths)
    return Tokens(flat(logps), flat(old_logps), spread, lengths, extras=extras, **given)


@pytest.mark.parametrize(
    ("name", "vector"), [(name, vector) for name in cases.FILES for vector in cases.module(name).VECTORS]
)
def test_vector(name, vector):
    given, (loss, gradient), *hyper = vector
    objective = cases.make(name, **(hyper[0] if hyper else {}))
    got_loss, got_gradient = cases.losses(objective, _tokens(given))
    for got, want in ((got_loss, loss), (got_gradient, gradient)):
        rows = want if isinstance(want, list) else [want]
        flat = [x for row in rows for x in (row if isinstance(row, list) else [row])]
        torch.testing.assert_close(got, torch.tensor(flat, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", cases.FILES)
def test_file_says_what_it_is(name):
    module = cases.module(name)
    assert "Source:" in module.__doc__
    assert len(module.VECTORS) >= 2
    source = Path(module.__file__).read_text()
    for field in inspect.get_annotations(module.Objective):
        if field in {f.name for f in dataclasses.fields(module.Objective)}:
            after = source.split(f"    {field}: ", 1)[1].split("\n", 2)[1]
            assert after.strip().startswith('"""'), f"{name}.{field}: expected a docstring under it"


@pytest.mark.parametrize(("name", "hyper"), SETTINGS)
def test_reference_agrees_on_random_tokens(name, hyper):
    if name == "clip_cov":  # its reference drops every candidate, so there must be no choice among them
        hyper = {**hyper, "fraction": 1.0, "cov_min": 0.05}
    objective = cases.make(name, **hyper)
    for seed in range(3):
        given = cases.suited(name, cases.batch(seed), objective)
        got, _ = cases.losses(objective, given.tokens)
        want = torch.tensor(cases.by_reference(name, objective, given), dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def _loss_and_gradient(objective, given, **more):
    logps = given.tokens.logps.clone().requires_grad_()
    entropy = given.tokens.entropy.clone().requires_grad_()
    result = repo_ops.policy_loss(logps, entropy=entropy, **{**given.arguments(objective), **more})
    gradients = torch.autograd.grad(result.loss, [logps, entropy], allow_unused=True)
    return torch.cat([result.loss.detach()[None], *(g for g in gradients if g is not None)])


FIELDS = [(name, field.name) for name in cases.FILES for field in dataclasses.fields(cases.module(name).Objective)]


@pytest.mark.parametrize(("name", "field"), [pair for pair in FIELDS if pair[1] not in cases.ACROSS_RANKS])
def test_every_hyper_parameter_matters_or_is_refused(name, field):
    context, value = cases.SWITCHES.get(f"{name}.{field}") or cases.SWITCHES[field]
    known = {f.name for f in dataclasses.fields(cases.module(name).Objective)}
    settings = {k: v for k, v in context.items() if k in known}
    if cases.module(name).Objective.one_loss_per_sequence and field.startswith(("sampler_", "top_entropy")):
        with pytest.raises(ValueError, match="a weight per token has no meaning"):
            cases.make(name, **{**settings, field: value})
        return
    if name == "gspo_token" and field == "ratio_level":
        value = "sequence_sum"
    before, after = cases.make(name, **settings), cases.make(name, **{**settings, field: value})
    assert getattr(before, field) != value
    given = cases.suited(name, cases.batch(), after)
    more = {"off_policy": given.off_policy}
    one, two = (_loss_and_gradient(objective, given, **more) for objective in (before, after))
    assert len(one) != len(two) or (one - two).abs().max() > 1e-4


@pytest.mark.parametrize("name", cases.NAMES)
def test_reach_is_what_is_read(name):
    objective = cases.make(name)
    tokens = cases.batch(per_token=objective.reach == "token").tokens
    whole = cases.losses(objective, tokens)
    if objective.reach == "token":
        for cut in (1, 5, 17, 29):
            pieces = [cases.losses(objective, cases.part(tokens, s, None)) for s in (slice(cut), slice(cut, None))]
            for got, want in zip(zip(*pieces), whole):
                torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=1e-14)
        return
    order = [5, 2, 3, 0, 7, 6, 1, 4]
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    rows = torch.cat([torch.arange(int(starts[i]), int(starts[i] + tokens.lengths[i])) for i in order])
    moved = cases.losses(objective, cases.part(tokens, rows, tokens.lengths[order]))
    for got, want in zip(moved, whole):
        torch.testing.assert_close(got, want[rows], rtol=1e-12, atol=1e-12)
    alone = [
        cases.losses(objective, cases.part(tokens, slice(int(s), int(s + n)), n[None]))
        for s, n in zip(starts, tokens.lengths)
    ]
    if objective.reach == "sequence":
        torch.testing.assert_close(torch.cat([g for _, g in alone]), whole[1], rtol=1e-12, atol=1e-12)
        with pytest.raises(TypeError, match="reads a whole sequence"):  # and token scope would not do
            cases.losses(objective, dataclasses.replace(tokens, lengths=None))


@pytest.mark.parametrize("name", cases.NAMES)
def test_zero_advantage_is_told_honestly(name):
    objective = cases.make(name)
    tokens = cases.batch(spread=3.0).tokens
    tokens = dataclasses.replace(tokens, advantages=torch.zeros_like(tokens.advantages))
    loss, gradient = cases.losses(objective, tokens)
    nothing = not loss.any() and not gradient.any()
    assert nothing is dataclasses.replace(objective, beta=0.0).skips_zero_advantage
    assert not cases.make(name, beta=0.1).skips_zero_advantage


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_are_finite(name, advantage):
    objective = cases.make(name)
    for dtype in (torch.float64, torch.float32):
        tokens = cases.batch().tokens
        n = len(tokens.logps)
        drift = torch.where(torch.arange(n) % 2 == 0, 100.0, -100.0)
        logps = -100.5 + torch.zeros(n)
        moved = {"logps": logps, "old_logps": logps - drift, "ref_logps": logps - drift, "sampler_logps": logps - drift}
        moved |= {"advantages": torch.full((n,), advantage)}
        tokens = dataclasses.replace(tokens, **{k: v.to(dtype) for k, v in moved.items()})
        tokens = dataclasses.replace(tokens, extras={k: v.to(dtype) for k, v in tokens.extras.items()})
        loss, gradient = cases.losses(objective, tokens)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", cases.NAMES)
def test_no_token_and_one_token(name):
    objective = cases.make(name)
    for lengths in ((), (0, 0), (1,)):
        given = cases.batch(lengths=lengths)
        logps = given.tokens.logps.clone().requires_grad_()
        result = repo_ops.policy_loss(logps, entropy=given.tokens.entropy, **given.arguments(objective))
        result.loss.backward()
        assert result.loss.isfinite()
        assert logps.grad is not None
        assert logps.grad.isfinite().all()
        if not sum(lengths):
            assert result.loss == 0


# a batch statistic of a micro-batch is its own
@pytest.mark.parametrize("name", [name for name in cases.NAMES if cases.make(name).reach != "batch"])
def test_micro_batches_add_up_to_the_step(name):
    objective = cases.make(name)
    given = cases.batch()
    counts = repo_ops.NumItems.of(given.lengths)
    whole = _loss_and_gradient(objective, given)
    parts = []
    for first, last in ((0, 3), (3, 8)):
        a, b = int(given.cu_seqlens[first]), int(given.cu_seqlens[last])
        piece = cases.Batch(cases.part(given.tokens, slice(a, b), given.lengths[first:last]), given.off_policy)
        parts.append(_loss_and_gradient(objective, piece, num_items=counts))
    n = len(given.tokens.logps)
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    gradient = torch.cat([p[1 : 1 + len(p[1:])] for p in parts])
    torch.testing.assert_close(gradient, whole[1 : 1 + n])


NOT_LINEAR = {"kimi", "kl_cov", "spo", "red_weight", "rep_asymre", "rep_opmd", "dppo_prime_rl", "ipo", "deepseek_v32"}


@pytest.mark.parametrize("name", sorted(set(cases.NAMES) - NOT_LINEAR - {"clip_cov"}))
def test_scaled_advantages_scale_the_gradient(name):
    objective = cases.make(name)
    tokens = cases.batch().tokens
    _, once = cases.losses(objective, tokens)
    _, thrice = cases.losses(objective, dataclasses.replace(tokens, advantages=3 * tokens.advantages))
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", cases.NAMES)
def test_gates_tell_which_gradients_are_off(name):
    objective = cases.make(name)
    tokens = cases.batch().tokens
    _, gradient = cases.losses(objective, tokens)
    for gate, where in objective.gates(tokens).items():
        assert where.dtype == torch.bool
        if gate in ("clip_low", "clip_high") and objective.reach == "token" and name != "rep_opmd":
            assert not gradient[where].any(), gate


def test_recipes_are_settings_of_files():
    for name, (file, settings) in RECIPES.items():
        assert file in cases.FILES
        assert name not in cases.FILES
        known = {f.name for f in dataclasses.fields(cases.module(file).Objective)}
        assert settings.keys() <= known


@pytest.mark.parametrize(
    ("name", "hyper", "complaint"),
    [
        ("grpo", {"sampler_max": 2.0}, "sampler_max: limits a weight that is off"),
        ("grpo", {"sampler_weight": "token_clip"}, "sampler_weight: expected one of token_truncate"),
        (
            "grpo",
            {"sampler_weight": "token_mask", "sampler_min": 3.0, "sampler_max": 2.0},
            "sampler_min <= sampler_max",
        ),
        ("grpo", {"delta": 1.1}, "delta: expected at least 1"),
        ("grpo", {"eps_low": 1.5}, "eps_low: expected a width <= 1"),
        ("grpo", {"process_group": object()}, "process_group: nothing in this objective is computed over a batch"),
        ("grpo", {"top_entropy_quantile": 0.0}, "top_entropy_quantile: expected a fraction"),
        ("kimi", {"sampler_weight": "token_mask"}, "a weight per token has no meaning"),
        ("spo", {"top_entropy_quantile": 0.2}, "a weight per token has no meaning"),
        ("minpro", {"surrogate": "ppo", "include_current": True}, "no gradient left"),
        ("dppo", {"ratio_cap": 10.0}, "ratio_cap: an attached ratio has no cap"),
        ("dppo", {"behaviour": "sampler_logps", "sampler_weight": "token_mask"}, "would count them twice"),
        ("rec", {"eps_low": 0.1}, "eps_low: clip 'none' with weight 'none' does not read it"),
        ("rec", {"clip": "one_side", "eps_ring_low": 0.1}, "eps_ring_low: clip 'one_side'"),
        ("bapo", {"low_start": 0.95}, "low_start: expected ratio bounds"),
        ("dr_grpo", {}, "max_length: expected the generation budget"),
        ("clip_cov", {"cov_min": 6.0}, "cov_min: expected less than cov_max"),
    ],
)
def test_impossible_settings_are_refused_with_a_reason(name, hyper, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        get_objective(name, **hyper)


def test_missing_inputs_are_refused_by_name():
    given = cases.batch()
    plain = {"cu_seqlens": given.cu_seqlens, "old_logps": given.tokens.old_logps}
    for name, hyper, argument in (
        ("grpo", {"sampler_weight": "token_mask"}, "sampler_logps"),
        ("grpo", {"off_policy_mask": 0.1}, "sampler_logps"),
        ("dppo", {"behaviour": "sampler_logps"}, "sampler_logps"),
        ("spo", {}, "ref_logps"),
        ("high_entropy", {}, "entropy"),
        ("dppo_topk", {}, "extras: expected 'topk_behaviour_logps', 'topk_offsets'"),
    ):
        with pytest.raises(ValueError, match=argument):
            repo_ops.policy_loss(
                given.tokens.logps, given.tokens.advantages, objective=get_objective(name, **hyper), **plain
            )


ONE_FILE = '''
"""Half of REINFORCE: -A logp / 2. Source: this test."""

from dataclasses import dataclass

from torch import Tensor

from repo_ops.objectives import base
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(base.Objective):
    share: float = 0.5
    """Of REINFORCE; 0.5."""

    def __call__(self, tokens: Tokens) -> Tensor:
        return -self.share * tokens.advantages * tokens.logps
'''


def test_adding_an_objective_is_adding_a_file(tmp_path, monkeypatch):
    (tmp_path / "half_reinforce.py").write_text(ONE_FILE)
    monkeypatch.setattr(repo_ops.objectives, "__path__", [*repo_ops.objectives.__path__, str(tmp_path)])
    assert "half_reinforce" in repo_ops.objective_names()
    given = cases.batch()
    arguments = given.arguments(repo_ops.get_objective("half_reinforce", share=0.25))
    found = _loss_and_gradient(arguments["objective"], given)
    torch.testing.assert_close(found, _loss_and_gradient(get_objective("reinforce"), given) / 4)
    with pytest.raises(ValueError, match="did you mean 'half_reinforce'"):
        repo_ops.get_objective("half_reinforze")


def _squared_drift(tokens: Tokens) -> torch.Tensor:
    return tokens.log_ratio.square() - tokens.advantages * tokens.logps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredDrift(Objective):
    weight: float = 1.0

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        return self.weight * tokens.log_ratio.square() - tokens.advantages * tokens.logps


def test_a_users_own_objective_is_a_function_or_a_dataclass():
    from repo_ops.objectives import as_objective

    given = cases.batch()
    want = _loss_and_gradient(get_objective("rec", regularizer="k2", regularizer_coef=1.0), given)
    assert as_objective(_squared_drift).reach == "batch"
    assert as_objective(SquaredDrift()).reach == "token"
    assert as_objective(SquaredDrift(sampler_weight="sequence_mask")).reach == "sequence"
    for objective in (as_objective(_squared_drift), SquaredDrift()):
        torch.testing.assert_close(_loss_and_gradient(objective, given), want)
    corrected = _loss_and_gradient(SquaredDrift(sampler_weight="token_mask", sampler_max=1.0), given)
    assert (corrected - want).abs().max() > 1e-3
    with pytest.raises(TypeError, match="make an instance"):
        as_objective(SquaredDrift)


def test_a_token_without_a_finite_sampler_logp_is_the_only_one_that_loses():
    given = cases.batch()
    for hyper in ({"sampler_weight": "token_truncate"}, {"sampler_weight": "sequence_mask"}, {"off_policy_mask": 0.0}):
        objective = get_objective("dapo", **hyper)
        broken = given.tokens.sampler_logps.clone()
        broken[7] = math.nan
        broken[20] = -math.inf
        arguments = {**given.arguments(objective), "sampler_logps": broken}
        logps = given.tokens.logps.clone().requires_grad_()
        result = repo_ops.policy_loss(logps, **arguments)
        result.loss.backward()
        # to the others it looks like an engine that agreed with the trainer about these two
        agreed = broken.clone()
        agreed[[7, 20]] = given.tokens.old_logps[[7, 20]]
        other = _loss_and_gradient(objective, given, sampler_logps=agreed)
        want = other[1 : 1 + len(logps)].clone()
        want[[7, 20]] = 0
        torch.testing.assert_close(logps.grad, want)
        assert float(result.metrics["sampler_unknown"].total) == 2
