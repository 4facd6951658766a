"""Arguments checked once, at the door: an error names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repo_ops.head.inputs import HeadInputs

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


def check_float(name: str, value: Tensor) -> None:
    """Refuse a tensor that is not of a floating dtype."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")


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


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    where: Layout,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> HeadInputs:
    """The checked head over its live rows.

    Raises:
        TypeError, ValueError: a shape, dtype or value is off; the message names the argument.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 token ids, got {targets.dtype}")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            check_float(name, value)
            if value.device != targets.device:
                raise ValueError(
                    f"{name}: expected device {targets.device} like targets, got {value.device}; move it there first"
                )
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [V, D] like lm_head.weight, got {list(weight.shape)}")
    if tuple(hidden.shape[:-1]) != where.shape or hidden.ndim != len(where.shape) + 1:
        raise ValueError(
            f"hidden: expected shape {[*where.shape, weight.shape[1]]} to go with targets {list(where.shape)}, "
            f"got {list(hidden.shape)}; position i of hidden predicts targets[i], so shift before calling"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}] to go with hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}; pass lm_head.weight, not its transpose"
        )
    if bias is not None:
        check_shape("bias", bias, (len(weight),), "the rows of weight")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap}")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale: expected a finite number other than 0, got {logit_scale}")
    ids = where.take(targets).to(torch.int64)
    check_values(
        "targets",
        ((ids >= 0) & (ids < len(weight))).all(),
        f"ids from 0 to {len(weight) - 1} where mask is 1",
        "mask positions that predict nothing (padding, -100)",
    )
    inv_temperature = _inv_temperature(temperature, where, weight.device)
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids,
        where.rows,
        inv_temperature,
        float(logit_scale),
        softcap,
    )


def _inv_temperature(temperature: float | Tensor, where: Layout, device: torch.device) -> Tensor | float:
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a finite number > 0, got {temperature}; greedy needs no temperature"
            )
        return 1.0 / float(temperature)
    if temperature.ndim == 0:
        temperature = temperature.expand(where.shape)
    check_float("temperature", temperature)
    if where.owner is not None and tuple(temperature.shape) == (where.num_sequences,):
        live = temperature.to(device)[where.owner]
    else:
        check_shape("temperature", temperature, where.shape, "targets")
        live = where.take(temperature.to(device))
    check_values(
        "temperature", ((live > 0) & live.isfinite()).all(), "finite numbers > 0", "0 stands for greedy decoding"
    )
    return 1.0 / live.to(torch.promote_types(live.dtype, torch.float32))


def _sequence_lengths(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[B] lengths from [B + 1] boundaries."""
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.ndim != 1
        or cu_seqlens.is_floating_point()
        or len(cu_seqlens) < 1
    ):
        raise ValueError("cu_seqlens: expected integer boundaries [B + 1], starting with 0 and ending with N")
    lengths = cu_seqlens.to(torch.int64).diff()
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens) & (lengths >= 0).all()
    check_values(
        "cu_seqlens", good, f"ascending boundaries from 0 to {num_tokens}, the number of tokens", "see targets"
    )
    return lengths
