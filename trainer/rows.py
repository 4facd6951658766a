"""Prompts and completions packed so that each distinct prefix is computed once.

A policy-gradient step scores many completions of the same prompt: G fresh ones, and the replayed ones. All of them go
into one row that starts with the prompt. Completions that begin alike share those tokens too, so a row is a tree of
tokens laid out depth first:

    prompt   3 * 4 =
    1st      _ 1 2 <newline>            row:  3 * 4 = _ 1 2 4
    2nd      _ 1 4 <newline>            each token sees its ancestors: the 4 sees "3 * 4 = _ 1", never the 2

A token's position is its depth, and the attention mask lets it see its ancestors and itself, so every hidden state is
the one that a separate row would give. The last token of a completion is predicted and never read: it takes no place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["MicroBatch", "deal", "idle_batch", "longest_row", "pack_rows"]


@dataclass(frozen=True)
class MicroBatch:
    """R rows of the same padded length L, and where in them each completion token is predicted."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64: depth in the tree, 0 for padding
    subtree_end: Tensor  # [R, L] int64: one past the token's last descendant
    gather: Tensor  # [N] int64: flat index r * L + l of the hidden state that predicts targets[n]
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int64: completion s owns targets[cu_seqlens[s] : cu_seqlens[s + 1]]
    sequences: tuple[int, ...]  # S indices into the caller's list
    tokens: int  # of the R * L, those that are not padding

    def attention_mask(self) -> Tensor:
        """Which tokens each token may see, [R, 1, L, L] bool: itself and its ancestors (one mask for all heads).

        Depth-first order makes this two comparisons: k is an ancestor of q, or q itself, when k <= q < subtree_end[k].
        """
        index = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        below = index[None, :, None] < self.subtree_end[:, None, :]  # [R, query, key]
        return (below & (index[:, None] >= index[None, :])).unsqueeze(1)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def pack_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    pairs_per_token: float = math.inf,
    pad_id: int = 0,
) -> list[MicroBatch]:
    """Micro-batches of shared-prefix rows that hold every completion with at least one token, each exactly once.

    Equals, per completion token, a separate row prompts[i] + completions[i] through the same model. A sequence with an
    empty completion predicts nothing and is left out.

    Args:
        prompts: S lists of token ids, one per completion, at least one token each; equal prompts share a row.
        completions: S lists of token ids (terminating token included, padding not).
        max_tokens: padded area R * L of a micro-batch. A prompt with more than fits is given several rows; one single
            sequence that is longer has a micro-batch of its own.
        pairs_per_token: pairs of tokens whose attention costs as much as all other work on one token, for
            `longest_row`. The default shares every prompt, whatever the length of its row.
        pad_id: token put in padded places (any valid id: nothing sees it).
    Raises:
        ValueError: lengths disagree, an empty prompt, or max_tokens < 1.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"completions: expected one per prompt, {len(prompts)}, got {len(completions)}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    members: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for sequence, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0:
            raise ValueError(
                f"prompts[{sequence}]: expected at least one token, got none; the first token of a completion is "
                "predicted by the last token of its prompt"
            )
        if len(completion) > 0:
            members.setdefault(tuple(prompt), []).append((tuple(completion), sequence))
    rows = [
        row
        for prompt, group in members.items()
        for row in _rows_of_prompt(prompt, group, min(max_tokens, longest_row(len(prompt), pairs_per_token)))
    ]
    rows.sort(key=lambda row: len(row.tokens))  # stable: similar lengths together pad least
    batches: list[list[_Row]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(row.tokens) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_collate(batch, pad_id) for batch in batches]


def longest_row(prompt: int, pairs_per_token: float) -> float:
    """Tokens beyond which a row of a prompt of this many costs more than two rows that both begin with the prompt.

    A row of length L is attended to as a whole, L^2 pairs, though completions do not see each other. With c completions
    of T tokens it is P + c T long, and costs (L a + L^2) / c for each, if a token costs a pairs; that is least where
    c T = sqrt(P (P + a)).
    """
    return prompt + math.sqrt(prompt * (prompt + pairs_per_token))


def idle_batch() -> MicroBatch:
    """A micro-batch that predicts nothing: one token, no sequence. For ranks that have to keep step with others."""
    none = torch.zeros(0, dtype=torch.int64)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(zero, zero, zero + 1, none, none, torch.zeros(1, dtype=torch.int64), (), 0)


def deal(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Which sequences each of `parts` ranks computes, every one once: about equal tokens, prompts kept together.

    The longest group of a prompt goes first, each to the part that has least so far. A group longer than an even share
    is cut, as otherwise few prompts would leave ranks idle; its prompt is then computed more than once.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(tuple(prompt), []).append(i)
    even = sum(len(prompt) + sum(len(completions[i]) for i in group) for prompt, group in members.items()) / parts
    groups: list[tuple[int, list[int]]] = []
    for prompt, group in members.items():
        # neighbours share the most
        group.sort(key=lambda i: tuple(completions[i]))
        size, chunk = len(prompt), list[int]()
        for i in group:
            if chunk and size + len(completions[i]) > even:
                groups.append((size, chunk))
                size, chunk = len(prompt), []
            size += len(completions[i])
            chunk.append(i)
        groups.append((size, chunk))
    loads, dealt = [0] * parts, [list[int]() for _ in range(parts)]
    for size, group in sorted(groups, key=lambda item: -item[0]):
        least = loads.index(min(loads))
        loads[least] += size
        dealt[least] += group
    return [sorted(part) for part in dealt]


@dataclass
class _Row:
    """One prompt and the tree of its completions, built depth first."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # places of the completion added last
    members: list[tuple[int, tuple[int, ...], list[int]]] = field(default_factory=list)  # sequence, completion, places

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.positions = list(range(len(self.prompt)))
        self.ends = [0] * len(self.prompt)

    def shared(self, completion: tuple[int, ...]) -> int:
        """How many leading tokens of `completion` the completion added last already has in the row."""
        count = 0
        for place, token in zip(self.path, completion[:-1], strict=False):
            if self.tokens[place] != token:
                break
            count += 1
        return count

    def add(self, sequence: int, completion: tuple[int, ...]) -> None:
        shared = self.shared(completion)
        self.close(shared)
        for token in completion[shared:-1]:
            self.positions.append(len(self.prompt) + len(self.path))
            self.path.append(len(self.tokens))
            self.tokens.append(token)
            self.ends.append(0)
        self.members.append((sequence, completion, [len(self.prompt) - 1, *self.path]))

    def close(self, depth: int) -> None:
        """Mark the places deeper than `depth` of the current path as complete: later tokens are not below them."""
        for place in self.path[depth:]:
            self.ends[place] = len(self.tokens)
        del self.path[depth:]

    def finish(self) -> _Row:
        self.close(0)
        self.ends[: len(self.prompt)] = [len(self.tokens)] * len(self.prompt)
        return self


