"""Words for running out of memory: what was largest, and what would help by how much."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.footprint import Workload, parts_at_peak, planned_at_rest

if TYPE_CHECKING:
    from repo_ops.trainer.run import Run

__all__ = ["alternatives", "explain", "explained", "is_out_of_memory"]

MIB = 1 << 20
MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")
"""Of the RuntimeError that torch's CPU allocator raises, on Linux and on Windows, and of other devices' errors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RunFailed):  # explained already, such as the memory of a server elsewhere
        return False
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Around the steps of a run: an allocation that fails becomes a RunFailed which says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(explain(run, error)) from error


def explain(run: Run, error: BaseException) -> str:
    """What was largest, the three settings that save most, and what the allocator said."""
    frames = traceback.walk_tb(error.__traceback__)
    generating = any("/rollout/" in frame.f_code.co_filename for frame, _ in frames)
    device, shape, ranks = run.learner.ranks.device, run.model.config, run.learner.ranks.size
    work = Workload.of(run.config, run.task, run.tokenizer, ranks=ranks)

    def needed(work: Workload) -> dict[str, int]:
        offloaded = work.config.cpu_offload and device.type != "cpu"
        peak = parts_at_peak(work, shape, device)
        rest = {} if offloaded else planned_at_rest(work, shape, device)
        return {**rest, **(peak.generating if generating else peak.learning)}

    parts = needed(work)
    saves = [
        (sum(parts.values()) - sum(needed(other).values()), text)
        for other, text in alternatives(work, device, generating=generating)
    ]
    largest = sorted(parts.items(), key=lambda part: -part[1])
    lines = [
        f"out of memory on {device} while {'generating' if generating else 'learning'}: {str(error).splitlines()[0]}",
        "largest (estimates, MiB): " + ", ".join(f"{name} {number / MIB:.0f}" for name, number in largest[:4]),
        "what would help most:",
        *(
            f"  {text}: saves about {saved / MIB:.0f} MiB"
            for saved, text in sorted(saves, key=lambda each: -each[0])[:3]
            if saved > 0
        ),
    ]
    return "\n".join(lines)


def alternatives(work: Workload, device: torch.device, *, generating: bool) -> Iterator[tuple[Workload, str]]:
    """The run with one setting changed that may save memory where it ran out, and how that is asked for."""
    config = work.config

    def changed(**settings: Any) -> Workload:
        return replace(work, config=replace(config, **settings))

    if generating:
        shorter, fewer = max(1, work.max_new_tokens // 2), max(1, config.prompts_per_step // 2)
        yield replace(work, max_new_tokens=shorter), f"--max_new_tokens {shorter} (now {work.max_new_tokens})"
        yield changed(prompts_per_step=fewer), f"--prompts_per_step {fewer} (now {config.prompts_per_step})"
        if work.ranks > 1 and config.engine == "hf":
            other = changed(engine="vllm_server")
            yield other, "--engine vllm_server (which samples elsewhere; see docs/scaling.md)"
    else:
        largest = work.rows * work.row
        half = max(work.longest, largest // 2)
        text = f"--micro_batch_tokens {half} (now {config.micro_batch_tokens}, of which {largest} are used)"
        yield changed(micro_batch_tokens=half), text
        yield changed(recompute_layers=True), "--recompute_layers true (a third more time)"
    yield changed(beta=0.0), "--beta 0 (no reference model)"
    if not config.lora_rank and find_spec("peft"):  # without it no adapter can be sketched
        other = changed(lora_rank=16)
        yield other, "--lora_rank 16 (adapters are trained, their reference costs nothing)"
    if device.type == "cuda":
        if work.ranks > 1:
            yield changed(cpu_offload=True), "--cpu_offload true (slower: the optimizer steps on the CPU)"
        ranks = 2 * work.ranks
        text = f"torchrun --nproc_per_node {ranks} --no-python repo-ops train ... (twice the ranks)"
        yield replace(work, ranks=ranks), text
