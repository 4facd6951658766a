"""Policy losses and the fused head inside verl.

Where verl is installed these tests run against it: its averaging (`agg_loss`), its registry, its ActorConfig-shaped
settings, its module of the fused kernel. Where it is not, they run against a stand-in below that states verl 0.9's
contract; the id of each test says which. verl's own fused kernel needs a GPU and takes part in neither.
"""

import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peers import EXACT

from repo_ops import get_objective, policy_loss
from repo_ops.integrations import verl as ours

HAS_VERL = importlib.util.find_spec("verl") is not None
F64 = torch.float64
LENGTHS = [6, 0, 1, 4, 7, 3]
B, T = len(LENGTHS), max(LENGTHS)


def agg_loss(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None,
             loss_scale_factor=None):  # fmt: skip
    """The contract of verl's function of this name: divide by the global counts, multiply by dp_size."""
    losses = torch.where(loss_mask, loss_mat, 0.0)
    if loss_agg_mode == "token-sum":
        return losses.sum() * dp_size
    if loss_agg_mode == "token-mean":
        return losses.sum() / (loss_mask.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    sequences = loss_mask.any(1).sum() if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-mean":
        return (losses.sum(1) / loss_mask.sum(1).clamp_min(1)).sum() / sequences * dp_size
    total = losses.sum() / sequences * dp_size
    return total if loss_agg_mode == "seq-mean-token-sum" else total / (loss_scale_factor or loss_mask.shape[1])


def stand_in():
    """Modules with what repo_ops.integrations.verl touches of verl 0.9."""
    core = ModuleType("verl.trainer.ppo.core_algos")
    core.POLICY_LOSS_REGISTRY, core.agg_loss = {}, agg_loss
    core.register_policy_loss = lambda name: lambda f: core.POLICY_LOSS_REGISTRY.setdefault(name, f)

    def vanilla(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights): ...

    class LinearCrossEntropy:
        @staticmethod
        def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None): ...

    core.compute_policy_loss_vanilla = vanilla
    kernel = ModuleType("verl.utils.kernel.linear_cross_entropy")
    kernel.LinearCrossEntropy, kernel.linear_cross_entropy = LinearCrossEntropy, None
    modules = {name: ModuleType(name) for name in
               ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.utils.kernel")}  # fmt: skip
    modules["verl.trainer.ppo"].core_algos, modules["verl.utils.kernel"].linear_cross_entropy = core, kernel
    return modules | {core.__name__: core, kernel.__name__: kernel}


@pytest.fixture(params=["real verl" if HAS_VERL else "stand-in by contract"])
def host(request, monkeypatch):
    if not HAS_VERL:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    from verl.trainer.ppo import core_algos
    from verl.utils.kernel import linear_cross_entropy

    # where repo-ops is installed beside verl, importing verl has run the plugin already
    own = {name: loss for name, loss in core_algos.POLICY_LOSS_REGISTRY.items() if not name.startswith("repo_ops/")}
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", own)
    monkeypatch.setattr(linear_cross_entropy, "linear_cross_entropy", linear_cross_entropy.linear_cross_entropy)
    return SimpleNamespace(core=core_algos, kernel=linear_cross_entropy)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    logps = -3 * torch.rand(B, T, generator=g, dtype=F64)
    old = logps + 0.3 * torch.randn(B, T, generator=g, dtype=F64)
    return logps, old, torch.randn(B, T, generator=g, dtype=F64), mask


def settings(low=0.2, high=0.2, **info):
    found = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=low, clip_ratio_high=high, global_batch_info=info)
    found.get = lambda key, default=None: getattr(found, key, default)
    return found


def call(host, name, given, config, mode="token-mean", **more):
    logps, old, advantages, mask = given
    logps = logps.clone().requires_grad_()
    loss, metrics = host.core.POLICY_LOSS_REGISTRY[name](
        old_log_prob=old, log_prob=logps, advantages=advantages, response_mask=mask, loss_agg_mode=mode, config=config,
        **{"rollout_is_weights": None, **more},
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logps)[0], metrics


def clipped(given, low, high, weights=1.0):
    logps, old, advantages, _ = given
    ratio = (logps - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)) * weights


