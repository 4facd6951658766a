"""What both vLLM engines share: the settings of a request, and the check of what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repo_ops.trainer.rollout import Completion, EngineError, decode_completion, encode_prompts, prompt_seeds
from repo_ops.trainer.rollout.hf import stop_token_ids
from repo_ops.trainer.rollout.sampler import check_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# vLLM keeps every token that ties with the k-th; in bfloat16 that is common. So many more are asked for.
TIES = 16
# JSON has no -inf: below this vLLM's server means it
NO_CHANCE = -9000.0


@dataclass(frozen=True)
class Drawn:
    """One token as vLLM reports it."""

    token_id: int
    logp: float
    likely: tuple[tuple[int, float], ...]
    """(token, log-probability) of the likeliest ones, in any order; the drawn one may be among them."""


@dataclass(frozen=True)
class Request:
    """How completions are to be sampled, checked, for either engine."""

    prompts: list[list[int]]
    seeds: list[int]
    """Of each prompt; vLLM adds the number of the sample."""
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    top_logps: int

    @property
    def likely(self) -> int:
        """How many of the likeliest tokens vLLM must report."""
        return max(self.top_logps, self.top_k + TIES if self.top_k else 0)

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments that vLLM's SamplingParams and its HTTP interface call alike, the seed excepted."""
        return {
            "n": 1 if self.greedy else self.num_samples,  # greedy completions of a prompt are all the same
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "max_tokens": self.max_new_tokens,
            "logprobs": self.likely,
            # only the tokens that `Answers` lists end a completion
            "ignore_eos": True,
            # a server may have defaults for these, taken from the model's generation_config.json
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }


class Answers:
    """Makes requests for a tokenizer and a set of terminators, and completions of what vLLM answers.

    Args:
        model, tokenizer, stop: as for `HFGenerate`; the terminators are the same tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stop_ids = stop_token_ids(model, tokenizer, self.stop).tolist()
        self._stops = frozenset(self.stop_ids)
        self.num_tokens = model.config.get_text_config().vocab_size

    def request(
        self,
        prompts: list[str],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        greedy: bool,
        top_logps: int,
        seed: int,
        limits: Mapping[str, Any],
    ) -> Request:
        """The request, its prompts as token ids, with a seed for each.

        Args:
            limits: `repo_ops_settings` of the workers.
        Raises:
            ValueError: a setting out of range, or one that vLLM cannot report exactly.
            EngineError: a prompt that is too long.
        """
        check_sampling(num_samples, max_new_tokens, temperature, top_k, top_p)
        if not 0 <= top_logps <= self.num_tokens:
            raise ValueError(f"top_logps: expected from 0 to the vocabulary's {self.num_tokens}, got {top_logps}")
        if top_p < 1 and not top_k:
            raise ValueError(
                f"top_p: expected 1.0, or a top_k beside it, got {top_p}; without top_k vLLM does not report which "
                "tokens it kept"
            )
        if greedy and (temperature != 1 or top_k or top_p < 1):
            raise ValueError(
                f"temperature: expected 1.0 without top_k or top_p where greedy, got {temperature}; vLLM reports "
                "greedy tokens under the plain softmax"
            )
        encoded = self.encode(prompts, max_new_tokens, limits)
        # 2^62: adding the number of a sample stays within 64 bits
        seeds = prompt_seeds(prompts, seed)
        request = Request(encoded, seeds, num_samples, max_new_tokens, temperature, top_k, top_p, greedy, top_logps)
        if 0 <= limits["max_logprobs"] < request.likely:
            raise ValueError(
                f"max_logprobs: expected vLLM to report {request.likely} likely tokens (top_k + {TIES}, or top_logps), "
                f"got {limits['max_logprobs']}; start it with --max-logprobs {request.likely}"
            )
        return request

    def encode(self, prompts: Sequence[str], max_new_tokens: int, limits: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of the prompts.

        Raises:
            EngineError: vLLM has no room for one of them and a completion; it would refuse the request.
        """
        encoded = encode_prompts(self.tokenizer, prompts)
        longest, room = max(map(len, encoded), default=0), limits["max_model_len"] - max_new_tokens
        if longest > room:
            raise EngineError(
                f"engine: expected prompts of at most {room} tokens beside max_new_tokens = {max_new_tokens}, got one "
                f"of {longest}; vLLM runs with max_model_len = {limits['max_model_len']}: start it with more, or leave "
                "longer prompts out with --max_prompt_tokens"
            )
        return encoded

    def group(self, request: Request, samples: Sequence[Sequence[Drawn]]) -> list[Completion]:
        """The completions of one prompt.

        Raises:
            EngineError: too few or too many samples, or a sample that the request does not allow.
        """
        expected = request.sampling["n"]
        if len(samples) != expected:
            raise EngineError(f"engine: expected {expected} completions of a prompt, got {len(samples)}")
        group = [self._completion(request, sample) for sample in samples]
        return group * request.num_samples if request.greedy else group

    def _completion(self, request: Request, drawn: Sequence[Drawn]) -> Completion:
        ids = tuple(token.token_id for token in drawn)
        finished = bool(ids) and ids[-1] in self._stops
        if len(ids) > request.max_new_tokens or not (finished or len(ids) == request.max_new_tokens):
            raise EngineError(
                f"engine: expected {request.max_new_tokens} tokens or a terminator, got {len(ids)} tokens without one; "
                "vLLM cut or aborted the completion"
            )
        if not self._stops.isdisjoint(ids[:-1]):
            raise EngineError(
                f"engine: expected nothing after a terminator, got {list(ids)}; stop_token_ids was ignored"
            )
        if not all(0 <= i < self.num_tokens for i in ids) or not all(-math.inf < t.logp <= 1e-4 for t in drawn):
            raise EngineError("engine: expected token ids of the vocabulary with log-probabilities, got something else")
        likely = [_ranked(token) for token in drawn]
        top = [_top(token, ranked, request.top_logps) for token, ranked in zip(drawn, likely)]
        return Completion(
            token_ids=ids,
            logps=tuple(min(0.0, token.logp) for token in drawn),
            text=decode_completion(self.tokenizer, ids, self.stop),
            finished=finished,
            top_ids=tuple(tuple(i for i, _ in row) for row in top) if request.top_logps else (),
            top_logps=tuple(tuple(logp for _, logp in row) for row in top) if request.top_logps else (),
            kept_ids=tuple(map(_kept, likely)) if request.top_k else (),
        )


