"""The training loop: generate -> reward -> draw and push -> advantages -> learner step -> sync -> log."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch

import repo_ops
from repo_ops.replay import ReplayBuffer, Sample
from repo_ops.trainer.config import TrainConfig, learning_rate, save_config
from repo_ops.trainer.evaluate import evaluate
from repo_ops.trainer.learner import ScoredSequence, reads_top_logps
from repo_ops.trainer.log import RunLog, read_metrics, summarize_run
from repo_ops.trainer.memory import peak_memory_mb, reset_peak_memory
from repo_ops.trainer.report import draw_report
from repo_ops.trainer.rewards import score
from repo_ops.trainer.rollout import Completion, encode_prompts
from repo_ops.trainer.run import Run
from repo_ops.trainer.tasks import Example

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


@dataclass
class Group:
    """A prompt of the step with its fresh completions, their rewards, and the replayed samples of that prompt."""

    example: Example
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    rewards: list[float]
    replayed: list[Sample] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Completion | Sample, float, bool]]:
        """(completion, reward, whether it is replayed), fresh ones first."""
        for completion, reward in zip(self.completions, self.rewards, strict=True):
            yield completion, reward, False
        for sample in self.replayed:
            yield sample, sample.reward, True


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
            examples = examples_of_step(config, run.task.train, step)
            generated = run.engine.generate(
                [example.prompt for example in examples],
                num_samples=config.group_size,
                max_new_tokens=run.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                top_logps=config.divergence_top_k if reads_top_logps(run.learner.objective) else 0,
                seed=seed_of(config, step),
            )
            time_generate = time.perf_counter() - started
            groups = scored_groups(run, examples, generated)
            draw_and_push(run.buffer, groups, version=step - 1, temperature=config.temperature)
            sequences = with_advantages(config, groups)
            metrics = run.learner.step(sequences, lr=learning_rate(config, step))
            if metrics["learner/nonfinite"]:
                log.say(f"step {step}: the loss or the gradient was not finite; the parameters were left as they were")
            run.engine.sync(step)

            seconds = time.perf_counter() - started
            metrics |= group_metrics(groups, sequences)
            metrics |= run.buffer.metrics(step) if run.buffer is not None else {}
            metrics |= {
                "time/generate": time_generate,
                "time/rest": seconds - time_generate - metrics["time/learner"],
                "tokens_per_second": sum(len(c.token_ids) for group in generated for c in group) / seconds,
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


def examples_of_step(config: TrainConfig, examples: Sequence[Example], step: int) -> list[Example]:
    """The prompts of step 1, 2, ..., all different: the pool in a new order each time round.

    A function of (seed, step) alone. What does not fill a last step is left out of that round.
    """
    steps_a_round = len(examples) // config.prompts_per_step
    round_, place = divmod(step - 1, steps_a_round)
    order = random.Random(f"{config.seed}/{round_}").sample(examples, len(examples))
    return order[place * config.prompts_per_step : (place + 1) * config.prompts_per_step]


def seed_of(config: TrainConfig, step: int) -> int:
    """Seed of the completions of a step. Step 0 is every evaluation's: the same random numbers before and after."""
    return config.seed * 1_000_003 + step


def scored_groups(run: Run, examples: Sequence[Example], generated: Sequence[Sequence[Completion]]) -> list[Group]:
    """The completions of each prompt that the reward functions gave a number."""
    flat = [(example, completion) for example, group in zip(examples, generated) for completion in group]
    columns = {name: [example.columns[name] for example, _ in flat] for name in examples[0].columns}
    texts = [completion.text for _, completion in flat]
    scores = score({"reward": (run.reward, 1.0)}, [example.prompt for example, _ in flat], texts, columns)
    totals = iter(scores.totals)
    groups = []
    prompts = encode_prompts(run.tokenizer, [example.prompt for example in examples])
    for example, prompt_ids, completions in zip(examples, prompts, generated, strict=True):
        kept = [(c, total) for c in completions if (total := next(totals)) is not None]
        groups.append(Group(example, tuple(prompt_ids), [c for c, _ in kept], [total for _, total in kept]))
    return groups


def draw_and_push(buffer: ReplayBuffer | None, groups: Sequence[Group], *, version: int, temperature: float) -> None:
    """Draw earlier samples of every prompt of the step, and only then store the new ones."""
    if buffer is None:
        return
    for group in groups:
        group.replayed = buffer.draw(group.example.prompt, version=version)
    for group in groups:
        samples = [
            Sample(c.token_ids, c.logps, reward, {}, version, temperature, c.finished, c.text)
            for c, reward in zip(group.completions, group.rewards, strict=True)
            if c.token_ids  # an empty completion has no token to learn from
        ]
        buffer.push(group.example.prompt, samples)


def with_advantages(config: TrainConfig, groups: Sequence[Group]) -> list[ScoredSequence]:
    """Every fresh and replayed completion of the step with its advantage over its group."""
    rows = [(i, group.prompt_ids, *row) for i, group in enumerate(groups) for row in group.rows()]
    if not rows:
        return []
    advantages = repo_ops.group_advantages(
        torch.tensor([reward for _, _, _, reward, _ in rows]),
        torch.tensor([i for i, *_ in rows]),
        off_policy=torch.tensor([replayed for *_, replayed in rows]),
        lengths=torch.tensor([len(completion.token_ids) for _, _, completion, _, _ in rows]),
        **config.advantages,
    )
    return [
        ScoredSequence(prompt_ids, completion.token_ids, advantage, replayed, completion.logps, i, *_top(completion))
        for (i, prompt_ids, completion, _, replayed), advantage in zip(rows, advantages.tolist(), strict=True)
    ]


def _top(completion: Completion | Sample) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """The likeliest tokens at each place with their log-probabilities; a stored sample has none."""
    return ((), ()) if isinstance(completion, Sample) else (completion.top_ids, completion.top_logps)


def group_metrics(groups: Sequence[Group], sequences: Sequence[ScoredSequence]) -> dict[str, float]:
    """What the step's completions were like, and for which share of its prompts anything can be learned.

    groups/effective_on and _off: prompts whose fresh, whose replayed completions hold a non-zero advantage;
    groups/effective: either of them. All three are shares of the step's prompts.
    """
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    on = {s.group for s in sequences if not s.off_policy and s.advantage != 0}
    off = {s.group for s in sequences if s.off_policy and s.advantage != 0}
    return {
        "reward/mean": fmean(rewards or [0.0]),
        "reward/std": pstdev(rewards or [0.0]),
        "reward/scored": float(len(rewards)),
        "frac_reward_zero_std": fmean(pstdev(group.rewards or [0.0]) == 0 for group in groups),
        "groups/effective_on": len(on) / len(groups),
        "groups/effective_off": len(off) / len(groups),
        "groups/effective": len(on | off) / len(groups),
        "completions/mean_length": fmean([len(c.token_ids) for c in completions] or [0.0]),
        "completions/clipped_ratio": fmean([not c.finished for c in completions] or [0.0]),
        "replay/share_of_sequences": sum(s.off_policy for s in sequences) / max(1, len(sequences)),
    }


def held_out(run: Run) -> dict[str, float]:
    """eval/* metrics on prompts that are never trained on; {} where there are none."""
    samples = run.config.heldout_samples
    found = evaluate(
        run.engine,
        run.task.heldout,
        run.reward,
        num_samples=samples,
        max_new_tokens=run.max_new_tokens,
        temperature=run.config.temperature,
        ks=sorted({1, samples}),
        seed=seed_of(run.config, 0),
    )
    return {f"eval/{name}": value for name, value in found.items()}
