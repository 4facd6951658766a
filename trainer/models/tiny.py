"""A language model of 77k parameters that knows its task a little: made on the spot, for tests and smoke runs."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from repo_ops.trainer.models.cache import built_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

    from repo_ops.trainer.tasks.problems import Problem

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SYMBOLS = (PAD, EOS, UNKNOWN, "\n", *" 0123456789abcdefghijklmnopqrstuvwxyz+-*=>,:()?\"'")


@dataclass(frozen=True)
class TinyModel:
    """Settings of the tiny model. Equal settings give the same weights on one machine."""

    seed: int = 0
    """Of the weights and of the warm start."""
    warm_start_steps: int = 300
    """Most supervised steps on right answers (about 130 are enough); 0 leaves the weights random."""


def tiny_folder(root: Path, settings: TinyModel) -> Path:
    """Folder with the model and its tokenizer in Hugging Face format; made on first use, kept by its settings."""
    text = json.dumps([asdict(settings), SYMBOLS, WARM_START_VERSION], sort_keys=True)
    key = "tiny-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    return built_folder(root, key, lambda folder: _make(folder, settings))


# Goes up when the recipe below changes, so that an older cache is not taken for the new one.
WARM_START_VERSION = 2
BATCH = 64
LEARNING_RATE = 3e-3
HIDDEN_SIZE = 64
# How many right answers it takes differs from seed to seed by a factor of two, so the loss decides. The noise after
# that makes a model that knows unsure: 0.13 to 0.4 of its samples are right (seeds 0 to 4, reverse, sort, copy).
KNOWS = 0.15
NOISY_STEPS = 40
NOISE = 0.9  # share of answers with one symbol replaced: what is left for rewards to raise


def _make(folder: Path, settings: TinyModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _untrained(tokenizer)
        _warm_start(model, tokenizer, settings)
    model.save_pretrained(folder)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token a symbol: letters, digits, a few signs, space and newline."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _untrained(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=2 * HIDDEN_SIZE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HIDDEN_SIZE // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def _warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: TinyModel) -> None:
    """Supervised steps on the symbol tasks: right answers until it knows them, then noisy ones."""
    from repo_ops.trainer.tasks.problems import SYMBOL_TASKS

    if not settings.warm_start_steps:
        return
    rng = random.Random(settings.seed)
    streams = [task(seed=settings.seed) for task in SYMBOL_TASKS.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(noise: float) -> float:
        problems = [next(rng.choice(streams)) for _ in range(BATCH)]
        loss = _answer_loss(model, tokenizer, problems, noise, rng)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model.train()
    for _ in range(settings.warm_start_steps):
        if step(noise=0.0) < KNOWS:
            break
    for _ in range(min(NOISY_STEPS, settings.warm_start_steps)):
        step(NOISE)
    model.eval()


def _answer_loss(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    noise: float,
    rng: random.Random,
) -> torch.Tensor:
    answers = [_corrupted(p.answer, rng) if rng.random() < noise else p.answer for p in problems]
    batch = tokenizer(
        [f"{p.question}{answer}\n" for p, answer in zip(problems, answers)],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, problem in enumerate(problems):
        labels[row, : len(problem.question)] = -100
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def _corrupted(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + rng.choice("abcdefgh") + answer[place + 1 :]
