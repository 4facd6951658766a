"""The clipped-ratio surrogate of packed tokens: loss, d loss / d logp and what was clipped, in one launch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.launch import Config, Launch, architecture_of, check_runnable, check_vector, launch_config

_FLOAT32 = (torch.float32,)
_KL_CODES = {"k1": 1, "k2": 2, "k3": 3}


class ClippedRatio(NamedTuple):
    """Per-token results, each [N]."""

    loss: Tensor
    """float32: weights * correction * surrogate + beta * kl_weights * kl."""
    dlogps: Tensor
    """float32: d sum(loss) / d logps."""
    ratio: Tensor
    """float32: the number that was clipped: r_t, the sequence's s, or the prefix weight m_t * r_t."""
    clipped_low: Tensor
    """bool: A < 0 and ratio < low, so no gradient."""
    clipped_high: Tensor
    """bool: A > 0 and ratio > high, so no gradient."""
    clipped_delta: Tensor | None
    """bool: A < 0 and ratio > delta, so no gradient; None without a delta."""
    kl: Tensor | None
    """float32, unweighted; None without ref_logps."""


@triton.jit
def _log_ratio(logps, old_logps, tokens, mask):
    if old_logps is not None:
        return tl.load(logps + tokens, mask=mask, other=0.0) - tl.load(old_logps + tokens, mask=mask, other=0.0)
    return tl.zeros(tokens.shape, tl.float32)


@triton.jit
def _bounded_exp(x):
    """exp(min(x, 70)): a ratio of 2.5e30 is as good as infinite, and a sum of them stays a number. NaN stays NaN."""
    return tl.exp(tl.where(x > 70.0, 70.0, x))


@triton.jit
def _bound(bound, tokens, mask):
    """A bound given as one number or as a number a token."""
    bound = tl.to_tensor(bound)  # the interpreter passes numbers as plain floats
    if bound.dtype.is_ptr():
        return tl.load(bound + tokens, mask=mask, other=1.0)
    else:
        return bound


@triton.jit
def _loaded_or_one(values, tokens, mask):
    if values is not None:
        return tl.load(values + tokens, mask=mask, other=1.0)
    return tl.full(tokens.shape, 1.0, tl.float32)


@triton.jit
def _surrogate(ratio, advantage, low, high, delta, tokens, mask):
    """-min(r A, clip(r, low, high) A) (for A < 0 at most delta |A|), its derivative in r, and the three clip masks.

    Comparisons choose, nothing is multiplied by 0: r may be inf, and inf * 0 is NaN. A NaN ratio compares False
    everywhere and so stays NaN. A ratio equal to a bound keeps its gradient. A == 0 gives exactly 0, whatever r is.
    """
    positive = advantage > 0
    negative = advantage < 0
    never = positive & negative
    is_low = never
    is_high = never
    is_delta = never
    kept = ratio
    if high is not None:
        most = _bound(high, tokens, mask)
        is_high = positive & (ratio > most)
        kept = tl.where(is_high, most, kept)
    if low is not None:
        least = _bound(low, tokens, mask)
        is_low = negative & (ratio < least)
        kept = tl.where(is_low, least, kept)
    if delta is not None:
        is_delta = negative & (kept > delta)
        kept = tl.where(is_delta, delta, kept)
        is_low = is_low & (is_delta == 0)
    clipped = is_low | is_high | is_delta
    active = positive | negative | (advantage != advantage)
    value = tl.where(active, -advantage * kept, 0.0)
    slope = tl.where(active & (clipped == 0), -advantage, 0.0)
    return value, slope, is_low, is_high, is_delta


@triton.jit
def _kl_term(logp, ref_logp, KL: tl.constexpr):
    """k1, k2 or k3 of x = ref_logp - logp, and its derivative in logp."""
    x = ref_logp - logp
    if KL == 1:
        return -x, tl.full(x.shape, 1.0, tl.float32)
    elif KL == 2:
        return 0.5 * x * x, -x
    else:
        # e^x - x - 1 loses every digit of a small x, where its series has them all (next term below 1e-8 of it)
        small = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0))))
        grows = _bounded_exp(x)
        near = tl.abs(x) < 0.1
        return tl.where(near, small, grows - x - 1.0), tl.where(near, -(small + x), 1.0 - grows)


@triton.jit
def _times(weight, value):
    """weight * value, exactly 0 where either is 0, even if the other is inf or NaN."""
    return tl.where((weight == 0) | (value == 0), 0.0, weight * value)


