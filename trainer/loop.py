"""The training loop: generate -> reward -> draw and push -> advantages -> learner step -> sync -> log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from repo_ops.trainer.config import learning_rate, save_config
from repo_ops.trainer.door import sampling
from repo_ops.trainer.evaluate import evaluate
from repo_ops.trainer.groups import collect, draw_and_push, group_metrics, seed_of, with_advantages
from repo_ops.trainer.nonfinite import NonfiniteGuard
from repo_ops.trainer.progress import Progress
from repo_ops.trainer.publish import publish
from repo_ops.trainer.reporting import reporting
from repo_ops.trainer.run import Run
from repo_ops.trainer.samples import rows_of_step
from repo_ops.trainer.summary import summarize_run
from repo_ops.trainer.throughput import reset_peak_memory, spent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


def train(run: Run, *, name: str = "train", console: Console | None = None) -> dict[str, float]:
    """Trains, and writes metrics.jsonl, config.yaml, report.html and the model to the run's folder.

    Args:
        run: from `repo_ops.trainer.run.prepare`.
        name: of the run, in the progress bar and in the report.
    Returns:
        The numbers of the final table (`summary.summarize_run`).
    Raises:
        RunFailed: memory ran out, or too many steps in a row were not finite.
        Stopped: a signal ended the run; what it had done is saved.
    """
    config, ranks = run.config, run.learner.ranks
    if ranks.is_first:
        save_config(config, run.folder / "config.yaml")
    with reporting(run, name=name, console=console) as log, Progress(run, log) as progress:
        guard = NonfiniteGuard(run.learner, run.folder, limit=config.nonfinite_limit, say=log.say)
        for sentence in (run.describe(), *run.notes):
            log.say(sentence)
        run.engine.sync(progress.done)
        if progress.unfinished is not None:  # before the first step, or where a step was cut off behind its learner
            conclude(run, progress)
        for step in range(progress.done + 1, config.steps + 1):
            reset_peak_memory(ranks.device)
            started = time.perf_counter()
            with progress.droppable():
                collected = collect(run, step)
            temperature = config.temperature
            draw_and_push(run.buffer, collected.groups, version=step - 1, temperature=temperature, ranks=ranks)
            sequences = with_advantages(config, collected.groups)
            metrics = run.learner.step(sequences, lr=learning_rate(config, step))
            metrics |= group_metrics(collected, sequences)
            metrics |= ranks.buffer_metrics(run.buffer.metrics(step)) if run.buffer is not None else {}
            metrics |= spent(run, collected, metrics, started)
            progress.learned(step, metrics)  # whatever fails from here on, what the step was is written down
            log.completions(step, rows_of_step(step, collected.groups, sequences))
            guard.check(step, sequences, metrics)
            run.engine.sync(step)
            metrics |= spent(run, collected, metrics, started)  # the weights took their time, too
            conclude(run, progress)
        found = summarize_run(log.lines)
        publish(run, found)
    return found


def conclude(run: Run, progress: Progress) -> None:
    """Evaluates after the step that is done, where that is due; then nothing of the step is left to do."""
    config, step, evaluation = run.config, progress.done, {}
    if step in (0, config.steps) or (config.eval_steps and step % config.eval_steps == 0):
        with progress.droppable():
            evaluation = held_out(run)
    progress.concluded(evaluation)


def held_out(run: Run) -> dict[str, float]:
    """eval/* metrics on prompts that are never trained on; {} where there are none."""
    config, ranks = run.config, run.learner.ranks
    settings = sampling(
        config, num_samples=config.heldout_samples, max_new_tokens=run.max_new_tokens, seed=seed_of(config, 0)
    )
    found = evaluate(
        run.engine,
        run.task.heldout,
        run.rewards,
        settings,
        ks=config.pass_at,
        success=config.eval_success,
        ranks=ranks,
    )
    return {f"eval/{name}": value for name, value in found.items()}
