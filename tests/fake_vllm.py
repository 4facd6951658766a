"""A server on localhost that speaks as much of vLLM's HTTP interface as the trainer uses, over a transformers model.

What it samples comes from `HFGenerate`, and weights arrive through the very class that vLLM mixes into its workers.
 `faults` puts a wrong answer in the place of a right one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import torch

from repo_ops.trainer.rollout import SamplingSettings
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.rollout.vllm_worker import WeightUpdates


class Worker(WeightUpdates):
    """vLLM's worker, as far as WeightUpdates sees it: a model under its checkpoint's names."""

    def __init__(self, model: Any, logprobs_mode: str = "processed_logprobs", max_logprobs: int = 64) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.model = model
        self.model_config = SimpleNamespace(
            logprobs_mode=logprobs_mode,
            max_logprobs=max_logprobs,
            max_model_len=64,
            get_vocab_size=lambda: model.config.vocab_size,
            dtype=model.dtype,
        )

    def reload_weights(self, weights_iterator: Any) -> None:
        held = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights_iterator:
                held[name].copy_(weight)


class FakeVLLM(ThreadingHTTPServer):
    """The server; use it in a `with` block. `faults[path]` gets (handler, body, answer) and sends what it likes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Any, tokenizer: Any, token: str | None = None, **settings: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.worker = Worker(model.requires_grad_(False), **settings)
        self.model, self.tokenizer = model, tokenizer
        self.faults: dict[str, Callable[[_Handler, Any, Any], None]] = {}
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # anything but a client that hung up

    def answer(self, path: str, body: Any) -> Any:
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "policy"}]}
        if path == "/collective_rpc":
            return {"results": [getattr(self.worker, body["method"])(*body["args"])]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        assert path == "/v1/completions"
        return self.completions(body)

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        for setting, value in {"ignore_eos": True, "repetition_penalty": 1.0, "min_p": 0.0, "model": "policy"}.items():
            assert body[setting] == value
        engine = HFGenerate(self.model, _TokenIds(self.tokenizer), stop=())
        engine._stop_ids = torch.tensor(body["stop_token_ids"])
        with self.lock:
            settings = SamplingSettings(
                num_samples=body["n"],
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"] or 1.0,
                greedy=body["temperature"] == 0,
                top_k=body["top_k"],
                top_p=body["top_p"],
                top_logps=body["logprobs"],
                seed=body["seed"] % 2**62,
            )
            (group,) = engine.generate([json.dumps(body["prompt"])], settings)
        choices = []
        for index, c in enumerate(group):
            top = [
                {f"token_id:{i}": max(x, -9999.0) for i, x in zip(ids, logps)}
                for ids, logps in zip(c.top_ids, c.top_logps)
            ]
            logprobs = {"token_logprobs": list(c.logps), "top_logprobs": top or None}
            reason = "stop" if c.finished else "length"
            choices.append(
                {"index": index, "token_ids": list(c.token_ids), "logprobs": logprobs, "finish_reason": reason}
            )
        return {"choices": choices[::-1]}  # in any order


class _TokenIds:
    """A tokenizer for prompts that are lists of token ids, written out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompts: list[str]) -> Any:
        return SimpleNamespace(input_ids=[json.loads(prompt) for prompt in prompts])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        self._respond(None)

    def do_POST(self) -> None:
        self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _respond(self, body: Any) -> None:
        self.server.requests.append((self.path, body))
        fault = self.server.faults.get(self.path)
        # as vLLM does: other paths are open to everybody
        if self.server.token and "/v1/" in self.path and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.send({"error": "Unauthorized"}, 401)
        elif fault is not None:
            fault(self, body, lambda: self.server.answer(self.path, body))
        else:
            self.send(self.server.answer(self.path, body))

    def send(self, answer: Any, status: int = 200) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def stall(self, seconds: float) -> None:
        time.sleep(seconds)

    def log_message(self, *_: object) -> None:
        pass
