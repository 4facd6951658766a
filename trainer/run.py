"""Everything that a training run works with, made from its settings before the first step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from repo_ops.head import gemm
from repo_ops.replay import ReplayBuffer
from repo_ops.trainer.checkpoint import Checkpoint
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import PromptStream
from repo_ops.trainer.distributed import join
from repo_ops.trainer.door import (
    check_ranks,
    check_settings,
    make_buffer,
    make_objective,
    make_task,
    open_rewards,
    open_source,
)
from repo_ops.trainer.learner import Learner
from repo_ops.trainer.lora import add_lora
from repo_ops.trainer.models import load_model
from repo_ops.trainer.models.liger import patch_layers
from repo_ops.trainer.resume import checkpoint_of, restore
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import RolloutEngine
from repo_ops.trainer.rollout.load import load_engine
from repo_ops.trainer.rollout.over_ranks import OverRanks
from repo_ops.trainer.tasks import Task

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

    @property
    def last_logged(self) -> int | None:
        """The last of them whose line is in the log; a step may have been cut off before it was written."""
        if self.resumed is None:
            return None
        return self.resumed.step - (self.resumed.manifest["unfinished"] is not None)

    def describe(self) -> str:
        """One line about what is trained, dtypes included: bfloat16 weights are a common silent mistake."""
        config, ranks = self.config, self.learner.ranks
        trained = sum(parameter.numel() for parameter in self.learner.parameters)
        compute = "bfloat16 autocast" if config.autocast else "no autocast"
        replay = f" with {config.replay} replay" if config.replay else ""
        lora = f" of LoRA rank {config.lora_rank}" if config.lora_rank else ""
        shared = ""
        if ranks.size > 1:
            copies = f" in {config.replicas} copies" if config.replicas > 1 else ""
            gathered = "bfloat16" if config.autocast else config.dtype
            shared = (
                f" (optimizer {config.dtype}, layers gathered in {gathered}, gradients reduced in float32) sharded "
                f"over {ranks.size} ranks{copies}{', on the CPU' if config.cpu_offload else ''}"
            )
        return (
            f"{config.objective}{replay} on {self.task.name}: {config.model}, {trained / 1e6:.1f}M parameters{lora} in "
            f"{config.dtype}{shared}, {compute}; "
            f"{config.steps} steps of {config.prompts_per_step} x {config.group_size}"
        )


def prepare(config: TrainConfig) -> Run:
    """The run that `config` describes, ready for its first step. What is cheap to check is checked first.

    Raises:
        ValueError: a setting that the objective, the replay, the task, the reward or the model refuses.
        ImportError: a package that a setting needs is missing.
    """
    check_settings(config)
    ranks = join(config.device)
    check_ranks(config, ranks)
    notes = [f"nothing is replayed: {', '.join(config.idle)} play no part"] if config.idle else []
    checkpoint = checkpoint_of(config, ranks, notes.append)
    source = open_source(config)
    rewards = open_rewards(config, source)

    folder = _output_folder(config.output_dir)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    transformers.set_seed(config.seed)  # of Python, numpy and torch: reward functions may use any of them
    transformers.utils.logging.disable_progress_bar()  # its bars, also when saving, would tear ours
    model, tokenizer = load_model(config.model, dtype=getattr(torch, config.dtype), seed=config.seed)
    if patch_layers(model, ranks.device, wanted=config.liger):
        notes.append("liger-kernel's RMSNorm, RoPE and SwiGLU run in the layers")
    if config.lora_rank:
        alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        add_lora(model, rank=config.lora_rank, alpha=alpha, targets=config.lora_targets)
    if ranks.size == 1:  # with more each takes its shards to its device
        model.to(ranks.device)
    task = make_task(config, source, tokenizer)
    notes += task.notes
    prompts = PromptStream(task.train, batch=config.prompts_per_step, seed=config.seed)
    max_new_tokens = config.max_new_tokens or task.max_new_tokens
    autocast = torch.bfloat16 if config.autocast else None
    learner = Learner(
        model,
        make_objective(config, max_length=max_new_tokens),
        off_policy_coef=config.off_policy_coef,
        temperature=config.temperature,
        max_tokens=config.micro_batch_tokens,
        autocast=autocast,
        head_dtype=torch.bfloat16 if config.head_autocast else torch.float32,
        betas=config.betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        recompute=config.recompute_layers,
        ranks=ranks,
        replicas=config.replicas,
        cpu_offload=config.cpu_offload,
    )
    engine = load_engine(
        config.engine, config.engine_args, model, tokenizer, stop=task.stop, autocast=autocast, ranks=ranks
    )
    if ranks.size > 1:
        engine = OverRanks(engine, ranks, samples_from=model if config.engine == "hf" else None)
    # of a large data set the first prompts stand for all; generation would refuse a longer one, too
    engine.check_prompts([e.prompt for e in (*task.heldout, *task.train[:1000])], max_new_tokens=max_new_tokens)
    notes += precision_notes(config, ranks.device)
    layers = "bfloat16" if config.autocast else config.dtype
    head = ", its head too" if config.head_autocast else ""
    notes.append(f"completions from {engine.describe()}; the learner computes its layers in {layers}{head}")
    run = Run(
        config, folder, task, rewards, max_new_tokens, model, tokenizer, engine, learner, make_buffer(config), prompts
    )
    run.resumed, run.notes = checkpoint, notes
    if checkpoint is not None:
        run.notes += restore(run, checkpoint)
    return run


def precision_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What a run on this device would be slow by."""
    layers = "bfloat16" if config.autocast else config.dtype
    if layers == "bfloat16" and not gemm.multiplies(torch.bfloat16, device):
        return [
            "bfloat16 products run in slow loops on this processor, which has none: --autocast false --dtype float32"
        ]
    if device.type != "cpu" and config.autocast and config.dtype == "float32" and not config.head_autocast:
        return ["the head multiplies in float32, which is slow on a GPU: --head_autocast true"]
    return []


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
