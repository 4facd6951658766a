"""The axes that objectives are made of, one by one, against numbers worked by hand and the golden intermediates."""

import dataclasses
import json
import math
from pathlib import Path

import objective_cases as cases
import pytest
import torch
from golden_names import translate

import repo_ops
from repo_ops import kl
from repo_ops.objectives import get_objective, grpo
from repo_ops.scope import widest
from repo_ops.terms import across_ranks, bounds_search, divergence, ratio_level, trust_region
from repo_ops.terms.bounded_exp import bounded_exp
from repo_ops.terms.clipped_ratio import clipped_ratio
from repo_ops.terms.entropy import AdaptiveEntropy, HighEntropy
from repo_ops.terms.off_policy_mask import OffPolicyMask
from repo_ops.terms.sampler import SamplerWeight
from repo_ops.terms.weighted_logps import weighted_logps
from repo_ops.tokens import Tokens

CONTENT = json.loads((Path(__file__).parent / "data" / "objectives_golden.json").read_text())
FIXTURES = CONTENT["fixtures"]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def _live(case, values):
    mask = torch.tensor(FIXTURES[case["fixture"]]["mask"]) != 0
    return f64(values)[mask]


def _tokens(case):
    fixture = FIXTURES[case["fixture"]]
    lengths = torch.tensor(fixture["mask"]).sum(1)
    named = {"logps": "logp", "old_logps": "oldlogp", "ref_logps": "reflogp", "sampler_logps": "samplogp"}
    given = {ours: _live(case, fixture[theirs]) for ours, theirs in named.items()}
    if entropy := case.get("inputs_extra", {}).get("entropy"):
        given["entropy"] = _live(case, entropy)
    return Tokens(advantages=f64(fixture["A"]).repeat_interleave(lengths), lengths=lengths, **given)


def _with(key):
    found = [case for case in CONTENT["cases"] if case["kind"] == "loss" and key in case["expected"]]
    assert found
    return pytest.mark.parametrize("case", found, ids=lambda case: case["id"])


def _objective(case):
    call = translate(case | FIXTURES[case["fixture"]])
    return get_objective(call.objective, **call.hyper)


@_with("c_low")
def test_bapo_bounds(case):
    metrics, want = _objective(case).metrics(_tokens(case)), case["expected"]
    measure = want.get("rho", want.get("pos_neg_ratio"))
    for name, value in (("low", want["c_low"]), ("high", want["c_high"]), ("measure", measure)):
        assert float(metrics[f"bapo/{name}"].total) == pytest.approx(value, rel=1e-6)
    assert int(metrics["bapo/evaluations"].total) == want["evaluations"]


@_with("prefix_min_ratio")
def test_prefix_minimum(case):
    tokens = _tokens(case)
    found = ratio_level.running_min(tokens, tokens.log_ratio, include_current=False).exp()
    torch.testing.assert_close(found, _live(case, case["expected"]["prefix_min_ratio"]))


@_with("weight")
def test_sampler_and_topr_weights(case):
    objective, tokens, want = _objective(case), _tokens(case), f64(case["expected"]["weight"])
    if case["objective"] == "topr":
        torch.testing.assert_close(objective._weight(tokens), want.repeat_interleave(tokens.lengths))
    else:
        (modifier,) = objective.modifiers
        torch.testing.assert_close(modifier(tokens), _live(case, want.tolist()))


@_with("divergence")
def test_binary_divergence(case):
    objective, tokens = _objective(case), _tokens(case)
    found = divergence.BINARY[objective.divergence](tokens.logps, tokens.old_logps)
    torch.testing.assert_close(found, _live(case, case["expected"]["divergence"]))
    kept = ~torch.stack(list(objective.gates(tokens).values())).any(0)
    assert kept.double().tolist() == _live(case, case["expected"]["keep"]).tolist()


@_with("entropy_mask")
def test_high_entropy(case):
    (modifier,) = _objective(case).modifiers
    assert modifier(_tokens(case)).tolist() == _live(case, case["expected"]["entropy_mask"]).tolist()


@_with("phi")
def test_vespo_phi(case):
    tokens = _tokens(case)
    want = f64(case["expected"]["phi"]).repeat_interleave(tokens.lengths)
    torch.testing.assert_close(_objective(case)._phi(tokens), want)


@_with("dropped")
def test_clip_cov_choice(case):
    found = _objective(case).gates(_tokens(case))["clip_cov"].double()
    assert found.tolist() == _live(case, case["expected"]["dropped"]).tolist()