@triton.jit
def _write_token_loss(
    value, ratio, is_low, is_high, is_delta, weight, tokens, mask,
    logps, ref_logps, kl_weights, beta, loss, out_ratio, clipped_low, clipped_high, clipped_delta, kl, KL: tl.constexpr,
):  # fmt: skip
    """Store everything of a token but its gradient; returns the KL term's share of the gradient."""
    total = _times(weight, value)
    dkl = tl.zeros(tokens.shape, tl.float32)
    if ref_logps is not None:
        logp = tl.load(logps + tokens, mask=mask, other=0.0)
        divergence, slope = _kl_term(logp, tl.load(ref_logps + tokens, mask=mask, other=0.0), KL)
        scale = beta * tl.load(kl_weights + tokens, mask=mask, other=0.0)
        total += _times(scale, divergence)
        dkl = _times(scale, slope)
        tl.store(kl + tokens, divergence, mask=mask)
    tl.store(loss + tokens, total, mask=mask)
    tl.store(out_ratio + tokens, ratio, mask=mask)
    tl.store(clipped_low + tokens, is_low.to(tl.uint8), mask=mask)
    tl.store(clipped_high + tokens, is_high.to(tl.uint8), mask=mask)
    if clipped_delta is not None:
        tl.store(clipped_delta + tokens, is_delta.to(tl.uint8), mask=mask)
    return dkl


