"""Prompts as the model reads them: text as it is, chat messages through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from repo_ops.trainer.tasks import Example

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Examples", "PromptText", "short_enough"]


class PromptText:
    """Turns the content of the prompt column into the text that the model goes on from.

    Args:
        chat: text too becomes a message, of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = chat

    def __call__(self, prompt: str | list[dict[str, Any]]) -> str:
        """The prompt's text, without the beginning-of-sequence token that the tokenizer will add.

        Raises:
            ValueError: messages, but no chat template, or one that the tokenizer's own special tokens would spoil.
        """
        if isinstance(prompt, str):
            if not self.chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if not self.tokenizer.chat_template:
            raise ValueError(
                "prompt_column: expected a tokenizer with a chat template for chat messages, got one without; use an "
                "instruct model, or write the prompts as text"
            )
        # a table has every key in every message; those that were not written are None
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if self._encoded(text, bare=True) == self._encoded(text):
            return text
        # the template writes what the tokenizer adds once more when it encodes
        shorter = text.removeprefix(self.tokenizer.bos_token or "")
        if self._encoded(shorter) != self._encoded(text, bare=True):
            raise ValueError(
                "prompt_column: expected a tokenizer that adds to a chat nothing but a beginning-of-sequence token, "
                f"got {text[:40]!r}... with other tokens around it; set add_bos_token and add_eos_token to false in "
                "tokenizer_config.json"
            )
        return shorter

    def _encoded(self, text: str, *, bare: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not bare).input_ids)


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Rows of a data set as examples, each made when it is asked for: the rows stay on the disk."""

    rows: Dataset
    text: PromptText
    prompt_column: str
    answer_column: str
    """Also reaches the rewards as `answer`, where the rows have it."""
    source: str = ""
    """What the rows are from; evaluation reports each source by itself."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = dict(self.rows[place])
        prompt = self.text(row.pop(self.prompt_column))
        if self.answer_column in row:
            row["answer"] = row[self.answer_column]
        return Example(f"{self.source}/{place}", prompt, row, self.source)


def short_enough(examples: Examples, max_tokens: int, *, batch: int = 1000) -> Examples:
    """Those whose prompt has at most so many tokens."""
    tokenizer = examples.text.tokenizer
    places: list[int] = []
    for start in range(0, len(examples), batch):
        # a slice of rows is read at once, which a thousand single rows are not
        prompts = [examples.text(prompt) for prompt in examples.rows[start : start + batch][examples.prompt_column]]
        lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
        places += [start + i for i, length in enumerate(lengths) if length <= max_tokens]
    return examples if len(places) == len(examples) else replace(examples, rows=examples.rows.select(places))
