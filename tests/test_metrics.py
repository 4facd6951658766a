"""Metrics: sums and counts by hand, unions that equal the whole, and what each loss reports."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import make_case

from repo_ops import get_objective, linear_policy_loss, policy_loss, summarize
from repo_ops.metrics import Stat, extreme, merge, stat

VALUES = torch.tensor([1.0, -2.0, 4.0])
SOME = torch.tensor([True, True, False])
NONE = torch.zeros(3, dtype=torch.bool)


def test_sums_and_extremes():
    assert stat(VALUES) == (3.0, 3.0)
    assert stat(VALUES, SOME) == (-1.0, 2.0)
    assert stat(VALUES, NONE) == (0.0, 0.0)
    assert stat(SOME) == (2.0, 3.0)
    assert extreme(VALUES, "max") == (4.0, 1.0)
    assert extreme(VALUES, "max", SOME) == (1.0, 1.0)
    assert extreme(VALUES, "min") == (-2.0, 1.0)
    assert extreme(VALUES, "max", NONE).count == 0
    assert extreme(torch.zeros(0), "min").count == 0


def test_what_is_not_counted_may_be_anything():
    junk = torch.tensor([1.0, -2.0, float("nan")])
    assert stat(junk, SOME) == (-1.0, 2.0)
    assert extreme(junk, "max", SOME) == (1.0, 1.0)


def test_summarize():
    found = summarize(
        {
            "clip": Stat(torch.tensor(3.0), torch.tensor(12.0)),
            "ratio": Stat(torch.tensor(6.0), torch.tensor(4.0)),  # ratios 1, 1, 1, 3
            "ratio_squared": Stat(torch.tensor(12.0), torch.tensor(4.0)),
            "off_policy/ratio": Stat(torch.tensor(5.0), torch.tensor(5.0)),
            "off_policy/ratio_squared": Stat(torch.tensor(5.0), torch.tensor(5.0)),
            "ratio_max": Stat(torch.tensor(3.0), torch.tensor(1.0)),
            "nobody": Stat(torch.tensor(0.0), torch.tensor(0.0)),
        }
    )
    assert found == {
        "clip": 0.25,
        "ratio": 1.5,
        "off_policy/ratio": 1.0,
        "ratio_max": 3.0,
        "ess": 0.75,
        "off_policy/ess": 1,
    }


def test_merge_by_hand():
    one = {"a": Stat(torch.tensor(1.0), torch.tensor(2.0)), "r_max": extreme(torch.tensor([3.0]), "max")}
    two = {"a": Stat(torch.tensor(5.0), torch.tensor(1.0)), "r_max": extreme(torch.zeros(0), "max"), "b": stat(VALUES)}
    assert merge([one, two]) == {"a": (6.0, 3.0), "r_max": (3.0, 1.0), "b": (3.0, 3.0)}
    assert merge([]) == {}


def loss_of(case, rows=slice(None), **kwargs):
    return linear_policy_loss(
        case.hidden[rows],
        case.weight,
        case.targets[rows],
        case.advantages[rows],
        mask=None if case.mask is None else case.mask[rows],
        old_logps=case.old_logps[rows],
        ref_logps=case.ref_logps[rows],
        off_policy=None if case.off_policy is None else case.off_policy[rows],
        **kwargs,
    )


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 5), name=st.sampled_from(["grpo", "cispo", "gspo", "repo"]))
def test_micro_batches_merge_into_the_metrics_of_the_step(cut, name):
    case = make_case(5, 7, 8, 31, lengths=[7, 0, 3, 1, 6], replayed=2)
    whole = summarize(loss_of(case, objective=name).metrics)
    parts = [loss_of(case, rows, objective=name).metrics for rows in (slice(0, cut), slice(cut, 5))]
    assert summarize(merge(parts)) == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_what_grpo_reports_by_hand():
    # A > 0: ratios 2 (clipped) and 1; A < 0: ratios 1/2 (clipped) and 2 (kept); a masked token that would be 100
    logps = torch.zeros(2, 3, dtype=torch.float64) - 1.0
    old = logps - torch.tensor([[2.0, 1.0, 100.0], [0.5, 2.0, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = policy_loss(logps, torch.tensor([1.0, -1.0]), mask=mask, old_logps=old).metrics
    means = {"ratio": 6.5 / 5, "ratio_max": 2.0, "ratio_min": 0.5, "clip_high": 0.2, "clip_low": 0.2}
    summary = summarize(found)
    assert {name: summary[name] for name in means} == pytest.approx(means)
    assert summary["ess"] == pytest.approx(6.5**2 / (5 * (4 + 1 + 0.25 + 4 + 1)))
    k3 = sum(r - 1 - torch.tensor(r).log().item() for r in (2.0, 1.0, 0.5, 2.0, 1.0)) / 5
    assert summary["approx_kl"] == pytest.approx(k3, abs=1e-6)


def test_replayed_rows_are_reported_apart():
    case = make_case(4, 6, 8, 31, replayed=2)
    summary = summarize(loss_of(case, objective="repo").metrics)
    fresh, replayed = make_case(4, 6, 8, 31), make_case(4, 6, 8, 31)
    for part, rows, prefix in ((fresh, slice(0, 2), ""), (replayed, slice(2, 4), "off_policy/")):
        alone = summarize(loss_of(part, rows, objective="grpo").metrics)
        for name in ("ratio", "ratio_max", "ratio_min", "ess", "approx_kl", "clip_low", "clip_high"):
            assert summary[prefix + name] == pytest.approx(alone[name], rel=1e-5), prefix + name


def test_kl_and_entropy_are_of_fresh_tokens():
    case = make_case(3, 5, 8, 31, replayed=1)
    objective = get_objective("repo", beta=0.1, entropy_coef=0.01)
    summary = summarize(loss_of(case, objective=objective).metrics)
    _, logps, entropy, _ = case.loss(objective="repo", beta=0.1, entropy_coef=0.01)
    x = (case.ref_logps - logps)[:2]
    assert summary["kl"] == pytest.approx((x.exp() - x - 1).mean().item(), rel=1e-4)
    assert summary["entropy"] == pytest.approx(entropy[:2].mean().item(), rel=1e-5)


def test_the_gap_to_the_sampler_is_reported_without_any_correction():
    logps = torch.full((1, 3), -1.0)
    sampler = torch.tensor([[-1.0, -1.5, float("nan")]])
    found = policy_loss(logps, torch.ones(1), old_logps=logps, sampler_logps=sampler).metrics
    summary = summarize(found)
    assert summary["sampler_gap_abs"] == pytest.approx(0.25)
    assert summary["sampler_ratio"] == pytest.approx((1 + torch.tensor(0.5).exp().item()) / 2)
    assert summary["sampler_unknown"] == pytest.approx(1 / 3)


def test_left_out_rows_are_reported():
    case = make_case(4, 5, 8, 31)
    case.advantages[:3] = 0.0
    assert loss_of(case, objective="grpo").metrics["live"] == (5.0, 20.0)


def test_metrics_of_nothing_are_empty_not_nan():
    found = policy_loss(torch.zeros(2, 3), torch.ones(2), mask=torch.zeros(2, 3)).metrics
    assert all(total.isfinite() or count == 0 for total, count in found.values())
    assert summarize(found) == {}
