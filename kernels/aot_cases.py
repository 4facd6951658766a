"""The launches that are compiled ahead of time: each kernel, dtype, alignment and option at least once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from repo_ops.kernels.clipped_ratio import ratio_launch
from repo_ops.kernels.group_advantages import advantages_launch
from repo_ops.kernels.launch import Launch
from repo_ops.kernels.logit_rows import RowStats, grads_launch, stats_launch
from repo_ops.kernels.tiled_logps import tiled_launches

# Those of Qwen3, whose rows start at 16-byte boundaries, and of Qwen2.5's tokenizer, whose rows start anywhere.
_VOCABULARIES = {"aligned": 151936, "odd": 151665}
_ROWS, _TOKENS, _GROUPED = 2048, 131072, 4096
# Llama 3's head; and a hidden size that fills no step, in rows off the 16-byte boundaries.
_HIDDEN, _ENTRIES, _ODD_HIDDEN = 4096, 128256, 1001


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, and the bytes that it moves for each element by its docstring's count."""

    name: str
    launch: Launch
    element: str
    bytes_per_element: float


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _row_cases(architecture: str) -> Iterator[Case]:
    """Each dtype and each alignment, bare and with every option; not every product of them."""
    vector, ids = _meta(_ROWS), _meta(_ROWS, dtype=torch.int64)
    given = RowStats(vector, vector, vector, vector)
    for dtype, vocabulary in itertools.product((torch.float32, torch.bfloat16, torch.float16), _VOCABULARIES):
        tile = _meta(_ROWS, _VOCABULARIES[vocabulary], dtype=dtype)
        label, size = f"{_name(dtype)} {vocabulary}", tile.element_size()
        options: dict[str, Any] = {"bias": _meta(tile.shape[1]), "inv_temperature": vector, "softcap": 30.0}
        stats = partial(stats_launch, tile, ids, architecture=architecture)
        grads = partial(grads_launch, tile, ids, given, vector, architecture=architecture)
        if dtype != torch.float16:
            everything = stats(with_entropy=True, with_sum_p2=True, **options)[0]
            yield Case(f"row_stats {label} everything", everything, "logit", size)
            yield Case(f"row_grads {label} everything", grads(vector, **options)[0], "logit", 2 * size)
        if vocabulary == "aligned":
            yield Case(f"row_stats {label}", stats()[0], "logit", size)
            yield Case(f"row_grads {label}", grads()[0], "logit", 2 * size)
        if dtype == torch.float32:
            yield Case(f"row_grads {label} to bfloat16", grads(vector, out_dtype=torch.bfloat16)[0], "logit", size + 2)
            if vocabulary == "aligned":
                yield Case(f"row_grads {label} to float16", grads(out_dtype=torch.float16)[0], "logit", size + 2)


def _product_cases(architecture: str) -> Iterator[Case]:
    """Plain in each dtype; with every option, and with a hidden size that nothing fits, in one; the join of shares."""
    targets, vector = _meta(_ROWS, dtype=torch.int64), _meta(_ROWS)
    wanted = {"with_entropy": True, "with_sum_p2": True, "with_argmax": True}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        operands = _meta(_ROWS, _HIDDEN, dtype=dtype), _meta(_ENTRIES, _HIDDEN, dtype=dtype)
        launches, _ = tiled_launches(*operands, targets, architecture=architecture)
        yield Case(f"tiled_logps {_name(dtype)}", launches[0], "logit", _product_bytes(launches[0], _HIDDEN))
        if dtype == torch.bfloat16:
            options: dict[str, Any] = {"bias": _meta(_ENTRIES), "inv_temperature": vector, "softcap": 30.0, **wanted}
            options |= {"rows": targets, "adapter": (_meta(_ROWS, 16, dtype=dtype), _meta(_ENTRIES, 16, dtype=dtype))}
            everything, _ = tiled_launches(*operands, targets, architecture=architecture, **options)
            bytes_each = _product_bytes(everything[0], _HIDDEN)
            yield Case("tiled_logps bfloat16 everything", everything[0], "logit", bytes_each)
            yield Case("join_shares everything", everything[1], "row's share", 16)
            yield Case("join_shares", launches[1], "row's share", 8)
            odd = _meta(_ROWS, _ODD_HIDDEN, dtype=dtype), _meta(_ENTRIES, _ODD_HIDDEN, dtype=dtype)
            uneven, _ = tiled_launches(*odd, targets, architecture=architecture)
            yield Case("tiled_logps bfloat16 odd", uneven[0], "logit", _product_bytes(uneven[0], _ODD_HIDDEN))


def _product_bytes(launch: Launch, hidden_size: int) -> float:
    """Of the operands' tiles, for each logit; nearly all come from L2."""
    config, itemsize = launch.config, launch.arguments["weight"].element_size()
    return hidden_size * itemsize * (1 / config.block + 1 / config.columns)


def _ratio_cases(architecture: str) -> Iterator[Case]:
    token = _meta(_TOKENS)
    plain: dict[str, Any] = {"old_logps": token, "weights": token, "low": 0.8, "high": 1.28}
    full = plain | {"ref_logps": token, "kl_weights": token, "correction": token, "delta": 3.0, "beta": 0.04}
    bounds = full | {"low": token, "high": token}
    for level, name, options in (
        ("token", "plain", plain),
        ("token", "everything", full),
        ("token", "bounds by token", bounds),
        ("sequence", "everything", full),
        ("prefix", "everything", full),
    ):
        starts = None if level == "token" else _meta(129, dtype=torch.int64)
        launch, _ = ratio_launch(token, token, level=level, cu_seqlens=starts, architecture=architecture, **options)
        moved = _bytes_by_element(launch, _TOKENS)
        # read again: logps for the KL term; logps and old_logps for a mean or a shifted log-ratio. A sequence's
        # gradient is written, read and written again.
        moved += 4 * ("ref_logps" in options) + 8 * (level != "token") + 8 * (level == "sequence")
        yield Case(f"clipped_ratio {level} {name}", launch, "token", moved)


def _group_cases(architecture: str) -> Iterator[Case]:
    rewards, starts, flags = _meta(_GROUPED), _meta(257, dtype=torch.int64), _meta(_GROUPED, dtype=torch.bool)
    for mode in ("split", "mixed"):
        launch, _ = advantages_launch(rewards, starts, off_policy=flags, mode=mode, architecture=architecture)
        yield Case(f"group_advantages {mode}", launch, "member", _bytes_by_element(launch, _GROUPED))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_by_element(launch: Launch, count: int) -> int:
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor) and value.numel() == count]
    return sum(tensor.element_size() for tensor in tensors)


def cases(architecture: str) -> list[Case]:
    """Every kernel with its launch configuration for `architecture`: each dtype, alignment and option at least once."""
    return [
        *_row_cases(architecture),
        *_product_cases(architecture),
        *_ratio_cases(architecture),
        *_group_cases(architecture),
    ]
