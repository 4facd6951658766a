"""How the head is computed: everything that changes cost or precision, never the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]

MIB = 1 << 20
LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    """Bytes that the op may hold beyond its outputs and gradients, whatever N. None: 128 MiB on a CPU; on a GPU what a
    tile of 2048 tokens needs, because smaller tiles make the float32 weight gradient bandwidth-bound. Gradients of a
    16-bit weight are summed in float32, which takes 4 V D bytes beside the 2 V D of the result."""

    logits_dtype: torch.dtype | None = None
    """Precision in which a tile of logits is stored before the softmax. None: float32 (float64 for float64 inputs). The
    inputs' own bfloat16 or float16 is cheaper and costs about 1e-2 in every log-probability."""

    all_logps: bool = False
    """Also return log-probabilities of tokens whose gradient is known to be zero before the first GEMM (zero advantage,
    no KL and no entropy term). False: such tokens are not computed and their log-probability is NaN."""

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
        if not isinstance(self.all_logps, bool):
            raise TypeError(f"options.all_logps: expected True or False, got {self.all_logps!r}")
        if self.logits_dtype is not None and self.logits_dtype not in LOGITS_DTYPES:
            raise ValueError(f"options.logits_dtype: expected a floating dtype or None, got {self.logits_dtype}")


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
