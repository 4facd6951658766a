"""How the head is computed: everything that changes cost or precision, never the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]

MIB = 1 << 20
LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """Backend, memory and precision of a fused-head call.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """

    backend: Backend = "auto"
    """"torch" (vendor GEMMs and in-place PyTorch row arithmetic), "triton" (the same GEMMs and Triton row kernels; GPU
    tensors, or CPU tensors under TRITON_INTERPRET=1), or "auto": triton on GPUs that have it, torch elsewhere."""

    memory_budget: int | None = None
    """Bytes that the op may hold beyond its outputs and gradients, whatever N. None: on a CPU 128 MiB, or what a tile
    of 512 tokens needs where that is more (300 MiB for 151936 float32 logits a token); on a GPU what a tile of 2048
    tokens needs. Smaller tiles make the weight gradient, which each adds to, bound by memory bandwidth. Gradients of a
    16-bit weight are summed in float32, which takes 4 V D bytes beside the 2 V D of the result. Where less than 192
    rows fit, a sweep without gradient (old and reference log-probabilities) keeps its logits in registers on a GPU."""

    operand_dtype: torch.dtype | None = None
    """Precision to which float32 operands of the products (hidden states, head, adapter) are rounded; logits, sums and
    the gradients of float32 tensors stay in float32. None: that of torch.autocast where it is on, as in any linear
    layer. torch.float32 keeps a float32 head exact under autocast. Rounded copies take 2 (V + N) D bytes beyond the
    budget. On a GPU torch 2.10 or newer is what makes 16-bit products fast."""

    logits_dtype: torch.dtype | None = None
    """Precision in which a tile of logits is stored before the softmax. None: float32 (float64 for float64 inputs). The
    inputs' own bfloat16 or float16 is cheaper and costs about 1e-2 in every log-probability."""

    all_logps: bool = False
    """Also return log-probabilities of tokens whose gradient is known to be zero before the first GEMM (zero advantage,
    no KL and no entropy term). False: such tokens are not computed and their log-probability is NaN."""

    accumulate_weight_grad: bool = False
    """Add the gradient of a float32 weight to `weight.grad` as it is formed, instead of handing over a second [V, D]
    tensor to be added: for many micro-batches. `linear_policy_loss` adds it in its forward, so call backward on the
    loss itself (unscaled: `num_items` scales; anything else is an error), and do not count on gradient hooks."""

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "torch", "triton"):
            raise ValueError(f"options.backend: expected 'auto', 'torch' or 'triton', got {self.backend!r}")
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise TypeError(
                f"options.memory_budget: expected an int of bytes or None, got {budget!r}; 1 << 27 is 128 MiB"
            )
        if budget is not None and budget < MIB:
            raise ValueError(
                f"options.memory_budget: expected bytes, at least {MIB} (1 MiB), got {budget}; "
                "pass None for the default of the device"
            )
        for name in ("all_logps", "accumulate_weight_grad"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"options.{name}: expected True or False, got {getattr(self, name)!r}")
        if self.logits_dtype is not None and self.logits_dtype not in LOGITS_DTYPES:
            raise ValueError(f"options.logits_dtype: expected a floating dtype or None, got {self.logits_dtype}")
        if self.operand_dtype is not None and self.operand_dtype not in OPERAND_DTYPES:
            raise ValueError(
                "options.operand_dtype: expected torch.float32, torch.bfloat16, torch.float16 or None, "
                f"got {self.operand_dtype}"
            )

    def rounds_to(self, device: str) -> torch.dtype | None:
        """`operand_dtype`, or that of autocast where it is on for this type of device now."""
        if self.operand_dtype is None and torch.amp.is_autocast_available(device):
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self.operand_dtype


def as_options(options: Options | None) -> Options:
    """`options`, or the defaults for None.

    Raises:
        TypeError: something else than Options.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        raise TypeError(f"options: expected repo_ops.Options or None, got {options!r}")
    return options
