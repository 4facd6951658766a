"""What both vLLM engines share: the settings of a request, and the check of what comes back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from repo_ops.trainer.rollout import (
    Completion,
    EngineError,
    SamplingSettings,
    decode_completion,
    encode_prompts,
    never,
    prompt_seeds,
)
from repo_ops.trainer.rollout.hf import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTENSION = "repo_ops.trainer.rollout.vllm_worker.WeightUpdates"
# vLLM keeps every token that ties with the k-th; in bfloat16 that is common. So many more are asked for.
TIES = 16
# JSON has no -inf: below this vLLM's server means it
NO_CHANCE = -9000.0


class Drawn(NamedTuple):
    """One token as vLLM reports it."""

    token_id: int
    logp: float
    likely: dict[int, float]
    """Log-probability of each of the likeliest tokens; the drawn one may be among them."""


class VLLMEngine(ABC):
    """Makes requests for a tokenizer and a set of terminators, and completions of what vLLM answers.

    Args:
        model: the policy; what `sync` sends.
        tokenizer: its tokenizer; prompts are sent as token ids.
        stop: as for `HFGenerate`; the terminators are the same tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.version: int | None = None
        self.should_stop: Callable[[], bool] = never
        self._stop_ids = stop_token_ids(model, tokenizer, self.stop).tolist()
        self._num_tokens = model.config.get_text_config().vocab_size
        self._limits: dict[str, Any] = {}

    @abstractmethod
    def sync(self, version: int) -> None:
        """Hands the policy's weights over, forgets the prefixes that older ones computed, and compares both sides.

        Raises:
            EngineError: vLLM refused them, or holds others afterwards.
        """

    @abstractmethod
    def _where(self) -> str:
        """Version and place of the vLLM."""

    @abstractmethod
    def _run(
        self, prompts: list[list[int]], seeds: list[int], arguments: dict[str, Any]
    ) -> Sequence[Sequence[Sequence[Drawn]]]:
        """The samples of each prompt; vLLM adds the number of the sample to the prompt's seed."""

    def describe(self) -> str:
        """What samples: version, place, dtype, room."""
        return f"vLLM {self._where()}, in {self._limits['dtype']}, max_model_len {self._limits['max_model_len']}"

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """Raises EngineError where one of them is too long to be completed."""
        self._encode(prompts, max_new_tokens)

    def generate(self, prompts: list[str], settings: SamplingSettings) -> list[list[Completion]]:
        """`settings.num_samples` completions of each prompt, in the order of the prompts.

        Raises:
            ValueError: as RolloutEngine; also top_p without top_k, or greedy at another temperature than 1.
            EngineError: `sync` was not called yet, or a prompt is too long; vLLM is gone or too slow, answers what was
                not asked for, or holds other weights than those of the last `sync`.
            GenerationStopped: `should_stop` came true.
        """
        if self.version is None:
            raise EngineError("engine: expected sync(version) before the first generate; vLLM holds other weights")
        self._check(settings)
        encoded = self._encode(prompts, settings.max_new_tokens)
        arguments = {
            "n": 1 if settings.greedy else settings.num_samples,  # greedy completions of a prompt are all the same
            "temperature": 0.0 if settings.greedy else settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "logprobs": _num_likely(settings),
            # only the tokens that `stop_token_ids` lists end a completion
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,
            # a server may have defaults for these, taken from the model's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        # below 2^62: adding the number of a sample stays within 64 bits
        found = self._run(encoded, prompt_seeds(prompts, settings), arguments)
        return [self._group(settings, samples) for samples in found]

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._limits["dtype"])

    def _check(self, settings: SamplingSettings) -> None:
        settings.check(self._num_tokens)
        if settings.top_p < 1 and not settings.top_k:
            raise ValueError(
                f"top_p: expected 1.0, or a top_k beside it, got {settings.top_p}; without top_k vLLM does not report "
                "which tokens it kept"
            )
        if settings.greedy and (settings.temperature != 1 or settings.top_k or settings.top_p < 1):
            raise ValueError(
                f"temperature: expected 1.0 without top_k or top_p where greedy, got {settings.temperature}; vLLM "
                "reports greedy tokens under the plain softmax"
            )
        likely, most = _num_likely(settings), self._limits["max_logprobs"]
        if 0 <= most < likely:
            raise ValueError(
                f"max_logprobs: expected vLLM to report {likely} likely tokens (--top_k + {TIES}, or "
                f"--divergence_top_k), got {most}; start it with --max-logprobs {likely}"
            )

    def _encode(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        encoded = encode_prompts(self.tokenizer, prompts)
        longest, room = max(map(len, encoded), default=0), self._limits["max_model_len"] - max_new_tokens
        if longest > room:
            raise EngineError(
                f"engine: expected prompts of at most {room} tokens beside max_new_tokens = {max_new_tokens}, got one "
                f"of {longest}; vLLM runs with max_model_len = {self._limits['max_model_len']}: start it with more, or "
                "leave longer prompts out with --max_prompt_tokens"
            )
        return encoded

    def _group(self, settings: SamplingSettings, samples: Sequence[Sequence[Drawn]]) -> list[Completion]:
        expected = 1 if settings.greedy else settings.num_samples
        if len(samples) != expected:
            raise EngineError(f"engine: expected {expected} completions of a prompt, got {len(samples)}")
        group = [self._completion(settings, sample) for sample in samples]
        return group * settings.num_samples if settings.greedy else group

    def _completion(self, settings: SamplingSettings, drawn: Sequence[Drawn]) -> Completion:
        ids = tuple(token.token_id for token in drawn)
        finished = bool(ids) and ids[-1] in self._stop_ids
        if len(ids) > settings.max_new_tokens or not (finished or len(ids) == settings.max_new_tokens):
            raise EngineError(
                f"engine: expected {settings.max_new_tokens} tokens or a terminator, got {len(ids)} tokens without "
                "one; vLLM cut or aborted the completion"
            )
        if not set(self._stop_ids).isdisjoint(ids[:-1]):
            raise EngineError(
                f"engine: expected nothing after a terminator, got {list(ids)}; stop_token_ids was ignored"
            )
        if not all(0 <= i < self._num_tokens for i in ids) or not all(-math.inf < t.logp <= 1e-4 for t in drawn):
            raise EngineError("engine: expected token ids of the vocabulary with log-probabilities, got something else")
        likely = [_ranked(token) for token in drawn]
        top = [_top(token, ranked, settings.top_logps) for token, ranked in zip(drawn, likely) if settings.top_logps]
        return Completion(
            token_ids=ids,
            logps=tuple(min(0.0, token.logp) for token in drawn),
            text=decode_completion(self.tokenizer, ids, self.stop),
            finished=finished,
            top_ids=tuple(tuple(i for i, _ in row) for row in top),
            top_logps=tuple(tuple(logp for _, logp in row) for row in top),
            kept_ids=tuple(map(_kept, likely)) if settings.top_k else (),
        )

    def _take_limits(self, found: dict[str, Any], remedy: str) -> None:
        """Notes `repo_ops_settings` of the workers.

        Raises:
            EngineError: vLLM's log-probabilities are not those of what it samples, or the vocabulary is another.
        """
        if found["logprobs_mode"] != "processed_logprobs":
            raise EngineError(
                f"engine: expected logprobs_mode processed_logprobs, got {found['logprobs_mode']}; at a temperature "
                f"other than 1 its log-probabilities would not be those of what it samples. {remedy}"
            )
        if found["vocab_size"] != self._num_tokens:
            raise EngineError(
                f"engine: expected a vocabulary of {self._num_tokens}, got {found['vocab_size']}: another model"
            )
        self._limits = found


def _num_likely(settings: SamplingSettings) -> int:
    """How many of the likeliest tokens vLLM must report."""
    return max(settings.top_logps, settings.top_k + TIES if settings.top_k else 0)


def _ranked(token: Drawn) -> list[tuple[int, float]]:
    """The reported tokens with a chance, the drawn one among them, likeliest first; then those without one."""
    likely = {**token.likely, token.token_id: token.logp}
    return sorted(((i, logp if logp > NO_CHANCE else -math.inf) for i, logp in likely.items()), key=lambda x: -x[1])


def _top(token: Drawn, ranked: list[tuple[int, float]], num_top: int) -> list[tuple[int, float]]:
    """The num_top likeliest; the drawn one takes the last place where it is not among them."""
    if len(ranked) < num_top:
        raise EngineError(f"engine: expected the {num_top} likeliest tokens at each place, got {len(ranked)}")
    best = ranked[:num_top]
    if all(i != token.token_id for i, _ in best):
        best[-1] = (token.token_id, token.logp)
    return best


def _kept(ranked: list[tuple[int, float]]) -> tuple[int, ...]:
    """All tokens that the draw was among.

    Raises:
        EngineError: those reported do not add up to 1: more than TIES tie with the k-th likeliest.
    """
    kept = [(i, logp) for i, logp in ranked if logp > -math.inf]
    mass = math.fsum(math.exp(logp) for _, logp in kept)
    if abs(mass - 1) > 1e-3:
        raise EngineError(
            f"engine: expected the kept tokens' probabilities to add up to 1, got {mass:.4f}; too many of them tie "
            "with the last one, so compute in a finer dtype"
        )
    return tuple(sorted(i for i, _ in kept))
