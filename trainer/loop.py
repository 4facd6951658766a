"""The training loop: generate -> reward -> draw and push -> advantages -> learner step -> sync -> log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from repo_ops.trainer.config import learning_rate, save_config
from repo_ops.trainer.evaluate import evaluate
from repo_ops.trainer.groups import collect, draw_and_push, group_metrics, seed_of, with_advantages
from repo_ops.trainer.log import RunLog, read_metrics, summarize_run
from repo_ops.trainer.memory import peak_memory_mb, reset_peak_memory
from repo_ops.trainer.report import draw_report
from repo_ops.trainer.run import Run

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


def train(run: Run, *, name: str = "train", console: Console | None = None) -> dict[str, float]:
    """Trains, and writes metrics.jsonl, config.yaml, report.png and the model to the run's folder.

    Args:
        run: from `repo_ops.trainer.run.prepare`.
        name: of the run, in the progress bar and in the report.
    Returns:
        The numbers of the final table (`log.summarize_run`).
    """
    config, device = run.config, run.model.device
    save_config(config, run.folder / "config.yaml")
    with RunLog(run.folder, name=name, steps=config.steps, every=config.log_steps, console=console) as log:
        log.say(run.describe())
        log.step(0, held_out(run))
        for step in range(1, config.steps + 1):
            reset_peak_memory(device)
            started = time.perf_counter()
            collected = collect(run, step)
            draw_and_push(run.buffer, collected.groups, version=step - 1, temperature=config.temperature)
            sequences = with_advantages(config, collected.groups)
            metrics = run.learner.step(sequences, lr=learning_rate(config, step))
            if metrics["learner/nonfinite"]:
                log.say(f"step {step}: the loss or the gradient was not finite; the parameters were left as they were")
            run.engine.sync(step)

            seconds = time.perf_counter() - started
            metrics |= group_metrics(collected, sequences)
            metrics |= run.buffer.metrics(step) if run.buffer is not None else {}
            metrics |= {
                "time/generate": collected.seconds,
                "time/rest": seconds - collected.seconds - metrics["time/learner"],
                "tokens_per_second": collected.tokens / seconds,
                "memory/peak_mb": peak_memory_mb(device),
            }
            if step == config.steps or (config.eval_steps and step % config.eval_steps == 0):
                metrics |= held_out(run)
            log.step(step, metrics)

    if config.save_model:
        run.model.save_pretrained(run.folder / "model")
        run.tokenizer.save_pretrained(run.folder / "model")
    draw_report({name: run.folder}, run.folder / "report.png", title=run.describe())
    return summarize_run(read_metrics(run.folder))


def held_out(run: Run) -> dict[str, float]:
    """eval/* metrics on prompts that are never trained on; {} where there are none."""
    samples = run.config.heldout_samples
    found = evaluate(
        run.engine,
        run.task.heldout,
        run.rewards,
        num_samples=samples,
        max_new_tokens=run.max_new_tokens,
        temperature=run.config.temperature,
        ks=run.config.pass_at,
        success=run.config.eval_success,
        seed=seed_of(run.config, 0),
    )
    return {f"eval/{name}": value for name, value in found.items()}
