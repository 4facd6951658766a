"""Sequences of a step as plain numbers, and their loss: live ones only, a prompt computed once for its completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import repo_ops
from repo_ops.causal_lm import find_head
from repo_ops.loss_inputs import PolicyLoss
from repo_ops.metrics import Metrics, merge
from repo_ops.objectives import Objective
from repo_ops.reduce import NumItems

__all__ = ["Row", "RowsLoss", "count", "rows_of", "shared_hidden"]

Logps = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A prompt with one of its completions, and all that a loss reads of it; one number a completion token."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The completion's tokens that count; none where TRL masked the whole completion."""
    advantage: float = 0.0
    group: int = 0
    """Which prompt of the generation it belongs to."""
    off_policy: bool = False
    """Replayed: sampled from an earlier policy."""
    old_logps: Logps | None = None
    """At the start of the step; of a replayed row, when it was sampled. None: the ratio is 1."""
    sampler_logps: Logps | None = None
    """What the policy (or the engine) that sampled it gave."""
    ref_logps: Logps | None = None
    support_ids: tuple[tuple[int, ...], ...] | None = None
    """The tokens that a truncated sampler kept at each place."""


PER_TOKEN = {
    "old_logps": "old_per_token_logps",
    "sampler_logps": "sampling_per_token_logps",
    "ref_logps": "ref_per_token_logps",
}
"""Our names of what TRL's generation may have computed for each token."""


def rows_of(output: dict[str, Any], groups: Sequence[int], support_ids: Sequence[Any] | None) -> list[Row]:
    """The rows of what TRL's `_generate_and_score_completions` returned, padding gone."""
    prompt_mask, completion_mask = output["prompt_mask"].bool().tolist(), output["completion_mask"].bool().tolist()
    prompts = _unpadded(output["prompt_ids"], prompt_mask)
    completions = _unpadded(output["completion_ids"], completion_mask)
    given = {
        ours: _unpadded(output[theirs], completion_mask)
        for ours, theirs in PER_TOKEN.items()
        if output.get(theirs) is not None
    }
    rows = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        numbers: dict[str, Any] = {name: values[i] for name, values in given.items()}
        if support_ids is not None:
            kept = tuple(tuple(ids) for ids in support_ids[i])
            if completion and len(kept) != len(completion):
                raise ValueError(
                    f"support_ids: expected one list of kept ids for each of the {len(completion)} tokens of a "
                    f"completion, got {len(kept)}"
                )
            numbers["support_ids"] = kept if completion else ()
        rows.append(Row(prompt, completion, float(output["advantages"][i]), groups[i], **numbers))
    return rows


def _unpadded(values: Tensor, mask: list[list[bool]]) -> list[tuple[Any, ...]]:
    return [tuple(v for v, keep in zip(row, kept) if keep) for row, kept in zip(values.tolist(), mask, strict=True)]


def count(rows: Sequence[Row]) -> list[float]:
    """Sequences and tokens, on-policy and replayed: the fields of `NumItems`."""
    on, off = [[len(r.token_ids) for r in rows if r.off_policy is kind] for kind in (False, True)]
    return [float(n) for n in (len(on), sum(on), len(off), sum(off))]


def shared_hidden(backbone: Any, rows: Sequence[Row], max_tokens: int) -> tuple[Tensor, Tensor, list[int]]:
    """Hidden states [N, D] that predict the targets [N] of `rows`, in the order of the returned indices into rows.

    `backbone` is a repo_ops.trainer.backbone.Backbone.
    """
    from repo_ops.trainer.rows import pack_rows

    batches = pack_rows(
        [r.prompt_ids for r in rows],
        [r.token_ids for r in rows],
        max_tokens=max_tokens,
        pairs_per_token=backbone.pairs_per_token,
    )
    device = next(backbone.model.parameters()).device
    moved = [batch.to(device) for batch in batches]
    hidden = torch.cat([backbone.hidden(batch) for batch in moved])
    return hidden, torch.cat([batch.targets for batch in moved]), [i for batch in batches for i in batch.sequences]


