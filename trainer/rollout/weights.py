"""The policy's weights as an inference engine wants them, and the check that they arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from repo_ops.trainer.lora import lora_layers
from repo_ops.trainer.rollout import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# what wrappers (activation checkpointing, torch.compile) put into a parameter's name
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class Digest(NamedTuple):
    """What two copies of a tensor must agree in."""

    numel: int
    dtype: str
    bits: int
    """Sum of the bit patterns modulo 2^64. Over the shards of a tensor it adds up to that of the whole."""

    @classmethod
    def of(cls, tensor: Tensor) -> Digest:
        """The digest of a tensor, in one pass over it."""
        patterns = tensor.detach().contiguous().view(BITS[tensor.element_size()])
        bits = int(patterns.sum(dtype=torch.int64)) % 2**64
        return cls(tensor.numel(), str(tensor.dtype).removeprefix("torch."), bits)


def full_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor in `dtype`) of every parameter of a transformers model, one at a time.

    Tied ones come once. A sharded parameter is gathered, so every rank must go through all of them. A LoRA adapter is
    added to a copy of the weight that it adapts; the model is not touched.

    Raises:
        EngineError: transformers converts the weights of this model as it loads them, such as the experts of a mixture
            of experts, which it stacks; a checkpoint holds them otherwise.
    """
    if getattr(model, "_weight_conversions", None):
        raise EngineError(
            f"engine: expected a model whose weights are named as in its checkpoint, got {type(model).__name__}, which "
            "transformers converts as it loads it; use engine hf"
        )
    adapted = lora_layers(model)
    embedding = model.get_input_embeddings().weight
    if any(layer.get_base_layer().weight is embedding for layer in adapted.values()):
        raise EngineError(
            "engine: expected no adapter on a head that is tied to the embedding, got one; the engine holds one weight "
            "for both, so leave lm_head out of lora_targets or use engine hf"
        )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = _whole(parameter.detach())
        owner, _, kind = name.rpartition(".base_layer.")
        if owner and kind == "weight":
            weight = _merged(weight, adapted[owner])
        name = name.replace(".base_layer.", ".")
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, weight.to(dtype)


def compare_weights(sent: Mapping[str, Digest], workers: Sequence[Mapping[str, Any]]) -> int:
    """How many of the tensors that the workers hold were found equal to those sent; at least one.

    Args:
        sent: digest of each weight, by its name in a checkpoint.
        workers: what each worker says of itself (`vllm_worker.WeightUpdates.repo_ops_digests`).
    Raises:
        EngineError: a tensor differs, or none could be compared.
    """
    fused = {name: parts for worker in workers for name, parts in worker["packed"].items()}
    held: dict[str, list[Digest]] = {}
    for worker in workers:
        for name, digest in worker["parameters"].items():
            held.setdefault(name, []).append(Digest(*digest))
    equal = 0
    for name, copies in held.items():
        expected = _expected(name, sent, fused)
        if expected is None or any(copy.dtype != expected.dtype for copy in copies):
            continue
        if all(copy.numel == expected.numel for copy in copies):  # every worker holds all of it
            matches = all(copy == expected for copy in copies)
        elif sum(copy.numel for copy in copies) == expected.numel:  # each holds a part of it
            matches = sum(copy.bits for copy in copies) % 2**64 == expected.bits
        else:  # padded, repeated over workers, or packed for a kernel: nothing to compare
            continue
        if not matches:
            raise EngineError(
                f"engine: {name} differs from the policy's after the weights were sent; what it samples would not come "
                "from the policy, so the run stops here"
            )
        equal += 1
    if not equal:
        raise EngineError(
            f"engine: none of its {len(held)} tensors could be compared with the {len(sent)} that were sent; is it the "
            "same model?"
        )
    return equal


def _expected(name: str, sent: Mapping[str, Digest], fused: Mapping[str, Sequence[str]]) -> Digest | None:
    """Digest of the engine's parameter `name`: of the weight of that name, or of those that were put into one."""
    if name in sent:
        return sent[name]
    *path, module, kind = name.split(".")
    names = [".".join([*path, part, kind]) for part in fused.get(module, ())]
    if not names or any(each not in sent for each in names):
        return None
    parts = [sent[each] for each in names]
    return Digest(sum(p.numel for p in parts), parts[0].dtype, sum(p.bits for p in parts) % 2**64)


def _whole(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor; a collective
    return full_tensor() if full_tensor is not None else tensor


def _merged(weight: Tensor, layer: Any) -> Tensor:
    """weight + scaling * B @ A, in float32 at least, rounded once: as `lora.merge_lora` writes it."""
    wide = weight.double() if weight.element_size() == 8 else weight.float()
    for adapter, scaling in layer.scaling.items():
        a, b = (_whole(factors[adapter].weight.detach()).to(wide.dtype) for factors in (layer.lora_A, layer.lora_B))
        added = scaling * (b @ a)
        wide = wide + (added.T if layer.fan_in_fan_out else added)
    return wide.to(weight.dtype)
