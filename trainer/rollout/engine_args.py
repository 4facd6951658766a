"""Which rollout engines there are and what each can be told; checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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
        for name, kinds in (("url", str), ("timeout", (int, float)), ("sync_timeout", (int, float))):
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"engine_args: {name}: expected another type, got {getattr(self, name)!r}")
        for name, least in (("retries", 0), ("connections", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"engine_args: {name}: expected a whole number from {least}, got {value!r}")
        for name in ("timeout", "sync_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"engine_args: {name}: expected more than 0 seconds, got {getattr(self, name)}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"engine_args: url: expected http://host:port, got {self.url!r}")
        if self.weights_dir is not None and not os.path.isdir(self.weights_dir):
            raise ValueError(f"engine_args: weights_dir: expected a folder, got {self.weights_dir!r}")

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
        require_known(list(arguments), [each.name for each in fields(ServerSettings)])
        ServerSettings(**arguments)


def require_known(names: list[str], known: list[str]) -> None:
    """Raises ValueError for the first name that is none of `known`, with the nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ValueError(f"engine_args: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
