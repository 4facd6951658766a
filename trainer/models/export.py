"""Writes a trained model as a plain folder in Hugging Face format, however it was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from repo_ops.trainer.distributed import Ranks, is_sharded, whole_state
from repo_ops.trainer.lora import lora_layers, merge_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["export_model"]


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks) -> None:
    """Writes config, safetensors and tokenizer to `folder` on the first rank; every rank has to call.

    Adapters are merged, so the folder loads without peft. A tied head that has an adapter is written as a head of its
    own. Takes the memory of one whole model on the first rank's CPU.
    """
    state = whole_state(model) if is_sharded(model) else model.state_dict()
    if ranks.is_first:
        layers = lora_layers(model)
        if is_sharded(model) or layers:
            plain = _without_weights(
                model, tied=not any(layer is model.get_output_embeddings() for layer in layers.values())
            )
            plain.save_pretrained(folder, state_dict=merge_lora(model, state))
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _without_weights(model: PreTrainedModel, *, tied: bool) -> PreTrainedModel:
    """A model of the same configuration whose parameters hold nothing; it knows how to write a folder."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if not tied:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype)
    plain.generation_config = model.generation_config
    return plain
