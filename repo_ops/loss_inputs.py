"""What `policy_loss` and `linear_policy_loss` have in common: the per-token arguments of an objective, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from repo_ops import arguments
from repo_ops.arguments import Layout
from repo_ops.metrics import Metrics
from repo_ops.objectives import Objective
from repo_ops.reduce import NumItemsLike
from repo_ops.step_loss import SequenceWeights, TokenWeights
from repo_ops.tokens import Tokens

ObjectiveLike = str | Objective | Callable[[Tokens], Tensor]

NOT_FINITE = (
    "an infinity comes from a token that the policy could not have sampled: mask it; a NaN may be what "
    "linear_policy_loss gives where it skipped a token: linear_logps, or Options(all_logps=True), computes every one"
)


class PolicyLoss(NamedTuple):
    """A policy loss with what was seen on the way."""

    loss: Tensor
    """0-d float32 with a graph: this call's share of the step's loss."""
    logps: Tensor
    """Detached log-probabilities in the shape of targets; 0 where mask is 0, NaN where they were not computed."""
    entropy: Tensor | None
    """Detached entropies likewise; None unless the objective reads them."""
    metrics: Metrics
    """name -> Stat(total, count): detached sums over the tokens that were computed (see `live`), for `summarize`."""


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The live tokens of a call, everything but their current log-probabilities."""

    objective: Objective
    where: Layout
    weights: TokenWeights
    advantages: Tensor
    lengths: Tensor
    """[B] live tokens of each sequence, those known to be zero left out."""
    old_logps: Tensor | None
    ref_logps: Tensor | None
    sampler_logps: Tensor | None
    off_policy: Tensor | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    constant: Tensor | None = None
    """0-d, the loss of sequences without tokens; None: 0."""

    def tokens(self, logps: Tensor, entropy: Tensor | None, rows: slice, lengths: Tensor | None) -> Tokens:
        """Some live tokens with their log-probabilities; `lengths` of the whole sequences among them, or None."""

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        old_logps = logps.detach() if self.old_logps is None else self.old_logps[rows]
        sampler_logps, sampler_known = take(self.sampler_logps), None
        if sampler_logps is not None:
            # exp of a non-finite number would poison the sum over its sequence
            sampler_known = sampler_logps.isfinite()
            sampler_logps = torch.where(sampler_known, sampler_logps, old_logps)
        return Tokens(
            logps=logps,
            old_logps=old_logps,
            advantages=self.advantages[rows],
            lengths=None if self.objective.reach == "token" else lengths,  # as in a chunk, so that a false scope shows
            ref_logps=take(self.ref_logps),
            sampler_logps=sampler_logps,
            sampler_known=sampler_known,
            entropy=entropy,
            off_policy=take(self.off_policy),
            extras={name: values[rows] for name, values in self.extras.items()},
        )