def test_register_names_every_objective_that_needs_no_more_than_verl_gives(host, caplog):
    with caplog.at_level(logging.WARNING):
        names = ours.register()
    assert "repo_ops: registered" in caplog.text
    assert {"repo_ops/grpo", "repo_ops/gspo", "repo_ops/cispo", "repo_ops/dr_grpo", "repo_ops/repo"} <= set(names)
    assert not {"repo_ops/areal", "repo_ops/dppo_topk", "repo_ops/high_entropy"} & set(names)
    assert set(names) <= set(host.core.POLICY_LOSS_REGISTRY)
    assert ours.register() == names  # a second call changes nothing


@pytest.mark.parametrize("mode", ours.REDUCTIONS)
@pytest.mark.parametrize("info", ["local", "global"])
def test_the_loss_is_averaged_as_verl_averages(host, mode, info):
    ours.register()
    given = batch()
    counts = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 12, "loss_scale_factor": 9}
    info = counts if info == "global" else {}
    loss, grad, metrics = call(host, "repo_ops/grpo", given, settings(0.1, 0.3, **info), mode)
    logps = given[0].clone().requires_grad_()
    losses = clipped((logps, *given[1:]), 0.1, 0.3)
    want = host.core.agg_loss(loss_mat=losses, loss_mask=given[3], loss_agg_mode=mode, **info)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-7, atol=1e-9)  # verl adds 1e-8 to lengths
    torch.testing.assert_close(grad, torch.autograd.grad(want, logps)[0], rtol=1e-7, atol=1e-9)
    assert all(isinstance(value, float) for value in metrics.values())
    drift = (given[1] - given[0])[given[3]].mean()
    assert metrics["actor/ppo_kl"] == pytest.approx(float(drift))


def test_uneven_micro_batches_on_two_ranks_add_up_to_the_steps_loss(host):
    # verl: the mean over ranks (FSDP) of the sum over micro-batches
    ours.register()
    given = batch()
    counts = {"batch_num_tokens": sum(LENGTHS), "global_batch_size": B, "loss_scale_factor": T}
    for name in ("repo_ops/grpo", "repo_ops/gspo", "repo_ops/cispo", "repo_ops/vespo"):
        for mode in ours.REDUCTIONS:
            whole = call(host, name, given, settings(dp_size=1, **counts), mode)
            ranks = [[slice(0, 1), slice(1, 4)], [slice(4, 6)]]
            total, slopes = 0.0, []
            for micro_batches in ranks:
                for rows in micro_batches:
                    part = tuple(x[rows] for x in given)
                    loss, grad, metrics = call(host, name, part, settings(dp_size=2, **counts), mode)
                    total, slopes = total + loss / len(ranks), [*slopes, grad / len(ranks)]
                    assert metrics.keys() == whole[2].keys()  # verl refuses ranks that report other metrics
            torch.testing.assert_close(total, whole[0], **EXACT)
            torch.testing.assert_close(torch.cat(slopes), whole[1], **EXACT)


def test_rollout_weights_are_a_factor_of_the_loss(host):
    ours.register()
    given = batch()
    weights = 0.5 + torch.rand(B, T, dtype=F64)
    loss, _, _ = call(host, "repo_ops/grpo", given, settings(), rollout_is_weights=weights)
    torch.testing.assert_close(loss, clipped(given, 0.2, 0.2, weights)[given[3]].sum() / sum(LENGTHS), **EXACT)
    # VESPO multiplies its sequence ratio instead: the same as an engine that reported other log-probabilities
    loss, _, _ = call(host, "repo_ops/vespo", given, settings(), rollout_is_weights=weights)
    want = policy_loss(given[0], given[2], objective=get_objective("vespo", sampler_weight="token_truncate"),
                       mask=given[3], old_logps=given[1], sampler_logps=given[1] - weights.log()).loss  # fmt: skip
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)


