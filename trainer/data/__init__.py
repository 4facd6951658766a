"""Prompts from files and hub data sets: what to train on, what to hold out, and what was left out of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repo_ops.trainer.data.prompts import Examples, PromptText, short_enough
from repo_ops.trainer.data.rows import open_rows, prompt_hashes, require_column, some_of
from repo_ops.trainer.data.stream import PromptStream
from repo_ops.trainer.rewards import OWN_COLUMNS
from repo_ops.trainer.tasks import Example, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataTask", "PromptStream", "open_data", "open_heldout"]

MAX_NEW_TOKENS = 256
"""Longest completion where neither a task nor the settings know better."""


@dataclass
class DataTask:
    """Data that were found and checked, before there is a tokenizer to make prompts with."""

    name: str
    train: Dataset | None
    heldout: dict[str, Dataset]
    """Rows by the name of their set."""
    prompt_column: str
    answer_column: str
    chat: bool = False
    """Text prompts become one user message."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out."""
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """What every row, to train on or held out, brings to the rewards beside its prompt."""
        tables = [*([self.train] if self.train is not None else []), *self.heldout.values()]
        shared = set.intersection(*(set(rows.column_names) for rows in tables)) - {self.prompt_column}
        return sorted(shared | ({"answer"} if self.answer_column in shared else set()))

    def task(self, tokenizer: PreTrainedTokenizerBase) -> Task:
        """The task, its prompts as this tokenizer's model reads them.

        Raises:
            ValueError: chat messages without a chat template, or no prompt is short enough.
        """
        text = PromptText(tokenizer, chat=self.chat)
        train: Sequence[Example] = () if self.train is None else self._examples(self.train, "data", text)
        heldout = [each for name, rows in self.heldout.items() for each in self._examples(rows, name, text)]
        return Task(self.name, train, heldout, (), MAX_NEW_TOKENS, None, tuple(self.notes))

    def _examples(self, rows: Dataset, name: str, text: PromptText) -> Examples:
        found = Examples(rows, text, self.prompt_column, self.answer_column, name)
        text(rows[0][self.prompt_column])  # a template that is missing shows here, not in the middle of the run
        if self.max_prompt_tokens is None:
            return found
        kept = short_enough(found, self.max_prompt_tokens)
        if len(kept) < len(found):
            dropped = f"{len(found) - len(kept)} of {len(found)} prompts left out"
            self.notes.append(f"{name}: {dropped}, longer than {self.max_prompt_tokens} tokens")
        if len(kept) == 0:
            raise ValueError(
                f"max_prompt_tokens: expected at least one prompt of {name} to fit, got {self.max_prompt_tokens}"
            )
        return kept


def open_data(
    data: str,
    eval_data: Sequence[str] = (),
    *,
    data_args: Mapping[str, Any],
    eval_data_args: Mapping[str, Any],
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    chat: bool = False,
    max_prompt_tokens: int | None = None,
    train_size: int | None = None,
    heldout_size: int | None = None,
    seed: int = 0,
) -> DataTask:
    """The rows to train on and those held out, opened and checked.

    A prompt that comes again in `data` is left out, because the replay buffer knows a prompt by its text and would give
    one row's answers for another's; so is one that is held out. Both are counted in the notes.

    Args:
        chat, max_prompt_tokens: see DataTask.
        data, eval_data: see `open_rows`; without eval_data, heldout_size rows of data are held out.
        train_size, heldout_size: rows taken at random (None: all of them; of data without eval_data none are held
            out).
    Raises:
        ValueError: nothing to read, a missing column, a prompt that is none, or fewer rows than asked for.
    """
    rows = open_rows(data, data_args, key="data")
    _check_columns(rows, prompt_column, answer_column)
    hashes = prompt_hashes(rows, prompt_column)
    keep = np.sort(np.unique(hashes, return_index=True)[1])  # where each prompt stands first
    notes = []
    if len(keep) < len(rows):
        notes.append(f"data: {len(rows) - len(keep)} of {len(rows)} rows left out, their prompts come again")
    heldout, held_hashes = _open_heldout(eval_data, eval_data_args, prompt_column, answer_column, heldout_size, seed)
    if eval_data:
        fresh = keep[~np.isin(hashes[keep], held_hashes)]
        if len(fresh) < len(keep):
            notes.append(f"data: {len(keep) - len(fresh)} of {len(keep)} prompts left out, they are held out")
        keep = fresh
        if len(keep) == 0:
            raise ValueError(
                f"data: expected prompts that are not held out, got {data}, all of whose prompts are in eval_data "
                f"{', '.join(eval_data)} too; name other data, or drop eval_data and set heldout_size"
            )
    split = 0 if eval_data else heldout_size or 0
    wanted = len(keep) - split if train_size is None else train_size
    if train_size is None and wanted < 1:
        raise ValueError(
            f"heldout_size: expected fewer than the {len(keep)} different prompts of {data}, got {split}; none would "
            "be left to train on"
        )
    if not 1 <= wanted <= len(keep) - split:
        raise ValueError(
            f"train_size, heldout_size: expected at most {len(keep)} rows of {data} in all, got {wanted} + {split}"
        )
    if split + wanted < len(keep) or split:
        keep = keep[some_of(len(keep), split + wanted, seed=seed)]
    if split:
        heldout, keep = {"heldout": rows.select(keep[:split])}, keep[split:]
    train = rows if len(keep) == len(rows) else rows.select(keep)
    return DataTask(data, train, heldout, prompt_column, answer_column, chat, max_prompt_tokens, notes)


def open_heldout(
    eval_data: Sequence[str],
    *,
    eval_data_args: Mapping[str, Any],
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    chat: bool = False,
    max_prompt_tokens: int | None = None,
    heldout_size: int | None = None,
    seed: int = 0,
) -> DataTask:
    """Rows to evaluate on, without any to train on. Raises as `open_data` does."""
    if heldout_size == 0:
        raise ValueError("heldout_size: expected at least one prompt to evaluate on, got 0; leave it out for all")
    heldout, _ = _open_heldout(eval_data, eval_data_args, prompt_column, answer_column, heldout_size, seed, key="data")
    return DataTask(", ".join(eval_data), None, heldout, prompt_column, answer_column, chat, max_prompt_tokens)


def _open_heldout(
    names: Sequence[str],
    options: Mapping[str, Any],
    prompt_column: str,
    answer_column: str,
    size: int | None,
    seed: int,
    *,
    key: str = "eval_data",
) -> tuple[dict[str, Dataset], np.ndarray[Any, Any]]:
    """Rows of each set, `size` of them (None: all), by its name; the hashes of their prompts."""
    found: dict[str, Dataset] = {}
    for name in names if size != 0 else ():
        rows = open_rows(name, options, key=key)
        _check_columns(rows, prompt_column, answer_column)
        if size is not None and size < len(rows):
            rows = rows.select(some_of(len(rows), size, seed=seed))
        label = Path(name).stem
        found[label if label not in found else name] = rows
    hashes = [prompt_hashes(rows, prompt_column) for rows in found.values()]
    return found, np.concatenate([np.empty(0, dtype=np.int64), *hashes])


def _check_columns(rows: Dataset, prompt_column: str, answer_column: str) -> None:
    require_column(rows, prompt_column, "prompt_column")
    if answer_column != "answer":
        require_column(rows, answer_column, "answer_column")
    if taken := sorted({"prompts", "completions", *OWN_COLUMNS} & set(rows.column_names) - {prompt_column}):
        raise ValueError(f"data: expected other columns than {taken}, which the trainer fills in; rename them")
