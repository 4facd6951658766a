"""The rewards of a step, and the sets of rows that an estimator compares them within."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sets:
    """Rows divided into disjoint sets. Every statistic comes back as [B]: each row is given that of its own set.

    The number of slots does not depend on the data, so nothing waits for the device.
    """

    slot: Tensor
    """[B] int64, which set a row belongs to."""
    slots: int
    """Sets that there may be; slots without rows are harmless."""
    member: Tensor
    """[B] bool, rows that count. The others are left out of every statistic."""

    def sum(self, values: Tensor) -> Tensor:
        """[B] sum of `values` [B] over each row's set."""
        counted = torch.where(self.member, values, 0)
        return values.new_zeros(self.slots).index_add_(0, self.slot, counted)[self.slot]

    def count(self) -> Tensor:
        """[B] float64 number of members of each row's set."""
        return self.sum(torch.ones_like(self.slot, dtype=torch.float64))

    def largest(self, values: Tensor) -> Tensor:
        """[B] largest of `values` [B] in each row's set; -inf in a set without members."""
        counted = torch.where(self.member, values, -torch.inf)
        empty = values.new_full((self.slots,), -torch.inf)
        return empty.scatter_reduce_(0, self.slot, counted, "amax")[self.slot]

    def smallest(self, values: Tensor) -> Tensor:
        """[B] smallest of `values` [B] in each row's set; +inf in a set without members."""
        return -self.largest(-values)

    def deviation(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B] `values` minus their (weighted) mean over the set; 0 for rows that do not count.

        Values are taken relative to the smallest of their set before anything is summed. So equal values deviate by
        exactly 0, whatever they are (a rounded mean of equal values differs from them, and a small eps under a small
        standard deviation would blow that up), and a common offset costs no digits. Weights that sum to 0 give 0.
        """
        weights = torch.ones_like(values) if weights is None else weights
        above = torch.where(self.member, values - self.smallest(values), 0)
        total = self.sum(weights)
        mean = self.sum(weights * above) / torch.where(total > 0, total, 1)
        return torch.where(self.member & (total > 0), above - mean, 0)

    def std(self, values: Tensor, *, unbiased: bool) -> Tensor:
        """[B] standard deviation of the set; exactly 0 where all values are equal or only one counts."""
        degrees = self.count() - (1 if unbiased else 0)
        return (self.sum(self.deviation(values).square()) / degrees.clamp_min(1)).sqrt()

    def among(self, rows: Tensor) -> Sets:
        """The same sets, with only those members for which `rows` [B] bool is True."""
        return Sets(self.slot, self.slots, self.member & rows)

    def first(self) -> Tensor:
        """[B] bool, True for one member of each set: what counts sets where rows are summed."""
        position = torch.arange(len(self.slot), dtype=torch.float64, device=self.slot.device)
        return self.member & (position == self.smallest(position))


@dataclass(frozen=True, eq=False)
class Rows:
    """What an estimator sees: the rewards of a step, all float64.

    B numbers cost nothing beside a model, so they are computed in float64 on every device. The sums of rows that arrive
    in another order then agree to 16 digits, and a float32 result does not depend on that order.
    """

    rewards: Tensor
    """[B] float64; 0 where the row has no reward."""
    scored: Tensor
    """[B] bool, False for rows whose reward was NaN: they are no members of any set, and their advantage will be 0."""
    groups: Sets
    """Rows of one prompt, on-policy and replayed rows apart in split mode."""
    batch: Sets
    """All rows, on-policy and replayed rows apart in split mode."""
    lengths: Tensor | None
    """[B] float64, tokens of each completion."""


def rows_of(
    rewards: Tensor,  # [B]
    group_ids: Tensor,  # [B] int
    apart: Tensor,  # [B] bool, rows that form sets of their own
    lengths: Tensor | None,  # [B] int
) -> Rows:
    """`Rows` from checked arguments. Group ids may be any integers in any order."""
    rewards = rewards.detach().to(torch.float64)
    scored = ~rewards.isnan()
    return Rows(
        rewards=torch.where(scored, rewards, 0),
        scored=scored,
        groups=Sets(numbered(group_ids, apart), max(len(rewards), 1), scored),
        batch=Sets(apart.long(), 2, scored),
        lengths=None if lengths is None else lengths.to(torch.float64),
    )


def numbered(group_ids: Tensor, apart: Tensor | None = None) -> Tensor:
    """[B] int64 in [0, B): one number for each distinct group id, or pair of group id and flag, in ascending order.

    torch.unique says the same, but waits for the device to learn how many there are.
    """
    flag = torch.zeros_like(group_ids, dtype=torch.bool) if apart is None else apart
    order = flag.int().argsort(stable=True)
    order = order[group_ids[order].argsort(stable=True)]
    ids, flags = group_ids[order], flag[order]
    begins = torch.zeros_like(group_ids, dtype=torch.long)
    begins[1:] = (ids[1:] != ids[:-1]) | (flags[1:] != flags[:-1])
    return torch.empty_like(begins).scatter_(0, order, begins.cumsum(0))


def standardized(deviation: Tensor, std: Tensor, eps: float) -> Tensor:
    """[B] deviation / (std + eps), and 0 where std is 0, whatever eps is."""
    return deviation / torch.where(std > 0, std + eps, 1)
