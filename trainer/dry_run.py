"""`repo-ops train --dry-run`: what a run would be and need, without weights, training or files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from repo_ops.cost import GEMM_SHARE
from repo_ops.doctor import backend_of
from repo_ops.trainer.config import TrainConfig, settings_as_json
from repo_ops.trainer.data import PromptStream
from repo_ops.trainer.distributed import as_started
from repo_ops.trainer.door import check_ranks, check_settings, make_task, open_rewards, open_source
from repo_ops.trainer.footprint import (
    Parameters,
    Peak,
    Workload,
    flops_of_step,
    parts_at_peak,
    planned_at_rest,
    sketched,
)
from repo_ops.trainer.models import load_shape
from repo_ops.trainer.rollout.load import GPU_MEMORY_UTILIZATION
from repo_ops.trainer.throughput import peak_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["plan_of_run"]

MIB = 1 << 20


def plan_of_run(config: TrainConfig) -> str:
    """The plan of a run as lines of text; estimates are marked with ~, and docs/running.md has their formulas.

    Raises:
        ValueError, ImportError: what `repo_ops.trainer.run.prepare` would raise for the objective, task or model.
    """
    import yaml

    check_settings(config)
    ranks = as_started(config.device)
    check_ranks(config, ranks)
    device, source = ranks.device, open_source(config)
    open_rewards(config, source).close()
    shape, tokenizer = load_shape(config.model, seed=config.seed)
    task = make_task(config, source, tokenizer)
    PromptStream(task.train, batch=config.prompts_per_step, seed=config.seed)
    work = Workload.of(config, task, tokenizer, ranks=ranks.size)
    with sketched(config, shape, device) as model:
        parameters = Parameters.of(model)
    rest, peak = planned_at_rest(work, shape, device), parts_at_peak(work, shape, device)
    compute = "bfloat16" if config.autocast else config.dtype
    counts = f"{_count(parameters.total)} parameters, {_count(parameters.trained)} of them trained"
    backend, reason = backend_of(device)
    tokens = f"{min(work.lengths)} to {max(work.lengths)}"
    rows = [
        ("model", f"{config.model}: {counts}, in {config.dtype}; layers compute in {compute}"),
        ("device", f"{device}, head backend {backend}" + (f" (not triton: {reason})" if reason else "")),
        ("data", f"{len(task.train)} prompts of {tokens} tokens, {len(task.heldout)} held out"),
        *_steps(work),
        *_memory(work, device, rest, peak),
        *_arithmetic(config, flops_of_step(parameters, shape, work), device),
        *([("not used", f"{', '.join(config.idle)}: nothing is replayed")] if config.idle else []),
    ]
    width = max(len(label) for label, _ in rows)
    settings = [f"  {line}" for line in yaml.safe_dump(settings_as_json(config), sort_keys=False).splitlines()]
    head = "dry run: nothing was loaded, trained or written; ~ marks estimates, for completions of full length"
    return "\n".join([head, "", *(f"{label:<{width}}  {text}" for label, text in rows), "", "settings", *settings])


def _steps(work: Workload) -> Sequence[tuple[str, str]]:
    config = work.config
    replayed = f" fresh + up to {work.replayed} replayed" if work.replayed else ""
    generated = config.prompts_per_step * config.group_size * work.max_new_tokens
    between = (config.steps - 1) // config.eval_steps if config.eval_steps else 0
    evaluations = f"{2 + between} evaluations" if work.heldout else "no evaluation"
    completions = f"{config.group_size}{replayed} completions of at most {work.max_new_tokens} tokens"
    tokens = f"~{_count(generated)} tokens generated a step, ~{_count(generated * config.steps)} in all"
    return [
        ("step", f"{config.prompts_per_step} prompts x {completions}"),
        ("micro-batch", f"at most {config.micro_batch_tokens} tokens: ~{work.rows} rows of ~{work.row}"),
        ("run", f"{config.steps} steps, {evaluations}; {tokens}"),
    ]


def _memory(work: Workload, device: torch.device, rest: dict[str, int], peak: Peak) -> Sequence[tuple[str, str]]:
    config = work.config

    def listed(parts: dict[str, int]) -> str:
        return f"{_mib(sum(parts.values()))}: " + ", ".join(f"{name} {_mib(number)}" for name, number in parts.items())

    offloaded = config.cpu_offload and device.type != "cpu"
    here = peak.largest + (0 if offloaded else sum(rest.values()))
    share = config.engine_args.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION)
    generating = {
        "hf": f"while generating ~{listed(peak.generating)}",
        "vllm": f"and all the time what vLLM takes: {share:g} of a GPU's memory (engine_args.gpu_memory_utilization)",
        "vllm_server": "while generating nothing: the server has its own",
    }
    ranks = f" on each of {work.ranks} ranks" if work.ranks > 1 else ""
    return [
        (f"memory, MiB{ranks}", f"at rest {'on the CPU ' if offloaded else ''}{listed(rest)}"),
        ("", f"while learning ~{listed(peak.learning)}"),
        ("", generating[config.engine]),
        ("", f"~{_mib(here)} at the peak{f' on {device.type}' if offloaded else ''}, without the runtime itself"),
    ]


def _mib(number: int) -> str:
    return f"{number / MIB:,.{0 if number >= 10 * MIB else 1}f}"


def _arithmetic(config: TrainConfig, flops: dict[str, float], device: torch.device) -> Sequence[tuple[str, str]]:
    step = sum(flops.values())
    parts = ", ".join(f"{name} {number / step:.0%}" for name, number in flops.items())
    rows = [("arithmetic", f"~{step:.2g} FLOP a step ({parts}), ~{step * config.steps:.2g} in all")]
    if peak := peak_flops(device):
        seconds = (flops["learner, layers"] + flops["learner, head"]) / (peak * GEMM_SHARE)
        rows.append(("learner", f"at least ~{seconds:.3g} s a step, at the speed of bare matrix products"))
    return rows


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
