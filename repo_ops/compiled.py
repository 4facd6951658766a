"""The fused head under torch.compile: three operators that a graph holds as they are, so that fullgraph=True passes.

A compiled function cannot look into the sweep (masks give shapes that depend on data, objectives are Python). So while
Dynamo traces, the public functions build calls of `torch.ops.repo_ops.*` instead, whose implementations are the eager
ones. An operator takes tensors and an int: what is constant in a call (an objective, options) is kept in a table, and
the int is its place there. Outside of torch.compile none of this is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.arguments import layout
from repo_ops.head.gradients import result_dtype
from repo_ops.head.inputs import RowStats, Wanted, exact_dtype
from repo_ops.head.plan import make_plan
from repo_ops.head_arguments import HeadSettings, head_inputs
from repo_ops.loss_inputs import ObjectiveLike, PolicyLoss
from repo_ops.metrics import Stat
from repo_ops.objectives import Objective, as_objective
from repo_ops.options import Options
from repo_ops.reduce import NumItems, NumItemsLike

if TYPE_CHECKING:
    from repo_ops.linear_policy_loss import Call

GIVEN = ("advantages", "old_logps", "ref_logps", "sampler_logps", "off_policy", "cu_seqlens")


class HeadTensors(NamedTuple):
    """The optional arguments of the head that may be tensors."""

    bias: Tensor | None
    temperature: Tensor | float
    mask: Tensor | None
    support_ids: Tensor | None
    adapter: tuple[Tensor, Tensor] | None
    tp_group: dist.ProcessGroup | None

    def flat(self) -> list[Tensor | None]:
        """bias, adapter hidden, adapter weight, temperature per token, mask, support_ids; what an operator takes."""
        if self.tp_group is not None:
            raise ValueError(
                "tp_group: expected None under torch.compile; leave the loss out of the compiled region "
                "(torch.compiler.disable), its GEMMs gain nothing from it"
            )
        temperature = self.temperature if isinstance(self.temperature, Tensor) else None
        return [self.bias, *(self.adapter or (None, None)), temperature, self.mask, self.support_ids]


@dataclass(frozen=True)
class Constants:
    """What is not a tensor in a call."""

    wanted: Wanted
    temperature: float
    softcap: float | None
    logit_scale: float
    options: Options
    objective: Any = None
    """An Objective."""
    off_policy_coef: float = 1.0
    extras: tuple[str, ...] = ()
    counted: str | None = None
    """How num_items was spelt: None, "one", "pair" or "NumItems"."""
    numbers: tuple[bool, ...] = ()
    """Which of its counts were Python numbers."""

    def settings(self, others: list[Tensor | None]) -> HeadSettings:
        """The head's settings from what `HeadTensors.flat` gave."""
        bias, low, up, temperature = others[:4]
        adapter = None if low is None or up is None else (low, up)
        given = self.temperature if temperature is None else temperature
        return HeadSettings(bias, given, self.softcap, self.logit_scale, adapter)

    def num_items(self, counts: list[Tensor]) -> NumItemsLike | None:
        """num_items as it was spelt."""
        given = [count.item() if number else count for count, number in zip(counts, self.numbers, strict=True)]
        if self.counted is None:
            return None
        if self.counted == "NumItems":
            return NumItems(*given)
        return given[0] if self.counted == "one" else (given[0], given[1])


_CALLS: list[Constants] = []


@functools.cache
def _chosen(objective: ObjectiveLike) -> Objective:
    """The objective of a name or a function, the same object each time."""
    return as_objective(objective)


