"""Liger's names on this library's head, against the installed Liger 0.8.5 in the same test: values, metrics, gradients.

Liger's own behaviour is met where it is surprising too (LUSPO counts padding, CISPO's cap may lie below 1); what
differs on purpose is tested at the end.
"""

import inspect
import itertools
import math

import pytest
import torch

from repo_ops import Options
from repo_ops.integrations import liger as ours

LENGTHS = [6, 0, 1, 4, 7, 3]  # an empty sequence, a single token, and one as long as the padding
B, T, D, V = len(LENGTHS), max(LENGTHS), 8, 37
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
KINDS = [(loss, level) for loss in LOSSES for level in ("token", "sequence")
         if level == "token" or loss not in TOKEN_LEVEL_ONLY]  # fmt: skip


@pytest.fixture(scope="module")
def liger():
    found = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    if "vespo_k_pos" not in inspect.signature(found.LigerFusedLinearGRPOLoss).parameters:
        pytest.skip("needs a Liger with VESPO and LUSPO (0.8.5)")
    return found


class Case:
    """Random ragged tensors, on which log-ratios are about 0.4."""

    def __init__(self, seed, *, temperature=1.3):
        g = torch.Generator().manual_seed(seed)
        self.mask = (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).float()
        self.hidden, self.weight, self.bias = (torch.randn(*s, generator=g) for s in ((B, T, D), (V, D), (V,)))
        self.ids, self.temperature = torch.randint(0, V, (B, T), generator=g), temperature
        logits = (self.hidden @ self.weight.T + self.bias) / temperature
        logps = logits.log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]
        drift = 0.4 * torch.randn(2, B, T, generator=g) + 0.2 * torch.randn(2, B, 1, generator=g)
        self.old, self.ref = logps + drift[0], logps + drift[1]
        self.advantages = torch.randn(B, generator=g)
        self.advantages[2] = 0.0
        weights = 0.3 + torch.rand(B, T, generator=g)
        self.ratios = {None: None, "[B]": weights[:, 0], "[B, 1]": weights[:, :1], "[B, T]": weights}

    def run(self, module, *, ratio=None, old=True, **settings):
        """[loss, metrics, gradients of hidden, weight and bias]."""
        beta = settings.setdefault("beta", 0.0)
        settings = {"epsilon_low": 0.15, "epsilon_high": 0.3, "max_completion_length": 16, "compiled": False,
                    "use_ref_model": bool(beta), "temperature": self.temperature, **settings}  # fmt: skip
        forward = {"ref_per_token_logps": self.ref if beta else None, "old_per_token_logps": self.old if old else None}
        for name in ("num_items_in_batch", "ref_input", "ref_weight", "ref_bias", "ref_per_token_logps"):
            if name in settings:
                forward[name] = settings.pop(name)
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        loss, metrics = module.LigerFusedLinearGRPOLoss(**settings)(
            *leaves[:2], self.ids, self.mask, self.advantages, leaves[2], vllm_is_ratio=self.ratios[ratio], **forward
        )
        assert isinstance(metrics, tuple)
        assert loss.shape == ()
        assert all(x.dtype == torch.float32 for x in (loss, *metrics))
        loss.backward()
        return [loss.detach(), *metrics, *(x.grad for x in leaves)]


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=3e-6 * max(1.0, float(w.abs().max())), check_dtype=False)


def cap(loss):
    return {"epsilon_high": 1.3} if loss == "cispo" else {}


@pytest.mark.parametrize(("loss", "level"), KINDS)
def test_values_metrics_and_gradients_are_ligers(liger, loss, level):
    seeds = itertools.count()
    kls = ((0.0, False), (0.07, False), (0.07, True))
    weights = ((None, True), ("[B]", False), ("[B, 1]", True), ("[B, T]", True))
    for (beta, corrected), (ratio, old) in itertools.product(kls, weights):
        delta = 1.5 if loss not in TOKEN_LEVEL_ONLY and ratio in (None, "[B, T]") else None
        case = Case(next(seeds))
        settings = {"loss_type": loss, "importance_sampling_level": level, "beta": beta, "delta": delta,
                    "use_bias_correction_kl": corrected, "ratio": ratio, "old": old, **cap(loss)}  # fmt: skip
        same(case.run(ours, **settings), case.run(liger, **settings))


