"""Words for running out of memory: what was largest, and what would help by how much."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.footprint import (
    ACTIVATIONS,
    CACHE,
    GATHERED_MODEL,
    Workload,
    activation_bytes,
    memory_at_rest,
    parts_at_peak,
    sketched,
)
from repo_ops.trainer.rollout import encode_prompts

if TYPE_CHECKING:
    from repo_ops.trainer.run import Run

__all__ = ["explain", "explained", "is_out_of_memory", "knobs"]

MIB = 1 << 20
AT_REST = ("weights", "gradients", "AdamW's averages", "reference model")
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
    lengths, heldout = (
        [len(ids) for ids in encode_prompts(run.tokenizer, [example.prompt for example in examples])]
        for examples in (run.task.train[:1000], run.task.heldout)
    )
    device, shape, ranks = run.learner.ranks.device, run.model.config, run.learner.ranks.size
    work = Workload.of(run.config, lengths, run.max_new_tokens, ranks=ranks, heldout=heldout)
    peak = parts_at_peak(run.config, shape, device, work)
    offloaded = run.config.cpu_offload and device.type != "cpu"
    rest = {} if offloaded else memory_at_rest(run.model, reference=run.learner.keeps_reference)
    parts = {**rest, **(peak.generating if generating else peak.learning)}
    largest = sorted(parts.items(), key=lambda part: -part[1])
    lines = [
        f"out of memory on {device} while {'generating' if generating else 'learning'}: {str(error).splitlines()[0]}",
        "largest (estimates, MiB): " + ", ".join(f"{name} {number / MIB:.0f}" for name, number in largest[:4]),
        "what would help most:",
        *(f"  {text}: saves about {saved / MIB:.0f} MiB" for saved, text in knobs(run, work, parts)[:3]),
    ]
    return "\n".join(lines)


def knobs(run: Run, work: Workload, parts: dict[str, int]) -> list[tuple[int, str]]:
    """(bytes saved at the peak, the setting to change) where memory ran out, the one that saves most first."""
    config, device, shape = run.config, run.learner.ranks.device, run.model.config
    found: list[tuple[int, str]] = []
    activations = parts.get(ACTIVATIONS, 0)
    largest = work.rows * work.row
    longest = work.longest_prompt + work.max_new_tokens
    if activations and largest > longest:
        half = max(longest, largest // 2)
        smaller = activation_bytes(config, shape, device, replace(work, micro_batch_tokens=half))
        text = f"--micro_batch_tokens {half} (now {config.micro_batch_tokens}, of which {largest} are used)"
        found.append((activations - smaller, text))
    if activations and not config.recompute_layers:
        less = activation_bytes(replace(config, recompute_layers=True), shape, device, work)
        found.append((activations - less, "--recompute_layers true (a third more time)"))
    if cache := parts.get(CACHE):
        shorter = max(1, work.max_new_tokens // 2)
        saved = cache * (work.max_new_tokens - shorter) // longest
        found.append((saved, f"--max_new_tokens {shorter} (now {work.max_new_tokens})"))
        fewer = max(1, work.prompts // 2)
        if fewer < work.prompts:
            found.append((cache // 2, f"--prompts_per_step {fewer} (now {work.prompts})"))
    if "reference model" in parts:
        found.append((parts["reference model"], "--beta 0 (no reference model)"))
    rest = sum(number for name, number in parts.items() if name in AT_REST)
    if not config.lora_rank:
        with sketched(replace(config, lora_rank=16), shape, device) as model:
            adapted = sum(memory_at_rest(model, reference=False).values()) // work.shards
        found.append((rest - adapted, "--lora_rank 16 (adapters are trained, their reference costs nothing)"))
    if gathered := parts.get(GATHERED_MODEL):
        found.append((gathered, "--engine vllm_server (which samples elsewhere; see docs/scaling.md)"))
    if work.ranks > 1 and device.type == "cuda" and not config.cpu_offload:
        found.append((rest, "--cpu_offload true (slower: the optimizer steps on the CPU)"))
    if device.type == "cuda":
        ranks = 2 * run.learner.ranks.size
        text = f"torchrun --nproc_per_node {ranks} --no-python repo-ops train ... (twice the ranks)"
        found.append((rest // 2, text))
    return sorted((knob for knob in found if knob[0] > 0), key=lambda knob: -knob[0])
