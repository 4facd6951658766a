"""Opt-in timing of launch configurations on the GPU at hand: with REPO_OPS_TUNE=1, or `repo-ops kernels --tune`.

The first call of each kernel, architecture and dtype in a process times the candidates on the call's own tensors and
prints the fastest as a row for the TABLE of `repo_ops.kernels.launch`; later calls keep it. Another row may sum in
another order: results then differ in their last bits from those of the table's row.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from repo_ops.kernels.launch import Config, Launch, architecture_of, launch_config, on_device, shared_memory_limit

Make = Callable[[Config], tuple[Launch | Sequence[Launch], Any]]
"""The launch or launches of a call under a configuration, with what they fill; each on memory that it may destroy."""

_CHOSEN: dict[tuple[str, str, torch.dtype], Config] = {}


def enabled() -> bool:
    """Whether REPO_OPS_TUNE=1 is set."""
    return os.environ.get("REPO_OPS_TUNE") == "1"


def tuned_config(kernel: str, like: Tensor, make: Make, *, dtype: torch.dtype | None = None) -> Config | None:
    """The fastest configuration of `kernel` on the device of `like`; None, for the table's, where tuning is off."""
    if not enabled() or like.numel() == 0:
        return None
    key = kernel, architecture_of(like.device), dtype or like.dtype
    if key not in _CHOSEN:
        _CHOSEN[key] = fastest(*key, make, like.device)
    return _CHOSEN[key]


def fastest(
    kernel: str,
    architecture: str,
    dtype: torch.dtype,
    make: Make,
    device: torch.device,
    *,
    milliseconds: Callable[[Sequence[Launch], torch.device], float] | None = None,
) -> Config:
    """The fastest of `candidates`, printed with its time and the table's; `milliseconds` times the launches of one."""
    measure = milliseconds or _milliseconds
    times: dict[Config, float] = {}
    for config in candidates(kernel, architecture, dtype):
        made = make(config)[0]
        try:
            times[config] = measure([made] if isinstance(made, Launch) else made, device)
        except triton.runtime.errors.OutOfResources:
            continue  # the estimate of shared memory was too low for this one
    current = launch_config(kernel, architecture, dtype)
    if not times:
        raise RuntimeError(f"{kernel}: no candidate configuration runs on {device}")
    best = min(times, key=times.__getitem__)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    measured = dataclasses.replace(best, device=name, date=datetime.date.today().isoformat())
    row = f'("{kernel}", "{architecture}", "{str(dtype).removeprefix("torch.")}"): {measured},'
    print(f"{row}  # {times[best]:.4g} ms; the table's row {times.get(current, float('nan')):.4g} ms", file=sys.stderr)
    return measured


def candidates(kernel: str, architecture: str, dtype: torch.dtype) -> list[Config]:
    """The table's row and its neighbours, as far as their tiles fit the shared memory of `architecture`."""
    row = launch_config(kernel, architecture, dtype)
    found = dict.fromkeys([row, *(_products(row) if row.columns else _streams(row, architecture))])
    limit = shared_memory_limit(architecture)
    return [config for config in found if config.tile_bytes(dtype.itemsize) <= limit]


def _streams(row: Config, architecture: str) -> Iterator[Config]:
    """4 to 16 elements a thread, programs of a half to twice the size."""
    lanes = 64 if architecture.startswith("gfx") else 32
    for warps, elements in itertools.product((row.num_warps // 2, row.num_warps, row.num_warps * 2), (4, 8, 16)):
        if warps:
            yield dataclasses.replace(row, block=warps * lanes * elements, num_warps=warps)


def _products(row: Config) -> Iterator[Config]:
    """Tiles of at most twice the row's elements a warp; more of them would spill."""
    shapes = ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4), (256, 128, 8), (64, 64, 4))
    for (block, columns, warps), depth, stages in itertools.product(shapes, (row.depth, row.depth // 2), (2, 3, 4)):
        if depth >= 16 and block * columns / warps <= 2 * row.block * row.columns / row.num_warps:
            yield dataclasses.replace(
                row, block=block, columns=columns, num_warps=warps, num_stages=stages, depth=depth
            )


def _milliseconds(launches: Sequence[Launch], device: torch.device) -> float:
    def call() -> None:
        for launch in launches:
            launch.run(device)

    with on_device(device):  # whose events the clock has to record
        return float(triton.testing.do_bench(call))


def main() -> int:
    """Tune every kernel at the shapes of the table on the current GPU; rows go to standard error."""
    from repo_ops.kernels import clipped_ratio, logit_rows, tiled_logps

    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        print("repo-ops kernels --tune: expected a GPU that torch can use, found none", file=sys.stderr)
        return 2
    os.environ["REPO_OPS_TUNE"] = "1"
    device = "cuda" if torch.cuda.is_available() else "xpu"
    for dtype in (torch.float32, torch.bfloat16):
        targets = torch.zeros(2048, dtype=torch.int64, device=device)
        tile = torch.randn(2048, 151936, device=device).to(dtype)
        stats = logit_rows.row_stats(tile, targets)
        logit_rows.row_grads_(tile, targets, stats, torch.ones(2048, device=device))
        del tile
        size = 8192 if dtype.itemsize == 2 else 1024
        hidden, weight = (torch.randn(n, 4096, device=device).to(dtype) for n in (size, 128256))
        tiled_logps.tiled_logps(hidden, weight, torch.zeros(size, dtype=torch.int64, device=device))
        del hidden, weight
    token = torch.randn(131072, device=device)
    starts = torch.arange(0, 131073, 1024, device=device)
    for level in ("token", "sequence"):
        clipped_ratio.clipped_ratio(token, token, old_logps=token, low=0.8, high=1.2, level=level, cu_seqlens=starts)
    return 0
