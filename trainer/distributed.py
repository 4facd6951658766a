"""Several processes that train one model together: who they are, how they share its weights, what they tell each other.

Started by torchrun; a process that was started by itself is one rank of one, and nothing here does anything then.

Every rank sees the whole step: generation is split over ranks and its completions are gathered, the learner's sequences
are split again by their tokens, and a prompt's replayed samples stay on its home rank. So the numbers of a step depend
on the number of ranks by rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repo_ops.metrics import Metrics, Stat, merge
from repo_ops.replay import home_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Ranks",
    "as_started",
    "decoder_layers",
    "inside",
    "is_sharded",
    "join",
    "leave",
    "shard",
    "split_again",
    "whole",
    "whole_state",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank computes."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None where there is one."""
        return dist.group.WORLD if self.size > 1 else None

    def keeps(self, prompt: str) -> bool:
        """Whether this rank is the prompt's home, where its samples are stored and drawn."""
        return home_rank(prompt, self.size) == self.rank

    def slice(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's neighbouring items out of a list that is the same on all ranks; sizes differ by one at most."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. All have to call; values are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, which alone calls it; raises on all ranks if it raised there."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:  # the others wait for this rank: they must hear of it, whatever it is
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.gather(number))

    def merged(self, metrics: Metrics) -> Metrics:
        """Metrics of all ranks: global sums with global counts."""
        if self.size == 1:
            return metrics
        return merge(self.gather({name: Stat(s.total.cpu(), s.count.cpu()) for name, s in metrics.items()}))

    def buffer_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """`ReplayBuffer.metrics` of all ranks: counters add up, means weigh by size; of p95 and max the largest."""
        parts = self.gather(dict(metrics))
        size = max(1.0, sum(part["replay/size"] for part in parts))
        found: dict[str, float] = {}
        for name in metrics:
            values = [part[name] for part in parts]
            if name.endswith("_mean"):
                found[name] = sum(v * part["replay/size"] for v, part in zip(values, parts)) / size
            else:
                found[name] = max(values) if name.endswith(("_p95", "_max")) else sum(values)
        return found


def join(device: str | None = None) -> Ranks:
    """This process as torchrun started it, connected with the others: NCCL between GPUs, gloo between CPUs.

    Args:
        device: "cpu", "cuda", "cuda:1"... None: a GPU where torch sees one. With several ranks a GPU is chosen by
            LOCAL_RANK, so none may be named.
    Raises:
        ValueError: torch cannot use the device here, or there are more local ranks than GPUs.
    """
    ranks = as_started(device)
    if ranks.size > 1 and not dist.is_initialized():
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        # objects travel over gloo, and so do gradients' norms where parameters are offloaded
        dist.init_process_group("gloo" if ranks.device.type == "cpu" else f"cpu:gloo,{ranks.device.type}:nccl")
    return ranks


def as_started(device: str | None = None) -> Ranks:
    """This process as torchrun started it, connected with nobody: what `join` begins with, and all of a dry run.

    Raises:
        ValueError: as `join`.
    """
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device)
    if size > 1 and chosen.type == "cuda":
        if device is not None and device != "cuda":
            raise ValueError(f"device: expected 'cuda' or none with {size} ranks, got {device!r}; each has its own GPU")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"nproc_per_node: expected at most {torch.cuda.device_count()}, the GPUs that torch sees, got local "
                f"rank {local}; start fewer ranks, or use --device cpu"
            )
        chosen = torch.device("cuda", local)
    return Ranks(rank, size, chosen)


def leave() -> None:
    """Ends the connection that `join` made; to be called once, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here, got {name!r} ({reason})") from error


def shard(
    model: PreTrainedModel,
    ranks: Ranks,
    *,
    compute: torch.dtype | None = None,
    replicas: int = 1,
    cpu_offload: bool = False,
) -> None:
    """Splits every parameter over the ranks by FSDP2, in place.

    Each layer is a unit; embedding, norm and head are in the root, whose forward the loss is computed in (`inside`).
    The root's unit stays in the parameters' dtype, so that the head can be exact. Gradients are
    reduced in float32 at least, and averaged: multiply a loss that is a sum over ranks by their number.

    Args:
        model: the same weights on every rank; on the CPU, or already on the rank's device.
        compute: dtype that layers are gathered and computed in, under autocast of that dtype (None: their own).
        replicas: whole copies of the model over the ranks; each copy is sharded over size / replicas neighbouring
            ranks (a node), and gradients are added up between copies. Hybrid sharding.
        cpu_offload: parameters, gradients and optimizer live on the CPU; layers visit the GPU one by one.
    Raises:
        ValueError: replicas do not divide the ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if ranks.size % replicas:
        raise ValueError(f"replicas: expected a divisor of the {ranks.size} ranks, got {replicas}")
    kind = ranks.device.type
    shape, names = (ranks.size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, ranks.size // replicas), ("replicate", "shard")  # type: ignore[assignment]
    own = next(model.parameters()).dtype
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(kind, shape, mesh_dim_names=names),
        "offload_policy": CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy(),
    }
    reduce = torch.promote_types(own, torch.float32)
    # autocast makes the casts of inputs, and keeps the stream between layers in the parameters' dtype
    layers = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mp_policy=layers, **settings)
    root = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    # a frozen model has no backward that would free the root after its forward
    fully_shard(model, mp_policy=root, reshard_after_forward=not trained, **settings)
    inside(model, lambda: None)  # the first forward tells FSDP2 which unit is the root
    split_again(model)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of the model, in order: the largest list of modules below its head."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"model: expected a list of layers, got {type(model).__name__}, which has none; use one rank")
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    return list(largest)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def inside(model: nn.Module, function: Callable[[], T]) -> T:
    """function(), run as the forward of a sharded model: the root's parameters are whole, and gradients reach them.

    Tensors with a graph must be returned in tuples, lists or dicts, where FSDP2 finds them. All ranks have to call.
    """
    if not is_sharded(model):
        return function()
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "run_inside_forward"
    if not hasattr(model, name):
        setattr(model, name, lambda call: call())
        register_fsdp_forward_method(model, name)
    return getattr(model, name)(function)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every parameter gathered on every rank, in the dtype that is computed in; split again at the end.

    In between each rank may run forwards without gradients by itself, as many as it likes: nothing is communicated.
    It takes the memory of one whole model in that dtype (16 GB for 8B parameters in bfloat16).
    """
    if not is_sharded(model):
        yield
        return
    units: list[Any] = [module for module in model.modules() if is_sharded(module)]
    root, layers = units[0], units[1:]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in layers:
            unit.set_reshard_after_forward(True, recurse=False)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        root.set_reshard_after_forward(not trained, recurse=False)
        split_again(model)


def split_again(model: nn.Module) -> None:
    """Frees what forwards without a backward left gathered: the root's parameters stay whole after its forward."""
    units: list[Any] = [module for module in model.modules() if is_sharded(module)]
    for unit in units:
        unit.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with whole tensors on the CPU, on the first rank; {} on the others. All have to call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state
