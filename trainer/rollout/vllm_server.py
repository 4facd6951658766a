"""Rollouts by a vLLM server that somebody else started: requests over HTTP, weights through a folder both sides see."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.rollout import EngineError
from repo_ops.trainer.rollout.json_client import JsonClient, RequestError
from repo_ops.trainer.rollout.load import ServerSettings
from repo_ops.trainer.rollout.vllm_engine import EXTENSION, Drawn, VLLMEngine
from repo_ops.trainer.rollout.weights import Digest, compare_weights, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START = (
    "start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    f"--worker-extension-cls {EXTENSION}, and repo-ops installed beside it"
)
FOLDER, LOCK = "repo-ops-weights-", "lock"


class VLLMServer(VLLMEngine):
    """Samples completions with a vLLM server (`vllm serve`), which is given the policy's weights after each step.

    Args:
        model, tokenizer, stop: as for VLLMEngine.
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
        super().__init__(model, tokenizer, stop)
        self.settings = settings
        self.ranks = ranks or Ranks()
        token = os.environ.get("VLLM_API_KEY")
        self._client = JsonClient(settings.url, retries=settings.retries, token=token, connections=settings.connections)
        self._name = self._model_name()
        self._take_limits(self._rpc("repo_ops_settings", timeout=settings.timeout)[0], f"Stop it and {START}")
        self._held = ""
        if self.ranks.is_first:
            remove_left_behind(settings.folder)

    def sync(self, version: int) -> None:
        """As VLLMEngine says. All ranks gather the weights and all raise alike; the first sends them."""
        with ExitStack() as files:
            outbox = _Outbox(self.settings.folder, files) if self.ranks.is_first else None
            for name, weight in full_weights(self.model, self._dtype):
                if outbox is not None:
                    outbox.add(name, weight)
            self._held = self.ranks.from_first(lambda: self._send(outbox))
        self.version = version

    def _send(self, outbox: _Outbox | None) -> str:
        """The folder that the server read them from: no other weights come under its name."""
        assert outbox is not None
        folder = outbox.close()
        for read in self._rpc("repo_ops_load_folder", str(folder), timeout=self.settings.sync_timeout):
            _check_read(outbox.sent, read)
        answer = self._client.ask("/reset_prefix_cache", {}, timeout=self.settings.sync_timeout)
        if answer is not None and not answer.get("success", True):
            raise EngineError("engine: the server did not reset its prefix cache; does somebody else use it too?")
        compare_weights(outbox.sent, self._rpc("repo_ops_digests", timeout=self.settings.sync_timeout))
        return str(folder)

    def _where(self) -> str:
        try:
            version = self._client.ask("/version", timeout=self.settings.timeout)["version"]
        except (RequestError, TypeError, LookupError):  # a proxy may hide it; nothing depends on it
            version = "of unknown version"
        return f"{version} at {self.settings.url}"

    def _run(self, prompts: list[list[int]], seeds: list[int], arguments: dict[str, Any]) -> list[list[list[Drawn]]]:
        common = {**arguments, "model": self._name, "return_token_ids": True, "return_tokens_as_token_ids": True}
        bodies = [{**common, "prompt": ids, "seed": seed} for ids, seed in zip(prompts, seeds)]
        found = self._client.ask_all(
            "/v1/completions", bodies, timeout=self.settings.timeout, should_stop=self.should_stop
        )
        # A server that is started again answers with the weights it was started with, and nothing else would tell.
        if any(held != self._held for held in self._rpc("repo_ops_held", timeout=self.settings.timeout)):
            raise EngineError(
                f"engine: the server at {self.settings.url} no longer holds the weights that it was sent after step "
                f"{self.version}; it was started again, or another run sends it weights, too: each needs its own"
            )
        return [_samples(answer) for answer in found]

    def _model_name(self) -> str:
        try:
            answer = self._client.ask("/v1/models", timeout=self.settings.timeout)
            return str(answer["data"][0]["id"])
        except RequestError as error:
            if error.status == 401:
                raise EngineError(f"{error}; set VLLM_API_KEY to the server's key") from error
            raise
        except (TypeError, LookupError) as error:
            raise EngineError(f"engine: expected a vLLM server at {self.settings.url}, got {answer!r}") from error

    def _rpc(self, method: str, *args: str, timeout: float) -> list[Any]:
        """What each worker answers to a method of WeightUpdates."""
        body = {"method": method, "args": list(args), "timeout": timeout}
        try:
            answer = self._client.ask("/collective_rpc", body, timeout=timeout)
        except RequestError as error:
            if error.status is None:
                raise
            raise EngineError(f"{error}. If this is its first call, {START}") from error
        if not isinstance(answer, dict) or not answer.get("results"):
            raise EngineError(f"engine: expected results of {method}, got {answer!r}; {START}")
        return list(answer["results"])


class _Outbox:
    """A safetensors file for each weight, in a new folder that `files` removes at its end, and their digests.

    The folder is locked while this process lives, so that `remove_left_behind` can tell.
    A failure is kept until `close`: the other ranks still gather, and would wait for this one for ever.
    """

    def __init__(self, parent: str, files: ExitStack) -> None:
        self.sent: dict[str, Digest] = {}
        self._parent = parent
        self._error: Exception | None = None
        try:
            folder = tempfile.TemporaryDirectory(dir=parent, prefix=FOLDER, ignore_cleanup_errors=True)
            self._folder = Path(files.enter_context(folder))
            self._folder.chmod(0o755)  # the server may be another user's
            fcntl.flock(files.enter_context((self._folder / LOCK).open("w")), fcntl.LOCK_EX)
        except OSError as error:
            self._error = error

    def add(self, name: str, weight: Tensor) -> None:
        from safetensors.torch import save_file

        self.sent[name] = Digest.of(weight)
        if self._error is None:
            try:
                save_file({name: weight.contiguous().cpu()}, self._folder / f"{len(self.sent):05d}.safetensors")
            except Exception as error:  # safetensors has errors of its own
                self._error = error

    def close(self) -> Path:
        """The folder, with all that was added; raises EngineError where it could not be written."""
        if self._error is not None:
            raise EngineError(
                f"engine: the weights could not be written to {self._parent} ({self._error}); set "
                "--engine_args.weights_dir to a folder with room that the server sees, too"
            ) from self._error
        return self._folder


def remove_left_behind(parent: str) -> None:
    """Frees the memory or disk of runs that were killed while they sent their weights."""
    for lock in Path(parent).glob(f"{FOLDER}*/{LOCK}"):
        with suppress(OSError), lock.open() as opened:  # of somebody else, locked, or gone by now
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _check_read(sent: Mapping[str, Digest], read: Any) -> None:
    """Raises EngineError unless a worker read exactly what was sent."""
    try:
        found = {name: Digest(*digest) for name, digest in read.items()}
    except (AttributeError, TypeError) as error:
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
        Drawn(int(i), float(logp), {int(key.removeprefix("token_id:")): float(x) for key, x in (top or {}).items()})
        for i, logp, top in zip(ids, found["token_logprobs"], likely)
    ]
