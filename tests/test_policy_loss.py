"""policy_loss on ready log-probabilities against the float64 formulas, to the last bits of float64."""

import itertools
import math

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_ops import get_objective, policy_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LENGTHS = [6, 0, 1, 4, 5]  # an empty row in the middle, one token, a full row
NAMES = ["grpo", "dr_grpo", "dapo", "bnpo_loss_type", "cispo", "gspo", "repo"]
TERMS = [
    {},
    {"beta": 0.04},
    {"beta": 0.1, "kl": "k1"},
    {"beta": 0.1, "kl": "k2", "kl_reduction": "seq-mean-token-mean"},
    {"entropy_coef": 0.02},
    {"beta": 0.04, "entropy_coef": 0.02, "row_norm": "official_code"},
]


def tokens(dtype=F64, lengths=LENGTHS, seed=0):
    """Log-probabilities and what goes with them; junk where masked; ratios far from usual clip bounds."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    logps = -torch.rand(B, T, generator=g, dtype=F64) * 4 - 0.1
    steps = torch.tensor([-0.6, -0.1, 0.05, 0.5], dtype=F64)
    given_ = {
        "logps": logps,
        "old_logps": logps - steps[torch.randint(0, 4, (B, T), generator=g)],
        "ref_logps": logps + 0.3 * torch.randn(B, T, generator=g, dtype=F64),
        "entropy": torch.rand(B, T, generator=g, dtype=F64) * 5,
    }
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    given_ = {k: torch.where(mask, v, float("nan")).to(dtype) for k, v in given_.items()}
    return {**given_, "mask": mask, "advantages": torch.randn(B, generator=g, dtype=F64).to(dtype)}


def compare(given_, name, hyper, *, error, **kwargs):
    """Loss and gradients to logps and entropy by the formulas, from the same rounded values."""
    results = []
    for function in (policy_loss, truth.policy_loss):
        live = dict(given_)
        leaves = [live[k].detach().clone().requires_grad_() for k in ("logps", "entropy")]
        if function is truth.policy_loss:
            leaves = [torch.where(given_["mask"], x.detach().double(), 0.0).requires_grad_() for x in leaves]
        live.update(logps=leaves[0], entropy=leaves[1])
        if function is policy_loss:
            if not hyper.get("beta"):
                live.pop("ref_logps")
            found = policy_loss(**live, objective=get_objective(name, **hyper), **kwargs)
            loss = found.loss
        else:
            loss = truth.policy_loss(**live, objective=name, **hyper, **kwargs)
        loss.backward()
        results.append([loss.detach(), *(torch.zeros(()) if x.grad is None else x.grad for x in leaves)])
    (loss, dlogps, dentropy), (true_loss, true_dlogps, true_dentropy) = results
    assert loss.item() == pytest.approx(true_loss.item(), rel=error, abs=error)
    assert truth.relative_error(dlogps, true_dlogps) <= error
    if hyper.get("entropy_coef"):
        assert truth.relative_error(dentropy, true_dentropy) <= error
    assert (dlogps[~given_["mask"]] == 0).all()
    return found


@pytest.mark.parametrize("hyper", TERMS, ids=lambda h: "-".join(map(str, h)) or "plain")
@pytest.mark.parametrize("replayed", [0, 2])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "error"), [(F64, 1e-12), (F32, 2e-6)], ids=["float64", "float32"])
def test_values_and_gradients(name, replayed, hyper, dtype, error):
    if name == "dr_grpo":
        hyper = {**hyper, "max_length": 16}
    off_policy = torch.arange(5) >= 5 - replayed if replayed else None
    compare(tokens(dtype), name, hyper, error=error, off_policy=off_policy, off_policy_coef=0.5 if replayed else 1.0)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bit_log_probabilities_are_computed_on_in_float32(dtype):
    # the gradient handed back is rounded to the input's dtype, once
    found = compare(tokens(dtype), "grpo", {"beta": 0.04}, error={BF16: 4e-3, F16: 5e-4}[dtype])
    assert found.loss.dtype == F32


@pytest.mark.parametrize("mask", [True, False])
def test_hand_worked_grpo(mask):
    # two rows: lengths 1 and 2 (mask) or 2 and 2; ratios 1, 2, 1/2 with widths 0.2
    logps = torch.tensor([[-1.0, -9.0], [-1.0, -2.0]], dtype=F64, requires_grad=True)
    old = torch.tensor([[-1.0, -9.0], [-1.0 - math.log(2), -2.0 + math.log(2)]], dtype=F64)
    live = torch.tensor([[1, 0], [1, 1]]) if mask else None
    found = policy_loss(logps, torch.tensor([1.0, -2.0], dtype=F64), old_logps=old, mask=live)
    # row 1: -1 a token. row 2, A < 0: ratio 2 is kept (loss 4, gradient 4), ratio 1/2 < 0.8 is clipped (loss 1.6)
    assert found.loss.item() == pytest.approx((-1.0 + (4 + 1.6) / 2) / 2, abs=1e-12)
    found.loss.backward()
    first = [-0.5, 0.0] if mask else [-0.25, -0.25]
    torch.testing.assert_close(logps.grad, torch.tensor([first, [4 / 4, 0.0]], dtype=F64), rtol=0, atol=1e-12)


def test_hand_worked_gspo():
    # mean log-ratio log 2 over three tokens: one ratio of 2, kept for A < 0; d loss / d logp = -A s / T a token
    logps = torch.full((1, 3), -1.0, dtype=F64, requires_grad=True)
    old = logps.detach() - math.log(2) * torch.tensor([[3.0, 0.0, 0.0]], dtype=F64)
    found = policy_loss(logps, torch.tensor([-1.0], dtype=F64), objective="gspo", old_logps=old)
    assert found.loss.item() == pytest.approx(2.0, abs=1e-12)
    found.loss.backward()
    torch.testing.assert_close(logps.grad, torch.full((1, 3), 2 / 3, dtype=F64), rtol=0, atol=1e-12)


def test_hand_worked_repo_both_row_norms():
    # 2 fresh rows, 1 replayed, all ratios 1: -A each. paper: -(1 + 3) / 2 - 2; official: -(1 + 3 + 2) / 3
    logps = torch.full((3, 2), -1.0, dtype=F64)
    kwargs = {"old_logps": logps, "off_policy": torch.tensor([False, True, False])}
    A = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    paper = policy_loss(logps, A, objective="repo", **kwargs)
    official = policy_loss(logps, A, objective=get_objective("repo", row_norm="official_code"), **kwargs)
    assert (paper.loss.item(), official.loss.item()) == pytest.approx((-4.0, -2.0), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0], [1], [0, 1]])
def test_almost_nothing(name, lengths):
    hyper = {"max_length": 4} if name == "dr_grpo" else {}
    given_ = tokens(lengths=[*lengths, 2])  # the extra row keeps a width
    given_ = {k: v[:-1] for k, v in given_.items()}
    found = compare(given_, name, hyper, error=1e-12)
    assert found.loss.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_at_all(name):
    hyper = {"max_length": 4} if name == "dr_grpo" else {}
    logps = torch.zeros(0, 3, requires_grad=True)
    loss = policy_loss(logps, torch.zeros(0), objective=get_objective(name, **hyper)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert logps.grad.shape == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded(name):
    hyper = {"max_length": 4} if name == "dr_grpo" else {}
    given_ = tokens()
    objective = get_objective(name, **hyper)
    off_policy = torch.tensor([False, True, False, True, False])
    padded = policy_loss(
        given_["logps"], given_["advantages"], objective=objective, mask=given_["mask"],
        old_logps=given_["old_logps"], off_policy=off_policy,
    )  # fmt: skip
    keep = given_["mask"]
    packed = policy_loss(
        given_["logps"][keep], given_["advantages"], objective=objective, old_logps=given_["old_logps"][keep],
        off_policy=off_policy, cu_seqlens=torch.tensor([0, *itertools.accumulate(LENGTHS)]),
    )  # fmt: skip
    assert torch.equal(padded.loss, packed.loss)
    assert padded.metrics == packed.metrics


def test_outputs():
    given_ = tokens()
    given_["logps"].requires_grad_()
    found = policy_loss(**given_, objective="cispo")
    assert not found.logps.requires_grad
    assert torch.equal(found.logps, torch.where(given_["mask"], given_["logps"], 0.0).detach())
    assert found.loss.dtype == F64


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "repo"])
def test_an_overflowing_ratio_behind_a_clip_has_a_zero_gradient(name):
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    old = torch.tensor([[-1.0, -400.0], [-1.0, -1.0]])
    found = policy_loss(logps, torch.tensor([1.0, 1.0]), objective=name, old_logps=old)
    found.loss.backward()
    assert found.loss.isfinite()
    assert logps.grad.isfinite().all()
    assert logps.grad[0, 1] == 0


def test_an_overflowing_ratio_with_zero_advantage_is_nothing():
    logps = torch.full((1, 2), -1.0, requires_grad=True)
    found = policy_loss(logps, torch.zeros(1), old_logps=torch.full((1, 2), -400.0))
    found.loss.backward()
    assert found.loss.item() == 0
    assert (logps.grad == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_p12_one_broken_sampler_log_probability_changes_that_token_only(junk):
    given_ = tokens()
    mask, sampler = given_["mask"], given_["old_logps"] - 0.1
    objective = get_objective("dapo", sampler_weight="token_truncate", sampler_max=2.0)
    grads = []
    for broken in (False, True):
        logps = given_["logps"].clone().requires_grad_()
        reported = sampler.clone()
        reported[0, 2] = junk if broken else reported[0, 2]
        loss = policy_loss(
            logps, given_["advantages"], objective=objective, mask=mask, old_logps=given_["old_logps"],
            sampler_logps=reported,
        ).loss  # fmt: skip
        loss.backward()
        assert loss.isfinite()
        grads.append(logps.grad)
    others = torch.ones_like(mask)
    others[0, 2] = False
    assert torch.equal(grads[0][others], grads[1][others])
    assert grads[0][0, 2] != 0
    assert grads[1][0, 2] == 0


def test_a_mask_over_an_overflowing_ratio_has_a_zero_gradient():
    # exactly the token that a sampler mask is there to drop: ratio e^199 with A < 0 is not clipped
    logps = torch.full((1, 2), -1.0, requires_grad=True)
    found = policy_loss(
        logps,
        -torch.ones(1),
        objective=get_objective("grpo", sampler_weight="token_mask", sampler_max=2.0),
        old_logps=torch.tensor([[-1.0, -200.0]]),
        sampler_logps=torch.tensor([[-1.0, -300.0]]),
    )
    found.loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.5, 0.0]]))


def test_the_reference_of_replayed_rows_is_not_looked_at():
    # a buffer keeps no reference log-probabilities: whatever stands there must not reach the loss
    given_ = tokens(F32)
    off_policy = torch.tensor([False, False, False, True, True])
    results = []
    for junk in (0.0, -300.0, 300.0):
        logps = given_["logps"].clone().requires_grad_()
        ref = torch.where(off_policy[:, None], junk, given_["ref_logps"])
        found = policy_loss(
            logps, given_["advantages"], objective=get_objective("repo", beta=0.1), mask=given_["mask"],
            old_logps=given_["old_logps"], ref_logps=ref, off_policy=off_policy,
        )  # fmt: skip
        found.loss.backward()
        results.append((found.loss.detach(), logps.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_lengths(lengths, name, seed, data):
    off_policy = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    hyper = {"max_length": 7} if name == "dr_grpo" else {}
    compare(tokens(lengths=lengths, seed=seed), name, {**hyper, "beta": 0.1}, error=1e-11, off_policy=off_policy)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 5), max_size=3), name=st.sampled_from(NAMES), seed=st.integers(0, 1000))
def test_any_split_into_micro_batches(cuts, name, seed):
    # P3: who divides. Every split of the step has the step's loss and gradients
    from repo_ops import NumItems

    given_ = tokens(seed=seed)
    off_policy = torch.tensor([False, True, False, True, False])
    objective = get_objective(name, beta=0.1, **({"max_length": 7} if name == "dr_grpo" else {}))
    num_items = NumItems.of(torch.tensor(LENGTHS), off_policy)
    grads, losses = [], []
    for borders in ([0, 5], sorted({0, 5, *cuts})):
        logps = given_["logps"].clone().requires_grad_()
        total = 0.0
        for start, end in itertools.pairwise(borders):
            rows = slice(start, end)
            part = policy_loss(
                logps[rows], given_["advantages"][rows], objective=objective, mask=given_["mask"][rows],
                old_logps=given_["old_logps"][rows], ref_logps=given_["ref_logps"][rows],
                off_policy=off_policy[rows], num_items=num_items,
            )  # fmt: skip
            part.loss.backward()
            total += part.loss.item()
        grads.append(logps.grad)
        losses.append(total)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-15)
