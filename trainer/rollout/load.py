"""The rollout engine that a run asks for by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.rollout import RolloutEngine
from repo_ops.trainer.rollout.engine_args import ServerSettings, check_engine_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_engine(
    engine: str,
    arguments: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop: Sequence[str],
    autocast: torch.dtype | None,
    ranks: Ranks | None = None,
) -> RolloutEngine:
    """The engine of that name for `model`.

    Args:
        engine: "hf", "vllm" (in this process) or "vllm_server".
        arguments: nothing for "hf"; those of vllm.LLM; the fields of ServerSettings.
        stop: single characters that end a completion.
        autocast: dtype of the learner's autocast; vLLM in this process computes in it, or in the model's own.
        ranks: the processes that train together.
    Raises:
        ValueError, ImportError, EngineError: it cannot be had like this; a sentence says why.
    """
    check_engine_args(engine, arguments)
    if engine == "hf":
        from repo_ops.trainer.rollout.hf import HFGenerate

        return HFGenerate(model, tokenizer, stop=stop, autocast_dtype=autocast)
    if engine == "vllm_server":
        from repo_ops.trainer.rollout.vllm_server import VLLMServer

        return VLLMServer(model, tokenizer, stop, settings=ServerSettings(**arguments), ranks=ranks)
    if engine != "vllm":
        raise ValueError(f"engine: expected hf, vllm or vllm_server, got {engine!r}")
    from repo_ops.trainer.rollout.vllm_local import VLLMInProcess

    dtype = str(autocast or model.dtype).removeprefix("torch.")
    return VLLMInProcess(model, tokenizer, stop, source=model.name_or_path, **{"dtype": dtype, **arguments})