@torch.compiler.assume_constant_result
def _kept(*values: Any) -> int:
    """The place in the table of the Constants of these values; traced calls that agree share one."""
    wanted = Wanted(*values[0])  # Dynamo gives a named tuple's values back, not its type
    constants = Constants(wanted, *values[1:])
    if constants.objective is not None and not isinstance(constants.objective, Objective):
        constants = replace(constants, objective=_chosen(constants.objective))
    for place, known in enumerate(_CALLS):
        # an objective may be a user's, whose equality is its own affair
        same = all(
            getattr(known, each.name) == getattr(constants, each.name)
            for each in fields(Constants)
            if each.name != "objective"
        )
        if same and known.objective is constants.objective:
            return place
    _CALLS.append(constants)
    return len(_CALLS) - 1


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tensors: HeadTensors,
    softcap: float | None,
    logit_scale: float,
    wanted: Wanted,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `repo_ops.linear_stats` returns, as nodes of the graph that is being traced."""
    _check_options(options)
    others = tensors.flat()
    temperature = 1.0 if isinstance(tensors.temperature, Tensor) else tensors.temperature
    call = _kept((wanted[0], wanted[1], wanted[2]), temperature, softcap, logit_scale, options)
    logps, *found = _Stats.apply(hidden, weight, *others, targets, call)
    entropy, sum_p2, is_argmax = (values if want else None for values, want in zip(found, wanted, strict=True))
    return logps, entropy, sum_p2, is_argmax


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    given: Mapping[str, Tensor | None],
    extras: Mapping[str, Tensor] | None,
    num_items: NumItemsLike | None,
    tensors: HeadTensors,
    off_policy_coef: float,
    softcap: float | None,
    logit_scale: float,
    objective: ObjectiveLike,
    options: Options,
) -> PolicyLoss:
    """What `repo_ops.linear_policy_loss` returns, as nodes of the graph that is being traced."""
    _check_options(options)
    others = tensors.flat()
    temperature = 1.0 if isinstance(tensors.temperature, Tensor) else tensors.temperature
    extras = {} if extras is None else extras
    counted, counts = _counts(num_items)
    numbers = tuple(not isinstance(count, Tensor) for count in counts)
    call = _kept(
        (), temperature, softcap, logit_scale, options, objective, off_policy_coef, tuple(extras), counted, numbers
    )
    differentiable = [hidden, weight, *others[:3]]
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in differentiable]
    arguments = [given[name] for name in GIVEN]
    present = tuple(value is not None for value in arguments)
    per_sequence = tuple(value.ndim == 1 for value in (given["advantages"], *extras.values()) if value is not None)
    with_entropy, *names = _seen(call, targets.ndim, present, per_sequence, tuple(v.ndim for v in extras.values()))
    loss, logps, entropy, sums = _Loss.apply(
        hidden, weight, *others, targets, arguments, list(extras.values()),
        [torch.as_tensor(count, dtype=torch.float64) if number else count for count, number in zip(counts, numbers)],
        call, needs, len(names),
    )  # fmt: skip
    metrics = {name: Stat(sums[i, 0], sums[i, 1]) for i, name in enumerate(names)}
    return PolicyLoss(loss, logps, entropy if with_entropy else None, metrics)


def _check_options(options: Options) -> None:
    if options.accumulate_weight_grad:
        name = "options.accumulate_weight_grad"
        raise ValueError(f"{name}: expected False under torch.compile, whose graphs have no .grad; leave it False")


def _counts(num_items: NumItemsLike | None) -> tuple[str | None, list[Any]]:
    if num_items is None:
        return None, []
    if isinstance(num_items, NumItems):
        n = num_items
        return "NumItems", [n.sequences, n.tokens, n.off_policy_sequences, n.off_policy_tokens]
    return ("pair", list(num_items)) if isinstance(num_items, tuple) else ("one", [num_items])


class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *others, targets, call = arguments
        found = torch.ops.repo_ops.linear_stats(hidden, weight, targets, others, call)
        logps, entropy, sum_p2, is_argmax, row_max, log_sum = found
        ctx.save_for_backward(hidden, weight, *others, targets, logps, row_max, log_sum, entropy)
        ctx.call = call
        ctx.mark_non_differentiable(sum_p2, is_argmax)
        return logps, entropy, sum_p2, is_argmax

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor, dentropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, *others, targets, logps, row_max, log_sum, entropy = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        grads = torch.ops.repo_ops.linear_stats_backward(
            hidden, weight, targets, others, [logps, row_max, log_sum, entropy], dlogps, dentropy, ctx.call, needs
        )
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*found, None, None, None, None, None)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *others, targets, given, extras, counts, call, needs, num_metrics = arguments
        loss, logps, entropy, sums, *grads = torch.ops.repo_ops.linear_policy_loss(
            hidden, weight, targets, others, given, extras, counts, call, needs, num_metrics
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
    "repo_ops::linear_stats",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, int call)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "repo_ops::linear_stats_backward",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, Tensor[] stats, Tensor? dlogps, Tensor? dentropy,"
    " int call, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "repo_ops::linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor?[] others, Tensor?[] given, Tensor[] extras,"
    " Tensor[] counts, int call, bool[] needs, int num_metrics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("repo_ops::linear_stats", "default")
def _stats_now(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: list[Tensor | None], call: int
) -> tuple[Tensor, ...]:
    from repo_ops.head import support, sweep

    constants = _CALLS[call]
    mask, support_ids = others[4:]
    where = layout(targets, mask, None)
    head = head_inputs(hidden, weight, targets, where, constants.settings(others))
    plan = make_plan(head, constants.options)
    if support_ids is None:
        stats = sweep.statistics(head, plan, wanted=constants.wanted)
        found = [stats.logps, stats.entropy, stats.sum_p2, stats.is_argmax, stats.row_max, stats.log_sum]
    else:
        ids = support.checked(support_ids, head, where)
        found = [*support.statistics(head, ids, plan, constants.wanted), None, None]
    absent = hidden.new_empty
    return tuple(
        absent(0, dtype=torch.bool if i == 3 else head.exact_dtype) if values is None else where.put(values)
        for i, values in enumerate(found)
    )


@torch.library.register_fake("repo_ops::linear_stats")
def _stats_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, others: list[Tensor | None], call: int
) -> tuple[Tensor, ...]:
    exact, wanted, has_support = exact_dtype(hidden, weight), _CALLS[call].wanted, others[5] is not None
    there = (True, *wanted, not has_support, not has_support)
    return tuple(
        hidden.new_empty(targets.shape if present else 0, dtype=torch.bool if i == 3 else exact)
        for i, present in enumerate(there)
    )


@torch.library.impl("repo_ops::linear_stats_backward", "default")
def _stats_backward_now(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    stats: list[Tensor],
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    call: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    from repo_ops.linear_stats import head_stats, stats_gradients

    constants, tensors = _CALLS[call], [hidden, weight, *others[:3]]
    mask, support_ids = others[4:]
    where = layout(targets, mask, None)
    arriving = [None if d is None or not d.numel() else where.take(d) for d in (dlogps, dentropy)]
    d_logps, d_entropy = arriving
    if support_ids is None:
        head = head_inputs(hidden, weight, targets, where, constants.settings(others))
        plan = make_plan(head, constants.options)
        logps, row_max, log_sum, entropy = (where.take(s) if s.numel() else None for s in stats)
        assert logps is not None
        assert row_max is not None
        assert log_sum is not None
        known = RowStats(logps, row_max, log_sum, entropy)
        return _shaped(stats_gradients(head, plan, known, d_logps, d_entropy, needs), tensors, needs)
    with _autograd():
        leaves = [t.detach().requires_grad_(need) if t is not None else None for t, need in zip(tensors, needs)]
        settings = constants.settings([*leaves[2:], *others[3:]])
        assert leaves[0] is not None
        assert leaves[1] is not None
        found = head_stats(
            leaves[0], leaves[1], targets, where, settings, constants.wanted, support_ids, constants.options
        )
        pairs = [(out, grad) for out, grad in zip(found[:2], arriving) if out is not None and grad is not None]
        grads = _gradients([out for out, _ in pairs], leaves, [grad for _, grad in pairs])
    return _shaped(grads, tensors, needs)


@torch.library.register_fake("repo_ops::linear_stats_backward")
def _stats_backward_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    stats: list[Tensor],
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    call: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        hidden.new_empty(t.shape if need else 0, dtype=t.dtype) if t is not None else hidden.new_empty(0)
        for t, need in zip([hidden, weight, *others[:3]], needs, strict=True)
    )


@torch.library.impl("repo_ops::linear_policy_loss", "default")
def _loss_now(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    given: list[Tensor | None],
    extras: list[Tensor],
    counts: list[Tensor],
    call: int,
    needs: list[bool],
    num_metrics: int,
) -> tuple[Tensor, ...]:
    from repo_ops.linear_policy_loss import evaluate, over_support

    constants, tensors, exact = _CALLS[call], [hidden, weight, *others[:3]], exact_dtype(hidden, weight)
    arguments: dict[str, Any] = dict(zip(GIVEN, given, strict=True))
    arguments |= {
        "extras": dict(zip(constants.extras, extras, strict=True)),
        "num_items": constants.num_items(counts),
        "off_policy_coef": constants.off_policy_coef,
    }
    with _autograd():  # coefficients are derivatives of the objective
        leaves = [None if t is None else t.detach() for t in tensors]
        if others[5] is not None:
            # by autograd, which would round the gradients of float16 leaves before a gradient scaler multiplies them
            leaves = [None if t is None else t.to(_gradient_dtype(t, exact)) for t in leaves]
        leaves = [None if t is None else t.requires_grad_(need) for t, need in zip(leaves, needs)]
        prepared = _prepared(constants, leaves, targets, others[3:5], arguments)
        if others[5] is None:
            with torch.no_grad():
                loss, stats, gathered = evaluate(prepared, needs)
                grads = gathered.finish()
                found = prepared.result(loss, stats.logps, stats.entropy)
        else:
            found = over_support(prepared, others[5])
            grads = _gradients([found.loss], leaves)
    # an operator's results may share no memory with each other or with its arguments
    entropy = hidden.new_empty(0, dtype=found.logps.dtype) if found.entropy is None else found.entropy.clone()
    sums = [torch.stack([part.to(torch.float32) for part in stat]) for stat in found.metrics.values()]
    if len(sums) != num_metrics:
        raise RuntimeError(
            f"objective: expected the {num_metrics} metrics that it had while tracing, got {len(sums)}; "
            "their names may not depend on values"
        )
    shaped = _shaped(grads, tensors, needs)
    return (found.loss.detach().clone(), found.logps.clone(), entropy, torch.stack(sums), *shaped)


def _prepared(
    constants: Constants,
    tensors: list[Tensor | None],
    targets: Tensor,
    others: list[Tensor | None],
    arguments: dict[str, Any],
) -> Call:
    from repo_ops.linear_policy_loss import prepare

    hidden, weight, *rest = tensors
    temperature, mask = others
    assert hidden is not None
    assert weight is not None
    assert constants.objective is not None
    settings = constants.settings([*rest, temperature])
    return prepare(hidden, weight, targets, mask, settings, constants.objective, constants.options, **arguments)


def _gradients(
    outputs: list[Tensor], leaves: list[Tensor | None], arriving: list[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of the leaves that require one, None for the others."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(torch.autograd.grad(outputs, wanted, arriving) if wanted else ())
    return [next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


@torch.library.register_fake("repo_ops::linear_policy_loss")
def _loss_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    others: list[Tensor | None],
    given: list[Tensor | None],
    extras: list[Tensor],
    counts: list[Tensor],
    call: int,
    needs: list[bool],
    num_metrics: int,
) -> tuple[Tensor, ...]:
    exact, constants = exact_dtype(hidden, weight), _CALLS[call]
    assert constants.objective is not None
    has_entropy = "entropy" in constants.objective.reads
    grads = [
        hidden.new_empty(t.shape if need else 0, dtype=_gradient_dtype(t, exact) if need else t.dtype)
        if t is not None
        else hidden.new_empty(0)
        for t, need in zip([hidden, weight, *others[:3]], needs, strict=True)
    ]
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(targets.shape, dtype=exact),
        hidden.new_empty(targets.shape if has_entropy else 0, dtype=exact),
        hidden.new_empty((num_metrics, 2), dtype=torch.float32),
        *grads,
    )


def _gradient_dtype(tensor: Tensor, exact: torch.dtype) -> torch.dtype:
    return result_dtype(tensor, exact, rounds_float16=False)


def _shaped(grads: list[Tensor | None], tensors: list[Tensor | None], needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients in the shapes of `tensors`, an empty tensor for what is not needed."""
    like = next(t for t in tensors if t is not None)
    return tuple(
        like.new_empty(0, dtype=like.dtype if t is None else t.dtype) if g is None or t is None or not need
        else g.reshape(t.shape)
        for g, t, need in zip(grads, tensors, needs, strict=True)
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _seen(
    call: int, ndim: int, present: tuple[bool, ...], per_sequence: tuple[bool, ...], extra_ndims: tuple[int, ...]
) -> tuple[Any, ...]:
    """Whether a call returns entropies, and the names of its metrics, found by one over a single token."""
    from repo_ops.linear_policy_loss import evaluate

    constants, shape = replace(_CALLS[call], options=Options()), (1,) * ndim  # here on the CPU, there perhaps not
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
        constants, tensors, torch.zeros(shape, dtype=torch.int64), [None, None],
        {**given, "num_items": None, "off_policy_coef": 1.0},
    )  # fmt: skip
    loss, stats, _ = evaluate(found, [False] * 5)
    return (stats.entropy is not None, *found.result(loss, stats.logps, stats.entropy).metrics)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, where the dispatcher may have switched its keys off."""
    keys = torch._C.DispatchKey
    allow = torch._C._SetExcludeDispatchKeyGuard
    with allow(keys.AutogradFunctionality, False), allow(keys.ADInplaceOrView, False), torch.enable_grad():
        yield