def test_an_objective_of_ones_own_keeps_its_settings(host):
    given, mine = batch(), get_objective("grpo", eps_low=0.05, eps_high=0.4)
    ours.register_objective("mine", mine)
    loss, _, _ = call(host, "mine", given, settings(0.2, 0.2))
    torch.testing.assert_close(loss, clipped(given, 0.05, 0.4)[given[3]].sum() / sum(LENGTHS), **EXACT)
    with pytest.raises(ValueError, match="name: expected one that verl does not have yet"):
        ours.register_objective("mine", mine)
    with pytest.raises(ValueError, match="got one that reads sampler_logps"):
        ours.register_objective("tis", get_objective("grpo_tis"))
    with pytest.raises(ValueError, match=r"got 0\.1 and 0\.0; verl adds both terms itself"):
        ours.register_objective("kl", get_objective("grpo", beta=0.1))
    with pytest.raises(TypeError, match="objective: expected an objective, got 'gspo'; get_objective"):
        ours.register_objective("name", "gspo")


def test_wrong_settings_are_refused_by_name(host):
    ours.register()
    with pytest.raises(ValueError, match="loss_agg_mode: expected one of token-mean"):
        call(host, "repo_ops/grpo", batch(), settings(), "tokens")
    with pytest.raises(ValueError, match=r"global_batch_info: expected \w+ with dp_size = 2"):
        call(host, "repo_ops/grpo", batch(), settings(dp_size=2))


def test_a_verl_with_another_interface_is_refused(host, monkeypatch):
    monkeypatch.setattr(host.core, "compute_policy_loss_vanilla", lambda old_log_prob, log_prob: None)
    with pytest.raises(RuntimeError, match=r"as in verl 0\.9, got old_log_prob, log_prob"):
        ours.register()


def test_the_self_check_refuses_a_loss_that_is_not_verls(host, monkeypatch):
    whole = host.core.agg_loss
    monkeypatch.setattr(host.core, "agg_loss", lambda **given: 1.01 * whole(**given))
    with pytest.raises(RuntimeError, match="differs from its definition"):
        ours.register()


def test_the_fused_head_goes_where_verl_looks_for_it(host, caplog):
    with caplog.at_level(logging.WARNING):
        ours.install_head()
    assert "is now repo_ops'" in caplog.text
    hidden, weight = torch.randn(1, 9, 128, requires_grad=True), torch.randn(300, 128, requires_grad=True)
    labels = torch.randint(0, 300, (1, 9))
    # as verl.models.transformers.dense_common calls it
    logps, entropy = host.kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    assert logps.shape == entropy.shape == (9,)
    log_probs = (hidden[0].double() @ weight.double().T / 0.7).log_softmax(-1)
    want = log_probs.gather(1, labels.T)[:, 0], -(log_probs.exp() * log_probs).sum(1)
    for got, true in zip((logps, entropy), want, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)
        mine, theirs = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (got, true))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for reduction in ("sum", "mean"):
        found, _ = host.kernel.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
        torch.testing.assert_close(found, getattr(logps, reduction)())
    with pytest.raises(ValueError, match="reduction: expected"):
        host.kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "max")


def test_without_verl_one_sentence_says_what_is_missing(monkeypatch):
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"verl is needed .* pip install verl"):
        ours.register()


def test_the_plugin_does_what_the_environment_asks_for(host, monkeypatch):
    import importlib

    monkeypatch.delitem(sys.modules, "repo_ops.integrations.verl_plugin", raising=False)
    before = host.kernel.linear_cross_entropy
    monkeypatch.setenv("REPO_OPS_VERL", "none")
    plugin = importlib.import_module("repo_ops.integrations.verl_plugin")
    assert "repo_ops/grpo" not in host.core.POLICY_LOSS_REGISTRY
    monkeypatch.delenv("REPO_OPS_VERL")
    importlib.reload(plugin)
    assert "repo_ops/grpo" in host.core.POLICY_LOSS_REGISTRY
    assert host.kernel.linear_cross_entropy is before
    monkeypatch.setenv("REPO_OPS_VERL", "objectives,head")
    importlib.reload(plugin)
    assert host.kernel.linear_cross_entropy is ours.linear_cross_entropy
    monkeypatch.setenv("REPO_OPS_VERL", "heads")
    with pytest.raises(ValueError, match="REPO_OPS_VERL: expected objectives, head or none"):
        importlib.reload(plugin)