def loss_inputs(
    objective: Objective,
    where: Layout,
    advantages: Tensor,
    *,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
    extras: Mapping[str, Tensor] | None,
    off_policy: Tensor | None,
    off_policy_coef: float,
    num_items: NumItemsLike | None,
    drop_zero_advantage: bool,
    dtype: torch.dtype,
) -> LossInputs:
    """The checked inputs, live tokens only; weights of `dtype`, that of the current log-probabilities.

    Raises:
        TypeError, ValueError: a shape, dtype or value is off, or an argument that the objective needs is missing.
    """
    where, num_sequences, owner, lengths = _with_sequences(where)
    device = owner.device
    per_token = _advantages(advantages, where, num_sequences, owner)
    if off_policy is not None:
        arguments.check_shape("off_policy", off_policy, (num_sequences,), "the sequences (True = replayed row)")
        if off_policy.dtype != torch.bool:
            raise TypeError(f"off_policy: expected bool, True for replayed rows, got {off_policy.dtype}")
        off_policy = off_policy.to(device)
        if old_logps is None:
            raise ValueError(
                "old_logps: expected the log-probabilities stored when replayed rows were sampled, got None; "
                "without them their ratio would silently be 1"
            )
    remedy = "leave replayed rows out instead of giving them no weight"
    arguments.check_number("off_policy_coef", off_policy_coef, "a finite number > 0", above=0, remedy=remedy)
    given = {"old_logps": old_logps, "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    live: dict[str, Tensor | None] = {}
    for name, values in given.items():
        if values is None and name in objective.reads:
            raise ValueError(f"{name}: expected a tensor, which this objective reads, got None")
        live[name] = None if values is None else _live_logps(name, values, where, device)
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras: expected a mapping of name to tensor, got {type(extras).__name__}")
    named = {name: _extra(name, values, where, num_sequences, owner) for name, values in (extras or {}).items()}
    if missing := sorted(objective.reads - {*given, "entropy", *named}):
        raise ValueError(
            f"extras: expected {', '.join(map(repr, missing))}, which this objective reads, got {[*named]}"
        )
    sequence_weights = SequenceWeights.of(
        objective,
        lengths,
        off_policy=off_policy,
        off_policy_coef=off_policy_coef,
        num_items=num_items,
        dtype=dtype,
    )
    found = LossInputs(
        objective,
        where,
        sequence_weights.spread(owner),
        per_token,
        lengths,
        **live,
        off_policy=None if off_policy is None else off_policy[owner],
        extras=named,
        constant=_constant(objective, sequence_weights.policy, lengths, advantages, extras or {}),
    )
    found = _without_zero_advantage(found) if drop_zero_advantage and objective.skips_zero_advantage else found
    # not sampler_logps: an engine that reports NaN loses that token, not the step
    for name, values in (("old_logps", found.old_logps), ("ref_logps", found.ref_logps)):
        if values is not None:
            ok = values.isfinite().all()
            arguments.check_values(name, ok, "finite numbers where a token is computed", NOT_FINITE)
    return found


def _with_sequences(where: Layout) -> tuple[Layout, int, Tensor, Tensor]:
    if where.num_sequences is None or where.owner is None or where.lengths is None:
        raise ValueError(
            "cu_seqlens: expected the boundaries [B + 1] of the packed sequences, got None; an objective averages per "
            "sequence, so packed [N] inputs need them (padded [B, T] inputs do not)"
        )
    return where, where.num_sequences, where.owner, where.lengths


def _advantages(advantages: Tensor, where: Layout, num_sequences: int, owner: Tensor) -> Tensor:
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages: expected a tensor [B] or per token, got {type(advantages).__name__}")
    arguments.check_float("advantages", advantages)
    if advantages.requires_grad:
        raise ValueError("advantages: expected constants, got a tensor that requires grad; detach it")
    advantages = advantages.to(owner.device)
    if tuple(advantages.shape) == (num_sequences,):  # also where there happen to be as many packed tokens
        per_token = advantages[owner]
    elif tuple(advantages.shape) == where.shape:
        per_token = where.take(advantages)
    else:
        raise ValueError(
            f"advantages: expected shape [{num_sequences}], one per sequence, or {list(where.shape)}, one per token, "
            f"got {list(advantages.shape)}"
        )
    arguments.check_values(
        "advantages",
        per_token.isfinite().all(),
        "finite numbers where mask is 1",
        "a NaN usually comes from a group without reward or the standard deviation of one sample",
    )
    return per_token.to(torch.promote_types(per_token.dtype, torch.float32))


def _live_logps(name: str, values: Tensor, where: Layout, device: torch.device) -> Tensor:
    arguments.check_shape(name, values, where.shape, "targets", "drop the log-probability of the first prompt token")
    arguments.check_float(name, values)
    arguments.check_device(name, values, device, "targets")
    live = where.take(values.detach())
    return live.to(torch.promote_types(live.dtype, torch.float32))


def _constant(
    objective: Objective, weights: Tensor, lengths: Tensor, advantages: Tensor, extras: Mapping[str, Tensor]
) -> Tensor | None:
    if advantages.shape != lengths.shape:  # given per token: there is none for a sequence without tokens
        return None
    per_sequence = {name: v.to(lengths.device) for name, v in extras.items() if v.shape == lengths.shape}
    losses = objective.loss_without_tokens(advantages.to(lengths.device), per_sequence)
    return None if losses is None else torch.where(lengths == 0, weights * losses, 0.0).sum()


def _extra(name: str, values: Tensor, where: Layout, num_sequences: int, owner: Tensor) -> Tensor:
    """[N, ...] of the live tokens, from one value per sequence [B] or per token (shape of targets, and more axes)."""
    if not isinstance(values, Tensor):
        raise TypeError(f"extras[{name!r}]: expected a tensor, got {type(values).__name__}")
    values, tokens = values.detach().to(owner.device), len(where.shape)
    if tuple(values.shape) == (num_sequences,) and (tokens == 2 or where.shape != (num_sequences,)):
        return values[owner]
    if tuple(values.shape[:tokens]) != where.shape:
        raise ValueError(
            f"extras[{name!r}]: expected shape [{num_sequences}], one per sequence, or {list(where.shape)} and more "
            f"axes, one per token, got {list(values.shape)}"
        )
    flat = values.reshape(-1, *values.shape[tokens:])
    return flat if where.rows is None else flat.index_select(0, where.rows)


def _without_zero_advantage(inputs: LossInputs) -> LossInputs:
    """The inputs without tokens whose loss and gradient are zero by their advantage. Weights stay what they were.

    Token scope drops tokens; wider scopes drop sequences whose advantages are all zero.
    """
    alive = inputs.advantages != 0
    owner = inputs.where.owner
    assert owner is not None
    if inputs.objective.reach == "batch":
        return inputs
    if inputs.objective.reach == "sequence":
        count = torch.zeros(len(inputs.lengths), dtype=torch.int64, device=owner.device).index_add(
            0, owner, alive.long()
        )
        alive = (count > 0)[owner]
    where = inputs.where.keep(alive)
    assert where.owner is not None

    def take(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[alive]

    return replace(
        inputs,
        where=where,
        weights=TokenWeights(*(w[alive] for w in inputs.weights)),
        advantages=inputs.advantages[alive],
        lengths=torch.bincount(where.owner, minlength=len(inputs.lengths)),
        old_logps=take(inputs.old_logps),
        ref_logps=take(inputs.ref_logps),
        sampler_logps=take(inputs.sampler_logps),
        off_policy=take(inputs.off_policy),
        extras={name: values[alive] for name, values in inputs.extras.items()},
    )
