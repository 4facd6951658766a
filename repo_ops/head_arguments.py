"""The arguments of a head, checked once, at the door."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import Layout, check_device, check_float, check_number, check_shape, check_values
from repo_ops.head import shards
from repo_ops.head.inputs import HeadInputs, Product, exact_dtype


@dataclass(frozen=True, eq=False)
class HeadSettings:
    """What a head has beside hidden states and weight, as `linear_logps` documents it."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    adapter: tuple[Tensor, Tensor] | None = None
    tp_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None:
            check_number("softcap", self.softcap, "a finite number > 0 or None", above=0)
        if check_number("logit_scale", self.logit_scale, "a finite number other than 0") == 0:
            raise ValueError("logit_scale: expected a finite number other than 0, got 0.0")
        if self.adapter is not None and (not isinstance(self.adapter, tuple) or len(self.adapter) != 2):
            raise TypeError("adapter: expected a pair (scaling * hidden @ A.T [..., r], B [V, r]), as of a LoRA head")
        if self.tp_group is not None and not isinstance(self.tp_group, dist.ProcessGroup):
            got = type(self.tp_group).__name__
            raise TypeError(f"tp_group: expected a process group, got {got}; of a DeviceMesh pass mesh.get_group()")


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    where: Layout,
    settings: HeadSettings,
    *,
    accumulate_weight_grad: bool = False,
    rounds_to: torch.dtype | None = None,
) -> HeadInputs:
    """The checked head over its live rows, before `HeadInputs.with_copies`.

    Raises:
        TypeError, ValueError: a shape, dtype, device or value is off; the message names the argument.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 token ids, got {targets.dtype}")
    adapter_hidden, adapter_weight = settings.adapter or (None, None)
    tensors = {"hidden": hidden, "weight": weight, "bias": settings.bias}
    for name, value in {**tensors, "adapter[0]": adapter_hidden, "adapter[1]": adapter_weight}.items():
        if value is not None or name in ("hidden", "weight"):
            _check_head_tensor(name, value, targets.device)
    _check_product("hidden", hidden, "weight", weight, where)
    if settings.bias is not None:
        check_shape("bias", settings.bias, (len(weight),), "the rows of weight")
    adapter = None
    if adapter_hidden is not None and adapter_weight is not None:
        _check_product("adapter[0]", adapter_hidden, "adapter[1]", adapter_weight, where)
        check_shape("adapter[1]", adapter_weight, (len(weight), adapter_weight.shape[1]), "the rows of weight")
        adapter = Product(adapter_hidden.reshape(-1, adapter_hidden.shape[-1]), adapter_weight)
    ids, group, owned = where.take(targets).to(torch.int64), settings.tp_group, None
    shard_sizes = [len(weight)] if group is None else shards.sizes(len(weight), weight.device, group)
    check_values(
        "targets",
        ((ids >= 0) & (ids < sum(shard_sizes))).all(),
        f"ids from 0 to {sum(shard_sizes) - 1} where mask is 1",
        "mask positions that predict nothing (padding, -100)",
    )
    if group is not None:
        ids, owned = shards.localize(ids, shard_sizes, dist.get_rank(group))
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        settings.bias,
        ids,
        where.rows,
        _inv_temperature(settings.temperature, where, weight.device, exact_dtype(hidden, weight)),
        float(settings.logit_scale),
        settings.softcap,
        adapter,
        group,
        owned,
        max(shard_sizes),
        accumulate_weight_grad and _accumulates(weight, rounds_to),
        rounds_to,
    )


def _accumulates(weight: Tensor, rounds_to: torch.dtype | None) -> bool:
    """Whether the gradient of `weight` can be added to its .grad; False for a frozen weight."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    name, grad = "options.accumulate_weight_grad", weight.grad if weight.is_leaf else None
    if not weight.is_leaf:
        raise ValueError(f"{name}: expected a leaf as weight, got one that was computed; pass the parameter itself")
    if weight.dtype != torch.float32:
        raise ValueError(
            f"{name}: expected a float32 weight, got {weight.dtype}, in which sums lose bits; leave it False"
        )
    if rounds_to == torch.float16:
        raise ValueError(
            f"{name}: expected operands of bfloat16 or float32, got float16, whose gradients are scaled; leave it False"
        )
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        raise ValueError(f"{name}: expected a weight without gradient hooks, which would see nothing; leave it False")
    if grad is not None and not grad.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous weight.grad, got strides {grad.stride()}; set it to None first"
        )
    return True


def _check_head_tensor(name: str, value: Tensor | None, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(value, module.DTensor):
        # full_tensor() outside the unit's forward gives a plausible loss and a wrong gradient
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; compute the loss inside the forward of the FSDP root "
            "that owns the head (torch.distributed.fsdp.register_fsdp_forward_method), where the parameter is whole"
        )
    check_float(name, value)
    check_device(name, value, device, "targets")


def _check_product(name: str, hidden: Tensor, weight_name: str, weight: Tensor, where: Layout) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{weight_name}: expected shape [V, D] like lm_head.weight, got {list(weight.shape)}")
    if tuple(hidden.shape[:-1]) != where.shape or hidden.ndim != len(where.shape) + 1:
        raise ValueError(
            f"{name}: expected shape {[*where.shape, weight.shape[1]]} to go with targets {list(where.shape)}, "
            f"got {list(hidden.shape)}; position i predicts targets[i], so shift before calling"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name}: expected shape [V, {hidden.shape[-1]}] to go with {name} {list(hidden.shape)}, "
            f"got {list(weight.shape)}; pass lm_head.weight, not its transpose"
        )


def _inv_temperature(
    temperature: float | Tensor, where: Layout, device: torch.device, exact: torch.dtype
) -> Tensor | float:
    if not isinstance(temperature, Tensor):
        remedy = "greedy decoding has none"
        return 1.0 / check_number("temperature", temperature, "a finite number > 0", above=0, remedy=remedy)
    if temperature.requires_grad:
        raise ValueError("temperature: expected constants, got a tensor that requires grad; detach it")
    if temperature.ndim == 0:
        temperature = temperature.expand(where.shape)
    check_float("temperature", temperature)
    if where.owner is not None and tuple(temperature.shape) == (where.num_sequences,):
        live = temperature.to(device)[where.owner]
    else:
        per_sequence = f" (or [{where.num_sequences}], one per sequence)" if where.owner is not None else ""
        check_shape("temperature", temperature, where.shape, f"targets{per_sequence}")
        live = where.take(temperature.to(device))
    check_values("temperature", ((live > 0) & live.isfinite()).all(), "finite numbers > 0", "greedy decoding has none")
    return 1.0 / live.to(torch.promote_types(live.dtype, exact))
