"""Values and gradients of the objectives against the code of TRL and of Liger, on random ragged batches.

TRL's `GRPOTrainer._compute_loss` runs on a stand-in that has the attributes it reads, with log-probabilities in place
of a model. Where a peer differs from this library, a test below says how, by an exact equality of its own.
"""

import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from peers import (
    F32,
    F64,
    HIGH,
    L_MAX,
    LENGTHS,
    LOSSES,
    LOW,
    SAMPLER_LIMITS,
    SEEDS,
    TERMS,
    WIDTHS,
    B,
    T,
    batch,
    compared,
    graded,
    make,
    ours,
    same,
    trainer_settings,
)

from repo_ops import NumItems, get_objective, linear_policy_loss, policy_loss
from repo_ops.kl import k3, unbiased

# --- TRL


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", minversion="1.16")
    return pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer


TRAINER = {
    "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": LOW, "epsilon_high": HIGH, "beta": 0.0,
    "max_completion_length": L_MAX, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
    "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": None, "aux_loss_enabled": False,
    "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
    "entropy_coef": 0.0,
}  # fmt: skip
ARGS = {
    "use_bias_correction_kl": False, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "steps_per_generation": 1,
}  # fmt: skip
ONE_PROCESS = SimpleNamespace(
    num_processes=1,
    sync_gradients=False,
    gather=lambda x: x,
    reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, **_: x,
)


def theirs(trl, given, *, old=True, sampler=True, num_items=None, **settings):
    """Loss and gradients of TRL's `_compute_loss`; `settings` are the trainer's attributes and its arguments."""
    logps, entropy = (x.clone().requires_grad_() for x in (given.logps, given.entropy))
    trainer = SimpleNamespace(**{**TRAINER, **{k: v for k, v in settings.items() if k not in ARGS}})
    trainer.args = SimpleNamespace(**{**ARGS, **{k: v for k, v in settings.items() if k in ARGS}})
    trainer.accelerator, trainer.model = ONE_PROCESS, SimpleNamespace(training=True)
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)
    trainer.get_off_policy_mask, trainer.get_gamma_weights = trl.get_off_policy_mask, trl.get_gamma_weights
    trainer.get_high_entropy_mask = lambda *a: trl.get_high_entropy_mask(trainer, *a)
    ids, mask = torch.zeros(B, T, dtype=torch.int64), given.mask.to(torch.int64)
    inputs = {"prompt_ids": ids[:, :0], "prompt_mask": ids[:, :0], "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": given.advantages, "ref_per_token_logps": given.ref_logps}
    inputs["num_items_in_batch"] = mask.sum() if num_items is None else torch.tensor(num_items)
    if old:
        inputs["old_per_token_logps"] = given.old_logps
    if sampler:
        inputs["sampling_per_token_logps"] = given.sampler_logps
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = _vllm_ratio(trl, trainer, given, mask)
    return graded(trl._compute_loss(trainer, None, inputs), logps, entropy)


