"""liger-kernel's RMSNorm, RoPE and SwiGLU in the layers below the head: Triton kernels, so a GPU only."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["patch_layers"]

# the head and its loss are ours; dropping theirs also leaves the model's forward as it was
KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "layer_norm": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def patch_layers(model: PreTrainedModel, device: torch.device, *, wanted: bool | None) -> bool:
    """Whether the model's layers now run liger-kernel's forwards, in place; do it before adapters are added.

    RoPE is patched for the whole process, and so for every model of this kind.

    Args:
        device: where the model will compute.
        wanted: None takes the kernels where they can run, True insists on them.
    Raises:
        ValueError, ImportError: they are insisted on and the device is no GPU, the package is missing or does not know
            the model.
    """
    kind = model.config.model_type
    if wanted is False or (wanted is None and (device.type != "cuda" or find_spec("liger_kernel") is None)):
        return False
    if device.type != "cuda":
        raise ValueError(f"liger: expected a GPU, whose kernels these are, got {device}; leave it out")
    if find_spec("liger_kernel") is None:
        raise ImportError("liger: needs the package liger-kernel; pip install liger-kernel")
    from liger_kernel.transformers import monkey_patch

    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        if wanted:
            raise ValueError(f"liger: expected a model that liger-kernel knows, got {kind}; leave it out")
        return False
    monkey_patch._apply_liger_kernel_to_instance(model=model, **KERNELS)
    return True
