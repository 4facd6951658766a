"""What a rollout engine gives the trainer: completions with the log-probabilities they were sampled under."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from repo_ops.trainer.failed import RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase


class EngineError(RunFailed):
    """The engine cannot be reached, is too slow, answers nonsense, or holds other weights than the policy."""


class GenerationStopped(Exception):  # noqa: N818
    """The engine's `should_stop` came true while it sampled. The completions of that call are lost."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: tuple[int, ...]
    """Sampled tokens, the terminating one (newline or end of sequence) included where there was one; no padding."""
    logps: tuple[float, ...]
    """Log-probability in nats of each token under the distribution it was drawn from (temperature applied)."""
    text: str
    """Decoded tokens up to, and without, the terminator."""
    finished: bool
    """Whether a terminator was produced; False where `max_new_tokens` cut the completion."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """At each token the K most probable ones, best first; the sampled one is in the last place where it is absent.
    Empty unless they were asked for."""
    top_logps: tuple[tuple[float, ...], ...] = ()
    """Their log-probabilities under the distribution that was drawn from."""
    kept_ids: tuple[tuple[int, ...], ...] = ()
    """At each token all that it was drawn from, where top_k or top_p cut some off; empty where nothing was."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How an engine samples."""

    num_samples: int
    """Completions of each prompt."""
    max_new_tokens: int
    """Tokens after which a completion is cut."""
    temperature: float
    """Divides the logits (> 0). The log-probabilities are those of the divided logits."""
    seed: int
    """Equal seeds give equal completions, as far as the order in which the engine adds numbers up does."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Of those keep the fewest most probable ones whose probabilities reach p; 1.0 keeps all. With top_k or top_p the
    log-probabilities are those of the truncated, renormalised distribution."""
    greedy: bool = False
    """Take the most probable token; its log-probability is still that of the softmax at `temperature`."""
    top_logps: int = 0
    """K most probable tokens to report at each place; those that top_k or top_p cut off have -inf. 0 reports none."""

    earlier: tuple[str, ...] = ()
    """Prompts that other ranks sample, and that one rank would sample before these."""

    def check(self, num_tokens: int) -> None:
        """Raises ValueError for a setting out of range; num_tokens: size of the vocabulary."""
        rules = {
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 < self.temperature < math.inf, "a finite number > 0 (greedy=True takes the argmax)"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "a number in (0, 1] (1.0 keeps all tokens)"),
            "top_logps": (
                0 <= self.top_logps <= num_tokens,
                f"0 to the vocabulary's {num_tokens} (--divergence_top_k)",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


class RolloutEngine(Protocol):
    """Anything that samples completions and can be told that the policy's weights have moved on."""

    should_stop: Callable[[], bool]
    """Asked again and again while `generate` runs; once it is true, `generate` raises GenerationStopped."""

    def describe(self) -> str:
        """What samples, in which version, dtype and limits: "vLLM 0.32.0 in this process, in bfloat16, ..."."""
        ...

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """Raises EngineError where the engine has no room for one of them and a completion."""
        ...

    def generate(self, prompts: list[str], settings: SamplingSettings) -> list[list[Completion]]:
        """`settings.num_samples` completions of each prompt, in the order of the prompts.

        Raises:
            ValueError: a setting out of range or that the engine cannot follow exactly, or a prompt without tokens.
            EngineError: what was sampled cannot be used.
            GenerationStopped: `should_stop` came true.
        """
        ...

    def sync(self, version: int) -> None:
        """Makes the next `generate` sample from the policy of step `version`. Call it before the first one, too.

        Every rank calls it: a sharded policy is gathered.
        """
        ...


def never() -> bool:
    """False: the `should_stop` of an engine that nobody interrupts."""
    return False


def prompt_seeds(prompts: Sequence[str], settings: SamplingSettings) -> list[int]:
    """A seed below 2^62 for the completions of each prompt; a prompt that comes again has another.

    It does not depend on the other prompts, so that ranks that share them out sample what one rank would.
    """
    seen = Counter(settings.earlier)
    seeds = []
    for prompt in prompts:
        key = f"{settings.seed} {seen[prompt]} ".encode() + prompt.encode("utf-8", "surrogatepass")
        seeds.append(int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 2)
        seen[prompt] += 1
    return seeds


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, as the engines and the learner both see them.

    Equals [tokenizer(p).input_ids for p in prompts]; a beginning-of-sequence token is there if the tokenizer adds one.

    Raises:
        ValueError: a prompt has no tokens, so there is no position to predict the first completion token from.
    """
    encoded = tokenizer(list(prompts)).input_ids if prompts else []
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{i}]: expected at least one token, got {prompts[i]!r}; start it with some text")
    return encoded


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Text of a completion up to, and without, the first of the `stop` characters; special tokens are left out."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    for character in stop:
        text = text.split(character, 1)[0]
    return text
