"""Rollouts by vLLM inside the training process: the weights are handed over in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repo_ops.trainer.rollout import EngineError, GenerationStopped
from repo_ops.trainer.rollout.load import GPU_MEMORY_UTILIZATION, check_engine_args, require_known
from repo_ops.trainer.rollout.vllm_engine import EXTENSION, Drawn, VLLMEngine
from repo_ops.trainer.rollout.weights import Digest, compare_weights, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'repo-ops[vllm]'"


class VLLMInProcess(VLLMEngine):
    """Samples completions with a `vllm.LLM` of its own on this rank's device.

    Args:
        model, tokenizer, stop: as for VLLMEngine.
        source: folder or hub id that vLLM reads the architecture from; its weights are replaced by the first `sync`.
        dtype: vLLM computes in it.
        llm_args: more arguments of `vllm.LLM`, for example gpu_memory_utilization (0.3 if left out: the policy needs
            the rest), max_model_len, tensor_parallel_size, enforce_eager, hf_overrides.
    Raises:
        ImportError: vLLM is not installed.
        ValueError: an argument that vLLM does not know, or that the engine sets itself.
        EngineError: vLLM cannot be set up so that its log-probabilities are those of what it samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = ("\n",),
        *,
        source: str,
        dtype: str,
        **llm_args: Any,
    ) -> None:
        super().__init__(model, tokenizer, stop)
        self._llm = _start({"gpu_memory_utilization": GPU_MEMORY_UTILIZATION, "dtype": dtype, **llm_args}, source)
        self._take_limits(self._rpc("repo_ops_settings")[0], "")

    def sync(self, version: int) -> None:
        """As VLLMEngine says."""
        sent: dict[str, Digest] = {}
        weights: Iterable[tuple[str, Tensor]] = self._to_send(sent)
        if self._llm.llm_engine.vllm_config.parallel_config.world_size > 1:
            weights = list(weights)  # they travel to other processes
        self._rpc("repo_ops_load", weights)
        if not self._llm.reset_prefix_cache():
            raise EngineError("engine: vLLM did not reset its prefix cache, which holds states of the old weights")
        compare_weights(sent, self._rpc("repo_ops_digests"))
        self.version = version

    def _where(self) -> str:
        import vllm

        return f"{vllm.__version__} in this process"

    def _run(self, prompts: list[list[int]], seeds: list[int], arguments: dict[str, Any]) -> list[list[list[Drawn]]]:
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        ids = self._llm.enqueue(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(**arguments, detokenize=False, seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        outputs = []
        try:
            while engine.has_unfinished_requests():
                if self.should_stop():
                    raise GenerationStopped
                outputs += [output for output in engine.step() if output.finished]
        except BaseException:
            engine.abort_request(ids, internal=True)  # otherwise the next call would get these completions, too
            raise
        outputs.sort(key=lambda output: int(output.request_id))  # vLLM numbers the requests as they come
        return [[_drawn(sample) for sample in sorted(o.outputs, key=lambda each: each.index)] for o in outputs]

    def _to_send(self, sent: dict[str, Digest]) -> Iterable[tuple[str, Tensor]]:
        for name, weight in full_weights(self.model, self._dtype):
            sent[name] = Digest.of(weight)
            yield name, weight

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._llm.collective_rpc(method, args=args)


def _start(llm_args: dict[str, Any], source: str) -> Any:
    check_engine_args("vllm", llm_args)
    # this process is the engine: weights are handed over by reference, and requests run in the order they came
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise ValueError("VLLM_ENABLE_V1_MULTIPROCESSING: expected 0 with engine vllm, got another value; unset it")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
    except ModuleNotFoundError as error:
        raise ImportError(f"engine 'vllm': expected the package vllm ({error}); {INSTALL}") from error
    require_known(llm_args, list(EngineArgs.__dataclass_fields__))
    set_num_threads = torch.set_num_threads
    try:
        return vllm.LLM(
            model=source,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            worker_extension_cls=EXTENSION,
            disable_log_stats=True,
            **llm_args,
        )
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a dummy in its place


def _drawn(sample: Any) -> list[Drawn]:
    if sample.logprobs is None or len(sample.logprobs) != len(sample.token_ids):
        raise EngineError("engine: expected log-probabilities for every token, got fewer from vLLM")
    return [
        Drawn(token, place[token].logprob, {i: each.logprob for i, each in place.items()})
        for token, place in zip(sample.token_ids, sample.logprobs)
    ]