def test_the_cases_clip_on_both_sides_and_both_levels(liger):
    for level in ("token", "sequence"):
        shares = [Case(seed).run(ours, loss_type="grpo", importance_sampling_level=level)[1] for seed in range(4)]
        assert any(0 < float(share) < 1 for share in shares), level


@pytest.mark.parametrize("loss", LOSSES)
def test_hyper_parameters_reach_the_loss(liger, loss):
    common = {"loss_type": loss, "epsilon_low": 0.05, "epsilon_high": 0.5, "max_completion_length": 9,
              "sapo_temperature_pos": 1.4, "sapo_temperature_neg": 0.7, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5,
              "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5}  # fmt: skip
    case = Case(3)
    same(case.run(ours, **common), case.run(liger, **common))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_count_of_the_step_is_read_where_liger_reads_it(liger, loss):
    for count in (50, torch.tensor(50.0), 0):
        case = Case(0)
        settings = {"loss_type": loss, "num_items_in_batch": count, **cap(loss)}
        same(case.run(ours, **settings), case.run(liger, **settings))


@pytest.mark.parametrize("loss", ["dapo", "luspo"])
def test_reference_log_probabilities_from_its_head(liger, loss):
    case = Case(1)
    settings = {"loss_type": loss, "beta": 0.07, "ref_per_token_logps": None, "ref_input": case.hidden + 0.1,
                "ref_weight": case.weight - 0.05, "ref_bias": case.bias + 0.1}  # fmt: skip
    same(case.run(ours, **settings), case.run(liger, **settings))


def test_a_beta_without_a_reference_is_a_kl_of_zero(liger):
    case = Case(1)
    settings = {"beta": 0.07, "use_ref_model": False}
    found = case.run(ours, **settings)
    same(found, case.run(liger, **settings))
    assert float(found[1]) == 0.0


def test_a_frozen_head_gets_no_gradient(liger):
    case = Case(2)
    hidden = case.hidden.clone().requires_grad_()
    module = ours.LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0, temperature=case.temperature)
    given = (case.ids, case.mask, case.advantages, case.bias, None, case.old)
    loss, _ = module(hidden, case.weight, *given)
    loss.backward()
    theirs = liger.LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0, temperature=case.temperature, compiled=False)
    other = case.hidden.clone().requires_grad_()
    theirs(other, case.weight, *given)[0].backward()
    assert case.weight.grad is None
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_can_be_nearer_to_the_truth_than_ligers(liger):
    half = Case(4)
    half.hidden, half.weight, half.bias = (x.bfloat16() for x in (half.hidden, half.weight, half.bias))
    exact = Case(4)
    exact.hidden, exact.weight, exact.bias = (x.bfloat16().float() for x in (exact.hidden, exact.weight, exact.bias))
    truth = exact.run(ours)
    mine, theirs = half.run(ours, options=Options()), half.run(liger)
    assert [x.dtype for x in mine[-3:]] == [torch.bfloat16] * 3
    for index in (0, -3, -2):
        errors = [(x[index].float() - truth[index]).norm() for x in (mine, theirs)]
        assert errors[0] <= errors[1]


def test_logits_are_rounded_as_ligers_unless_options_say_otherwise(liger):
    # nothing but the logits' rounding moves the loss: a KL to log-probabilities that are given, ratios of 1
    torch.manual_seed(0)
    # multiples of 1/4 and 1/16: float32 sums of their products are exact, so every processor rounds the same logits
    hidden, weight = (torch.randint(-8, 9, size) / unit for size, unit in (((4, 16, 32), 4), ((101, 32), 16)))
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    ids, mask, advantages = torch.randint(101, (4, 16)), torch.ones(4, 16), torch.randn(4)
    ref, settings = torch.full((4, 16), -5.0), {"beta": 0.1, "loss_type": "grpo"}
    modules = [
        liger.LigerFusedLinearGRPOLoss(compiled=False, **settings),
        ours.LigerFusedLinearGRPOLoss(**settings),
        ours.LigerFusedLinearGRPOLoss(options=Options(), **settings),
    ]
    theirs, rounded, exact = (m(hidden, weight, ids, mask, advantages, ref_per_token_logps=ref)[0] for m in modules)
    assert abs(rounded - theirs) <= 1e-5 * abs(theirs)
    assert abs(exact - theirs) > 1e-4 * abs(theirs)
    with pytest.raises(TypeError, match="options"):
        ours.LigerFusedLinearGRPOLoss(options="bf16", **settings)(hidden, weight, ids, mask, advantages, None, ref)


