"""What a run's settings say about prompts and rewards, opened."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import DataTask, open_data, open_heldout
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.tasks import Task, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["make_task", "open_heldout_source", "open_rewards", "open_source"]


def open_source(config: TrainConfig) -> Task | DataTask:
    """What to train on: a task that is whole, or data that wait for a tokenizer."""
    if config.data is None:
        sizes = {
            "train_size": 32 if config.train_size is None else config.train_size,
            "heldout_size": 16 if config.heldout_size is None else config.heldout_size,
        }
        return load_task(config.task, **sizes, seed=config.seed, **config.task_args)
    return open_data(
        config.data,
        config.eval_sets,
        data_args=config.data_args,
        eval_data_args=config.eval_data_args,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        chat=config.chat,
        max_prompt_tokens=config.max_prompt_tokens,
        train_size=config.train_size,
        heldout_size=config.heldout_size,
        seed=config.seed,
    )


def open_heldout_source(config: TrainConfig) -> Task | DataTask:
    """What to evaluate on: of data only what is held out is opened."""
    if config.data is None:
        return open_source(config)
    return open_heldout(
        config.eval_sets,
        eval_data_args=config.eval_data_args,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        chat=config.chat,
        max_prompt_tokens=config.max_prompt_tokens,
        heldout_size=config.heldout_size,
        seed=config.seed,
    )


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
