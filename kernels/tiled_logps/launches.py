"""Log-probabilities from hidden states: arguments checked, cut into launches, run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from repo_ops.kernels import tune
from repo_ops.kernels.elementwise import elementwise_arguments
from repo_ops.kernels.launch import (
    Config,
    Launch,
    architecture_of,
    check_runnable,
    check_vector,
    interpreting,
    launch_config,
)
from repo_ops.kernels.logit_rows import RowStats, new_stats
from repo_ops.kernels.tiled_logps.product import aligned, check_adapter, check_product, product_arguments
from repo_ops.kernels.tiled_logps.shares import join_shares_kernel, tiled_logps_kernel

_ROWS_A_LAUNCH = 16384
"""Bounds the memory between the kernels: 8 to 16 bytes for each row and `Config.share` entries of the vocabulary."""
_JOIN_ROWS = 128
_WIDEST_STEP = 64
"""No row of the launch table steps further along the hidden states."""


def tiled_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
) -> RowStats:
    """Log-probability of each row's target, with the row's max and log-sum, from hidden states; no logits in memory.

    Equals `row_stats(tile, targets, ...)` for, in float32,
        tile = hidden[rows] @ weight.T + adapter[0][rows] @ adapter[1].T
    A row's bits depend on the weight and on the configuration, not on how many rows are computed with it.

    Args:
        hidden: [M, D] float32, bfloat16 or float16; rows may lie further apart than D. Where the dtypes of hidden and
            weight differ, both are multiplied as float32, far from the speed of the tensor cores.
        weight: [V, D]. Fastest where D is a multiple of 64 and rows start at 16-byte boundaries.
        targets: [N] int64 in [0, V). An id outside, -1 for a target in another rank's shard of the vocabulary, answers
            NaN in that row's logps and False in is_argmax; the other statistics are those of the shard.
        rows: [N] int64 positions in hidden, in any order, inside [0, M); None where N = M and all are wanted.
        bias, inv_temperature, logit_scale, softcap: as for `row_stats`; inv_temperature a float or [N].
        adapter: low-rank addition to the logits, ([M, R], [V, R]) of the dtypes of hidden and weight.
    Returns:
        RowStats of [N] tensors; entropy, sum_p2 and is_argmax only where asked for. The target is kept out of the sums
        until the end, so log-probability and entropy have full relative precision where it is nearly certain; elsewhere
        they are off by a few 1e-7. A row of nothing but -inf is NaN.
    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number, named.
    Source: online softmax over tiles, arXiv:1805.02867; the long axis split, with a second kernel, arXiv:2311.01282.
    """
    check_runnable("hidden", hidden)
    make = partial(
        tiled_launches,
        hidden,
        weight,
        targets,
        rows=rows,
        bias=bias,
        inv_temperature=inv_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        adapter=adapter,
        with_entropy=with_entropy,
        with_sum_p2=with_sum_p2,
        with_argmax=with_argmax,
        architecture=architecture_of(hidden.device),
    )
    config = None
    if tune.enabled():
        kernel, dtype = _tuning_key(hidden, weight)
        config = tune.tuned_config(kernel, hidden, lambda config: make(config=config), dtype=dtype)
    launches, stats = make(config=config)
    for launch in launches:
        launch.run(hidden.device)
    return stats


def tiled_launches(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    inv_temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    with_entropy: bool = False,
    with_sum_p2: bool = False,
    with_argmax: bool = False,
    config: Config | None = None,
    architecture: str,
) -> tuple[list[Launch], RowStats]:
    """The launches behind `tiled_logps`, two for each 16384 rows, and the tensors that they fill."""
    head = check_product("hidden", hidden, "weight", weight)
    num_rows, vocabulary, device = targets.numel(), weight.shape[0], hidden.device
    if rows is None and hidden.shape[0] != num_rows:
        raise ValueError(
            f"targets: expected shape [{hidden.shape[0]}] like the rows of hidden, got {list(targets.shape)};"
            " pass rows to compute some of them"
        )
    scaling = elementwise_arguments(num_rows, vocabulary, device, bias, inv_temperature, logit_scale, softcap)
    vectors = {
        "targets": check_vector("targets", targets, num_rows, (torch.int64,), device),
        "rows": check_vector("rows", rows, num_rows, (torch.int64,), device),
        "inv_temperature": scaling["inv_temperature"],
    }
    low_rank = check_adapter(adapter, hidden, weight)
    if config is None:
        kernel, dtype = _tuning_key(hidden, weight)
        config = launch_config(kernel, architecture, dtype)
    constants = {
        **product_arguments(head, low_rank, config),
        **scaling,
        "weight": weight,
        "adapter_weight": low_rank.weight,
        "V": vocabulary,
        # numpy has no bfloat16 product
        "UPCAST": hidden.dtype != weight.dtype or interpreting(),
    }
    stats = new_stats(hidden, num_rows, with_entropy, with_sum_p2, with_argmax)
    fields = 2 + with_entropy + with_sum_p2
    height = 1 + fields * triton.cdiv(vocabulary, config.share)
    partial = stats.logps.new_empty(height * min(num_rows, _ROWS_A_LAUNCH))
    launches = []
    for start in range(0, num_rows, _ROWS_A_LAUNCH):
        part = slice(start, min(start + _ROWS_A_LAUNCH, num_rows))
        states = {"hidden": hidden, "adapter_hidden": low_rank.hidden}
        if rows is None:
            states = {name: None if value is None else value[part] for name, value in states.items()}
        own = {name: None if value is None else value[part] for name, value in vectors.items()}
        found = RowStats._make(None if field is None else field[part] for field in stats)
        launches += _launch_pair({**constants, **states, **own, "partial": partial}, found, config)
    return launches, stats


def _tuning_key(hidden: Tensor, weight: Tensor) -> tuple[str, torch.dtype]:
    """Name and dtype of the launch table's row: loads of single elements want smaller tiles than loads of 16 bytes."""
    whole = aligned(hidden, weight) and hidden.shape[-1] % _WIDEST_STEP == 0
    return "tiled_logps" if whole else "tiled_logps_uneven", torch.promote_types(hidden.dtype, weight.dtype)


def _launch_pair(arguments: dict[str, Any], stats: RowStats, config: Config) -> list[Launch]:
    """The product and the join of some rows; all pairs of a call use the same memory in between, one after another."""
    targets, vocabulary = arguments["targets"], arguments["V"]
    num_rows, num_shares = len(targets), triton.cdiv(vocabulary, config.share)
    blocks = {
        "BLOCK": config.block,
        "COLUMNS": config.columns,
        "SHARE": config.share,
        "GROUP": config.group,
        "ENTROPY": stats.entropy is not None,
        "SUM_P2": stats.sum_p2 is not None,
    }
    programs = triton.cdiv(num_rows, config.block) * num_shares
    product = Launch(tiled_logps_kernel, programs, {**arguments, **blocks, "N": num_rows}, config)
    flags = None if stats.is_argmax is None else stats.is_argmax.view(torch.uint8)
    joined = {
        **stats._asdict(),
        "is_argmax": flags,
        "partial": arguments["partial"],
        "targets": targets,
        "N": num_rows,
        "V": vocabulary,
        "shares": num_shares,
        "BLOCK": _JOIN_ROWS,
    }
    join_config = Config(_JOIN_ROWS, 4, 1, config.device, config.shape, config.date)
    return [product, Launch(join_shares_kernel, triton.cdiv(num_rows, _JOIN_ROWS), joined, join_config)]