_POINTERS = [
    "logps", "advantages", "old_logps", "ref_logps", "weights", "kl_weights", "correction",
    "loss", "dlogps", "ratio", "clipped_low", "clipped_high", "clipped_delta", "kl",
]  # fmt: skip
# Numbers and lengths are run-time values: another batch, bound or beta runs the same binary. A bound given as a tensor
# and one given as a number are two binaries.
_RUNTIME = ["low", "high", "delta", "beta", "N"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def ratio_tokens_kernel(
    logps, advantages, old_logps, low, high, delta, ref_logps, beta, weights, kl_weights,
    correction, loss, dlogps, ratio, clipped_low, clipped_high, clipped_delta, kl, N,
    KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token ratios: one program a block of tokens.

    Bytes a token: 4 for each tensor given (2 to 9 of them), 14 written, and 4 + 1 more with a KL term and a delta.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < N
    r = _bounded_exp(_log_ratio(logps, old_logps, tokens, mask))
    advantage = tl.load(advantages + tokens, mask=mask, other=0.0)
    weight = _times(_loaded_or_one(weights, tokens, mask), _loaded_or_one(correction, tokens, mask))
    value, slope, is_low, is_high, is_delta = _surrogate(r, advantage, low, high, delta, tokens, mask)
    dkl = _write_token_loss(
        value, r, is_low, is_high, is_delta, weight, tokens, mask,
        logps, ref_logps, kl_weights, beta, loss, ratio, clipped_low, clipped_high, clipped_delta, kl, KL,
    )  # fmt: skip
    tl.store(dlogps + tokens, _times(_times(weight, slope), r) + dkl, mask=mask)


@triton.jit
def _least(a, b):
    """min that keeps a NaN."""
    return tl.where(a != a, a, tl.where(a <= b, a, b))


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=[*_POINTERS, "cu_seqlens"])
def ratio_sequences_kernel(
    logps, advantages, old_logps, low, high, delta, ref_logps, beta, weights, kl_weights,
    correction, loss, dlogps, ratio, clipped_low, clipped_high, clipped_delta, kl, N,
    cu_seqlens,  # [B + 1] int32 or int64
    KL: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sequence or prefix ratios: one program a sequence, blocks of its tokens in order.

    Bytes a token as for `ratio_tokens_kernel`, plus a second read of logps and old_logps: shifted by one for a prefix,
    for the mean of a sequence. A sequence's dlogps are written, read and written, since their factor comes last.
    """
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    # a cu_seqlens that runs past the tokens must not make the kernel read past them
    end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), N)
    lanes = tl.arange(0, BLOCK)

    length = tl.maximum(end - begin, 1).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    if old_logps is not None and not PREFIX:
        for start in range(begin, end, BLOCK):
            tokens = start + lanes
            sums += _log_ratio(logps, old_logps, tokens, tokens < end)
    s = _bounded_exp(tl.sum(sums, axis=0) / length)

    least = float("inf")
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + lanes
        mask = tokens < end
        advantage = tl.load(advantages + tokens, mask=mask, other=0.0)
        weight = _times(_loaded_or_one(weights, tokens, mask), _loaded_or_one(correction, tokens, mask))
        if PREFIX:
            # the log-ratio of the token before, so that an inclusive scan is the exclusive minimum; nothing is before
            # the first token, whose own minimum is 0 = log 1
            later = mask & (tokens > begin)
            before = tl.where(later, _log_ratio(logps, old_logps, tokens - 1, later), float("inf"))
            running = _least(least, tl.associative_scan(before, 0, _least))
            least = _least(least, tl.reduce(before, 0, _least))
            r = _bounded_exp(_log_ratio(logps, old_logps, tokens, mask) + tl.where(tokens == begin, 0.0, running))
        else:
            r = tl.zeros([BLOCK], tl.float32) + s
        value, slope, is_low, is_high, is_delta = _surrogate(r, advantage, low, high, delta, tokens, mask)
        dkl = _write_token_loss(
            value, r, is_low, is_high, is_delta, weight, tokens, mask,
            logps, ref_logps, kl_weights, beta, loss, ratio, clipped_low, clipped_high, clipped_delta, kl, KL,
        )  # fmt: skip
        slope = _times(weight, slope)
        if PREFIX:
            tl.store(dlogps + tokens, _times(slope, r) + dkl, mask=mask)
        else:
            slopes += tl.where(mask, slope, 0.0)
            if ref_logps is not None:
                tl.store(dlogps + tokens, dkl, mask=mask)

    if not PREFIX:
        # every token moves s by s / T, and s moves every token's loss: one number for the whole sequence
        shared = _times(tl.sum(slopes, axis=0), s) / length
        if ref_logps is not None:
            # what a thread reads back below, another one may have written
            tl.debug_barrier()
        for start in range(begin, end, BLOCK):
            tokens = start + lanes
            mask = tokens < end
            gradient = tl.zeros([BLOCK], tl.float32) + shared
            if ref_logps is not None:
                gradient += tl.load(dlogps + tokens, mask=mask, other=0.0)
            tl.store(dlogps + tokens, gradient, mask=mask)


def clipped_ratio(
    logps: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None,
    low: float | Tensor | None,
    high: float | Tensor | None,
    level: Literal["token", "sequence", "prefix"] = "token",
    cu_seqlens: Tensor | None = None,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    kl: Literal["k1", "k2", "k3"] = "k3",
    beta: float = 0.0,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    correction: Tensor | None = None,
) -> ClippedRatio:
    """Weighted loss of each token under a clipped importance ratio, and its gradient.

    Equals, with lr = logps - old_logps,
        r = exp(lr)                                      level "token"
        r = exp(mean of lr over the sequence)            level "sequence", the mean attached
        r = exp(min of lr over earlier tokens) * exp(lr) level "prefix", the minimum detached, 1 for the first token
        l = -minimum(r * A, clip(r, low, high) * A), for A < 0 at most delta * |A|
        loss = weights * correction * l + beta * kl_weights * kl(ref_logps, logps)
    A ratio equal to a bound keeps its gradient, so a ratio of exactly 1 always does.

    Args:
        logps: [N] float32, packed tokens of the current policy.
        advantages: [N] float32. A token with 0 adds exactly 0 to the surrogate, even where its ratio is inf or NaN.
        old_logps: [N] float32, the behaviour policy's; None where the ratio is 1 by construction.
        low, high: bounds of the ratio itself (0.8, 1.2), not widths: a float, [N] float32, or None for no bound.
        level: what the ratio is taken over. "sequence" and "prefix" need cu_seqlens, "token" has no use for it.
        cu_seqlens: [B + 1] int32 or int64, ascending from 0 to N; empty sequences are allowed.
        delta: cap on the ratio of tokens with A < 0 (dual clip's c, INTELLECT-2's delta), >= 1; None for no cap.
        ref_logps: [N] float32, the reference policy's; None for no KL term.
        kl: estimator, of x = ref_logps - logps: k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1.
        beta: factor of the KL term.
        weights: [N] float32, each token's share in the reduction; None for 1. A 0 silences the surrogate.
        kl_weights: [N] float32, the same for the KL term; None for `weights`.
        correction: [N] float32, a constant factor of the surrogate, not of the KL term; None for 1.
    Returns:
        ClippedRatio. Tokens at or after cu_seqlens[-1] belong to no sequence; their values are undefined.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    Source: PPO arXiv:1707.06347 eq. 7; GSPO arXiv:2507.18071 eq. 5; MinPRO arXiv:2601.22718; dual clip arXiv:1912.09729
        eq. 5; delta arXiv:2505.07291; KL estimators joschu.net/blog/kl-approx.html.
    """
    check_runnable("logps", logps)
    make = partial(
        ratio_launch,
        logps,
        advantages,
        old_logps=old_logps,
        low=low,
        high=high,
        level=level,
        cu_seqlens=cu_seqlens,
        delta=delta,
        ref_logps=ref_logps,
        kl=kl,
        beta=beta,
        weights=weights,
        kl_weights=kl_weights,
        correction=correction,
        architecture=architecture_of(logps.device),
    )
    kernel = "ratio_tokens" if level == "token" else "ratio_sequences"
    launch, result = make(config=tune.tuned_config(kernel, logps, lambda config: make(config=config)))
    launch.run(logps.device)
    return result


def ratio_launch(
    logps: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None,
    low: float | Tensor | None,
    high: float | Tensor | None,
    level: str = "token",
    cu_seqlens: Tensor | None = None,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    kl: str = "k3",
    beta: float = 0.0,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    correction: Tensor | None = None,
    config: Config | None = None,
    architecture: str,
) -> tuple[Launch, ClippedRatio]:
    """The launch behind `clipped_ratio` and the tensors that it fills."""
    if level not in ("token", "sequence", "prefix"):
        raise ValueError(f'level: expected "token", "sequence" or "prefix", got {level!r}')
    if kl not in _KL_CODES:
        raise ValueError(f"kl: expected one of {', '.join(_KL_CODES)}, got {kl!r}")
    if not math.isfinite(beta):
        raise ValueError(f"beta: expected a finite number, got {beta}")
    if delta is not None and not delta >= 1:
        raise ValueError(f"delta: expected at least 1 (it caps the ratio from above), got {delta}")
    N = logps.numel()
    arguments = _token_arguments(
        N,
        logps.device,
        logps=logps,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        weights=weights,
        kl_weights=weights if kl_weights is None else kl_weights,
        correction=correction,
    )
    if ref_logps is None:
        arguments["kl_weights"] = None
    elif arguments["kl_weights"] is None:
        arguments["kl_weights"] = torch.ones_like(logps)
    arguments |= _bound_arguments(low, high, N, logps.device)
    result = _empty_result(logps, delta is not None, ref_logps is not None)
    arguments |= {name: _bytes_of(value) for name, value in result._asdict().items()}
    arguments |= {"delta": delta, "beta": float(beta), "N": N, "KL": _KL_CODES[kl] if ref_logps is not None else 0}
    if level == "token":
        config = config or launch_config("ratio_tokens", architecture, logps.dtype)
        programs = triton.cdiv(N, config.block)
        return Launch(ratio_tokens_kernel, programs, {**arguments, "BLOCK": config.block}, config), result
    arguments["cu_seqlens"] = _check_cu_seqlens(cu_seqlens, level, logps.device)
    config = config or launch_config("ratio_sequences", architecture, logps.dtype)
    arguments |= {"PREFIX": level == "prefix", "BLOCK": config.block}
    programs = arguments["cu_seqlens"].numel() - 1 if N > 0 else 0
    return Launch(ratio_sequences_kernel, programs, arguments, config), result


def _token_arguments(N: int, device: torch.device, **tensors: Tensor | None) -> dict[str, Any]:
    return {name: check_vector(name, value, N, _FLOAT32, device) for name, value in tensors.items()}


def _bound_arguments(
    low: float | Tensor | None, high: float | Tensor | None, N: int, device: torch.device
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, Tensor):
            arguments[name] = check_vector(name, bound, N, _FLOAT32, device)
        else:
            arguments[name] = None if bound is None else float(bound)
    if isinstance(arguments["low"], float) and not arguments["low"] <= 1:
        raise ValueError(f"low: expected a ratio of at most 1 (1 - eps_low), got {low}")
    if isinstance(arguments["high"], float) and not arguments["high"] >= 1:
        raise ValueError(f"high: expected a ratio of at least 1 (1 + eps_high), got {high}")
    return arguments


def _empty_result(logps: Tensor, has_delta: bool, has_kl: bool) -> ClippedRatio:
    floats = [torch.empty_like(logps, memory_format=torch.contiguous_format) for _ in range(3)]
    flags = [torch.empty(logps.shape, dtype=torch.bool, device=logps.device) for _ in range(2 + has_delta)]
    kl = torch.empty_like(floats[0]) if has_kl else None
    loss, dlogps, ratio = floats
    return ClippedRatio(loss, dlogps, ratio, flags[0], flags[1], flags[2] if has_delta else None, kl)


def _bytes_of(value: Tensor | None) -> Tensor | None:
    return value.view(torch.uint8) if value is not None and value.dtype == torch.bool else value


def _check_cu_seqlens(cu_seqlens: Tensor | None, level: str, device: torch.device) -> Tensor:
    if cu_seqlens is None:
        raise ValueError(f'cu_seqlens: expected [B + 1] sequence starts for level "{level}", got None')
    checked = check_vector("cu_seqlens", cu_seqlens, max(cu_seqlens.numel(), 1), (torch.int32, torch.int64), device)
    assert checked is not None
    return checked