@dataclass(frozen=True)
class RowsLoss:
    """The loss of some rows of a step, divided by the counts of the whole step."""

    objective: Objective
    off_policy_coef: float
    temperature: float
    options: repo_ops.Options = repo_ops.Options()  # noqa: RUF009 (frozen)

    def is_live(self, row: Row) -> bool:
        """Whether any token of the row can carry a gradient, or take part in a statistic over the batch."""
        if not row.token_ids:
            return False
        if self.objective.reach == "batch" or (not row.off_policy and (self.objective.beta or self._has_bonus)):
            return True
        return row.advantage != 0 or not self._policy_term.skips_zero_advantage

    def of_hidden(self, model: Any, backbone: Any, rows: Sequence[Row], items: NumItems, max_tokens: int) -> Any:
        """(loss, metrics) of live rows through shared-prefix rows of `model`, to be called inside its forward."""
        hidden, targets, order = shared_hidden(backbone, rows, max_tokens)
        head = find_head(model)

        def part(tokens: Tensor, chosen: Sequence[Row], **arguments: Any) -> PolicyLoss:
            picked = hidden[tokens]
            return repo_ops.linear_policy_loss(
                picked,
                targets=targets[tokens],
                support_ids=_support(chosen, targets.device),
                temperature=self.temperature,
                options=self.options,
                **head.arguments(picked),
                **arguments,
            )

        return self._total([rows[i] for i in order], items, part, hidden.device)

    def of_logps(self, logps: Tensor, entropy: Tensor | None, rows: Sequence[Row], items: NumItems) -> Any:
        """(loss, metrics) of live rows whose log-probabilities [N] (and entropies) a host computed, row by row."""

        def part(tokens: Tensor, chosen: Sequence[Row], **arguments: Any) -> PolicyLoss:
            if "entropy" in arguments["objective"].reads:
                arguments["entropy"] = None if entropy is None else entropy[tokens]
            return repo_ops.policy_loss(logps[tokens], **arguments)

        return self._total(rows, items, part, logps.device)

    def _total(
        self, rows: Sequence[Row], items: NumItems, part: Callable[..., PolicyLoss], device: torch.device
    ) -> tuple[Tensor, Metrics]:
        """On-policy and replayed rows apart: for fresh ones "no old_logps" can say that the ratio is 1."""
        starts = torch.tensor([0] + [len(row.token_ids) for row in rows]).cumsum(0).tolist()
        loss, metrics = torch.zeros((), device=device), []
        for replayed in (False, True):
            members = [i for i, row in enumerate(rows) if row.off_policy is replayed]
            if not members:
                continue
            tokens = [t for i in members for t in range(starts[i], starts[i + 1])]
            chosen = [rows[i] for i in members]
            lengths = torch.tensor([0] + [len(row.token_ids) for row in chosen], device=device)
            found = part(
                torch.tensor(tokens, dtype=torch.int64, device=device),
                chosen,
                advantages=torch.tensor([row.advantage for row in chosen], device=device),
                cu_seqlens=lengths.cumsum(0),
                **self._arguments(chosen, items, replayed, device),
            )
            loss = loss + found.loss
            metrics.append(found.metrics)
        return loss, merge(metrics)

    def _arguments(self, rows: Sequence[Row], items: NumItems, replayed: bool, device: torch.device) -> dict[str, Any]:
        def numbers(name: str) -> Tensor | None:
            if any(getattr(row, name) is None for row in rows):
                return None
            return torch.tensor([x for row in rows for x in getattr(row, name)], device=device)

        found = {"old_logps": numbers("old_logps"), "sampler_logps": numbers("sampler_logps")}
        if replayed:
            off_policy = torch.ones(len(rows), dtype=torch.bool, device=device)
            return found | {
                "objective": self._policy_term,
                "off_policy": off_policy,
                "off_policy_coef": self.off_policy_coef,
                "num_items": items,
            }
        if self.objective.row_norm == "official_code":
            items = replace(items, sequences=items.sequences + items.off_policy_sequences)
        return found | {"objective": self.objective, "ref_logps": numbers("ref_logps"), "num_items": items}

    @property
    def _has_bonus(self) -> bool:
        return self.objective.entropy_coef > 0

    @property
    def _policy_term(self) -> Objective:
        """All that replayed rows have: no KL, no entropy bonus."""
        return replace(self.objective, beta=0.0, entropy_coef=0.0)


def _support(rows: Sequence[Row], device: torch.device) -> Tensor | None:
    """[N, K] kept ids, -1 for padding; None where the sampler kept all."""
    if any(row.support_ids is None for row in rows):
        return None
    kept = [ids for row in rows for ids in row.support_ids or ()]
    width = max(1, max(map(len, kept), default=1))
    return torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in kept], dtype=torch.int64, device=device)
