"""Statistics beyond the log-probability, against float64 full logits."""

import pytest
import torch
from truth import make_case, scores

from repo_ops import Options, linear_logps, linear_stats
from repo_ops.head import triton_rows


def truth(case):
    leaves = {name: tensor.detach() for name, tensor in case.leaves().items()}
    p = scores(**leaves, **case.head).softmax(-1)
    return p.square().sum(-1), p.argmax(-1) == case.targets


WHY_NOT = triton_rows.why_not(torch.zeros(1), torch.float32)
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("V", [1, 127, 5003])
@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_sum_p2_and_argmax(V, backend):
    case = make_case(3, 7, 24, V, bias=True, temperature=0.7, softcap=9.0, logit_scale=1.3)
    leaves = {name: tensor.detach() for name, tensor in case.leaves().items()}
    best = scores(**leaves, **case.head).argmax(-1)
    case.targets[0] = best[0]  # hits
    sum_p2, hits = truth(case)
    found = linear_stats(
        case.hidden, case.weight, case.targets, bias=case.bias, options=Options(backend=backend), **case.head
    )
    torch.testing.assert_close(found.sum_p2.double(), sum_p2, rtol=2e-5, atol=0)
    assert torch.equal(found.is_argmax, hits)
    assert found.is_argmax[0].all()
    both = linear_logps(case.hidden, case.weight, case.targets, bias=case.bias, with_entropy=True, **case.head)
    torch.testing.assert_close(found.logps, both.logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy, both.entropy, rtol=1e-5, atol=2e-6)


def test_only_what_is_asked_for_and_masked_rows_are_zero():
    case = make_case(2, 5, 8, 31)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    found = linear_stats(case.hidden, case.weight, case.targets, statistics=["sum_p2"], mask=mask)
    assert found.entropy is None
    assert found.is_argmax is None
    assert not found.sum_p2.requires_grad
    assert (found.sum_p2[mask == 0] == 0).all()
    assert (found.sum_p2[mask == 1] > 1 / 31 - 1e-6).all()
    with pytest.raises(
        ValueError, match="statistics: expected names out of 'entropy', 'sum_p2', 'is_argmax', got 'p2'"
    ):
        linear_stats(case.hidden, case.weight, case.targets, statistics=["p2"])


def test_squared_norm_of_the_logit_gradient():
    # what verl's optimal baseline weighs tokens by: |p - onehot|^2
    case = make_case(1, 6, 8, 31)
    z = (case.hidden.double() @ case.weight.double().T).detach().requires_grad_()
    z.log_softmax(-1).gather(-1, case.targets[..., None]).sum().backward()
    found = linear_stats(case.hidden, case.weight, case.targets, statistics=["sum_p2"])
    norm = 1 - 2 * found.logps.exp() + found.sum_p2
    torch.testing.assert_close(norm.double(), z.grad.square().sum(-1), rtol=1e-5, atol=1e-6)


def test_over_a_support():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(31, 8), torch.randint(0, 31, (2, 3))
    ids = torch.stack([torch.randperm(31)[:5] for _ in range(6)]).reshape(2, 3, 5)
    found = linear_stats(hidden, weight, targets, support_ids=ids)
    kept = torch.zeros(2, 3, 31, dtype=torch.bool).scatter(2, ids, True).scatter(2, targets[..., None], True)
    p = (hidden.double() @ weight.double().T).masked_fill(~kept, -float("inf")).softmax(-1)
    torch.testing.assert_close(found.sum_p2.double(), p.square().sum(-1), rtol=1e-5, atol=0)
    assert torch.equal(found.is_argmax, p.argmax(-1) == targets)
