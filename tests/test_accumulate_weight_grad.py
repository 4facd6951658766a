"""Options(accumulate_weight_grad=True): the same gradients, added to weight.grad without a second [V, D] tensor."""

import pytest
import torch

from repo_ops import Options, linear_logps, linear_policy_loss

B, T, D, V = 4, 6, 8, 41
INTO = Options(accumulate_weight_grad=True)


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(B, T, D), torch.randn(V, D), torch.randint(0, V, (B, T)), torch.tensor([1.0, -1.0, 0.5, 0.0])


def policy(hidden, weight, targets, advantages, options):
    return linear_policy_loss(hidden, weight, targets, advantages, num_items=B, options=options).loss


def stats(hidden, weight, targets, advantages, options):
    found = linear_logps(hidden, weight, targets, with_entropy=True, options=options)
    return (found.logps * advantages[:, None] + found.entropy).sum() / 7


@pytest.mark.parametrize("loss", [policy, stats])
@pytest.mark.parametrize("already", [False, True])
def test_micro_batches_add_up_in_the_tensor_that_is_there(case, loss, already):
    hidden, weight, targets, advantages = case
    grads = []
    for options in (Options(), INTO):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        w.grad = torch.ones_like(w) if already else None
        before = w.grad
        for rows in (slice(0, 2), slice(2, 4)):
            loss(h[rows], w, targets[rows], advantages[rows], options).backward()
        if options is INTO and already:
            assert w.grad is before
        grads.append((h.grad, w.grad))
    for ours, expected in zip(grads[1], grads[0]):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_tied_embedding_adds_its_own_share(case):
    _, weight, targets, advantages = case
    grads = []
    for options in (Options(), INTO):
        w = weight.clone().requires_grad_()
        policy(torch.nn.functional.embedding(targets, w), w, targets, advantages, options).backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_logps_find_the_grad_of_the_moment_of_backward(case):
    hidden, weight, targets, advantages = case
    w = weight.clone().requires_grad_()
    w.grad = torch.ones_like(w)
    loss = stats(hidden, w, targets, advantages, INTO)
    w.grad = None  # optimizer.zero_grad() between forward and backward
    loss.backward()
    expected = weight.clone().requires_grad_()
    stats(hidden, expected, targets, advantages, Options()).backward()
    torch.testing.assert_close(w.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_what_would_be_lost_or_wrong_is_an_error(case):
    hidden, weight, targets, advantages = case
    w = weight.clone().requires_grad_()
    loss = policy(hidden, w, targets, advantages, INTO)
    w.grad = None
    with pytest.raises(RuntimeError, match="call zero_grad before the loss"):
        loss.backward()
    with pytest.raises(ValueError, match="gradient 1; scale it by num_items"):
        (policy(hidden, w, targets, advantages, INTO) * 2).backward()
    with pytest.raises(ValueError, match="expected a leaf"):
        policy(hidden, w * 1, targets, advantages, INTO)
    with pytest.raises(ValueError, match=r"expected a float32 weight, got torch\.bfloat16"):
        policy(hidden, weight.bfloat16().requires_grad_(), targets, advantages, INTO)
    hooked, ids = weight.clone().requires_grad_(), torch.zeros(B, T, 1, dtype=torch.long)
    hooked.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="without gradient hooks"):
        policy(hidden, hooked, targets, advantages, INTO)
    with pytest.raises(ValueError, match="support_ids: expected None with options"):
        linear_logps(hidden, w, targets, support_ids=ids, options=INTO)


def test_frozen_weight_and_no_grad_leave_it_alone(case):
    hidden, weight, targets, advantages = case
    h = hidden.clone().requires_grad_()
    policy(h, weight, targets, advantages, INTO).backward()
    assert weight.grad is None
    w = weight.clone().requires_grad_()
    with torch.no_grad():
        policy(hidden, w, targets, advantages, INTO)
    assert w.grad is None
