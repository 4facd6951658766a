"""What the public functions hand over while they are traced, and the lists of tensors that operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.head_arguments import HeadSettings
from repo_ops.options import Options
from repo_ops.reduce import NumItems, NumItemsLike


class HeadArguments(NamedTuple):
    """The optional arguments of the head, as they were given."""

    bias: Tensor | None
    temperature: Tensor | float
    softcap: float | None
    logit_scale: float
    mask: Tensor | None
    support_ids: Tensor | None
    adapter: tuple[Tensor, Tensor] | None
    tp_group: dist.ProcessGroup | None
    options: Options

    def tensors(self) -> list[Tensor | None]:
        """bias, adapter hidden, adapter weight, temperature, mask, support_ids: what an operator takes."""
        if self.tp_group is not None:
            raise ValueError(
                "tp_group: expected None under torch.compile; leave the loss out of the compiled region "
                "(torch.compiler.disable), its GEMMs gain nothing from it"
            )
        if self.options.accumulate_weight_grad:
            name = "options.accumulate_weight_grad"
            raise ValueError(f"{name}: expected False under torch.compile, whose graphs have no .grad; leave it False")
        temperature = self.temperature if isinstance(self.temperature, Tensor) else as_tensor(self.temperature)
        return [self.bias, *(self.adapter or (None, None)), temperature, self.mask, self.support_ids]


def as_tensor(number: float) -> Tensor:
    """A number that may change from step to step: as a constant of the graph, each new value would be traced anew."""
    return torch.scalar_tensor(number, dtype=torch.float64)


class Constants(NamedTuple):
    """What is not a tensor in a call."""

    softcap: float | None
    logit_scale: float
    options: Options
    temperature_is_number: bool
    wanted: tuple[bool, ...] = ()
    """The fields of `Wanted`; empty for a loss."""
    objective: Any = None
    """An Objective; as given, a name or a function."""
    extras: tuple[str, ...] = ()
    counted: str | None = None
    """How num_items was spelt: None, "one", "pair" or "NumItems"."""
    numbers: tuple[bool, ...] = ()
    """Which of its counts were Python numbers."""

    def settings(self, others: list[Tensor | None]) -> HeadSettings:
        """The head's settings from what `HeadArguments.tensors` gave."""
        bias, low, up, given = others[:4]
        adapter = None if low is None or up is None else (low, up)
        assert given is not None
        temperature = given.item() if self.temperature_is_number else given
        return HeadSettings(bias, temperature, self.softcap, self.logit_scale, adapter)

    def num_items(self, counts: list[Tensor]) -> NumItemsLike | None:
        """num_items as it was spelt."""
        given = [count.item() if number else count for count, number in zip(counts, self.numbers, strict=True)]
        if self.counted is None:
            return None
        if self.counted == "NumItems":
            return NumItems(*given)
        return given[0] if self.counted == "one" else (given[0], given[1])


def counts_of(num_items: NumItemsLike | None) -> tuple[str | None, list[Any]]:
    """How num_items is spelt, and its counts."""
    if num_items is None:
        return None, []
    if isinstance(num_items, NumItems):
        n = num_items
        return "NumItems", [n.sequences, n.tokens, n.off_policy_sequences, n.off_policy_tokens]
    return ("pair", list(num_items)) if isinstance(num_items, tuple) else ("one", [num_items])