def _vllm_ratio(trl, trainer, given, mask):
    """TRL's own lines for the ratio, cut out of the method that generates completions."""
    source = inspect.getsource(trl._generate_and_score_completions)
    start = source.index("                per_token_logps_diff = (old_per_token_logps")
    end = source.index("            # Compute the per-token log probabilities for the reference model", start)
    scope = {"self": trainer, "mask": mask, "torch": torch, "math": math}
    scope |= {"old_per_token_logps": given.old_logps, "sampling_per_token_logps": given.sampler_logps}
    exec(textwrap.dedent(source[start:end]), scope)
    return scope["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize(("loss", "level", "term"), [(*key, t) for key in LOSSES for t in TERMS if compared(*key, t)])
def test_trl(trl, loss, level, term):
    (name, hyper), (trainer, more) = LOSSES[loss, level], TERMS[term]
    for seed in SEEDS:
        given = batch(seed)
        want = theirs(trl, given, **trainer_settings(loss, level), **trainer)
        same(ours(given, make(name, hyper | more)), want)


def test_the_batches_reach_every_branch():
    for level, name in (("token", "grpo"), ("sequence", "gspo")):
        found = [
            policy_loss(g.logps, g.advantages, objective=get_objective(name, **WIDTHS, **more), mask=g.mask,
                        old_logps=g.old_logps, sampler_logps=g.sampler_logps, entropy=g.entropy).metrics
            for g in map(batch, SEEDS)
            for more in ({"off_policy_mask": 0.05}, {"sampler_weight": "token_mask", **SAMPLER_LIMITS})
        ]  # fmt: skip
        for gate in ("clip_low", "clip_high"):
            assert sum(float(m[gate].total) for m in found) > 0, (level, gate)
        for kept in ("off_policy_kept", "sampler_weight"):
            assert any(0 < float(m[kept].total) != float(m[kept].count) for m in found if kept in m)


@pytest.mark.parametrize(("loss", "level"), LOSSES)
def test_trl_without_old_log_probabilities(trl, loss, level):
    name, hyper = LOSSES[loss, level]
    given = batch(0)
    want = theirs(trl, given, old=False, **trainer_settings(loss, level))
    same(ours(given, make(name, hyper), old_logps=None), want)


def test_trl_off_policy_mask_without_an_engine(trl):
    given = batch(1)  # TRL falls back to old_logps; here they are passed by name
    want = theirs(trl, given, sampler=False, off_policy_mask_threshold=0.05)
    same(ours(given, get_objective("grpo", **WIDTHS, off_policy_mask=0.05), sampler_logps=given.old_logps), want)


@pytest.mark.parametrize("loss", ["grpo", "sapo", "luspo", "dr_grpo", "dapo", "cispo", "vespo", "bnpo"])
def test_trl_accumulation(trl, loss):
    # one of 4 micro-batches of a generation of 4 steps; TRL counts tokens over the generation, sequences by the number
    # of micro-batches, and takes BNPO's mean of micro-batches
    name, hyper = LOSSES[loss, "token"]
    given, (steps, tokens) = batch(2), (4, 100)
    accumulation = {"current_gradient_accumulation_steps": steps, "steps_per_generation": steps, "num_items": tokens}
    want = theirs(trl, given, **trainer_settings(loss, "token"), **accumulation)
    more = {"share": 1 / steps} if loss == "bnpo" else {"num_items": NumItems(steps * B, tokens)}
    same(ours(given, make(name, hyper), **more), want)


# --- TRL: differences


def _k3_sum(given, logps, weight):
    """sum of weight * k3 over live tokens; masked ones hold no infinity here."""
    return (torch.where(given.mask, weight * k3(logps, given.ref_logps), 0.0)).sum()


@pytest.mark.parametrize("loss", ["grpo", "luspo", "dapo", "cispo"])
def test_trl_unbiased_kl_at_sequence_level(trl, loss):
    # TRL multiplies a token's k3 by its sequence's ratio where that is the level; "unbiased" here is the token's own
    # ratio at every level, which is what makes the gradient that of the KL (arXiv 2512.02556)
    name, hyper = LOSSES[loss, "sequence"]
    given, beta = batch(0), 0.07
    got = theirs(trl, given, **trainer_settings(loss, "sequence"), beta=beta, use_bias_correction_kl=True)
    want = ours(given, make(name, hyper))
    lengths = given.mask.sum(1, keepdim=True).clamp_min(1).to(F64)
    weights = {"grpo": 1 / (B * lengths), "luspo": 1 / B}.get(loss, 1 / sum(LENGTHS))
    logps = given.logps.clone().requires_grad_()
    drift = torch.where(given.mask, logps - given.old_logps, 0.0).sum(1, keepdim=True) / lengths
    penalty = beta * _k3_sum(given, logps, weights * drift.exp())
    (slope,) = torch.autograd.grad(penalty, logps)
    same(got, [want[0] + penalty.detach(), want[1] + slope, want[2]])
    own = unbiased(given.logps, given.ref_logps, given.old_logps)
    other = ours(given, make(name, hyper | {"beta": beta, "kl": "unbiased"}))
    torch.testing.assert_close(other[0] - want[0], beta * torch.where(given.mask, weights * own, 0.0).sum())
    assert (other[0] - got[0]).abs() > 1e-4


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("quantile", [1.0, 0.3])
def test_trl_entropy_bonus(trl, loss, quantile):
    # TRL: a mean over tokens whatever the loss type, and over the high-entropy ones alone where those learn. Here: over
    # all live tokens, averaged like the loss. Equal for token means without a quantile.
    name, hyper = LOSSES[loss, "token"]
    given, coef = batch(1), 0.02
    settings = {"_entropy_bonus_enabled": True, "entropy_coef": coef, "top_entropy_quantile": quantile}
    got = theirs(trl, given, **trainer_settings(loss, "token"), **settings)
    quantile_ = None if quantile == 1 else quantile
    mine = ours(given, make(name, hyper | {"entropy_coef": coef, "top_entropy_quantile": quantile_}))
    if loss in ("dapo", "bnpo") and quantile == 1:
        same(mine, got)
        return
    assert (mine[0] - got[0]).abs() > 1e-5
    want = ours(given, make(name, hyper | {"top_entropy_quantile": quantile_}))
    acting = given.mask & (given.entropy >= torch.quantile(given.entropy[given.mask], 1 - quantile))
    share = acting.to(F64) / acting.sum()
    same(got, [want[0] - coef * (share * given.entropy).sum(), want[1], -coef * share])


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_trl_weighs_a_token_without_sampler_probability_by_one(trl, mode):
    # here that token has no policy loss; for the others it is the same
    given = batch(0)
    given.advantages[0], given.old_logps[0, 2] = 1.0, given.logps[0, 2]
    given.sampler_logps[0] = given.old_logps[0] - 0.02
    given.sampler_logps[0, 2] = math.nan
    trainer, more = TERMS[mode]
    objective = get_objective("grpo", **WIDTHS, **more)
    got, mine = theirs(trl, given, **trainer), ours(given, objective)
    agreed = given.sampler_logps.clone()
    agreed[0, 2] = given.old_logps[0, 2]
    same(got, ours(given, objective, sampler_logps=agreed))
    assert mine[1][0, 2] != got[1][0, 2]
    others = torch.arange(T)[None] != torch.where(torch.arange(B) == 0, 2, -1)[:, None]
    same([mine[1][others]], [got[1][others]])


@pytest.mark.parametrize("where", ["masked", "no advantage"])
def test_trl_multiplies_overflows_by_zero(trl, where):
    given = batch(0)
    row, column = (2, 5) if where == "masked" else (4, 3)
    given.advantages = torch.tensor([1.0, -1, 1, -1, 0, -1], dtype=F64)
    given.old_logps[row, column] = -1000.0
    got, want = theirs(trl, given), ours(given, get_objective("grpo", **WIDTHS))
    assert not got[1][row, column].isfinite()
    assert all(x.isfinite().all() for x in want)
    given.old_logps[row, column] = given.logps[row, column]
    same(want, theirs(trl, given))


def test_refused_on_both_sides():
    with pytest.raises(ValueError, match="sampler_weight: expected token_truncate or token_mask"):
        get_objective("vespo", sampler_weight="sequence_mask")
    with pytest.raises(ValueError, match="delta"):
        get_objective("cispo", delta=2.0)  # TRL takes it and does not read it


# --- Liger

D, V = 8, 37


@pytest.fixture(scope="module")
def liger():
    found = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    if "vespo_k_pos" not in inspect.signature(found).parameters:
        pytest.skip("needs a Liger with VESPO and LUSPO (0.8.5)")
    return found


def head(seed, dtype):
    """A batch whose log-probabilities come from hidden states: hidden, weight, targets and the rest."""
    g = torch.Generator().manual_seed(100 + seed)
    hidden, weight = torch.randn(B, T, D, generator=g, dtype=F64), torch.randn(V, D, generator=g, dtype=F64)
    targets = torch.randint(0, V, (B, T), generator=g)
    logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    given = batch(seed)
    moved = {
        n: (logps + getattr(given, n) - given.logps).to(dtype) for n in ("old_logps", "ref_logps", "sampler_logps")
    }
    given = SimpleNamespace(mask=given.mask, logps=logps, advantages=given.advantages.to(dtype), **moved)
    return given, hidden.to(dtype), weight.to(dtype), targets


def by_liger(liger, seed, dtype, *, ratio=None, **settings):
    given, *leaves, targets = head(seed, dtype)
    leaves = [x.requires_grad_() for x in leaves]
    module = liger(
        compiled=False,
        use_ref_model=bool(settings.get("beta")),
        epsilon_low=LOW,
        max_completion_length=L_MAX,
        **settings,
    )
    ref = given.ref_logps if settings.get("beta") else None
    loss, _ = module(
        *leaves, targets, given.mask.to(dtype), given.advantages, ref_per_token_logps=ref,
        old_per_token_logps=given.old_logps, vllm_is_ratio=None if ratio is None else ratio(given),
    )  # fmt: skip
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))]


