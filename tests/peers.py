"""What the comparison with peers' code shares: random ragged batches, and which of their settings is which of ours."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import torch

from repo_ops import get_objective, policy_loss
from repo_ops.objectives import sapo
from repo_ops.terms.ratio_level import sequence_mean

F32, F64 = torch.float32, torch.float64
LENGTHS = [6, 0, 1, 4, 7, 3]  # an empty sequence, a single token, and one as long as the padding
B, T, L_MAX = len(LENGTHS), max(LENGTHS), 16
SEEDS = range(2)
LOW, HIGH = 0.15, 0.3  # unequal, so that a swap shows; narrow enough for sequence ratios to leave them
WIDTHS = {"eps_low": LOW, "eps_high": HIGH}
EXACT = {"rtol": 1e-11, "atol": 1e-13}
"""Both sides are float64 and differ by the order of their sums."""


def batch(seed, dtype=F64):
    """Padded random log-probabilities, 0.4 nats apart; finite junk where masked, as the peers multiply by the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    logps = -0.5 - 3 * torch.rand(B, T, generator=g, dtype=F64)
    drift = 0.4 * torch.randn(3, B, T, generator=g, dtype=F64) + 0.2 * torch.randn(3, B, 1, generator=g, dtype=F64)
    advantages = torch.randn(B, generator=g, dtype=F64).abs() * torch.tensor([1.0, -1, 1, -1, 1, -1])
    advantages[int(torch.randint(0, B, (), generator=g))] = 0.0
    # TRL takes its entropy quantile in float32: entropies that float32 holds, so that its threshold is ours
    entropy = torch.rand(B, T, generator=g).to(F64)
    names = ("old_logps", "ref_logps", "sampler_logps")
    given = {"logps": logps, "entropy": entropy, **{n: logps + d for n, d in zip(names, drift)}}
    return SimpleNamespace(mask=mask, advantages=advantages, **{n: v.to(dtype) for n, v in given.items()})


def ours(given, objective, *, share=1.0, **more):
    """Loss and gradients to log-probabilities and entropies."""
    logps, entropy = (x.clone().requires_grad_() for x in (given.logps, given.entropy))
    reads = {n: getattr(given, n) for n in ("old_logps", "ref_logps", "sampler_logps")}
    reads |= {"mask": given.mask, "entropy": entropy, "objective": objective}
    loss = share * policy_loss(logps, given.advantages, **{**reads, **more}).loss
    return graded(loss, logps, entropy)


def graded(loss, logps, entropy):
    gradients = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(logps) if g is None else g for g in gradients)]


def same(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **(tolerance or EXACT))


@dataclass(frozen=True, kw_only=True)
class SequenceSapo(sapo.Objective):
    """TRL lets SAPO's gate judge the sequence's ratio; the paper and this library's file judge the token's."""

    scope: ClassVar = "sequence"

    def __call__(self, tokens):
        return super().__call__(replace(tokens, logps=tokens.old_logps + sequence_mean(tokens, tokens.log_ratio)))


TOKEN_MEAN, TOKEN_SUM = {"reduction": "token-mean"}, {"reduction": "seq-mean-token-sum"}
CONST = {"max_length": L_MAX}
# TRL chooses a temperature by torch.where of two numbers, whose result is float32: its 1.05 is this number
SAPO = {"tau_neg": float(torch.tensor(1.05, dtype=F32))}
# (loss type, level) -> our name and its settings; TRL's epsilon_high of CISPO is the cap, ours is a width around 1
LOSSES = {
    ("grpo", "token"): ("grpo", WIDTHS),
    ("bnpo", "token"): ("bnpo_loss_type", WIDTHS),
    ("dr_grpo", "token"): ("dr_grpo", WIDTHS | CONST),
    ("dapo", "token"): ("dapo", WIDTHS),
    ("luspo", "token"): ("grpo", WIDTHS | TOKEN_SUM),
    ("cispo", "token"): ("cispo", {"eps_high": 0.3} | TOKEN_MEAN),
    ("sapo", "token"): ("sapo", SAPO),
    ("vespo", "token"): ("vespo", {}),
    ("grpo", "sequence"): ("gspo", WIDTHS),
    ("bnpo", "sequence"): ("gspo", WIDTHS | TOKEN_MEAN),
    ("dr_grpo", "sequence"): ("dr_grpo", WIDTHS | CONST | {"ratio_level": "sequence_mean"}),
    ("dapo", "sequence"): ("dapo", WIDTHS | {"ratio_level": "sequence_mean"}),
    ("luspo", "sequence"): ("luspo", WIDTHS),
    ("cispo", "sequence"): ("cispo", {"eps_high": 0.3, "ratio_level": "sequence_mean"} | TOKEN_MEAN),
    ("sapo", "sequence"): (SequenceSapo, SAPO),
    ("vespo", "sequence"): ("vespo", {}),  # its weight is the sequence's anyway: TRL does not read the level
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
VLLM_LIMITS = {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.3}
SAMPLER_LIMITS = {"sampler_min": 0.8, "sampler_max": 1.3}
# TRL's settings and ours
TERMS = {
    "plain": ({}, {}),
    "k3": ({"beta": 0.07}, {"beta": 0.07}),
    "unbiased-kl": ({"beta": 0.07, "use_bias_correction_kl": True}, {"beta": 0.07, "kl": "unbiased"}),
    "delta": ({"delta": 1.5}, {"delta": 1.5}),
    "high-entropy": ({"top_entropy_quantile": 0.3, "beta": 0.07}, {"top_entropy_quantile": 0.3, "beta": 0.07}),
    "off-policy-mask": ({"off_policy_mask_threshold": 0.05, "beta": 0.07}, {"off_policy_mask": 0.05, "beta": 0.07}),
    **{
        mode: (
            {"use_vllm": True, "vllm_importance_sampling_mode": mode, "beta": 0.07, **VLLM_LIMITS},
            {"sampler_weight": mode, "beta": 0.07, **SAMPLER_LIMITS},
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}


def make(name, hyper):
    return get_objective(name, **hyper) if isinstance(name, str) else name(**hyper)


def trainer_settings(loss, level):
    settings = {"loss_type": loss, "importance_sampling_level": level}
    return settings | ({"epsilon_high": 1 + HIGH} if loss == "cispo" else {})


def compared(loss, level, term):
    if term == "delta":
        return loss in CLIPPED  # TRL ignores its delta elsewhere; here the other objectives have no such field
    if term.startswith("sequence_"):
        return loss != "vespo"  # refused by TRL's constructor and by ours: test_refused_on_both_sides
    return not (term == "unbiased-kl" and level == "sequence")  # test_trl_unbiased_kl_at_sequence_level
