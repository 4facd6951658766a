"""What a call did, seen from below: its matrix products, the largest tensor, the bytes alive at the worst moment."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Records every operator that reaches a device while it is active, on the calling thread.

    Bytes are counted by storage, from the operator that made it to the moment nothing holds it: deterministic, and
    blind only to what an operator allocates and frees inside itself. Storages that existed before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []
        """(rows, inner, columns) of each matrix product."""
        self.largest = 0
        """Elements of the largest new storage."""
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def multiplications(self) -> int:
        """Multiply-adds of all matrix products."""
        return sum(rows * inner * columns for rows, inner, columns in self.products)

    def passes(self, N: int, D: int, V: int) -> float:
        """Multiply-adds in units of one product of N rows with the head."""
        return self.multiplications() / (N * D * V)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.products.append((*left.shape, right.shape[1]))
        elif name == "bmm":
            (batch, rows, inner), columns = args[0].shape, args[1].shape[2]
            self.products.append((batch * rows, inner, columns))
        elif name in ("matmul", "linear", "baddbmm", "einsum", "addbmm"):
            raise NotImplementedError(f"{name}: count its multiply-adds here")
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.largest = max(self.largest, size // tensor.element_size())
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
