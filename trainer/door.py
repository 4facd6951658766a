"""The parts that a run's settings name, and what settings are refused for before anything is read or loaded: in a run,
a dry run and an evaluation alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import repo_ops
from repo_ops.objectives.base import Objective
from repo_ops.replay import ReplayBuffer
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import DataTask, open_data, open_heldout
from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.learner import reads_top_logps
from repo_ops.trainer.publish import check_hub
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import SamplingSettings
from repo_ops.trainer.tasks import Task, load_task
from repo_ops.trainer.trackers import check_installed, tracker_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    *("check_ranks", "check_settings"),
    *("make_buffer", "make_objective", "make_task", "open_rewards", "open_source", "sampling"),
]


def make_objective(config: TrainConfig, *, max_length: int = 1) -> Objective:
    """The objective that the settings name.

    Args:
        max_length: tokens of a completion; Dr.GRPO divides by them, unless told otherwise.
    """
    given: dict[str, Any] = {"max_length": max_length, **config.objective_args}
    if config.beta is not None:
        given["beta"] = config.beta
    return repo_ops.get_objective(config.objective, **given)


def make_buffer(config: TrainConfig) -> ReplayBuffer | None:
    """The empty replay buffer; None where nothing is replayed."""
    if config.replay is None:
        return None
    return ReplayBuffer(
        config.replay_capacity, config.replay, config.replay_num, config.replay_min_size, seed=config.seed
    )


def open_source(config: TrainConfig, *, train: bool = True) -> Task | DataTask:
    """What to train on: a task that is whole, or data that wait for a tokenizer.

    Args:
        train: False opens, of data, only what is held out.
    """
    if config.data is None:
        sizes = {
            "train_size": 32 if config.train_size is None else config.train_size,
            "heldout_size": 16 if config.heldout_size is None else config.heldout_size,
        }
        return load_task(config.task, **sizes, seed=config.seed, **config.task_args)
    settings: dict[str, Any] = {
        "eval_data_args": config.eval_data_args,
        "prompt_column": config.prompt_column,
        "answer_column": config.answer_column,
        "chat": config.chat,
        "max_prompt_tokens": config.max_prompt_tokens,
        "heldout_size": config.heldout_size,
        "seed": config.seed,
    }
    if not train:
        return open_heldout(config.eval_sets, **settings)
    settings |= {"data_args": config.data_args, "train_size": config.train_size}
    return open_data(config.data, config.eval_sets, **settings)


def open_rewards(config: TrainConfig, source: Task | DataTask) -> Rewards:
    """The reward functions that were asked for, or the task's, checked against the columns there are."""
    if isinstance(source, Task) and source.reward is not None and not config.reward_weights:
        return Rewards({source.reward.__name__: (source.reward, 1.0)})
    rewards = Rewards.load(config.reward_weights, timeout=config.reward_timeout)
    rewards.check(source.columns)
    return rewards


def make_task(config: TrainConfig, source: Task | DataTask, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task, its prompts as this tokenizer's model reads them."""
    task = source.task(tokenizer) if isinstance(source, DataTask) else source
    return task if config.stop is None else replace(task, stop=tuple(config.stop))


def sampling(
    config: TrainConfig, *, num_samples: int, max_new_tokens: int, seed: int, top_logps: int = 0
) -> SamplingSettings:
    """How completions are drawn, in training and in evaluation."""
    return SamplingSettings(
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        top_k=config.top_k,
        top_p=config.top_p,
        top_logps=top_logps,
    )


def check_settings(config: TrainConfig) -> None:
    """Refuses names and numbers that objective, advantages, replay or the hub do not know, and missing packages.

    Raises:
        ValueError, ImportError: a sentence names the setting.
    """
    _check_top_logps(config, make_objective(config))
    check_installed(tracker_names(config.report_to), option="report_to")
    check_installed(["pyarrow"] if config.save_completions else [], option="save_completions")
    make_buffer(config)
    two = torch.zeros(2)
    repo_ops.group_advantages(two, two.long(), off_policy=two.bool(), lengths=two.long(), **config.advantages)
    check_hub(config.push_to_hub)


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Refuses with a ValueError what so many ranks cannot do."""
    if config.engine == "vllm" and ranks.size > 1:
        raise ValueError(
            f"engine: expected hf or vllm_server with {ranks.size} ranks, got vllm, which lives in one process; start "
            "a server for all of them (docs/scaling.md)"
        )
    if ranks.size % config.replicas:
        raise ValueError(f"replicas: expected a divisor of the {ranks.size} ranks, got {config.replicas}")
    if config.cpu_offload and ranks.size == 1:
        raise ValueError("cpu_offload: expected a sharded model, got one rank; start more with torchrun")


def _check_top_logps(config: TrainConfig, objective: Objective) -> None:
    if not reads_top_logps(objective):
        if config.divergence_top_k != TrainConfig.divergence_top_k:
            raise ValueError(
                f"divergence_top_k: expected nothing with {config.objective}, which does not read it, got "
                f"{config.divergence_top_k}"
            )
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
