"""The clipped-ratio family by one Triton launch, through the public loss, equals autograd over the same numbers."""

import pytest
import torch

from repo_ops import Options, get_objective, linear_logps, linear_policy_loss
from repo_ops.objectives import objective_names

pytest.importorskip("triton")

# three sequences of 9, 0 and 5 live tokens and one without advantage, in two tiles
B, T, D, V = 4, 11, 8, 61
FAMILY = {
    "grpo": {},
    "delta": {"delta": 1.3},
    "gspo": {"eps_low": 0.1, "eps_high": 0.1},
    "prefix": {"ratio_level": "prefix_min"},
    "kl": {"beta": 0.1, "kl": "k2"},
    "masked": {"sampler_weight": "token_mask", "sampler_min": 0.8, "sampler_max": 1.2},
    "repo": {"beta": 0.1},
}
NAMES = {"gspo": "gspo", "repo": "repo"}


@pytest.mark.parametrize("case", FAMILY)
def test_kernel_and_autograd_agree(case, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets, mask = torch.randint(0, V, (B, T)), torch.zeros(B, T, dtype=torch.bool)
    for row, length in enumerate((9, 0, 5, 4)):
        mask[row, :length] = True
    with torch.no_grad():
        logps = linear_logps(hidden, weight, targets).logps
    given = {
        "advantages": torch.tensor([1.0, -1.0, -0.7, 0.0]),
        "old_logps": logps + 0.3 * torch.randn(B, T),
        "ref_logps": logps + 0.3 * torch.randn(B, T),
        "sampler_logps": logps + 0.3 * torch.randn(B, T),
        "mask": mask,
        "objective": get_objective(NAMES.get(case, "grpo"), **FAMILY[case]),
    }
    if case == "repo":
        given["off_policy"] = torch.tensor([False, False, True, True])
    launched = []
    import repo_ops.kernels.clipped_ratio as kernel

    real = kernel.clipped_ratio
    monkeypatch.setattr(kernel, "clipped_ratio", lambda *a, **k: launched.append(1) or real(*a, **k))
    losses = {}
    for backend in ("triton", "torch"):
        found = linear_policy_loss(hidden, weight, targets, options=Options(backend=backend), **given)
        losses[backend] = found.loss.item(), *torch.autograd.grad(found.loss, [hidden, weight])
    assert launched
    assert losses["triton"][0] == pytest.approx(losses["torch"][0], abs=1e-6)
    for mine, expected in zip(losses["triton"][1:], losses["torch"][1:], strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_objectives_with_a_loss_of_their_own_do_not_claim_the_kernel():
    hyper = {"dr_grpo": {"max_length": 8}}
    claimed = set()
    for name in objective_names():
        try:
            objective = get_objective(name, **hyper.get(name, {}))
        except ValueError:
            continue  # needs settings that only its user knows
        if objective.kernel_terms is not None:
            claimed.add(name)
    assert {"grpo", "dr_grpo", "dapo", "gspo", "repo"} <= claimed
    assert not claimed & {"cispo", "clip_cov", "kl_cov", "sapo", "vespo", "gmpo", "topr", "bapo"}
