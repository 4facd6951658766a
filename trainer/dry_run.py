"""`repo-ops train --dry-run`: what a run would be and need, without weights, training or files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

import repo_ops
from repo_ops.cost import GEMM_SHARE
from repo_ops.doctor import backend_of
from repo_ops.trainer.config import TrainConfig, settings_as_json
from repo_ops.trainer.footprint import Parameters, Workload, flops_of_step, memory_at_rest, parts_at_peak, sketched
from repo_ops.trainer.models import load_shape
from repo_ops.trainer.rollout import encode_prompts
from repo_ops.trainer.sources import make_task, open_source
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
    beta = {} if config.beta is None else {"beta": config.beta}
    objective = repo_ops.get_objective(config.objective, **{"max_length": 1, **beta, **config.objective_args})
    source = open_source(config)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape, tokenizer = load_shape(config.model, seed=config.seed)
    task = make_task(config, source, tokenizer)
    # of a large data set the first prompts stand for all: it lies on disk and is not read as a whole
    some = [example.prompt for example in task.train[:1000]]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, some)]
    work = Workload.of(config, lengths, config.max_new_tokens or task.max_new_tokens)
    with sketched(config, shape, device) as model:
        parameters = Parameters.of(model)
        rest = memory_at_rest(model, reference="ref_logps" in objective.reads and not config.lora_rank)
    rows = [
        ("model", _model(config, parameters)),
        ("device", _device(device)),
        ("data", f"{len(task.train)} prompts of {min(lengths)} to {max(lengths)} tokens, {len(task.heldout)} held out"),
        *_steps(config, work, bool(task.heldout)),
        *_memory(rest, parts_at_peak(config, shape, device, work), config.replicas),
        *_arithmetic(config, flops_of_step(parameters, shape, work), device),
    ]
    width = max(len(label) for label, _ in rows)
    settings = [f"  {name}: {value}" for name, value in settings_as_json(config).items()]
    head = "dry run: nothing was loaded, trained or written; ~ marks estimates, for completions of full length"
    return "\n".join([head, "", *(f"{label:<{width}}  {text}" for label, text in rows), "", "settings", *settings])


def _model(config: TrainConfig, parameters: Parameters) -> str:
    compute = "bfloat16" if config.autocast else config.dtype
    return (
        f"{config.model}: {_count(parameters.total)} parameters, {_count(parameters.trained)} of them trained, in "
        f"{config.dtype}; layers compute in {compute}"
    )


def _device(device: torch.device) -> str:
    backend, reason = backend_of(device)
    return f"{device}, head backend {backend}" + (f" (not triton: {reason})" if reason else "")


def _steps(config: TrainConfig, work: Workload, evaluates: bool) -> Sequence[tuple[str, str]]:
    replayed = f" fresh + up to {work.replayed} replayed" if work.replayed else ""
    generated = work.prompts * work.group_size * work.max_new_tokens
    between = (config.steps - 1) // config.eval_steps if config.eval_steps else 0
    evaluations = f"{2 + between} evaluations" if evaluates else "no evaluation"
    completions = f"{work.group_size}{replayed} completions of at most {work.max_new_tokens} tokens"
    tokens = f"~{_count(generated)} tokens generated a step, ~{_count(generated * config.steps)} in all"
    return [
        ("step", f"{work.prompts} prompts x {completions}"),
        ("micro-batch", f"at most {config.micro_batch_tokens} tokens: ~{work.rows} rows of ~{work.row}"),
        ("run", f"{config.steps} steps, {evaluations}; {tokens}"),
    ]


def _memory(rest: dict[str, int], peak: dict[str, int], replicas: int) -> Sequence[tuple[str, str]]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rest = {name: number * replicas // ranks for name, number in rest.items()}
    together = sum(rest.values())
    cache = peak["keys and values while generating"]
    learning = sum(peak.values()) - cache

    def listed(parts: dict[str, int]) -> str:
        return ", ".join(f"{name} {number / MIB:,.0f}" for name, number in parts.items())

    on_each = f" on each of {ranks} ranks" if ranks > 1 else ""
    return [
        (f"memory, MiB{on_each}", f"{together / MIB:,.0f} at rest: {listed(rest)}"),
        ("", "~" + listed(peak)),
        ("", f"~{(together + max(cache, learning)) / MIB:,.0f} at the peak, without the runtime itself"),
    ]


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
