"""How much memory a step takes beyond what was there before it.

On a CPU every step is measured in a process of its own, once, by the kernel's high-water mark of resident memory
(Linux lets a process reset it), less what was resident before the step. Three things make that honest: blocks above
64 KiB are mapped and unmapped one by one, so that freed ones leave the count and cannot be used again unseen; the heap
is trimmed before the step; and a tiny step of the same method goes first, so that loading libraries and starting
threads are not counted. On a GPU it is the allocator's own count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

__all__ = ["in_own_process", "peak_bytes"]

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TOKENIZERS_PARALLELISM": "false",
}


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> tuple[int, str]:
    """(bytes beyond those in use before, at the highest moment of `step`; how that was found out)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    _trim()
    if _reset_high_water():
        before = _status("VmRSS")
        kept = step()
        peak = _status("VmHWM")
        del kept
        return max(0, peak - before), "VmHWM"
    return _sampled(step)


def in_own_process(script: Path, request: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """What `script REQUEST` prints as its last line, as json, from a fresh process.

    Raises:
        RuntimeError: it failed; with the end of its error output.
    """
    environment = {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(script), "--child", json.dumps(request)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} {request}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _trim() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _sampled(step: Callable[[], object]) -> tuple[int, str]:
    """Resident memory looked at every millisecond where there is /proc, else the process's lifetime maximum."""
    if not Path("/proc/self/statm").exists():
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        kept = step()
        del kept
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before, "ru_maxrss (a lower bound)"
    page, seen, done = resource.getpagesize(), [0], Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], resident())

    before, watcher = resident(), Thread(target=watch)
    watcher.start()
    try:
        kept = step()
        seen[0] = max(seen[0], resident())
    finally:
        done.set()
        watcher.join()
    del kept
    return seen[0] - before, "resident memory every 1 ms"