@_with("selected")
def test_kl_cov_choice(case):
    found = _objective(case).gates(_tokens(case))["kl_cov"].double()
    assert found.tolist() == _live(case, case["expected"]["selected"]).tolist()


def _two(**given):
    """Two sequences of two tokens."""
    plain = {"logps": f64([-1.0, -2.0, -1.0, -1.0]), "old_logps": f64([-1.0, -2.0, -1.0, -1.0])}
    return Tokens(advantages=f64([1.0, 1.0, -1.0, -1.0]), lengths=torch.tensor([2, 2]), **{**plain, **given})


def test_off_policy_mask_drops_a_drifted_mistake_and_only_that():
    # both sequences drifted by 0.6 nats a token on average; the first one is a success
    tokens = _two(sampler_logps=f64([-0.2, -1.6, -0.5, -0.3]))
    assert OffPolicyMask(0.5)(tokens).tolist() == [1, 1, 0, 0]
    assert OffPolicyMask(0.61)(tokens).tolist() == [1, 1, 1, 1]
    # the other direction is no drift away from the sampler
    assert OffPolicyMask(0.5)(_two(sampler_logps=f64([-9.0] * 4))).tolist() == [1, 1, 1, 1]


def test_sampler_weights_by_level_and_action():
    gap = math.log(2)
    tokens = _two(sampler_logps=f64([-1.0 - gap, -2.0, -1.0 - gap, -1.0 - gap]))
    for mode, low, high, want in (
        ("token_truncate", None, None, [2, 1, 2, 2]),
        ("token_truncate", 1.2, 1.5, [1.5, 1.2, 1.5, 1.5]),
        ("token_mask", None, 1.5, [0, 1, 0, 0]),
        ("token_mask", 1.5, None, [2, 0, 2, 2]),
        ("sequence_truncate", None, 3.0, [2, 2, 3, 3]),
        ("sequence_mask", None, 3.0, [2, 2, 0, 0]),
        ("geometric_truncate", None, None, [math.sqrt(2)] * 2 + [2] * 2),
    ):
        torch.testing.assert_close(SamplerWeight(mode, low, high)(tokens), f64(want))
    far = _two(sampler_logps=f64([-101.0, -2.0, -1.0, -1.0]))
    assert SamplerWeight("token_truncate", None, None)(far)[0] == pytest.approx(math.exp(20))
    assert SamplerWeight("token_truncate", None, None).scope == "token"
    assert SamplerWeight("sequence_mask", None, None).scope == "sequence"


def test_high_entropy_keeps_the_top_fraction_and_ties():
    for entropy, fraction, want in (
        ([0.1, 0.4, 0.2, 0.3], 0.25, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], 1.0, [1, 1, 1, 1]),
        ([0.5, 0.5, 0.5, 0.5], 0.2, [1, 1, 1, 1]),
    ):
        assert HighEntropy(fraction)(_two(entropy=f64(entropy))).tolist() == want


def test_adaptive_entropy_follows_its_target():
    controller = AdaptiveEntropy(target=0.5, step=0.01)
    assert [controller.update(h) for h in (0.4, 0.5)] == pytest.approx([0.01, 0.02])
    assert controller.update(0.6) == 0.0  # above the target nothing is applied
    assert controller.coef == pytest.approx(0.01)
    assert [controller.update(h) for h in (0.6, 0.6)] == [0.0, 0.0]
    assert controller.coef == 0.0  # and it never turns into a malus


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("abs", 0.5, -1.0),
        ("k3_plus", math.exp(0.5) - 1.5, -0.5),
        ("unbiased", 2 * (math.exp(0.5) - 1.5), 2 * -0.5),  # ratio 2
    ],
)
def test_kl_by_hand(name, value, gradient):
    logps = f64([-2.0]).requires_grad_()
    tokens = Tokens(logps, f64([-2.0 - math.log(2)]), f64([0.0]), None, ref_logps=f64([-1.5]))
    found = kl.KL[name](tokens)
    assert found.item() == pytest.approx(value)
    assert torch.autograd.grad(found, logps)[0].item() == pytest.approx(gradient)


def test_trust_regions_on_a_line_of_ratios():
    ratio = f64([0.3, 0.7, 1.0, 1.5, 4.0])
    up, down = torch.ones(5), -torch.ones(5)
    bounds = trust_region.Bounds(0.8, 1.2, 0.4, 3.0)
    for rule, advantages, want in (
        (trust_region.everywhere, up, [1, 1, 1, 1, 1]),
        (trust_region.one_side, up, [1, 1, 1, 0, 0]),
        (trust_region.one_side, down, [0, 0, 1, 1, 1]),
        (trust_region.two_side, up, [0, 0, 1, 0, 0]),
        (trust_region.ring, up, [1, 0, 1, 0, 0]),
        (trust_region.ring, down, [0, 0, 1, 0, 1]),
    ):
        assert rule(ratio, advantages, bounds).int().tolist() == want


