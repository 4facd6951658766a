"""`repo-ops evaluate`: how good a model is on prompts from a file or a task, without training it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repo_ops.trainer.config import PolicySettings, TrainConfig, parse_settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Evaluation", "parse_evaluation", "run_evaluation"]


@dataclass(frozen=True)
class Evaluation(PolicySettings):
    """Settings of an evaluation. Those that training has too mean the same there."""

    data: str | list[str] | None = None
    """Prompts: a .jsonl or .parquet file, a folder, a data set of the hub, or a list of these."""
    task: str | None = None
    """Instead of data: a task; its held-out prompts are those of a training run with the same seed and sizes."""
    train_size: int | None = None
    """Of the training run whose held-out prompts are wanted (none: 32); only with a task."""
    heldout_size: int | None = None
    """Prompts (none: 16 of a task, all of the data)."""
    samples: int = 8
    """Sampled completions for each prompt; one greedy completion comes on top (0: greedy alone)."""
    eval_k: list[int] = field(default_factory=list)
    """pass@k is reported for these k, from 1 to samples (none: 1 and samples)."""
    output: str | None = None
    """File for the numbers, as JSON (none: they are only shown)."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.task is None):
            raise ValueError(f"data, task: expected one of the two, got {self.data!r} and {self.task!r}")
        if self.data is not None and self.train_size is not None:
            raise ValueError(f"train_size: expected none with data, got {self.train_size}; use heldout_size")
        if self.samples < 0:
            raise ValueError(f"samples: expected at least 0, got {self.samples}")
        if self.samples == 0 and self.eval_k:
            raise ValueError(f"eval_k: expected none without samples, got {self.eval_k}")
        self.as_training()

    def as_training(self) -> TrainConfig:
        """These settings under the names that training has for them; it checks them.

        Raises:
            ValueError: one of them is out of range.
        """
        own = {"data", "data_args"} | ({"task"} if self.task is None else set())
        same = {each.name for each in fields(TrainConfig)} & {each.name for each in fields(self)} - own
        given = {name: getattr(self, name) for name in same}
        sets = [self.data] if isinstance(self.data, str) else self.data or []
        if sets:
            given |= {"data": sets[0], "eval_data": sets, "eval_data_args": self.data_args}
        return TrainConfig(**given, heldout_samples=max(1, self.samples), prompts_per_step=1)


def parse_evaluation(arguments: Sequence[str]) -> Evaluation:
    """The Evaluation that command line arguments describe."""
    description = "Evaluate a language model, greedily and by sampling. Where a setting may be none, write null."
    return parse_settings(Evaluation, arguments, prog="repo-ops evaluate", description=description)


def run_evaluation(settings: Evaluation, console: Console | None = None) -> dict[str, float]:
    """Evaluates, shows the numbers as a table, writes them where `output` says; returns them (see `evaluate`).

    Raises:
        ValueError: the settings, the data or the model do not go together; a sentence says why.
    """
    import torch
    import transformers
    from rich.console import Console

    from repo_ops.trainer.distributed import join
    from repo_ops.trainer.door import make_task, open_rewards, open_source, sampling
    from repo_ops.trainer.evaluate import evaluate
    from repo_ops.trainer.models import load_model
    from repo_ops.trainer.rollout.load import load_engine

    config = settings.as_training()
    ranks = join(settings.device)
    if ranks.size > 1:
        raise ValueError(f"evaluate: expected one process, got {ranks.size} ranks; start it without torchrun")
    source = open_source(config, train=False)
    rewards = open_rewards(config, source)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    transformers.set_seed(settings.seed)
    model, tokenizer = load_model(settings.model, dtype=getattr(torch, settings.dtype), seed=settings.seed)
    task = make_task(config, source, tokenizer)
    autocast = torch.bfloat16 if settings.autocast else None
    engine = load_engine("hf", {}, model.to(ranks.device), tokenizer, stop=task.stop, autocast=autocast)
    how = sampling(
        config,
        num_samples=settings.samples,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        seed=settings.seed * 1_000_003,  # as at step 0 of a run
    )
    found = evaluate(engine, task.heldout, rewards, how, ks=config.pass_at, success=settings.eval_success)
    rewards.close()
    console = console or Console()
    for note in task.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(_table(found, title=f"{settings.model} on {task.name}"))
    if settings.output is not None:
        numbers = {name: None if value != value else value for name, value in found.items()}  # NaN is no JSON
        content = {"settings": asdict(settings), "numbers": numbers}
        Path(settings.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


def _table(found: dict[str, float], *, title: str) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in ("", "value", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    for name, value in found.items():
        if not name.endswith(("_low", "_high")):
            low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
            shown = f"{value:.0f}" if name.endswith(("prompts", "unscored")) else f"{value:.4f}"
            table.add_row(name, shown, "" if low is None or high is None else f"{low:.4f} to {high:.4f}")
    return table
