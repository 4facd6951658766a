"""The elementwise part of a head, logits from what a GEMM gives, in kernels; and the check of its arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from repo_ops.kernels.launch import check_positive, check_vector

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)


@triton.jit
def _tanh(y):
    # 1 - 2/(e^2y + 1) loses the digits of a small y, so those take an odd polynomial (own fit, relative error 8e-8)
    s = y * y
    p = -0.0059058466 * s + 0.0208053645
    p = p * s - 0.0537866764
    p = p * s + 0.1333195865
    p = p * s - 0.3333329856
    small = y + y * s * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
    large = tl.where(y < 0, -large, large)
    return tl.where(tl.abs(y) < 0.6, small, large)


@triton.jit
def finish_logits(raw, bias, columns, mask, logit_scale, softcap, inv_temperature):
    """z of a block; -inf where masked."""
    x = raw.to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask).to(tl.float32)
    if softcap is not None:
        z = _tanh(x * (logit_scale / softcap)) * (softcap * inv_temperature)
    else:
        z = x * (logit_scale * inv_temperature)
    if mask is not None:
        z = tl.where(mask, z, float("-inf"))
    return z


@triton.jit
def log1p(x):
    """log(1 + x) of a scalar x >= 0; below 0.5, where 1 + x drops digits of x, as 2 atanh(x / (2 + x))."""
    t = x / (2.0 + x)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 / 9.0))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


def elementwise_arguments(
    rows: int,
    vocabulary: int,
    device: torch.device,
    bias: Tensor | None,
    inv_temperature: Tensor | float,
    logit_scale: float,
    softcap: float | None,
) -> dict[str, Any]:
    """Checked arguments of `finish_logits`, by the parameter names of the kernels that take them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    """
    temperatures, temperature = None, 1.0
    if isinstance(inv_temperature, Tensor):
        temperatures = check_vector("inv_temperature", inv_temperature, rows, FLOATS[:1], device)
    else:
        temperature = check_positive("inv_temperature", inv_temperature) or 1.0
    return {
        "bias": check_vector("bias", bias, vocabulary, FLOATS, device),
        "inv_temperature": temperatures,
        "inv_temperature_value": temperature,
        "logit_scale": float(logit_scale),
        "softcap": check_positive("softcap", softcap),
    }