def test_logits_of_float16_stay_float32(liger):
    # a float16 tile also holds probabilities times 1 / N, which vanish before a gradient scaler multiplies them
    half = Case(4)
    half.hidden, half.weight, half.bias = (x.half() for x in (half.hidden, half.weight, half.bias))
    plain, exact = half.run(ours), half.run(ours, options=Options())
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    theirs = half.run(liger)
    torch.testing.assert_close(plain[0], theirs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [None, Options()])
def test_under_autocast_logits_are_those_of_bfloat16_inputs(options):
    case, half = Case(4), Case(4)
    half.hidden, half.weight = half.hidden.bfloat16(), half.weight.bfloat16()
    want = half.run(ours, options=options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(ours, options=options)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-6)
    assert [x.dtype for x in found[-3:]] == [torch.float32] * 3


@pytest.mark.parametrize(("loss", "level"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_constants_of_another_precision_are_read_as_liger_reads_them(liger, loss, level, dtype):
    settings = {"loss_type": loss, "importance_sampling_level": level, "beta": 0.07, "use_bias_correction_kl": True}
    case = Case(7)
    case.advantages, case.old, case.ref = (x.to(dtype) for x in (case.advantages, case.old, case.ref))
    case.ratios = {shape: None if x is None else x.to(dtype) for shape, x in case.ratios.items()}
    for ratio in (None, "[B, T]"):
        given = {**settings, **cap(loss), "ratio": ratio}
        same(case.run(ours, **given), case.run(liger, **given))


def test_advantages_may_be_integers_and_the_head_float64(liger):
    case = Case(7)
    case.advantages = case.advantages.sign().to(torch.int64)
    same(case.run(ours), case.run(liger))
    case.hidden, case.weight, case.bias = (x.double() for x in (case.hidden, case.weight, case.bias))
    same(case.run(ours, beta=0.07), case.run(liger, beta=0.07))


@pytest.mark.parametrize(("loss", "level"), KINDS)
def test_what_is_given_is_constant_even_with_a_graph(liger, loss, level):
    settings = {"loss_type": loss, "importance_sampling_level": level, "beta": 0.07, "use_bias_correction_kl": True}
    want = Case(8).run(liger, ratio="[B, T]", **settings, **cap(loss))
    case = Case(8)
    given = [case.advantages, case.old, case.ref, case.ratios["[B, T]"]]
    for tensor in given:
        tensor.requires_grad_()
    same(case.run(ours, ratio="[B, T]", **settings, **cap(loss)), want)
    assert all(tensor.grad is None for tensor in given)


POSITIONAL = (0.07, 0.15, 0.3, "dr_grpo", 16, "token", 1.0, 1.05, 1.3, False, True, 2)


def test_the_functional_form_takes_ligers_positions(liger):
    case = Case(5)
    assert ours.liger_fused_linear_grpo is ours.LigerFusedLinearGRPOFunction.apply
    results = []
    for function in (ours.liger_fused_linear_grpo, liger.LigerFusedLinearGRPOFunction.apply):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        more = (case.ids, case.mask, case.advantages, None, case.ref, case.old, None, None, None)
        rest = (case.ratios["[B, T]"], 1.6, True, 2.0, 3.0, 3.0, 2.0, 41)
        loss, metrics = function(*leaves, *more, *POSITIONAL, *rest)
        results.append([loss.detach(), *metrics, *torch.autograd.grad(loss, leaves)])
    same(*results)


def test_signatures_are_ligers(liger):
    for get in (
        lambda m: m.LigerFusedLinearGRPOLoss.__init__,
        lambda m: m.LigerFusedLinearGRPOLoss.forward,
        lambda m: m.LigerFusedLinearGRPOFunction.forward if m is liger else m.LigerFusedLinearGRPOFunction.apply,
    ):
        mine, theirs = (list(inspect.signature(get(m)).parameters.values()) for m in (ours, liger))
        theirs = [p for p in theirs if p.name not in ("cls", "ctx")]
        mine = [p for p in mine if (p.name, p.kind) != ("options", p.KEYWORD_ONLY)]  # ours, and after all of Liger's
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]


# --- differences, on purpose


def test_masked_tokens_cannot_overflow_into_the_loss(liger):
    case = Case(6)
    case.old[2, 5] = -1000.0  # masked
    found = case.run(ours, loss_type="grpo")
    assert all(x.isfinite().all() for x in found)
    assert not case.run(liger, loss_type="grpo")[0].isfinite()
    case.old[2, 5] = 0.0
    same(found, case.run(liger, loss_type="grpo"))


@pytest.mark.parametrize("name", ["old", "ref"])
def test_ratios_and_kl_stay_finite_where_ligers_do_not(liger, name):
    case = Case(6)
    shift = torch.tensor([[-120.0 if name == "old" else 120.0]])
    setattr(case, name, getattr(case, name) + shift)
    assert all(x.isfinite().all() for x in case.run(ours, beta=0.07))
    assert not case.run(liger, beta=0.07)[0].isfinite()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_that_luspo_counts_holds_ids_of_the_vocabulary(level):
    case = Case(0)
    case.ids = torch.where(case.mask > 0, case.ids, -100)
    settings = {"importance_sampling_level": level, "beta": 0.07}
    case.run(ours, loss_type="grpo", **settings)
    with pytest.raises(ValueError, match="selected_token_ids: expected ids from 0 to 36, masked or not; luspo counts"):
        case.run(ours, loss_type="luspo", **settings)


def test_a_delta_that_no_one_reads_is_told(liger):
    with pytest.warns(UserWarning, match="delta: loss_type 'cispo' does not read it"):
        found = Case(0).run(ours, loss_type="cispo", epsilon_high=5.0, delta=2.0)
    same(found, Case(0).run(liger, loss_type="cispo", epsilon_high=5.0, delta=2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gspo"}, "loss_type: expected one of grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: expected 'token'"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "Sequence-level importance sampling is not"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length: expected"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive"),
        ({"delta": -1.0}, "delta must be positive"),
        ({"delta": 1.1}, "delta: expected at least 1"),
        ({"beta": 0.1, "ref_per_token_logps": None}, "ref_per_token_logps: expected them or ref_input"),
        ({"beta": 0.1, "ref_per_token_logps": None, "ref_input": torch.zeros(B, T, D)}, "ref_weight: expected"),
        ({"epsilon_low": -0.1}, "eps_low: expected"),
        ({"beta": -0.1, "loss_type": "luspo"}, "beta: expected a number >= 0"),
        ({"vespo_k_neg": -1.0, "loss_type": "vespo"}, "k_neg: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
    ],
)
def test_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Case(0).run(ours, **settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", torch.full((B, T), 0.5), "attention_mask: expected 0 and 1"),
        ("mask", torch.ones(B, T + 1), "attention_mask: expected shape"),
        ("advantages", torch.zeros(B, T), "advantages: expected shape"),
        ("ids", torch.full((B, T), V), "targets: expected ids from 0 to 36"),
        ("old", torch.full((B, T), math.nan), "old_logps: expected finite numbers"),
    ],
)
def test_wrong_tensors_are_refused_by_name(name, value, message):
    case = Case(0)
    setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.run(ours)


def test_a_second_backward_is_refused():
    case = Case(0)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
    loss, _ = ours.LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0)(
        *leaves, case.ids, case.mask, case.advantages
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called a second time"):
        loss.backward()