def by_us(seed, dtype, objective, *, mask=None, scale=1.0, share=1.0):
    given, *leaves, targets = head(seed, dtype)
    leaves = [x.requires_grad_() for x in leaves]
    reads = {n: getattr(given, n) for n in ("old_logps", "ref_logps", "sampler_logps")}
    reads |= {"advantages": scale * given.advantages, "mask": given.mask if mask is None else mask}
    loss = share * linear_policy_loss(*leaves, targets, objective=objective, **reads).loss
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))]


def close(got, want, rtol=0.0):
    # Liger's log-probabilities and their gradients are float32 whatever comes in; the terms of the losses are about 1
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=2e-6)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=3e-6 * float(w.abs().max()))


def liger_settings(loss, level):
    return trainer_settings(loss, level) | ({} if loss == "cispo" else {"epsilon_high": HIGH})


LIGER_TERMS = {
    "plain": ({"beta": 0.0}, {}),
    "k3": ({"beta": 0.07}, {"beta": 0.07}),
    "unbiased-kl": ({"beta": 0.07, "use_bias_correction_kl": True}, {"beta": 0.07, "kl": "unbiased"}),
    "delta": ({"beta": 0.0, "delta": 1.5}, {"delta": 1.5}),
    "vllm-ratio": ({"beta": 0.07}, {"beta": 0.07, "sampler_weight": "token_truncate", **SAMPLER_LIMITS}),
}


