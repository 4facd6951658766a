"""Arguments checked once, at the door: an error names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which positions are live tokens, and of which sequence, for padded [B, T] or packed [N] inputs."""

    shape: tuple[int, ...]
    """Shape of targets: (B, T) or (N,)."""
    num_sequences: int | None
    """B; None for packed inputs without cu_seqlens."""
    rows: Tensor | None
    """[L] int64 positions of live tokens in the flattened targets; None where all are live."""
    owner: Tensor | None
    """[L] int64 sequence of each live token; None where num_sequences is."""
    lengths: Tensor | None
    """[B] int64 live tokens of each sequence."""

    @property
    def num_live(self) -> int:
        """L, the number of live tokens."""
        return math.prod(self.shape) if self.rows is None else len(self.rows)

    def take(self, values: Tensor) -> Tensor:
        """[L] of the live tokens from a tensor of `shape`."""
        flat = values.reshape(-1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def put(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """A tensor of `shape` from [L], `fill` elsewhere."""
        if self.rows is None:
            return values.reshape(self.shape)
        return values.new_full((math.prod(self.shape),), fill).index_copy(0, self.rows, values).reshape(self.shape)

    def keep(self, alive: Tensor) -> Layout:
        """The layout with fewer live tokens: those under `alive` [L] bool. `lengths` keep counting all of them."""
        kept = alive.nonzero()[:, 0]
        rows = kept if self.rows is None else self.rows[kept]
        return Layout(
            self.shape, self.num_sequences, rows, None if self.owner is None else self.owner[kept], self.lengths
        )


def check_shape(name: str, value: Tensor, shape: Sequence[int], like: str, remedy: str = "") -> None:
    """Refuse a tensor of another shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {list(shape)} like {like}, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {list(shape)} like {like}, got {list(value.shape)}"
            + (f"; {remedy}" if remedy else "")
        )


def check_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    """Refuse a tensor on another device."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} like {like}, got {value.device}; move it there first")


def check_float(name: str, value: Tensor) -> None:
    """Refuse a tensor that is not of a floating dtype."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")


def check_number(
    name: str, value: object, expected: str, *, low: float = -math.inf, above: float = -math.inf, remedy: str = ""
) -> float:
    """The finite number `value`, at least `low` and more than `above`."""
    then = f"; {remedy}" if remedy else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}{then}")
    if not (low <= value < math.inf and value > above):
        raise ValueError(f"{name}: expected {expected}, got {value}{then}")
    return float(value)


def check_values(name: str, ok: Tensor, expected: str, remedy: str) -> None:
    """Refuse values for which `ok` (0-d bool) is False, at once on a CPU, without waiting for the device elsewhere."""
    message = f"{name}: expected {expected}; {remedy}"
    if ok.device.type == "cpu":
        if not bool(ok):
            raise ValueError(message)
    else:
        torch._assert_async(ok, message)


def layout(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, name: str = "targets") -> Layout:
    """The layout of `tokens` [B, T] or [N], the argument called `name`.

    Raises:
        TypeError, ValueError: shapes or dtypes disagree, or cu_seqlens does not cover the tokens.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    if tokens.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [B, T], or [N] for packed tokens, got {list(tokens.shape)}")
    shape, device = tuple(tokens.shape), tokens.device
    if cu_seqlens is not None and tokens.ndim != 1:
        raise ValueError(f"cu_seqlens: expected packed {name} [N], got {name} of shape {list(shape)}; drop cu_seqlens")
    if mask is not None:
        check_shape("mask", mask, shape, name)
        check_device("mask", mask, device, name)
        check_values("mask", ((mask == 0) | (mask == 1)).all(), "bool or 0 and 1", "a weight goes into the advantages")
    num_sequences: int | None = shape[0] if tokens.ndim == 2 else None
    owner = None
    if tokens.ndim == 2:
        owner = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
    elif cu_seqlens is not None:
        full = _sequence_lengths(cu_seqlens, shape[0])
        num_sequences = len(full)
        owner = torch.arange(num_sequences, device=device).repeat_interleave(full.to(device), output_size=shape[0])
    rows = None
    if mask is not None:
        rows = mask.reshape(-1).to(torch.bool).nonzero()[:, 0]
        owner = None if owner is None else owner.index_select(0, rows)
    lengths = None if owner is None else torch.bincount(owner, minlength=num_sequences or 0)
    return Layout(shape, num_sequences, rows, owner, lengths)


def _sequence_lengths(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[B] lengths from [B + 1] boundaries."""
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.ndim != 1
        or cu_seqlens.is_floating_point()
        or len(cu_seqlens) < 1
    ):
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
        raise ValueError(
            f"cu_seqlens: expected integer boundaries [B + 1] as a tensor, from 0 to {num_tokens}, got {got}"
        )
    lengths = cu_seqlens.to(torch.int64).diff()
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (lengths >= 0).all()
    check_values(
        "cu_seqlens", good, f"ascending boundaries from 0 to {num_tokens}, the number of tokens", "see targets"
    )
    return lengths
