"""`repo-ops evaluate`: how good a model is on prompts from a file or a task, without training it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repo_ops.trainer.config import TrainConfig, parse_settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Evaluation", "parse_evaluation", "run_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation. Those that training has too mean the same there."""

    model: str = "smollm2"
    """"smollm2", "tiny", a folder in Hugging Face format such as a run's, or a hub id."""
    data: str | list[str] | None = None
    """Prompts: a .jsonl or .parquet file, a folder, a data set of the hub, or a list of these."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """For datasets.load_dataset, e.g. --data_args.split test."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or chat messages for the tokenizer's chat template."""
    answer_column: str = "answer"
    """Column that reaches the reward functions as `answer`."""
    chat: bool = False
    """Text prompts become one user message in the tokenizer's chat template."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out, and counted (none: no limit)."""
    task: str | None = None
    """Instead of data: a task; its held-out prompts are those of a training run with the same seed and sizes."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    train_size: int | None = None
    """Of the training run whose held-out prompts are wanted (none: 32); only with a task."""
    heldout_size: int | None = None
    """Prompts (none: 16 of a task, all of the data)."""
    reward: str | None = None
    """As in training (none: the task's)."""
    rewards: dict[str, float] = field(default_factory=dict)
    """As in training; the first one decides what counts as solved."""
    reward_timeout: float | None = 300.0
    """As in training, for all completions of a pass."""
    samples: int = 8
    """Sampled completions for each prompt; one greedy completion comes on top (0: greedy alone)."""
    eval_k: list[int] = field(default_factory=list)
    """pass@k is reported for these k, from 1 to samples (none: 1 and samples)."""
    eval_success: float = 1.0
    """Least value of the (first) reward that counts as solved."""
    temperature: float = 1.0
    """Divides the logits when sampling (> 0)."""
    top_k: int = 0
    """Sample among the k most probable tokens only (0: all; at most 512), as in training."""
    top_p: float = 1.0
    """Of these, sample among the most probable ones that reach this probability, in (0, 1]; below 1 it wants a
    top_k."""
    max_new_tokens: int | None = None
    """Longest completion, tokens (none: the task's own; 256 for data)."""
    stop: list[str] | None = None
    """Single characters that end a completion, besides the end-of-sequence token."""
    seed: int = 0
    """Of the samples, and of the choice among the prompts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    autocast: bool = True
    """Compute in bfloat16."""
    device: str | None = None
    """cpu, cuda, cuda:1... (none: a GPU where torch sees one, else the CPU)."""
    threads: int | None = None
    """CPU threads of torch (none: its own choice)."""
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
    from repo_ops.trainer.evaluate import evaluate
    from repo_ops.trainer.models import load_model
    from repo_ops.trainer.rollout.load import load_engine
    from repo_ops.trainer.sources import make_task, open_heldout_source, open_rewards

    config = settings.as_training()
    ranks = join(settings.device)
    if ranks.size > 1:
        raise ValueError(f"evaluate: expected one process, got {ranks.size} ranks; start it without torchrun")
    source = open_heldout_source(config)
    rewards = open_rewards(config, source)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    transformers.set_seed(settings.seed)
    model, tokenizer = load_model(settings.model, dtype=getattr(torch, settings.dtype), seed=settings.seed)
    task = make_task(config, source, tokenizer)
    autocast = torch.bfloat16 if settings.autocast else None
    engine = load_engine("hf", {}, model.to(ranks.device), tokenizer, stop=task.stop, autocast=autocast)
    found = evaluate(
        engine,
        task.heldout,
        rewards,
        num_samples=settings.samples,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        ks=config.pass_at,
        success=settings.eval_success,
        seed=settings.seed * 1_000_003,  # as at step 0 of a run
    )
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