@pytest.mark.parametrize("level", sorted(ratio_level.LEVELS))
def test_ratio_levels_against_their_reference(level):
    tokens = cases.batch(lengths=(1, 17, 0, 33, 64, 2)).tokens
    found = ratio_level.LEVELS[level].combine(tokens, tokens.log_ratio)
    for piece, own in zip(found.split(tokens.lengths.tolist()), tokens.log_ratio.split(tokens.lengths.tolist())):
        if len(own):
            assert piece.tolist() == pytest.approx(ratio_level.reference(level, own.tolist()))


def test_running_minimum_including_the_token_itself():
    tokens = cases.batch(lengths=(5, 3)).tokens
    found = ratio_level.running_min(tokens, f64([3.0, 5.0, 2.0, 4.0, 9.0, 1.0, 7.0, 0.5]), include_current=True)
    assert found.tolist() == [3, 3, 2, 2, 2, 1, 1, 0.5]


def test_bounds_search_walks_its_path():
    assert bounds_search.path(0.6, 0.9, 0.1) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert bounds_search.path(0.6, 0.9, 0.2) == pytest.approx([0.6, 0.8, 0.9])
    assert bounds_search.path(0.6, 0.9, 0.0) == [0.6]
    no_token = cases.batch(lengths=()).tokens
    for rule in bounds_search.RULES.values():
        found = bounds_search.search(no_token, rule, [0.6, 0.9], [1.2, 3.0], 0.5, None)
        assert (float(found.low), float(found.high)) == (0.6, 1.2)  # nothing to balance: where it starts


def test_support_ids_hold_the_sampled_token():
    ids = divergence.support_ids(torch.tensor([[4, 2, 1], [4, 2, 1]]), torch.tensor([2, 7]))
    assert ids.tolist() == [[4, 2, 1], [4, 2, 7]]


def test_bounded_exp_keeps_value_and_gradient_below_its_limit():
    x = torch.tensor([-200.0, 0.0, 3.0, 69.0, 200.0], requires_grad=True)
    found = bounded_exp(x)
    found.sum().backward()
    assert found.isfinite().all()
    torch.testing.assert_close(x.grad, found.detach())
    torch.testing.assert_close(found[:4].detach(), x[:4].detach().exp())
    assert found[4].item() == pytest.approx(math.exp(70), rel=1e-5)


def test_an_infinite_factor_meets_zero_without_nan():
    logps = f64([-1.0, -1.0, -1.0]).requires_grad_()
    loss = weighted_logps(logps, f64([0.0, 1.0, 2.0]), f64([math.inf, 0.0, 3.0]))
    assert loss.tolist() == [0, 0, 6]
    log_ratio = f64([1e4, 1e4, -1e4]).requires_grad_()
    found = clipped_ratio(log_ratio, f64([0.0, 1.0, -1.0]), 0.8, 1.2)
    found.sum().backward()
    assert found.tolist() == [0, -1.2, 0.8]
    assert log_ratio.grad.tolist() == [0, 0, 0]


def test_statistics_without_a_group_are_this_ranks_own():
    values = f64([1.0, 2.0, 6.0])
    assert across_ranks.mean(values, None) == 3
    assert across_ranks.mean(values[:0], None) == 0
    assert across_ranks.total(values, None) is values
    assert across_ranks.gathered(values, None) is values


def test_scopes_widen():
    assert widest("token", "sequence") == "sequence"
    assert widest("batch", "sequence", "token") == "batch"
    assert get_objective("dapo", top_entropy_quantile=0.2).reach == "batch"
    assert get_objective("grpo", ratio_level="prefix_min").reach == "sequence"
    assert get_objective("grpo", sampler_weight="token_mask").reach == "token"


def test_composition_gives_the_papers_own_files():
    given = cases.batch()
    for name, parts in (
        ("gspo", {"ratio_level": "sequence_mean", "eps_low": 3e-4, "eps_high": 4e-4}),
        ("rloo", {"ratio_level": "sequence_sum"}),
    ):
        one, two = (cases.losses(get_objective(*x[:1], **x[1]), given.tokens) for x in ((name, {}), ("grpo", parts)))
        torch.testing.assert_close(one, two)
    minpro = cases.losses(get_objective("minpro"), given.tokens)
    torch.testing.assert_close(minpro, cases.losses(get_objective("cispo", ratio_level="prefix_min"), given.tokens))
    clipped = get_objective("ppo", ratio_level="prefix_min", eps_high=0.28)
    torch.testing.assert_close(
        cases.losses(get_objective("minpro_ppo"), given.tokens), cases.losses(clipped, given.tokens)
    )