def _rows_of_prompt(
    prompt: tuple[int, ...], group: list[tuple[tuple[int, ...], int]], longest: float
) -> Iterator[_Row]:
    row = _Row(prompt)
    # sorted, completions that begin alike are neighbours: comparing with the last one finds every shared prefix
    for completion, sequence in sorted(group):
        grown = len(row.tokens) + len(completion) - 1 - row.shared(completion)
        if row.members and grown > longest:
            yield row.finish()
            row = _Row(prompt)
        row.add(sequence, completion)
    yield row.finish()


def _collate(rows: list[_Row], pad_id: int) -> MicroBatch:
    length = max(len(row.tokens) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    position_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    # padding sees itself only: a row of the mask without a single True would be 0 / 0 in the softmax
    subtree_end = torch.arange(1, length + 1).repeat(len(rows), 1)
    gather: list[int] = []
    targets: list[int] = []
    ends = [0]
    for r, row in enumerate(rows):
        input_ids[r, : len(row.tokens)] = torch.tensor(row.tokens)
        position_ids[r, : len(row.tokens)] = torch.tensor(row.positions)
        subtree_end[r, : len(row.tokens)] = torch.tensor(row.ends)
        for _, completion, places in row.members:
            gather += [r * length + place for place in places]
            targets += completion
            ends.append(len(targets))
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        subtree_end=subtree_end,
        gather=torch.tensor(gather, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int64),
        sequences=tuple(sequence for row in rows for sequence, _, _ in row.members),
        tokens=sum(len(row.tokens) for row in rows),
    )