def _ratio(given):
    gap = torch.where(given.mask, given.old_logps - given.sampler_logps, 0.0)
    return gap.exp().clamp(*SAMPLER_LIMITS.values())


def _liger_compared(loss, level, term):
    if loss == "luspo" and (level == "token" or term in ("k3", "vllm-ratio")):
        return False  # test_liger_luspo_pads
    return compared(loss, level, term) and not (level == "sequence" and loss in ("cispo", "sapo", "vespo"))


@pytest.mark.parametrize(
    ("loss", "level", "term"), [(*key, t) for key in LOSSES for t in LIGER_TERMS if _liger_compared(*key, t)]
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_liger(liger, loss, level, term, dtype):
    (name, hyper), (settings, more) = LOSSES[loss, level], LIGER_TERMS[term]
    for seed in SEEDS:
        ratio = _ratio if term == "vllm-ratio" else None
        want = by_liger(liger, seed, dtype, ratio=ratio, **liger_settings(loss, level), **settings)
        # VESPO's terms weigh more: without AVX-512 Liger is 3.3e-6 off float64 at a loss of -1.5, ours 2e-15
        close(by_us(seed, dtype, make(name, hyper | more)), want, rtol=2e-6 if loss == "vespo" else 0.0)


@pytest.mark.parametrize(("level", "beta"), [("token", 0.0), ("token", 0.07), ("sequence", 0.07)])
def test_liger_luspo_pads(liger, level, beta):
    # Where its per-token losses are a matrix, Liger's LUSPO multiplies them by the sequence's length, counts padding
    # in, and divides by the padded width: (1 / B) sum_i T_i / T sum over all T columns. TRL sums live tokens.
    name, hyper = LOSSES["luspo", level]
    got = by_liger(liger, 0, F32, **liger_settings("luspo", level), beta=beta)
    mine = by_us(0, F32, make(name, hyper | {"beta": beta}))
    assert (mine[0] - got[0]).abs() > 1e-3
    everywhere = torch.ones(B, T, dtype=torch.bool)
    want = by_us(0, F32, make(name, hyper))  # at sequence level the KL alone is a matrix
    if level == "token":
        summed, lengths = get_objective("grpo", reduction="token-sum", **WIDTHS), torch.tensor(LENGTHS, dtype=F32)
        want = by_us(0, F32, summed, mask=everywhere, scale=lengths, share=1 / (B * T))
    for row, length in enumerate(LENGTHS if beta else []):
        kl = get_objective("grpo", reduction="token-sum", beta=beta)
        alone = everywhere & (torch.arange(B) == row)[:, None]
        part = by_us(0, F32, kl, mask=alone, scale=0.0, share=length / (B * T))
        want = [w + p for w, p in zip(want, part, strict=True)]
    close(got, want)


@pytest.mark.parametrize("loss", ["cispo", "sapo", "vespo"])
def test_liger_refuses_what_trl_runs_at_sequence_level(liger, loss):
    with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
        by_liger(liger, 0, F32, **liger_settings(loss, "sequence"), beta=0.0)
