"""Which rollout engines there are, what each can be told, and the one that a run asks for by name."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

# vLLM, torch and transformers are imported by the engine that needs them: settings are checked before they are loaded
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from repo_ops.trainer.distributed import Ranks
    from repo_ops.trainer.rollout import RolloutEngine

IN_PROCESS = {
    "model": "it is the run's model",
    "tokenizer": "prompts are sent as token ids",
    "skip_tokenizer_init": "prompts are sent as token ids",
    "seed": "every request has its own",
    "logprobs_mode": "the log-probabilities must be those of the sampled distribution",
    "max_logprobs": "it follows from what is asked for",
    "worker_extension_cls": "it receives the weights",
}
"""Arguments of vllm.LLM that the engine sets itself, and why."""
GPU_MEMORY_UTILIZATION = 0.3
"""What vLLM in this process takes of a GPU, unless told otherwise: the policy needs the rest."""


@dataclass(frozen=True)
class ServerSettings:
    """How to reach a vLLM server: the keys of `engine_args` with engine vllm_server."""

    url: str = "http://localhost:8000"
    """Of the server; $VLLM_API_KEY is sent along where it is set."""
    timeout: float = 600.0
    """Seconds until all completions of a prompt must be there (> 0)."""
    sync_timeout: float = 600.0
    """Seconds until the server must have read the weights (> 0)."""
    retries: int = 3
    """How often a request is sent again where the server was gone or busy, after 1, 2, 4... seconds (>= 0)."""
    connections: int = 64
    """Requests under way at a time (>= 1)."""
    weights_dir: str | None = None
    """Folder on a disk that trainer and server both see; holds one copy of the weights during a sync (none: /dev/shm,
    the memory of this machine, or the temporary folder)."""

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
            "timeout": ((int, float), lambda seconds: seconds > 0, "more than 0 seconds"),
            "sync_timeout": ((int, float), lambda seconds: seconds > 0, "more than 0 seconds"),
            "retries": (int, lambda count: count >= 0, "a whole number from 0"),
            "connections": (int, lambda count: count >= 1, "a whole number from 1"),
            "url": (str, lambda url: re.match("https?://[^/:]", url), "http://host:port"),
            "weights_dir": ((str, type(None)), lambda path: path is None or os.path.isdir(path), "a folder"),
        }
        for name, (kinds, holds, expected) in rules.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or not holds(value):
                raise ValueError(f"engine_args.{name}: expected {expected}, got {value!r}")

    @property
    def folder(self) -> str:
        """Where the weights lie during a sync."""
        return self.weights_dir or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())


def check_engine_args(engine: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where `engine` cannot be told one of `arguments`."""
    if engine == "hf" and arguments:
        raise ValueError(f"engine_args: expected none with engine hf, got {', '.join(arguments)}")
    if engine == "vllm":
        for name, reason in IN_PROCESS.items():
            if name in arguments:
                raise ValueError(f"engine_args: {name} is not yours to set: {reason}; leave it out")
    if engine == "vllm_server":
        require_known(arguments, [each.name for each in fields(ServerSettings)])
        ServerSettings(**arguments)


def require_known(names: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for the first name that is none of `known`, with the nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ValueError(f"engine_args: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


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