def test_extras_by_sequence_and_by_token_and_their_shapes():
    given = cases.batch(lengths=(3, 2))
    t, spo = given.tokens, get_objective("spo")
    arguments = given.arguments(spo)
    by_sequence = {"baseline": t.extras["baseline"][[0, 3]]}
    one = repo_ops.policy_loss(t.logps, **arguments).loss
    two = repo_ops.policy_loss(t.logps, **{**arguments, "extras": by_sequence}).loss
    assert one == two
    shifted = {**arguments, "extras": {}, "advantages": t.advantages - t.extras["baseline"]}
    torch.testing.assert_close(repo_ops.policy_loss(t.logps, **shifted).loss, one)
    with pytest.raises(ValueError, match=r"extras\['baseline'\]: expected shape \[2\]"):
        repo_ops.policy_loss(t.logps, **{**arguments, "extras": {"baseline": f64([1.0] * 4)}})
    with pytest.raises(TypeError, match=r"extras\['baseline'\]: expected a tensor"):
        repo_ops.policy_loss(t.logps, **{**arguments, "extras": {"baseline": 0.5}})


def test_spo_cross_entropy_refuses_rewards_above_zero():
    given = cases.batch()
    arguments = given.arguments(get_objective("spo", form="cross_entropy"))
    with pytest.raises(ValueError, match="advantages: expected rewards <= 0"):
        repo_ops.policy_loss(given.tokens.logps, **{**arguments, "advantages": given.tokens.advantages.abs() + 1})


def test_vespo_takes_the_sampler_weight_into_the_ratio_of_the_sequence():
    # a gap of log 2 on one of two tokens: W = 2, as if the policy itself had moved
    tokens = _two(sampler_logps=f64([-1.0 - math.log(2), -2.0, -1.0, -1.0]))
    objective = get_objective("vespo", sampler_weight="token_truncate")
    assert objective.modifiers == ()
    assert "sampler_logps" in objective.reads
    assert objective._phi(tokens).tolist() == pytest.approx([4 * math.exp(-3)] * 2 + [1.0] * 2)
    masked = get_objective("vespo", sampler_weight="token_mask", sampler_max=1.5)._phi(tokens)
    assert masked.tolist() == pytest.approx([1e-16 * math.exp(3)] * 2 + [1.0] * 2, rel=1e-6)
    with pytest.raises(ValueError, match="sampler_weight: expected token_truncate or token_mask"):
        get_objective("vespo", sampler_weight="sequence_mask")


def test_trl_6808_a_subclass_with_its_own_loss_is_not_taken_for_its_parent():
    # neither replaced by the kernel of the parent's loss, nor spared tokens that carry nothing in the parent's alone
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithDrift(grpo.Objective):
        def __call__(self, tokens):
            return super().__call__(tokens) + tokens.log_ratio.square()

    class OtherRatio(grpo.Objective):
        def log_ratio(self, tokens):
            return 2 * super().log_ratio(tokens)

    class Same(grpo.Objective):
        def metrics(self, tokens):
            return {}

    assert WithDrift().kernel_terms is OtherRatio().kernel_terms is None
    assert not WithDrift().skips_zero_advantage
    assert Same().kernel_terms == grpo.Objective().kernel_terms is not None
    assert Same().skips_zero_advantage
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    targets, old = torch.randint(0, 7, (2, 3)), -torch.rand(2, 3)
    arguments = {"objective": WithDrift(reduction="token-sum"), "old_logps": old}
    found = repo_ops.linear_policy_loss(hidden, weight, targets, torch.zeros(2), **arguments).loss
    drift = (repo_ops.linear_logps(hidden, weight, targets).logps - old).square().sum()
    torch.testing.assert_close(found, drift)


def test_only_losses_that_the_kernel_knows_have_kernel_terms():
    for name in ("grpo", "gspo", "repo", "luspo", "dapo"):
        assert get_objective(name).kernel_terms is not None
    for name in ("gspo_token", "rloo", "clip_cov", "cispo", "bapo", "minpro"):  # another ratio, or another loss
        assert get_objective(name).kernel_terms is None
    assert get_objective("grpo", log_ratio_clamp=20.0).kernel_terms is None
    assert get_objective("grpo", kl="unbiased", beta=0.1).kernel_terms is None
