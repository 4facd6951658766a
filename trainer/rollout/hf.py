"""Rollouts by transformers' `generate`, inside the training process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repo_ops.trainer.rollout import (
    Completion,
    EngineError,
    GenerationStopped,
    SamplingSettings,
    decode_completion,
    encode_prompts,
    never,
    prompt_seeds,
)
from repo_ops.trainer.rollout.sampler import Sampler, ShareEnded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Share of a batch's sequences at which those that have ended leave it. SmolLM2 in float32, one thread of a busy
# machine, 8 prompts of 22 tokens x 8 samples of 3 to 8 tokens, CPU seconds in one run: 2.8 to 3.1 at any share up to
# 0.5, 3.9 where all stay to the end, 8.5 where each sample also computes its own prompt.
DROP_AT = 0.25
NOT_FINITE = (
    "engine: expected finite logits, got NaN or infinity from the model; its weights are not finite, or its layers "
    "overflow: look at the weights, or try --autocast false"
)


def cache_argument(model: PreTrainedModel) -> str:
    """What the model calls its cache: from transformers 5.24 on the old name warns."""
    return "cache" if "cache" in inspect.signature(model.get_decoder().forward).parameters else "past_key_values"


class HFGenerate:
    """Samples completions with the very model that is trained, so there are no weights to send.

    Args:
        model: a causal language model of transformers; shared, never copied.
        tokenizer: its tokenizer.
        stop: single characters. A completion ends with the first token whose text holds one of them, or with an
            end-of-sequence token of the model or the tokenizer.
        max_batch_size: most sequences in one batch.
        autocast_dtype: dtype of autocast while sampling, for example torch.bfloat16. The log-probabilities are then
            those of the lower-precision model: right as behaviour log-probabilities, but not what the learner computes
            in float32. None samples in the model's own dtype, whatever autocast surrounds the call.
    Raises:
        ValueError: max_batch_size below 1, or a stop string that is not one character.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = ("\n",),
        *,
        max_batch_size: int = 128,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.max_batch_size = max_batch_size
        self.autocast_dtype = autocast_dtype
        self.version = 0
        self.should_stop: Callable[[], bool] = never
        self._stop_ids = stop_token_ids(model, tokenizer, self.stop)
        # any id serves: the mask hides it in the prompt, and what follows a terminator is cut off
        self._pad_id = int(self._stop_ids[0]) if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def describe(self) -> str:
        """What samples, and in which dtype."""
        import transformers

        dtype = str(self.autocast_dtype or self.model.dtype).removeprefix("torch.")
        return f"transformers {transformers.__version__}, with the model that learns, in {dtype}"

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """Nothing to check: there is room for prompts of any length, as far as memory goes."""

    def sync(self, version: int) -> None:
        """Notes the version: the weights are shared, so they are the policy's already."""
        self.version = version

    def generate(self, prompts: list[str], settings: SamplingSettings) -> list[list[Completion]]:
        """`settings.num_samples` completions of each prompt, in the order of the prompts.

        Each sequence draws from its own row of numbers, made from the seed and its prompt before the first token:
        completions do not depend on the other prompts or the batch size (beyond rounding), and the global random state
        is neither read nor moved.

        Raises:
            ValueError, EngineError, GenerationStopped: as RolloutEngine; EngineError where logits are not finite.
        """
        settings.check(self.model.config.get_text_config().vocab_size)
        num_samples = settings.num_samples
        encoded = encode_prompts(self.tokenizer, prompts)
        owners = [i for i in range(len(prompts)) for _ in range(num_samples)]
        uniforms = torch.empty(len(prompts), num_samples, settings.max_new_tokens, dtype=torch.float64)
        for row, seed in zip(uniforms, prompt_seeds(prompts, settings)):
            row.uniform_(generator=torch.Generator().manual_seed(seed))
        uniforms = uniforms.flatten(0, 1)
        order = sorted(range(len(owners)), key=lambda row: len(encoded[owners[row]]))
        sampler = Sampler(settings)
        completions: dict[int, Completion] = {}
        with _sampling_mode(self.model, self.autocast_dtype):
            for start in range(0, len(order), self.max_batch_size):
                if self.should_stop():
                    raise GenerationStopped
                rows = order[start : start + self.max_batch_size]
                sampler.begin(uniforms[rows].to(self.model.device))
                self._generate_batch([encoded[owners[row]] for row in rows], sampler)
                if not sampler.logps.isfinite().all():
                    raise EngineError(NOT_FINITE)
                completions.update(zip(rows, self._completions(sampler)))
        return [[completions[i * num_samples + j] for j in range(num_samples)] for i in range(len(prompts))]

    def _generate_batch(self, prompts: list[list[int]], sampler: Sampler) -> None:
        """Leaves the sampled tokens [B, max_new_tokens] and their log-probabilities in the sampler."""
        from transformers import DynamicCache, GenerationConfig

        distinct, copies = _distinct(prompts)
        ids, mask = _left_pad(distinct, self._pad_id, self.model.device)
        cache = DynamicCache(config=self.model.config)
        given = {cache_argument(self.model): cache}
        # A prompt is computed once; its logits, keys and values are copied to all its samples.
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
            **given,
        ).logits[:, -1]
        copies = copies.to(ids.device)
        cache.batch_select_indices(copies)
        ids, mask = ids[copies], mask[copies]
        limit = ids.shape[1] + sampler.settings.max_new_tokens
        sampler.prompt_width = ids.shape[1]
        new = sampler.draw(ids, logits[copies])[:, None]
        while True:
            ids = torch.cat([ids, new], dim=1)
            mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
            live = self._is_stop(new).any(1).logical_not().nonzero().squeeze(1)
            if ids.shape[1] == limit or len(live) == 0:
                return
            if len(live) < len(ids):
                ids, mask = ids[live], mask[live]
                cache.batch_select_indices(live)
                sampler.rows = sampler.rows[live]
            # comes back when a share of the sequences has ended, so that these leave the batch
            new = self.model.generate(
                ids,
                attention_mask=mask,
                logits_processor=[sampler],
                stopping_criteria=[ShareEnded(self._is_stop, DROP_AT, self.should_stop)],
                # do_sample=False: the sampler leaves one finite score in a row, the token that it drew
                generation_config=GenerationConfig(
                    max_new_tokens=limit - ids.shape[1],
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=self._pad_id,
                    eos_token_id=self._stop_ids.tolist(),
                ),
                # a sharded model is whole here, and each rank stops when its own sequences have ended
                synced_gpus=False,
                **given,
            )[:, ids.shape[1] :]

    def _is_stop(self, token_ids: Tensor) -> Tensor:
        return torch.isin(token_ids, self._stop_ids.to(token_ids.device))

    def _completions(self, sampler: Sampler) -> list[Completion]:
        out = []
        rows = (sampler.token_ids, sampler.logps, self._is_stop(sampler.token_ids), sampler.top_ids, sampler.top_logps)
        for *row, kept in zip(*(tensor.tolist() for tensor in rows), sampler.kept_ids):
            is_stop = row[2]
            finished = True in is_stop
            length = is_stop.index(True) + 1 if finished else len(is_stop)
            tokens, logps, _, *top = (tuple(each[:length]) for each in row)
            text = decode_completion(self.tokenizer, tokens, self.stop)
            top_ids, top_logps = (tuple(map(tuple, each)) if sampler.settings.top_logps else () for each in top)
            kept_ids = tuple(kept[step] for step in range(length)) if kept else ()
            out.append(Completion(tokens, logps, text, finished, top_ids, top_logps, kept_ids))
        return out


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Tensor:
    """Ids [n] of every token that ends a completion: text with a stop character in it, or an end-of-sequence token.

    Raises:
        ValueError: a stop string is not one character (it could be spread over tokens), or nothing would ever stop.
    """
    for string in stop:
        if len(string) != 1:
            raise ValueError(f"stop: expected single characters such as '\\n', got {string!r}")
    # without the names of special tokens: <pad> does not hold the letter a
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True) if stop else []
    ids = {i for i, text in enumerate(texts) if any(character in text for character in stop)}
    for eos in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ids.update([eos] if isinstance(eos, int) else eos or [])
    if not ids:
        raise ValueError("stop: expected a character or a tokenizer with an end-of-sequence token, got neither")
    return torch.tensor(sorted(ids))


def _distinct(prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """The different prompts, and for each prompt its place among them [B]."""
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(ids), len(places)) for ids in prompts]
    return [list(ids) for ids in places], torch.tensor(copies)


def _left_pad(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, longest], prompts flush right."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@contextmanager
def _sampling_mode(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no gradients, the wanted precision, no generation defaults of the model; all put back after."""
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    defaults = model.generation_config
    model.eval()
    # a model's own defaults (repetition penalty, top_k ...) would bend the distribution behind the sampler's back
    model.generation_config = GenerationConfig()
    device = model.device.type
    try:
        with torch.no_grad(), torch.autocast(device, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            yield
    finally:
        # casts cached here carry no graph; inside somebody's autocast region training would meet them again
        torch.clear_autocast_cache()
        model.generation_config = defaults
        for module in training:
            module.training = True
