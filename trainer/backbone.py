"""What the learner needs of a Hugging Face causal language model: hidden states of packed rows, and the head."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import repo_ops
from repo_ops.causal_lm import find_head
from repo_ops.trainer.rows import MicroBatch, pack_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Backbone"]


class Backbone:
    """The layers below the head, run on shared-prefix rows, each hidden state equal to that of a separate row.

    Refuses, when made, a model whose rows would not be exact: it compares the log-probs of a few packed tokens with
    those of `model(...)` on separate rows, which catches recurrent layers, attention that ignores a mask, positions
    that are not taken from `position_ids`, and a scaling of the logits that `find_head` does not know.

    Args:
        model: stays in eval mode (dropout would make packed and separate rows differ).
        autocast: dtype the layers compute in (None: their own). The head computes in its weights' dtype either way.
    """

    def __init__(self, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> None:
        self.model = model.eval()
        self.attention = _attention_of(model)
        self.window = _window_of(model.config.get_text_config())
        self.head = find_head(model)
        self.autocast: torch.dtype | None = None
        _compare_with_separate_rows(self)
        self.autocast = autocast

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Hidden state that predicts each target of the micro-batch, [N, D] in the head's dtype.

        Raises:
            ValueError: a sequence is longer than the model's attention window.
        """
        longest = int(batch.position_ids.max()) + 1
        if self.window is not None and longest > self.window:
            raise ValueError(
                f"model: expected prompt + completion within its attention window of {self.window} tokens, got "
                f"{longest}; beyond it shared-prefix rows would not be exact: shorten prompts or max_new_tokens"
            )
        mask = batch.attention_mask()
        if self.attention == "eager":  # eager attention adds its mask to the scores
            dtype = self.autocast or self.head.weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        with self._precision(batch.input_ids.device):
            states = self.model.get_decoder()(
                input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
        # float32 weights meet bfloat16 states under autocast: widening the states loses nothing
        return states.flatten(0, 1)[batch.gather].to(self.head.weight.dtype)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)


def _attention_of(model: PreTrainedModel) -> str:
    takes = inspect.signature(model.get_decoder().forward).parameters
    if getattr(model, "_is_stateful", False) or not {"attention_mask", "position_ids"} <= set(takes):
        raise ValueError(
            f"model: expected attention layers that take a mask and positions, got {type(model).__name__}, which is "
            "recurrent or has positions of its own; shared-prefix rows would not be exact"
        )
    name = model.config.get_text_config()._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ValueError(
            f"model: expected attention 'sdpa' or 'eager', got {name!r}, which ignores the mask of shared-prefix rows; "
            "load it with attn_implementation='sdpa'"
        )
    return name


def _window_of(config: Any) -> int | None:
    """Longest sequence for which every layer attends to everything before it; None: no limit."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if window is None and "sliding_attention" not in kinds:
        return getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None
    if getattr(config, "layer_types", None) and "sliding_attention" not in kinds:
        return None  # Qwen: a window in the config that no layer uses
    return window


@torch.no_grad()
def _compare_with_separate_rows(backbone: Backbone) -> None:
    vocabulary = backbone.head.weight.shape[0]
    device = backbone.head.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (12,), generator=generator).tolist()
    prompt, completions = ids[:4], [ids[4:8], ids[4:6] + ids[8:10], ids[10:]]
    (batch,) = pack_rows([prompt] * 3, completions, max_tokens=64)
    batch = batch.to(device)
    hidden = backbone.hidden(batch)
    packed = repo_ops.linear_logps(hidden, targets=batch.targets, **backbone.head.arguments(hidden)).logps
    separate = []
    for index in batch.sequences:
        row = torch.tensor([prompt + completions[index]], device=device)
        logits = backbone.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        separate.append(logits.float().log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0])
    gap = (packed - torch.cat(separate)).abs().max().item()
    # float32 differs by 1e-6; bfloat16 weights round to a few hundredths where a wrong mask gives whole nats
    if not gap < (1e-3 if backbone.head.weight.dtype == torch.float32 else 0.25):
        raise ValueError(
            f"model: packed and separate rows of {type(backbone.model).__name__} differ by {gap:.3g} nats; it has "
            "recurrent layers, positions of its own, or a scaling of the logits that is not supported"
        )
