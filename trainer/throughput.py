"""What a step cost: its time, the speed of its parts, its peak memory."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from repo_ops.cost import DEVICES
from repo_ops.trainer.footprint import Parameters

if TYPE_CHECKING:
    from repo_ops.trainer.groups import Collected
    from repo_ops.trainer.run import Run

__all__ = ["peak_flops", "reset_peak_memory", "spent"]

_MB = 1 << 20


def spent(run: Run, collected: Collected, metrics: Mapping[str, float], started: float) -> dict[str, float]:
    """Time, speed and memory of the step so far; on a GPU whose peak is known, mfu, its share that the learner used.

    mfu = (4 B + 2 T) * tokens through the layers / (seconds * dense bfloat16 peak * ranks), for B parameters
    below the head of which T are trained: 6 B where all are. A prompt counts once for all its completions, dead
    sequences not at all, nor do attention, the head and what is computed a second time.

    Args:
        metrics: of the step, `learner/tokens` over all ranks and `time/learner` in seconds.
        started: when it was, by time.perf_counter().
    """
    ranks, learning, tokens = run.learner.ranks, metrics["time/learner"], metrics["learner/tokens"]
    seconds = time.perf_counter() - started
    found = {
        "tokens_per_second/learner": tokens / learning,
        "time/generate": collected.seconds,
        "time/rest": seconds - collected.seconds - learning,
        "tokens_per_second": collected.tokens / seconds,
        "memory/peak_mb": peak_memory_mb(ranks.device),
    }
    if peak := peak_flops(ranks.device):
        parameters = Parameters.of(run.model)
        flops = (4 * parameters.backbone + 2 * min(parameters.trained, parameters.backbone)) * tokens
        found["mfu"] = flops / (learning * peak * ranks.size)
    return found


def peak_flops(device: torch.device) -> float | None:
    """Vendor's dense bfloat16 peak in FLOP/s; None for a device that `repo_ops.cost` does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((1e12 * speed.tflops for known, speed in DEVICES.items() if known.lower() in name), None)


def reset_peak_memory(device: torch.device) -> None:
    """Starts measuring anew. On a CPU only Linux can; elsewhere the peak stays that of the whole process.

    On Linux it also hands freed memory back to the system: row lengths differ from step to step, and glibc keeps the
    gaps (SmolLM2-135M grew from 2.7 to 4.1 GiB in 25 steps). It costs 0.05 s.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
        with suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """MiB: allocated by tensors on a GPU; resident in the process, code included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MB
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024 / _MB
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MB
