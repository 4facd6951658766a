"""What the learner needs of a Hugging Face causal language model: hidden states of packed rows, and the head."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import repo_ops
from repo_ops.causal_lm import CausalLMHead, find_head
from repo_ops.trainer.distributed import inside, is_sharded, split_again
from repo_ops.trainer.lora import has_lora
from repo_ops.trainer.rows import MicroBatch, pack_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Backbone"]


class Backbone:
    """The layers below the head, run on shared-prefix rows, each hidden state equal to that of a separate row.

    Refuses, when made, a model whose rows would not be exact: it compares the log-probs of a few packed tokens with
    those of `model(...)` on separate rows, which catches recurrent layers, attention that ignores a mask, positions
    that are not taken from `position_ids`, and a scaling of the logits that `find_head` does not know.

    Of a model that is sharded (`repo_ops.trainer.distributed.shard`) `hidden` and `head` are to be used inside its
    forward only; all ranks have to make their Backbone together.

    Args:
        model: stays in eval mode (dropout would make packed and separate rows differ).
        autocast: dtype the layers compute in (None: their own).
        head_dtype: what operands of the head's products are rounded to, where its weights are float32.
        device: where it computes (None: where its parameters are; offloaded ones are elsewhere).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        autocast: torch.dtype | None = None,
        head_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.model = model.eval()
        self.device = device or next(model.parameters()).device
        self.attention = _attention_of(model)
        self.pairs_per_token = _pairs_per_token(model)
        self.window = _window_of(model.config.get_text_config())
        # adapters are switched off and on, and a sharded model has other tensors inside each forward
        self._head = None if is_sharded(model) or has_lora(model) else find_head(model)
        # a sharded model may gather its layers in bfloat16 already: it must run as it will
        self.autocast, self.head_dtype = autocast if is_sharded(model) else None, torch.float32
        _compare_with_separate_rows(self)
        split_again(model)
        self.autocast, self.head_dtype = autocast, head_dtype

    @property
    def head(self) -> CausalLMHead:
        """The head as it is now."""
        return find_head(self.model) if self._head is None else self._head

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
        mask, dtype = batch.attention_mask(), self.head.weight.dtype
        if self.attention == "eager":  # eager attention adds its mask to the scores
            added = self.autocast or dtype
            mask = torch.zeros(mask.shape, dtype=added, device=mask.device).masked_fill(~mask, torch.finfo(added).min)
        with self.precision():
            states = self.model.get_decoder()(
                input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
        # float32 weights meet bfloat16 states under autocast: widening the states loses nothing
        return states.flatten(0, 1)[batch.gather].to(dtype)

    def logps(self, batch: MicroBatch, temperature: float = 1.0, support_ids: Tensor | None = None) -> Tensor:
        """Log-probability of each target of the micro-batch, [N]; over support_ids [N, K] as in `linear_logps`."""
        hidden, head = self.hidden(batch), self.head
        settings: dict[str, Any] = {"targets": batch.targets, "temperature": temperature, "support_ids": support_ids}
        settings["options"] = repo_ops.Options(operand_dtype=self.head_dtype)
        return repo_ops.linear_logps(hidden, **settings, **head.arguments(hidden)).logps

    def precision(self) -> AbstractContextManager[Any]:
        """What the layers run under."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)


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


def _pairs_per_token(model: PreTrainedModel) -> float:
    """Pairs of tokens whose attention costs as much as the weights of the layers do for one token.

    A layer's weights cost a multiply-add each; a pair costs 2 for each number of the heads: q k, and p v.
    """
    config = model.config.get_text_config()
    width = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * (
        config.num_attention_heads
    )
    weights = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    return weights / config.num_hidden_layers / (2 * width)


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
    vocabulary = backbone.model.config.get_text_config().vocab_size
    device = backbone.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (12,), generator=generator).tolist()
    prompt, completions = ids[:4], [ids[4:8], ids[4:6] + ids[8:10], ids[10:]]
    (batch,) = pack_rows([prompt] * 3, completions, max_tokens=64)
    batch = batch.to(device)
    packed = inside(backbone.model, lambda: backbone.logps(batch))
    separate = []
    for index in batch.sequences:
        row = torch.tensor([prompt + completions[index]], device=device)
        with backbone.precision():
            logits = backbone.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        separate.append(logits.float().log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0])
    if not torch.cat(separate).isfinite().all():
        raise ValueError(
            f"model: expected finite log-probabilities, got NaN or infinity from {type(backbone.model).__name__}; its "
            "weights are not finite, or its layers overflow: look at the weights, or try --autocast false"
        )
    gap = (packed - torch.cat(separate)).abs().max().item()
    exact = backbone.autocast is None and next(backbone.model.parameters()).dtype != torch.bfloat16
    # float32 differs by 1e-6; bfloat16 rounds to a few hundredths where a wrong mask gives whole nats
    if not gap < (1e-3 if exact else 0.25):
        raise ValueError(
            f"model: packed and separate rows of {type(backbone.model).__name__} differ by {gap:.3g} nats; it has "
            "recurrent layers, positions of its own, or a scaling of the logits that is not supported"
        )
