"""Rollouts by vLLM inside the training process: the weights are handed over in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repo_ops.trainer.rollout import Completion, EngineError, GenerationStopped, never
from repo_ops.trainer.rollout.engine_args import GPU_MEMORY_UTILIZATION, check_engine_args, require_known
from repo_ops.trainer.rollout.vllm_answer import Answers, Drawn, Request, check_settings, in_words
from repo_ops.trainer.rollout.weights import Digest, compare_weights, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTENSION = "repo_ops.trainer.rollout.vllm_worker.WeightUpdates"
INSTALL = "pip install 'repo-ops[vllm]'"


class VLLMInProcess:
    """Samples completions with a `vllm.LLM` of its own on this rank's device.

    Args:
        model: the policy; what `sync` sends.
        tokenizer: its tokenizer.
        stop: single characters, as for `HFGenerate`.
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
        self.model = model
        self.version: int | None = None
        self.should_stop: Callable[[], bool] = never
        self._answers = Answers(model, tokenizer, stop)
        self._llm = _start({"gpu_memory_utilization": GPU_MEMORY_UTILIZATION, "dtype": dtype, **llm_args}, source)
        self._limits = check_settings(self._rpc("repo_ops_settings"), self._answers.num_tokens, "")

    def describe(self) -> str:
        """What samples: version, dtype, room."""
        import vllm

        return f"vLLM {vllm.__version__} in this process, {in_words(self._limits)}"

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """Raises EngineError where one of them is too long to be completed."""
        self._answers.encode(prompts, max_new_tokens, self._limits)

    def sync(self, version: int) -> None:
        """Hands the policy's weights over, forgets the prefixes that older ones computed, and compares both sides.

        Raises:
            EngineError: vLLM refused them, or holds others afterwards.
        """
        sent: dict[str, Digest] = {}
        weights: Iterable[tuple[str, Tensor]] = self._to_send(sent)
        if self._llm.llm_engine.vllm_config.parallel_config.world_size > 1:
            weights = list(weights)  # they travel to other processes
        self._rpc("repo_ops_load", weights)
        if not self._llm.reset_prefix_cache():
            raise EngineError("engine: vLLM did not reset its prefix cache, which holds states of the old weights")
        compare_weights(sent, self._rpc("repo_ops_digests"))
        self.version = version

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
            EngineError: `sync` was not called yet, or vLLM answers what was not asked for.
            GenerationStopped: `should_stop` came true.
        """
        if self.version is None:
            raise EngineError("engine: expected sync(version) before the first generate; vLLM holds other weights")
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
        return [self._answers.group(request, samples) for samples in self._run(request)]

    def _run(self, request: Request) -> list[list[list[Drawn]]]:
        """Samples of each prompt."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        settings = {**request.sampling, "stop_token_ids": self._answers.stop_ids, "detokenize": False}
        ids = self._llm.enqueue(
            [{"prompt_token_ids": prompt} for prompt in request.prompts],
            [SamplingParams(**settings, seed=seed) for seed in request.seeds],
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
        dtype = getattr(torch, self._limits["dtype"])
        for name, weight in full_weights(self.model):
            weight = weight.to(dtype)
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
    require_known(list(llm_args), list(EngineArgs.__dataclass_fields__))
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
        Drawn(token, place[token].logprob, tuple((i, each.logprob) for i, each in place.items()))
        for token, place in zip(sample.token_ids, sample.logprobs)
    ]
