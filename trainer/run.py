"""Everything that a training run works with, made from its settings before the first step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

import repo_ops
from repo_ops.objectives.base import Objective
from repo_ops.replay import ReplayBuffer
from repo_ops.trainer.checkpoint import Checkpoint
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import PromptStream
from repo_ops.trainer.learner import Learner, reads_top_logps
from repo_ops.trainer.models import load_model
from repo_ops.trainer.publish import check_hub
from repo_ops.trainer.resume import checkpoint_of, restore
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import RolloutEngine
from repo_ops.trainer.rollout.load import load_engine
from repo_ops.trainer.sources import make_task, open_rewards, open_source
from repo_ops.trainer.tasks import Task
from repo_ops.trainer.trackers import check_installed, tracker_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Run", "prepare"]


@dataclass
class Run:
    """The parts of a run; the loop only moves data between them."""

    config: TrainConfig
    folder: Path
    task: Task
    rewards: Rewards
    max_new_tokens: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    learner: Learner
    buffer: ReplayBuffer | None
    prompts: PromptStream
    resumed: Checkpoint | None = None
    """What the run goes on from; None: from its beginning."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the log about how the run came to be."""

    @property
    def resumed_at(self) -> int | None:
        """Steps that were made before; None: the run is new."""
        return None if self.resumed is None else self.resumed.step

    def describe(self) -> str:
        """One line about what is trained, dtypes included: bfloat16 weights are a common silent mistake."""
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.learner.parameters)
        compute = "bfloat16 autocast" if config.autocast else "no autocast"
        replay = f" with {config.replay} replay" if config.replay else ""
        return (
            f"{config.objective}{replay} on {self.task.name}: {config.model}, {parameters / 1e6:.1f}M parameters in "
            f"{config.dtype}, {compute}; {config.steps} steps of {config.prompts_per_step} x {config.group_size}"
        )


def prepare(config: TrainConfig) -> Run:
    """The run that `config` describes, ready for its first step. What is cheap to check is checked first.

    Raises:
        ValueError: a setting that the objective, the replay, the task, the reward or the model refuses.
        ImportError: a package that a setting needs is missing.
    """
    beta = {} if config.beta is None else {"beta": config.beta}
    objective_args = {**beta, **config.objective_args}
    _check_top_logps(config, repo_ops.get_objective(config.objective, **{"max_length": 1, **objective_args}))
    check_installed(tracker_names(config.report_to), option="report_to")
    check_installed(["pyarrow"] if config.save_completions else [], option="save_completions")
    device = _device(config.device)
    two = torch.zeros(2)
    repo_ops.group_advantages(two, two.long(), off_policy=two.bool(), lengths=two.long(), **config.advantages)
    check_hub(config.push_to_hub)
    notes: list[str] = []
    checkpoint = checkpoint_of(config, notes.append)
    buffer = None
    if config.replay is not None:
        buffer = ReplayBuffer(
            config.replay_capacity, config.replay, config.replay_num, config.replay_min_size, seed=config.seed
        )
    source = open_source(config)
    rewards = open_rewards(config, source)

    folder = _output_folder(config.output_dir)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    transformers.set_seed(config.seed)  # of Python, numpy and torch: reward functions may use any of them
    transformers.utils.logging.disable_progress_bar()  # its bars, also when saving, would tear ours
    model, tokenizer = load_model(config.model, dtype=getattr(torch, config.dtype), seed=config.seed)
    model.to(device)
    task = make_task(config, source, tokenizer)
    notes += task.notes
    prompts = PromptStream(task.train, batch=config.prompts_per_step, seed=config.seed)
    max_new_tokens = config.max_new_tokens or task.max_new_tokens
    autocast = torch.bfloat16 if config.autocast else None
    learner = Learner(
        model,
        # Dr.GRPO divides by the generation budget, unless told otherwise
        repo_ops.get_objective(config.objective, **{"max_length": max_new_tokens, **objective_args}),
        off_policy_coef=config.off_policy_coef,
        temperature=config.temperature,
        max_tokens=config.micro_batch_tokens,
        autocast=autocast,
        betas=config.betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    engine = load_engine(config.engine, config.engine_args, model, tokenizer, stop=task.stop, autocast=autocast)
    run = Run(config, folder, task, rewards, max_new_tokens, model, tokenizer, engine, learner, buffer, prompts)
    run.resumed, run.notes = checkpoint, notes
    if checkpoint is not None:
        run.notes += restore(run, checkpoint)
    return run


def _check_top_logps(config: TrainConfig, objective: Objective) -> None:
    if not reads_top_logps(objective):
        return
    if config.replay is not None:
        raise ValueError(
            f"replay: expected none with {config.objective}, got {config.replay!r}; the buffer does not keep the "
            "sampler's likeliest tokens, which this objective reads"
        )
    if config.top_k != 0 or config.top_p != 1:
        raise ValueError(
            f"top_k, top_p: expected 0 and 1 with {config.objective}, got {config.top_k} and {config.top_p}; the "
            "divergence would measure what the sampler cut off"
        )


def _output_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"output_dir: expected a folder that can be written, got {name!r} ({reason})") from error
    return folder


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here, got {name!r} ({reason})") from error
