"""How fast the learner was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from repo_ops.cost import DEVICES
from repo_ops.trainer.footprint import Parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from repo_ops.trainer.distributed import Ranks

__all__ = ["peak_flops", "throughput"]


def throughput(metrics: Mapping[str, float], model: PreTrainedModel, ranks: Ranks) -> dict[str, float]:
    """Tokens per second and, on a GPU whose peak is known, model FLOP utilisation of a learner's step.

    mfu = (4 B + 2 T) * tokens through the layers / (seconds * dense bfloat16 peak * ranks), for B parameters
    below the head of which T are trained: 6 B where all are. A prompt counts once for all its completions, dead
    sequences not at all, nor do attention, the head and what is computed a second time.

    Args:
        metrics: of the step, `learner/tokens` over all ranks and `time/learner` in seconds.
    """
    seconds, tokens = metrics["time/learner"], metrics["learner/tokens"]
    found = {"tokens_per_second/learner": tokens / seconds}
    if peak := peak_flops(ranks.device):
        parameters = Parameters.of(model)
        flops = (4 * parameters.backbone + 2 * min(parameters.trained, parameters.backbone)) * tokens
        found["mfu"] = flops / (seconds * peak * ranks.size)
    return found


def peak_flops(device: torch.device) -> float | None:
    """Vendor's dense bfloat16 peak in FLOP/s; None for a device that `repo_ops.cost` does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((1e12 * speed.tflops for known, speed in DEVICES.items() if known.lower() in name), None)
