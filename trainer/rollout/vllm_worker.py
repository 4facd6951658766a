"""What repo-ops adds to the workers of vLLM.

`vllm serve --worker-extension-cls repo_ops.trainer.rollout.vllm_worker.WeightUpdates` mixes the class into vLLM's own
worker. It needs torch and safetensors, nothing of the trainer's other requirements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from repo_ops.trainer.rollout.weights import Digest


class WeightUpdates:
    """Methods for vLLM's `collective_rpc`; arguments and answers are plain JSON, except for `repo_ops_load`."""

    # of vLLM's worker
    model_runner: Any
    model_config: Any
    reload_weights: Any

    repo_ops_folder = ""
    """Where the weights were read from, all of them."""

    def repo_ops_settings(self) -> dict[str, Any]:
        """The settings that decide whether what the engine reports can be used."""
        config = self.model_config
        return {
            "logprobs_mode": str(getattr(config.logprobs_mode, "value", config.logprobs_mode)),
            "max_logprobs": int(config.max_logprobs),
            "max_model_len": int(config.max_model_len),
            "vocab_size": int(config.get_vocab_size()),
            "dtype": str(config.dtype).removeprefix("torch."),
        }

    def repo_ops_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over these weights, named as in a checkpoint. vLLM packs them anew for its kernels where it does so."""
        self.reload_weights(weights_iterator=iter(weights))
        for module in self.model_runner.get_model().modules():
            # On a CPU, vLLM computes with a packed copy of each weight. It reloads a tied head through the embedding
            # alone, and would go on with the packed copy of the old head.
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def repo_ops_load_folder(self, path: str) -> dict[str, tuple[Any, ...]]:
        """Takes over the weights of all safetensors files in a folder; the digest of each, as it was read."""
        read: dict[str, tuple[Any, ...]] = {}
        self.repo_ops_folder = ""
        self.repo_ops_load(_read(Path(path), read))
        self.repo_ops_folder = path
        return read

    def repo_ops_held(self) -> str:
        """The folder whose weights it holds; empty where those are the weights it was started with."""
        return self.repo_ops_folder

    def repo_ops_digests(self) -> dict[str, Any]:
        """Digest of every parameter that this worker holds, and which of a checkpoint's modules vLLM puts into one."""
        model = self.model_runner.get_model()
        return {
            "parameters": {name: tuple(Digest.of(tensor.data)) for name, tensor in model.named_parameters()},
            "packed": {name: list(parts) for name, parts in getattr(model, "packed_modules_mapping", {}).items()},
        }


def _read(folder: Path, read: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected safetensors files in {folder}; does the server see the trainer's folder?")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name)
                read[name] = tuple(Digest.of(tensor))
                yield name, tensor
