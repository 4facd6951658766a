"""Running sums of each row over the columns of a tile of products that lies in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from repo_ops.kernels.elementwise import finish_logits


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile."""
    pairs = tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1])
    return tl.split(pairs)


@triton.jit
def _fold_logits(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    """Some columns more for each row's max m, r = sum e^(z-m), u = sum e^(z-m) (z-m) and q = sum e^(2(z-m)).

    The target's logit goes to z_target instead.
    """
    width: tl.constexpr = raw.shape[1]
    z = finish_logits(raw, None, None, None, logit_scale, softcap, inv_t[:, None])
    lanes = tl.arange(0, width)
    local = tl.where((target >= start) & (target < start + width), target - start, -1)
    # Few tiles hold a target of these rows, and one a column past the end. A branch for each mask: on CDNA masks that
    # live together take more scalar registers than there are
    has_target = tl.max(local, axis=0) >= 0
    if has_target:
        z_target += tl.sum(tl.where(lanes[None, :] == local[:, None], z, 0.0), axis=1)
    if start + width > V:
        z = tl.where((lanes < V - start)[None, :], z, float("-inf"))
    if has_target:
        z = tl.where(lanes[None, :] == local[:, None], float("-inf"), z)

    peak = tl.maximum(m, tl.max(z, axis=1))
    # (-inf) - (-inf) is NaN: a row of which nothing but -inf was seen has its max at 0 for as long
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    lag = m - origin
    scale = tl.exp(lag)
    below = z - origin[:, None]
    e = tl.exp(below)
    if ENTROPY:
        # e^-200 is 0 in float32, and 0 * -inf would be NaN; a NaN reaches the row through r
        u = scale * (u + r * tl.maximum(lag, -200.0)) + tl.sum(e * tl.maximum(below, -200.0), axis=1)
    if SUM_P2:
        q = scale * scale * q + tl.sum(e * e, axis=1)
    r = scale * r + tl.sum(e, axis=1)
    return peak, r, u, q, z_target


@triton.jit
def _fold_part(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    if raw.shape[1] > 64:
        half: tl.constexpr = raw.shape[1] // 2
        left, right = _halves(raw)
        m, r, u, q, z_target = _fold_logits(
            left, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
        return _fold_logits(
            right, target, start + half, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
    else:
        return _fold_logits(raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2)


@triton.jit
def fold_tile(
    raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target,
    ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
):  # fmt: skip
    """`_fold_logits` by 64 columns: exponentials of a whole tile beside its logits do not fit into the registers."""
    if raw.shape[1] > 128:
        half: tl.constexpr = raw.shape[1] // 2
        left, right = _halves(raw)
        m, r, u, q, z_target = _fold_part(
            left, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
        return _fold_part(
            right, target, start + half, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2
        )
    else:
        return _fold_part(raw, target, start, V, logit_scale, softcap, inv_t, m, r, u, q, z_target, ENTROPY, SUM_P2)
