"""`linear_policy_loss` as a node of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from repo_ops.compiled import gradients
from repo_ops.compiled.arguments import Constants, HeadArguments, as_tensor, counts_of
from repo_ops.compiled.calls import constants_of, kept
from repo_ops.head.inputs import exact_dtype
from repo_ops.linear_policy_loss import Call, evaluate, over_support, prepare
from repo_ops.loss_inputs import ObjectiveLike, PolicyLoss
from repo_ops.metrics import Stat
from repo_ops.options import Options
from repo_ops.reduce import NumItemsLike

GIVEN = ("advantages", "old_logps", "ref_logps", "sampler_logps", "off_policy", "cu_seqlens")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    given: Mapping[str, Tensor | None],
    extras: Mapping[str, Tensor] | None,
    num_items: NumItemsLike | None,
    arguments: HeadArguments,
    off_policy_coef: float,
    objective: ObjectiveLike,
) -> PolicyLoss:
    """What `repo_ops.linear_policy_loss` returns, as nodes of the graph that is being traced."""
    others, is_number = arguments.tensors(), not isinstance(arguments.temperature, Tensor)
    extras = {} if extras is None else extras
    counted, counts = counts_of(num_items)
    are_numbers = tuple(not isinstance(count, Tensor) for count in counts)
    if isinstance(objective, FunctionType):
        id(objective)  # Dynamo then guards on it; otherwise on its code alone, which closures share
    call = kept(
        hidden.device.type, arguments.softcap, arguments.logit_scale, arguments.options, is_number, (), objective,
        tuple(extras), counted, are_numbers,
    )  # fmt: skip
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, *others[:3])]
    values = [given[name] for name in GIVEN]
    present = tuple(value is not None for value in values)
    per_sequence = tuple(value.ndim == 1 for value in (given["advantages"], *extras.values()) if value is not None)
    with_entropy, *names = _seen(call, targets.ndim, present, per_sequence, tuple(v.ndim for v in extras.values()))
    numbers = [
        as_tensor(off_policy_coef),
        *(as_tensor(count) if number else count for count, number in zip(counts, are_numbers)),
    ]
    loss, logps, entropy, sums = _Loss.apply(
        hidden, weight, *others, targets, values, list(extras.values()), numbers, call, needs, len(names)
    )
    metrics = {name: Stat(sums[i, 0], sums[i, 1]) for i, name in enumerate(names)}
    return PolicyLoss(loss, logps, entropy if with_entropy else None, metrics)


@torch.compiler.assume_constant_result
def _seen(
    call: int, ndim: int, present: tuple[bool, ...], per_sequence: tuple[bool, ...], extra_ndims: tuple[int, ...]
) -> tuple[Any, ...]:
    """Whether a call returns entropies, and the names of its metrics, found by one over a single token."""
    # here on the CPU, there perhaps not
    constants, shape = constants_of(call)._replace(options=Options(), temperature_is_number=True), (1,) * ndim
    given: dict[str, Any] = {name: torch.ones(shape) if there else None for name, there in zip(GIVEN, present)}
    given["advantages"] = torch.ones(1)
    if given["off_policy"] is not None:
        given["off_policy"] = torch.zeros(1, dtype=torch.bool)
    if given["cu_seqlens"] is not None:
        given["cu_seqlens"] = torch.tensor([0, 1])
    given["extras"] = {
        name: torch.zeros(1 if alone else (1,) * rank)
        for name, alone, rank in zip(constants.extras, per_sequence[1:], extra_ndims, strict=True)
    }
    tensors: list[Tensor | None] = [torch.zeros((*shape, 1)), torch.zeros((2, 1)), None, None, None]
    found = _prepared(
        constants, tensors, torch.zeros(shape, dtype=torch.int64), [torch.ones(()), None],
        {**given, "num_items": None, "off_policy_coef": 1.0, "copies": True},
    )  # fmt: skip
    loss, stats, _ = evaluate(found, [False] * 5)
    return (stats.entropy is not None, *found.result(loss, stats.logps, stats.entropy).metrics)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *others, targets, given, extras, numbers, call, needs, num_metrics = arguments
        loss, logps, entropy, sums, *grads = torch.ops.repo_ops.linear_policy_loss(
            hidden, weight, targets, others, given, extras, numbers, call, needs, num_metrics
        )
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, *others[:3])]
        ctx.mark_non_differentiable(logps, entropy, sums)
        return loss, logps, entropy, sums

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found = [
            (grad * dloss.to(grad.dtype)).to(dtype) if need else None
            for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
        ]
        return (*found, *[None] * 10)


torch.library.define(
    "repo_ops::linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, Tensor?[] given, Tensor[] extras,"
    " Tensor[] numbers, int call, bool[] needs, int num_metrics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("repo_ops::linear_policy_loss", "default")
def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    given: list[Tensor | None],
    extras: list[Tensor],
    numbers: list[Tensor],
    call: int,
    needs: list[bool],
    num_metrics: int,
) -> tuple[Tensor, ...]:
    constants, tensors, exact = constants_of(call), [hidden, weight, *others[:3]], exact_dtype(hidden, weight)
    arguments: dict[str, Any] = dict(zip(GIVEN, given, strict=True))
    arguments |= {
        "extras": dict(zip(constants.extras, extras, strict=True)),
        "num_items": constants.num_items(numbers[1:]),
        "off_policy_coef": numbers[0].item(),
        "copies": others[5] is None,
    }
    with gradients.autograd_on():  # coefficients are derivatives of the objective
        leaves = [None if t is None else t.detach() for t in tensors]
        if others[5] is not None:
            # by autograd, which would round the gradients of float16 leaves before a gradient scaler multiplies them
            leaves = [None if t is None else t.to(gradients.gradient_dtype(t, exact)) for t in leaves]
        leaves = [None if t is None else t.requires_grad_(need) for t, need in zip(leaves, needs)]
        prepared = _prepared(constants, leaves, targets, others[3:5], arguments)
        if others[5] is None:
            with torch.no_grad():
                loss, stats, gathered = evaluate(prepared, needs)
                grads = gathered.finish()
                found = prepared.result(loss, stats.logps, stats.entropy)
        else:
            found = over_support(prepared, others[5])
            grads = gradients.of_leaves([found.loss], leaves)
    # an operator's results may share no memory with each other or with its arguments
    entropy = hidden.new_empty(0, dtype=found.logps.dtype) if found.entropy is None else found.entropy.clone()
    sums = [torch.stack([part.to(torch.float32) for part in stat]) for stat in found.metrics.values()]
    if len(sums) != num_metrics:
        raise RuntimeError(
            f"objective: expected the {num_metrics} metrics that it had while tracing, got {len(sums)}; "
            "their names may not depend on values"
        )
    shaped = gradients.shaped(grads, tensors, needs)
    return (found.loss.detach().clone(), found.logps.clone(), entropy, torch.stack(sums), *shaped)


@torch.library.register_fake("repo_ops::linear_policy_loss")
def _loss_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    given: list[Tensor | None],
    extras: list[Tensor],
    numbers: list[Tensor],
    call: int,
    needs: list[bool],
    num_metrics: int,
) -> tuple[Tensor, ...]:
    exact, tensors = exact_dtype(hidden, weight), [hidden, weight, *others[:3]]
    has_entropy = "entropy" in constants_of(call).objective.reads
    dtypes = [None if t is None else gradients.gradient_dtype(t, exact) for t in tensors]
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(targets.shape, dtype=exact),
        hidden.new_empty(targets.shape if has_entropy else 0, dtype=exact),
        hidden.new_empty((num_metrics, 2), dtype=torch.float32),
        *gradients.empty(tensors, needs, dtypes),
    )


def _prepared(
    constants: Constants,
    tensors: list[Tensor | None],
    targets: Tensor,
    others: list[Tensor | None],
    arguments: dict[str, Any],
) -> Call:
    hidden, weight, *rest = tensors
    temperature, mask = others
    assert hidden is not None
    assert weight is not None
    settings = constants.settings([*rest, temperature])
    return prepare(hidden, weight, targets, mask, settings, constants.objective, constants.options, **arguments)
