"""Rollouts by a vLLM server that somebody else started: requests over HTTP, weights through a folder both sides see."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.rollout import Completion, EngineError, never
from repo_ops.trainer.rollout.engine_args import ServerSettings
from repo_ops.trainer.rollout.json_client import JsonClient, ServerRefused
from repo_ops.trainer.rollout.vllm_answer import Answers, Drawn, Request, check_settings, in_words
from repo_ops.trainer.rollout.vllm_local import EXTENSION
from repo_ops.trainer.rollout.weights import Digest, compare_weights, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START = (
    "start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    f"--worker-extension-cls {EXTENSION}, and repo-ops installed beside it"
)
FILE_BYTES = 2 * 1024**3
FOLDER, LOCK = "repo-ops-weights-", "lock"


class VLLMServer:
    """Samples completions with a vLLM server (`vllm serve`), which is given the policy's weights after each step.

    Args:
        model: the policy; what `sync` sends.
        tokenizer: its tokenizer; prompts are sent as token ids.
        stop: single characters, as for `HFGenerate`.
        settings: where the server is and how long to wait for it.
        ranks: the processes that train together. Each asks for its own completions; the first sends the weights.
    Raises:
        EngineError: no such server, or one that was started without what is needed; the message says how to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = ("\n",),
        *,
        settings: ServerSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.ranks = ranks or Ranks()
        self.version: int | None = None
        self.should_stop: Callable[[], bool] = never
        self._answers = Answers(model, tokenizer, stop)
        self._client = JsonClient(
            settings.url,
            retries=settings.retries,
            token=os.environ.get("VLLM_API_KEY"),
            connections=settings.connections,
        )
        self._name = self._model_name()
        found = self._rpc("repo_ops_settings", timeout=settings.timeout)
        self._limits = check_settings(found, self._answers.num_tokens, f"Stop it and {START}")
        self._held = ""
        if self.ranks.is_first:
            remove_left_behind(settings.folder)

    def describe(self) -> str:
        """What samples: version, address, dtype, room."""
        try:
            version = self._client.get("/version", timeout=self.settings.timeout)["version"]
        except (ServerRefused, TypeError, LookupError):  # a proxy may hide it; nothing depends on it
            version = "of unknown version"
        return f"vLLM {version} at {self.settings.url}, {in_words(self._limits)}"

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """Raises EngineError where one of them is too long to be completed."""
        self._answers.encode(prompts, max_new_tokens, self._limits)

    def sync(self, version: int) -> None:
        """Gathers the policy's weights on all ranks; the first sends them and compares both sides.

        Raises:
            EngineError: on all ranks: the server is gone, did not take them, or holds others afterwards.
        """
        outbox = _Outbox(self.settings.folder) if self.ranks.is_first else None
        try:
            for name, weight in full_weights(self.model):
                if outbox is not None:
                    outbox.add(name, weight.to(getattr(torch, self._limits["dtype"])))
            self._held = self.ranks.from_first(lambda: self._send(outbox))
        finally:
            if outbox is not None:
                outbox.remove()
        self.version = version

    def _send(self, outbox: _Outbox | None) -> str:
        """The folder that the server read them from: no other weights come under its name."""
        assert outbox is not None
        folder = outbox.close()
        for read in self._rpc("repo_ops_load_folder", str(folder), timeout=self.settings.sync_timeout):
            _check_read(outbox.sent, read)
        answer = self._client.post("/reset_prefix_cache", {}, timeout=self.settings.sync_timeout)
        if answer is not None and not answer.get("success", True):
            raise EngineError("engine: the server did not reset its prefix cache; does somebody else use it too?")
        compare_weights(outbox.sent, self._rpc("repo_ops_digests", timeout=self.settings.sync_timeout))
        return str(folder)

    def generate(
        self,
        prompts: list[str],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        top_logps: int = 0,
        seed: int,
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of the prompts; the arguments are those of HFGenerate.

        The same seed gives the same completions, as far as the order in which vLLM adds numbers up does.

        Raises:
            ValueError: an argument out of range, top_p without top_k, or greedy at another temperature than 1.
            EngineError: `sync` was not called yet; the server is gone or too slow, answers what was not asked for, or
                holds other weights than those of the last `sync`.
            GenerationStopped: `should_stop` came true.
        """
        if self.version is None:
            raise EngineError(
                "engine: expected sync(version) before the first generate; the server holds other weights"
            )
        request = self._answers.request(
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            top_logps=top_logps,
            seed=seed,
            limits=self._limits,
        )
        found = self._client.post_all(
            "/v1/completions", self._bodies(request), timeout=self.settings.timeout, should_stop=self.should_stop
        )
        self._check_held()
        return [self._answers.group(request, _samples(answer)) for answer in found]

    def _check_held(self) -> None:
        """Raises EngineError where the server was given other weights than by `sync`, or lost them.

        A server that is started again answers with the weights it was started with, and nothing else would tell.
        """
        if any(held != self._held for held in self._rpc("repo_ops_held", timeout=self.settings.timeout)):
            raise EngineError(
                f"engine: the server at {self.settings.url} no longer holds the weights that it was sent after step "
                f"{self.version}; it was started again, or another run sends it weights, too: each needs its own"
            )

    def _bodies(self, request: Request) -> list[dict[str, Any]]:
        common = {
            **request.sampling,
            "model": self._name,
            "stop_token_ids": self._answers.stop_ids,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return [{**common, "prompt": ids, "seed": seed} for ids, seed in zip(request.prompts, request.seeds)]

    def _model_name(self) -> str:
        try:
            answer = self._client.get("/v1/models", timeout=self.settings.timeout)
        except ServerRefused as error:
            if error.status == 401:
                raise EngineError(f"{error}; set VLLM_API_KEY to the server's key") from error
            raise
        try:
            return str(answer["data"][0]["id"])
        except (TypeError, LookupError) as error:
            raise EngineError(f"engine: expected a vLLM server at {self.settings.url}, got {answer!r}") from error

    def _rpc(self, method: str, *args: str, timeout: float) -> list[Any]:
        """What each worker answers to a method of WeightUpdates."""
        body = {"method": method, "args": list(args), "timeout": timeout}
        try:
            answer = self._client.post("/collective_rpc", body, timeout=timeout)
        except ServerRefused as error:
            raise EngineError(f"{error}. If this is its first call, {START}") from error
        if not isinstance(answer, dict) or not answer.get("results"):
            raise EngineError(f"engine: expected results of {method}, got {answer!r}; {START}")
        return list(answer["results"])


class _Outbox:
    """Safetensors files in a new folder, of about 2 GiB each, and the digests of what is in them.

    The folder is locked while this process lives, so that `remove_left_behind` can tell.
    A failure is kept until `close`: the other ranks still gather, and would wait for this one for ever.
    """

    def __init__(self, parent: str) -> None:
        self.sent: dict[str, Digest] = {}
        self._parent = parent
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        self._error: Exception | None = None
        self._batch: dict[str, Tensor] = {}
        self._files = 0

    def add(self, name: str, weight: Tensor) -> None:
        self.sent[name] = Digest.of(weight)
        self._batch[name] = weight.contiguous().cpu()
        if sum(tensor.nbytes for tensor in self._batch.values()) >= FILE_BYTES:
            self._write()

    def close(self) -> Path:
        """The folder, with all that was added.

        Raises:
            EngineError: it could not be written.
        """
        self._write()
        if self._error is not None or self._folder is None:
            raise EngineError(
                f"engine: the weights could not be written to {self._parent} ({self._error}); set "
                "engine_args.weights_dir to a folder with room that the server sees, too"
            ) from self._error
        return self._folder

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _write(self) -> None:
        from safetensors.torch import save_file

        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(dir=self._parent, prefix=FOLDER))
                self._folder.chmod(0o755)  # the server may be another user's
                self._lock = (self._folder / LOCK).open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self._batch and self._error is None:
                save_file(self._batch, self._folder / f"{self._files:05d}.safetensors")
        except Exception as error:  # safetensors has errors of its own
            self._error = error
        self._batch, self._files = {}, self._files + 1


def remove_left_behind(parent: str) -> None:
    """Frees the memory or disk of runs that were killed while they sent their weights."""
    for lock in Path(parent).glob(f"{FOLDER}*/{LOCK}"):
        with suppress(OSError), lock.open() as opened:  # of somebody else, locked, or gone by now
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _check_read(sent: Mapping[str, Digest], read: Any) -> None:
    """Raises EngineError unless a worker read exactly what was sent."""
    try:
        found = {name: Digest(int(numel), dtype, int(bits)) for name, (numel, dtype, bits) in read.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise EngineError(f"engine: expected digests of the weights, got {str(read)[:200]}; {START}") from error
    if found != dict(sent):
        wrong = sorted(name for name in {**found, **sent} if found.get(name) != sent.get(name))
        raise EngineError(
            f"engine: the server read other weights than were sent, {wrong[0]} for one; does it see the same folder?"
        )


def _samples(answer: Any) -> list[list[Drawn]]:
    """The samples of one answer of /v1/completions, in order."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [_drawn(choice) for choice in choices]
    except (TypeError, LookupError, ValueError) as error:
        raise EngineError(
            f"engine: expected completions with token ids and log-probabilities, got {str(answer)[:200]} "
            f"({type(error).__name__}: {error})"
        ) from error


def _drawn(choice: Mapping[str, Any]) -> list[Drawn]:
    ids, found = choice["token_ids"], choice["logprobs"]
    likely = found["top_logprobs"] or [None] * len(ids)
    if not len(ids) == len(found["token_logprobs"]) == len(likely):
        raise ValueError("log-probabilities of another length than the tokens")
    return [
        Drawn(
            int(i), float(logp), tuple((int(key.removeprefix("token_id:")), float(x)) for key, x in (top or {}).items())
        )
        for i, logp, top in zip(ids, found["token_logprobs"], likely)
    ]
