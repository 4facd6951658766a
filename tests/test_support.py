"""Log-probabilities over the tokens that a truncated sampler kept."""

import itertools

import pytest
import torch

from repo_ops import get_objective, linear_logps, linear_policy_loss, policy_loss

B, T, D, V, K = 3, 5, 8, 101, 7
HEAD = {"softcap": 6.0, "logit_scale": 0.9, "temperature": 0.8}


@pytest.fixture
def case():
    torch.manual_seed(0)
    targets = torch.randint(0, V, (B, T))
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(B * T)]).reshape(B, T, K)
    ids[0, 0] = -1  # nothing kept but the target
    ids[1, 1, 3:] = -1  # padding
    ids[2, 2] = torch.cat([targets[2, 2, None], (targets[2, 2] + torch.arange(1, K)) % V])  # the target among them
    shapes = [(B, T, D), (V, D), (V,), (B, T, 2), (V, 2)]
    return targets, ids, [torch.randn(*shape, requires_grad=True) for shape in shapes]


def truth(targets, ids, tensors):
    """(logps, entropy) in float64 from full logits with what was not kept at -inf."""
    h, w, b, low, up = (t.double() for t in tensors)
    z = (h @ w.T + b + low @ up.T) * HEAD["logit_scale"]
    z = HEAD["softcap"] * torch.tanh(z / HEAD["softcap"]) / HEAD["temperature"]
    kept = torch.zeros(B, T, V + 1, dtype=torch.bool).scatter(2, torch.where(ids < 0, V, ids), True)[..., :V]
    kept = kept.scatter(2, targets[..., None], True)
    log_p = z.masked_fill(~kept, -float("inf")).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~kept, 0.0)).sum(-1)
    return log_p.gather(2, targets[..., None])[..., 0], entropy


def relative(found, expected):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def test_values_and_gradients_equal_a_masked_vocabulary(case):
    targets, ids, tensors = case
    h, w, b, low, up = tensors
    found = linear_logps(h, w, targets, bias=b, adapter=(low, up), with_entropy=True, support_ids=ids, **HEAD)
    logps, entropy = truth(targets, ids, tensors)
    torch.testing.assert_close(found.logps.double(), logps, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=2e-6, rtol=0)
    weights = torch.randn(2, B, T)
    mine = torch.autograd.grad((found.logps * weights[0] + found.entropy * weights[1]).sum(), tensors)
    true = torch.autograd.grad((logps * weights[0] + entropy * weights[1]).sum(), tensors)
    assert relative(mine, true) < 1e-5
    assert found.logps[0, 0] == 0  # a row that kept nothing is certain of its target


@pytest.mark.parametrize("shape", [(), (B,), (B, T)], ids=["scalar_tensor", "per_sequence", "per_token"])
def test_temperature_tensors(case, shape):
    targets, ids, tensors = case
    h, w, b, low, up = tensors
    temperature = torch.rand(shape) + 0.5
    per_token = temperature[..., None] if len(shape) == 1 else temperature
    head = {**HEAD, "temperature": temperature}
    found = linear_logps(h, w, targets, bias=b, adapter=(low, up), support_ids=ids, **head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEAD, "temperature", per_token.expand(B, T)[..., None])
        logps, _ = truth(targets, ids, tensors)
    torch.testing.assert_close(found.logps.double(), logps, atol=2e-6, rtol=0)
    mine, true = (torch.autograd.grad(values.sum(), tensors) for values in (found.logps, logps))
    assert relative(mine, true) < 1e-5


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_requires_grad(case, needs):
    targets, ids, tensors = case
    h, w, b, low, up = (t.detach().clone() for t in tensors)
    wanted = [t.requires_grad_() for t, need in zip((h, w, b), needs, strict=True) if need]
    found = linear_logps(h, w, targets, bias=b, adapter=(low, up), support_ids=ids, **HEAD)
    assert found.logps.requires_grad == any(needs)
    logps, _ = truth(targets, ids, [h, w, b, low, up])
    if wanted:
        mine, true = (torch.autograd.grad(values.sum(), wanted) for values in (found.logps, logps))
        assert relative(mine, true) < 1e-5


def test_policy_loss_over_a_support_equals_the_loss_of_its_logps(case):
    targets, ids, tensors = case
    h, w, b, low, up = tensors
    mask, advantages = torch.rand(B, T) < 0.7, torch.randn(B)
    logps, _ = truth(targets, ids, tensors)
    old_logps = (logps + 0.2 * torch.randn(B, T)).detach().float()
    options = {"old_logps": old_logps, "mask": mask, "objective": get_objective("gspo", eps_low=0.5, eps_high=0.5)}
    head = {"bias": b, "adapter": (low, up), "support_ids": ids, **HEAD}
    found = linear_policy_loss(h, w, targets, advantages, **options, **head)
    true = policy_loss(logps, advantages, **options)
    assert found.loss.item() == pytest.approx(true.loss.item(), abs=2e-6)
    assert relative(torch.autograd.grad(found.loss, tensors), torch.autograd.grad(true.loss, tensors)) < 1e-5


def test_the_ratio_is_1_on_policy_where_the_sampler_truncates():
    # nucleus sampling at 0.8: over the whole vocabulary each sampled token looks less likely than it was
    torch.manual_seed(0)
    hidden, weight = torch.randn(2000, 16), torch.randn(64, 16) * 0.5
    log_p = (hidden @ weight.T).log_softmax(-1)
    order = log_p.argsort(-1, descending=True)
    before = log_p.exp().gather(1, order).cumsum(-1) - log_p.exp().gather(1, order)
    ids = torch.where(before < 0.8, order, -1)
    kept = torch.where(before < 0.8, log_p.gather(1, order), -float("inf")).log_softmax(-1)
    place = torch.multinomial(kept.exp(), 1)
    targets, sampler = ids.gather(1, place)[:, 0], kept.gather(1, place)[:, 0]
    ratio = (linear_logps(hidden, weight, targets, support_ids=ids).logps - sampler).exp()
    biased = (linear_logps(hidden, weight, targets).logps - sampler).exp()
    assert ratio.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert biased.mean().item() < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:, :4], r"support_ids: expected shape \[3, 5, 'K'\] with 0 < K <= 512, got \[3, 4, 7\]"),
        (lambda ids: ids.float(), "support_ids: expected int64"),
        (lambda ids: ids + V, "support_ids: expected ids from 0 to 100"),
        (lambda ids: ids.new_zeros(B, T, 513), "K <= 512"),
    ],
)
def test_a_support_of_another_kind_is_refused(case, change, message):
    targets, ids, (h, w, *_) = case
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logps(h, w, targets, support_ids=change(ids))
