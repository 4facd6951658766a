"""How tokens are averaged: each reduction is one weight per sequence, the same for all its tokens.

The step's loss is sum_i weight_i * sum_t loss_{i,t}. Weights need lengths and counts only, so they are known before the
first logit, and micro-batches or ranks that share the step's counts (`NumItems`) add up to the same loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from repo_ops.terms import across_ranks

Count = int | float | Tensor

REDUCTIONS = {
    "token-mean": "sum over tokens / number of tokens (DAPO, CISPO, BNPO loss type)",
    "seq-mean-token-mean": "mean over sequences of the mean over tokens (GRPO, GSPO)",
    "seq-mean-token-sum": "mean over sequences of the sum over tokens",
    "const": "sum over tokens / (number of sequences * max_length) (Dr.GRPO)",
    "const-nobatch": "sum over tokens / max_length",
    "token-sum": "sum over tokens, divided by the caller",
}
ROW_NORMS = ("paper", "official_code")


@dataclass(frozen=True)
class NumItems:
    """What a whole step holds, over all micro-batches and ranks; counts may be 0-d tensors.

    Sequences without a live token count as sequences. Counts add up: `NumItems.of(...) + NumItems.of(...)`.
    """

    sequences: Count
    tokens: Count
    off_policy_sequences: Count = 0
    off_policy_tokens: Count = 0

    @classmethod
    def of(
        cls, lengths: Tensor, off_policy: Tensor | None = None, *, process_group: dist.ProcessGroup | None = None
    ) -> NumItems:
        """Counts of sequences with `lengths` [B] live tokens, `off_policy` [B] bool marking replayed ones.

        With `process_group` they are summed over its ranks, each of which has to call.
        """
        if off_policy is None:
            counts: list[Count] = [len(lengths), lengths.sum()]
        else:
            on, off = torch.where(off_policy, 0, lengths), torch.where(off_policy, lengths, 0)
            counts = [(~off_policy).sum(), on.sum(), off_policy.sum(), off.sum()]
        if process_group is not None:
            joined = torch.stack([torch.as_tensor(count, device=lengths.device) for count in counts])
            counts = list(across_ranks.total(joined, process_group).unbind())
        return cls(*counts)

    def __add__(self, other: NumItems) -> NumItems:
        return NumItems(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.off_policy_sequences + other.off_policy_sequences,
            self.off_policy_tokens + other.off_policy_tokens,
        )


NumItemsLike = NumItems | Count | tuple[Count, Count]


def counts_tokens(reduction: str) -> bool:
    """Whether `reduction` divides by tokens; the others divide by sequences."""
    return reduction in ("token-mean", "token-sum")


def resolve_num_items(
    num_items: NumItemsLike | None, lengths: Tensor, off_policy: Tensor | None, reduction: str
) -> NumItems:
    """The step's counts: this call's own where `num_items` is None, else the caller's in any accepted spelling.

    Raises:
        ValueError, TypeError: a spelling that leaves a needed count open.
    """
    if num_items is None:
        return NumItems.of(lengths, off_policy)
    if isinstance(num_items, NumItems):
        _check_off_policy_counts(num_items, off_policy)
        return num_items
    pair = num_items if isinstance(num_items, tuple) else (num_items,)
    if not all(isinstance(n, int | float) or (isinstance(n, Tensor) and n.ndim == 0) for n in pair):
        raise TypeError(
            f"num_items: expected a number, a pair (on_policy, off_policy) or NumItems, got {type(num_items).__name__}"
        )
    if any(isinstance(n, int | float) and not 0 <= n < float("inf") for n in pair):
        raise ValueError(f"num_items: expected finite counts >= 0, got {num_items}")
    if len(pair) != (1 if off_policy is None else 2):
        expected = "one number" if off_policy is None else "a pair (on_policy, off_policy) because off_policy is given"
        raise ValueError(f"num_items: expected {expected}, got {num_items}")
    on, off = pair[0], 0 if off_policy is None else pair[-1]
    if off_policy is None:
        _check_own_count(on, lengths, reduction)
    if counts_tokens(reduction):
        return NumItems(float("nan"), on, float("nan"), off)
    return NumItems(on, float("nan"), off, float("nan"))


def _check_own_count(count: Count, lengths: Tensor, reduction: str) -> None:
    """Refuse a count of the step below that of this call alone, where comparing them needs no device."""
    if reduction in ("token-sum", "const-nobatch") or isinstance(count, Tensor) or lengths.device.type != "cpu":
        return
    own, unit = (int(lengths.sum()), "tokens") if counts_tokens(reduction) else (len(lengths), "sequences")
    if count < own:
        raise ValueError(
            f"num_items: expected at least the {own} {unit} of this call, got {count}; it counts those of the whole "
            "step, all micro-batches and ranks (where ranks average gradients, multiply the loss by their number)"
        )


def _check_off_policy_counts(num_items: NumItems, off_policy: Tensor | None) -> None:
    counts = dataclasses.astuple(num_items)
    if any(isinstance(n, int | float) and not (0 <= n < float("inf")) for n in counts):
        raise ValueError(f"num_items: expected finite counts >= 0, got {num_items}")
    uncounted = isinstance(num_items.off_policy_sequences, int | float) and num_items.off_policy_sequences == 0
    if off_policy is not None and uncounted and off_policy.device.type == "cpu" and bool(off_policy.any()):
        raise ValueError(f"num_items: expected the counts of replayed rows too, got {num_items}; use NumItems.of")


def sequence_weights(
    reduction: str,
    lengths: Tensor,
    num_items: NumItems,
    *,
    off_policy: Tensor | None = None,
    off_policy_coef: float = 1.0,
    row_norm: str = "paper",
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[B] weight of each token of sequence i in the step's loss.

    With replayed sequences the loss is J_on + off_policy_coef * J_off, each part reduced by its own counts
    (row_norm "paper"); "official_code" lets per-sequence reductions divide both parts by all sequences together.

    Args:
        reduction: a key of REDUCTIONS. lengths: [B] live tokens. off_policy: [B] bool.
    Source: arXiv 2506.09340; repository SihengLi99/RePO, replay_grpo_trainer.py.
    """
    lengths = lengths.to(dtype)
    weights = _one_kind(reduction, lengths, num_items.sequences, num_items.tokens, max_length)
    if off_policy is None:
        return weights
    sequences_on, sequences_off = num_items.sequences, num_items.off_policy_sequences
    if row_norm == "official_code":
        sequences_on = sequences_off = num_items.sequences + num_items.off_policy_sequences
        weights = _one_kind(reduction, lengths, sequences_on, num_items.tokens, max_length)
    off = _one_kind(reduction, lengths, sequences_off, num_items.off_policy_tokens, max_length)
    return torch.where(off_policy, off_policy_coef * off, weights)


def _one_kind(reduction: str, lengths: Tensor, sequences: Count, tokens: Count, max_length: int | None) -> Tensor:
    length = lengths.clamp_min(1)
    one = torch.ones_like(length)
    if reduction == "token-sum":
        return one
    if reduction == "const-nobatch":
        assert max_length is not None
        return one / max_length
    if reduction == "token-mean":
        return one / _at_least_one(tokens, length)
    per_sequence = one / _at_least_one(sequences, length)
    if reduction == "seq-mean-token-mean":
        return per_sequence / length
    if reduction == "const":
        assert max_length is not None
        return per_sequence / max_length
    assert reduction == "seq-mean-token-sum", reduction
    return per_sequence


def _at_least_one(count: Count, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=like.dtype, device=like.device).clamp_min(1)
