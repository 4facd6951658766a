"""Peak memory of a stretch of the run: of the GPU where the model is on one, else of the process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_MB = 1 << 20


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new stretch. On a CPU only Linux can; elsewhere the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # some containers forbid it
            return


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