def check_settings(settings: Sequence[dict[str, Any]], vocab_size: int, remedy: str) -> dict[str, Any]:
    """The settings, alike in all workers, of a vLLM whose log-probabilities are those of the sampled distribution.

    Raises:
        EngineError: they are others, or the vocabulary is another.
    """
    found = dict(settings[0])
    if found["logprobs_mode"] != "processed_logprobs":
        raise EngineError(
            f"engine: expected logprobs_mode processed_logprobs, got {found['logprobs_mode']}; at a temperature other "
            f"than 1 its log-probabilities would not be those of what it samples. {remedy}"
        )
    if found["vocab_size"] != vocab_size:
        raise EngineError(f"engine: expected a vocabulary of {vocab_size}, got {found['vocab_size']}: another model")
    return found


def in_words(limits: Mapping[str, Any]) -> str:
    """Dtype and room of a vLLM, from its `repo_ops_settings`."""
    return f"in {limits['dtype']}, max_model_len {limits['max_model_len']}"


def _ranked(token: Drawn) -> list[tuple[int, float]]:
    """The reported tokens with a chance, the drawn one among them, likeliest first; then those without one."""
    likely = dict(token.likely)
    likely[token.token_id] = token.logp
    return sorted(((i, logp if logp > NO_CHANCE else -math.inf) for i, logp in likely.items()), key=lambda x: -x[1])


def _top(token: Drawn, ranked: list[tuple[int, float]], num_top: int) -> list[tuple[int, float]]:
    """The num_top likeliest; the drawn one takes the last place where it is not among them."""
    if num_top and len(ranked) < num_top:
        raise EngineError(f"engine: expected the {num_top} likeliest tokens at each place, got {len(ranked)}")
    best = ranked[:num_top]
    if num_top and all(i != token.token_id for i, _ in best):
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
