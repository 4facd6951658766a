"""One optimizer step on scored completions: pack the live ones, sum the loss over micro-batches and ranks, step.

Only sequences that can carry a gradient are computed; the denominators of the loss still count all of them, so loss
and gradient are those of the whole step, however it is cut into micro-batches and over ranks.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import repo_ops
from repo_ops import Options, PolicyLoss
from repo_ops.causal_lm import find_head
from repo_ops.logit_offsets import logit_offsets
from repo_ops.metrics import Metrics, merge, summarize
from repo_ops.objectives.base import Objective
from repo_ops.reduce import NumItems
from repo_ops.trainer.backbone import Backbone
from repo_ops.trainer.distributed import Ranks, inside, is_sharded, shard
from repo_ops.trainer.lora import has_lora, without_lora
from repo_ops.trainer.recompute import recompute_layers
from repo_ops.trainer.rows import MicroBatch, deal, idle_batch, pack_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Learner", "ScoredSequence", "reads_top_logps", "support_ids"]

TOP_LOGPS = frozenset({"topk_behaviour_logps", "topk_offsets"})
"""Extras that are made from the sampler's likeliest tokens."""


@dataclass(frozen=True)
class ScoredSequence:
    """A prompt, a completion of it, and how much better than its group it was."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Completion tokens, the terminating one included."""
    advantage: float
    off_policy: bool = False
    """Replayed: sampled from an earlier policy."""
    logps: tuple[float, ...] = ()
    """Log-probability of each completion token when it was sampled; replayed sequences must have them."""
    group: int = 0
    """Which prompt of the step it belongs to; for metrics."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """The sampler's K likeliest tokens at each token (Completion.top_ids); for objectives that read them."""
    top_logps: tuple[tuple[float, ...], ...] = ()
    """Their log-probabilities when the token was sampled."""
    kept_ids: tuple[tuple[int, ...], ...] = ()
    """What each token was drawn from where top_k or top_p cut some off (Completion.kept_ids); the policy's
    log-probabilities are taken over the same tokens."""


def reads_top_logps(objective: Objective) -> bool:
    """Whether the sampler must report its likeliest tokens (`top_logps` of `generate`) for this objective."""
    return not TOP_LOGPS.isdisjoint(objective.reads)


class Learner:
    """Holds the model, the objective and AdamW, and makes one step at a time.

    With several ranks the model is sharded in place (`repo_ops.trainer.distributed.shard`) and each rank computes its
    share of a step; the gradient is the sum over ranks. The KL's reference is a frozen copy of the model, sharded too,
    or the model itself with its LoRA adapters switched off.

    On-policy sequences were sampled from the very weights they train, so their importance ratio is 1 by construction
    and no extra forward computes old log-probabilities. Replayed sequences use those that were stored with them.

    Args:
        model: its parameters that require a gradient are trained; stays in eval mode.
        off_policy_coef: weight of the replayed part of the loss.
        temperature: what the completions were sampled with; divides the logits.
        max_tokens: padded tokens of one forward and backward.
        autocast: dtype of the layers below the head (None: the weights' own).
        head_dtype: what operands of the head's products are rounded to, where its weights are float32.
        recompute: layers keep their input alone and are computed again in the backward: less memory, the same numbers.
        ranks: who trains together; all of them make the same Learner from the same weights.
        replicas, cpu_offload: how the ranks share the model, see `shard`.
    Raises:
        ValueError: the model's packed rows would not be exact (see Backbone), the objective reads what no sequence
            holds, or it reads likely tokens of a head with a LoRA adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        off_policy_coef: float = 1.0,
        temperature: float = 1.0,
        max_tokens: int = 4096,
        autocast: torch.dtype | None = None,
        head_dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        recompute: bool = False,
        ranks: Ranks | None = None,
        replicas: int = 1,
        cpu_offload: bool = False,
    ) -> None:
        if missing := sorted(objective.reads - {"ref_logps", "sampler_logps", "entropy"} - TOP_LOGPS):
            raise ValueError(
                "objective: expected one that reads log-probabilities and entropy, got one which also reads "
                f"{', '.join(missing)}; call repo_ops.linear_policy_loss from a loop of your own"
            )
        if reads_top_logps(objective) and find_head(model).lora is not None:
            raise ValueError("objective: reads likely tokens, expected a head without LoRA adapter; adapt other layers")
        self.ranks = ranks or Ranks(device=next(model.parameters()).device)
        if self.ranks.size > 1 and objective.reach == "batch":
            objective = replace(objective, process_group=self.ranks.group)
        frozen = None
        if "ref_logps" in objective.reads and not has_lora(model):
            frozen = copy.deepcopy(model).requires_grad_(False)
        if recompute:
            recompute_layers(model)
        dtypes = (autocast, head_dtype)
        self.backbone = self._backbone(model, dtypes, replicas, cpu_offload)
        self.reference: Backbone | None = None
        if "ref_logps" in objective.reads:
            self.reference = self._backbone(frozen, dtypes, replicas, cpu_offload) if frozen else self.backbone
        self.objective = objective
        self.policy_term = replace(objective, beta=0.0, entropy_coef=0.0)  # all that replayed sequences have
        self.off_policy_coef = off_policy_coef
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.max_grad_norm = max_grad_norm
        if self.ranks.size == 1:
            _embedding_gradient_by_rows(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)

    @property
    def keeps_reference(self) -> bool:
        """Whether a second model is kept for the KL; adapters that are switched off need none."""
        return self.reference not in (None, self.backbone)

    def _backbone(
        self, model: PreTrainedModel, dtypes: tuple[torch.dtype | None, torch.dtype], replicas: int, cpu_offload: bool
    ) -> Backbone:
        autocast, head_dtype = dtypes
        if self.ranks.size > 1:
            shard(model, self.ranks, compute=autocast, replicas=replicas, cpu_offload=cpu_offload)
        return Backbone(model, autocast=autocast, head_dtype=head_dtype, device=self.ranks.device)

    def step(self, sequences: Sequence[ScoredSequence], *, lr: float) -> dict[str, float]:
        """Metrics of one optimizer step with learning rate `lr`; `sequences` is the whole step, the same on all ranks.

        `learner/skipped` is 1 where the parameters were left alone: no sequence was live, or the loss or the gradient
        was not finite (`learner/nonfinite` is then 1 too).
        """
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        live = [sequence for sequence in sequences if self.is_live(sequence)]
        mine = self.share(live)
        batches = self.pack(mine)
        rounds = self.ranks.most(len(batches))
        if rounds > 1 and self.objective.reach == "batch":
            raise ValueError(
                f"max_tokens: expected room for the whole step in one micro-batch, got {self.max_tokens}; the "
                "objective has statistics over the batch, which micro-batches would change"
            )
        # ranks gather the layers together, so each runs every round
        batches += [idle_batch()] * (rounds - len(batches))
        own, metrics = self.backward(mine, batches, count_items(sequences))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        grad_norm = _plain(norm)
        shares = self.ranks.gather((float(own), len(batches), sum(batch.tokens for batch in batches)))
        loss, micro_batches, tokens = (sum(numbers) for numbers in zip(*shares))
        finite = math.isfinite(loss) and bool(torch.isfinite(grad_norm))
        if live and finite:  # else the gradients stay as they are, for who wants to look at them
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return {
            "loss": loss,
            "grad_norm": float(grad_norm),
            "lr": lr,
            **_shown(self.ranks.merged(metrics)),
            "learner/sequences": float(len(live)),
            "learner/micro_batches": float(micro_batches),
            "learner/tokens": float(tokens),
            "learner/tokens_of_separate_rows": float(sum(len(s.prompt_ids) + len(s.token_ids) for s in sequences)),
            "learner/skipped": float(not (live and finite)),
            "learner/nonfinite": float(not finite),
            "time/learner": time.perf_counter() - started,
        }

    def share(self, live: list[ScoredSequence]) -> list[ScoredSequence]:
        """The live sequences that this rank computes."""
        if self.ranks.size == 1:
            return live
        dealt = deal([s.prompt_ids for s in live], [s.token_ids for s in live], self.ranks.size)
        return [live[i] for i in dealt[self.ranks.rank]]

    def is_live(self, sequence: ScoredSequence) -> bool:
        """Whether any token of the sequence can carry a gradient, or take part in a statistic over the batch."""
        if not sequence.token_ids:
            return False
        if not sequence.off_policy and (self.objective.beta > 0 or self.objective.entropy_coef > 0):
            return True
        dead = sequence.advantage == 0 and self.policy_term.skips_zero_advantage
        return not dead or self.objective.reach == "batch"

    def pack(self, sequences: Sequence[ScoredSequence]) -> list[MicroBatch]:
        """The micro-batches of shared-prefix rows that hold `sequences`."""
        prompts = [sequence.prompt_ids for sequence in sequences]
        return pack_rows(
            prompts,
            [sequence.token_ids for sequence in sequences],
            max_tokens=self.max_tokens,
            pairs_per_token=self.backbone.pairs_per_token,
        )

    def backward(
        self, sequences: Sequence[ScoredSequence], batches: Sequence[MicroBatch], num_items: NumItems
    ) -> tuple[Tensor, Metrics]:
        """The loss of all micro-batches (detached) and its metrics; adds its gradient to the parameters'.

        With several ranks: this rank's share of both, and the gradient of all; each needs as many micro-batches.
        """
        loss = torch.zeros((), device=self.ranks.device)
        metrics: list[Metrics] = []
        for batch in batches:
            part, found = self._micro_batch(
                batch.to(self.ranks.device), [sequences[i] for i in batch.sequences], num_items
            )
            loss += part
            metrics += found
        return loss, merge(metrics)

    def _micro_batch(
        self, batch: MicroBatch, sequences: list[ScoredSequence], num_items: NumItems
    ) -> tuple[Tensor, list[Metrics]]:
        ref_logps = self._ref_logps(batch, sequences)
        if is_sharded(self.backbone.model):
            return self._micro_batch_inside(batch, sequences, num_items, ref_logps)
        states = self.backbone.hidden(batch)
        # the head's gradient of one part is handed over before the other part makes its own: one [V, D] buffer, not two
        hidden = states.detach().requires_grad_(states.requires_grad)
        loss = torch.zeros((), device=hidden.device)
        metrics = []
        for result in self._parts(hidden, batch, sequences, num_items, ref_logps):
            result.loss.backward()
            loss += result.loss.detach()
            metrics.append(result.metrics)
        if states.requires_grad:
            states.backward(hidden.grad)
        return loss, metrics

    def _micro_batch_inside(
        self, batch: MicroBatch, sequences: list[ScoredSequence], num_items: NumItems, ref_logps: Tensor | None
    ) -> tuple[Tensor, list[Metrics]]:
        """The same inside the forward of a sharded model, where its root's parameters are whole."""

        def losses() -> list[tuple[Tensor, Metrics]]:
            hidden = self.backbone.hidden(batch)
            parts = self._parts(hidden, batch, sequences, num_items, ref_logps)
            return [(part.loss, part.metrics) for part in parts]

        found = inside(self.backbone.model, losses)
        loss = torch.stack([part for part, _ in found]).sum()
        (loss * self.ranks.size).backward()  # gradients are averaged over ranks; the step's is their sum
        return loss.detach(), [metrics for _, metrics in found]

    def _parts(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        sequences: list[ScoredSequence],
        num_items: NumItems,
        ref_logps: Tensor | None,
    ) -> Iterator[PolicyLoss]:
        """The loss of fresh and of replayed sequences, each computed when it is asked for.

        Two parts: for fresh rows "no old_logps" states that the ratio is 1, replayed rows bring their own.
        """
        # an idle rank still owes its gradients, zeros, to the reduction, and statistics over ranks need all of them
        owed = self.ranks.size > 1 and (not sequences or self.objective.reach == "batch")
        for replayed in (False, True):
            members = [i for i, sequence in enumerate(sequences) if sequence.off_policy is replayed]
            if not members and not owed:
                continue
            tokens, cu_seqlens = _select(batch.cu_seqlens, members)
            chosen, predicting = [sequences[i] for i in members], hidden[tokens]
            kept_ids = support_ids(chosen, hidden.device)
            yield repo_ops.linear_policy_loss(
                predicting,
                targets=batch.targets[tokens],
                advantages=torch.tensor([sequence.advantage for sequence in chosen], device=hidden.device),
                objective=self.objective,
                ref_logps=None if ref_logps is None else ref_logps[tokens],
                sampler_logps=self._sampler_logps(chosen, replayed),
                extras=self._extras(chosen, predicting, batch.targets[tokens]),
                cu_seqlens=cu_seqlens,
                temperature=self.temperature,
                support_ids=kept_ids,
                options=Options(
                    operand_dtype=self.backbone.head_dtype,
                    accumulate_weight_grad=kept_ids is None and self._adds_to_head_gradient(),
                ),
                **self.backbone.head.arguments(predicting),
                **(self._replayed(chosen, num_items) if replayed else {"num_items": self._on_policy(num_items)}),
            )

    def _adds_to_head_gradient(self) -> bool:
        """Whether the next part of a step adds to the head's gradient in place, instead of making a second [V, D]."""
        weight = self.backbone.head.weight
        return not is_sharded(self.backbone.model) and weight.grad is not None and weight.dtype == torch.float32

    def _on_policy(self, num_items: NumItems) -> NumItems:
        """What the on-policy part divides by when it is computed by itself."""
        if self.objective.row_norm == "official_code":
            return replace(num_items, sequences=num_items.sequences + num_items.off_policy_sequences)
        return num_items

    def _replayed(self, sequences: list[ScoredSequence], num_items: NumItems) -> dict[str, Any]:
        for sequence in sequences:
            if len(sequence.logps) != len(sequence.token_ids):
                raise ValueError(
                    f"logps: expected one for each of the {len(sequence.token_ids)} tokens of a replayed sequence, "
                    f"got {len(sequence.logps)}; store the sampler's log-probabilities"
                )
        device = self.ranks.device
        return {
            "old_logps": torch.tensor([logp for sequence in sequences for logp in sequence.logps], device=device),
            "off_policy": torch.ones(len(sequences), dtype=torch.bool, device=device),
            "off_policy_coef": self.off_policy_coef,
            "num_items": num_items,
        }

    def _sampler_logps(self, sequences: list[ScoredSequence], replayed: bool) -> Tensor | None:
        """What the engine reported, [N]; for fresh rows always, so that a drift of the engine shows in the metrics."""
        unknown = any(len(sequence.logps) != len(sequence.token_ids) for sequence in sequences)
        if unknown or (replayed and "sampler_logps" not in self.objective.reads):
            return None
        logps = [logp for sequence in sequences for logp in sequence.logps]
        return torch.tensor(logps, device=self.ranks.device)

    def _extras(self, sequences: list[ScoredSequence], hidden: Tensor, targets: Tensor) -> dict[str, Tensor] | None:
        """At the sampler's likeliest tokens, [N, K]: its own log-probabilities, and offsets of the policy's."""
        if not reads_top_logps(self.objective):
            return None
        for sequence in sequences:
            if not len(sequence.top_ids) == len(sequence.top_logps) == len(sequence.token_ids):
                raise ValueError(
                    f"top_ids, top_logps: expected one row for each of the {len(sequence.token_ids)} tokens, got "
                    f"{len(sequence.top_ids)} and {len(sequence.top_logps)}; generate with top_logps=K"
                )
        device, head = hidden.device, self.backbone.head
        if not sequences:  # an idle rank
            return {name: hidden.new_zeros(0, 1) for name in TOP_LOGPS}
        ids = torch.tensor([row for sequence in sequences for row in sequence.top_ids], device=device)
        behaviour = torch.tensor([row for sequence in sequences for row in sequence.top_logps], device=device)
        offsets = logit_offsets(
            hidden,
            head.weight,
            targets,
            ids,
            bias=head.bias,
            temperature=self.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            operand_dtype=self.backbone.head_dtype,
        )
        return {"topk_behaviour_logps": behaviour, "topk_offsets": offsets}

    @torch.no_grad()
    def _ref_logps(self, batch: MicroBatch, sequences: list[ScoredSequence]) -> Tensor | None:
        reference = self.reference
        if reference is None:
            return None
        shared = reference is self.backbone
        off: AbstractContextManager[None] = without_lora(reference.model) if shared else nullcontext()
        support = support_ids(sequences, self.ranks.device)
        with off:
            return inside(reference.model, lambda: reference.logps(batch, self.temperature, support))


def _embedding_gradient_by_rows(model: PreTrainedModel) -> None:
    """Embeddings tied to the head add the rows of a micro-batch's tokens to its gradient, not another [V, D].

    The head's backward comes first in each micro-batch, so the gradient is there, dense, when the rows arrive.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and embedding.weight is model.get_output_embeddings().weight:
        embedding.sparse = True


def count_items(sequences: Sequence[ScoredSequence]) -> NumItems:
    """What the loss of a step divides by: all its sequences and tokens, live or not, on-policy and replayed apart."""
    lengths = torch.tensor([len(s.token_ids) for s in sequences])
    return NumItems.of(lengths, torch.tensor([s.off_policy for s in sequences], dtype=torch.bool))


def support_ids(sequences: Sequence[ScoredSequence], device: torch.device) -> Tensor | None:
    """[N, K] what each token was drawn from, -1 for padding; None where that was the whole vocabulary."""
    rows = [kept for sequence in sequences for kept in sequence.kept_ids]
    if not rows:
        return None
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=device)


def _select(cu_seqlens: Tensor, members: list[int]) -> tuple[Tensor, Tensor]:
    """Places of the tokens of the given sequences, and the cu_seqlens of those sequences alone."""
    starts, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    tokens = [place for i in members for place in range(starts[i], ends[i])]
    lengths = [0] + [ends[i] - starts[i] for i in members]
    device = cu_seqlens.device
    return torch.tensor(tokens, dtype=torch.int64, device=device), torch.tensor(lengths, device=device).cumsum(0)


def _plain(norm: Tensor) -> Tensor:
    """A gradient's norm over all ranks: of sharded parameters it comes as a sharded tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _shown(metrics: Metrics) -> dict[str, float]:
    """The step's metrics as numbers, without those that are constant because fresh rows have ratio 1."""
    constant = ("ratio", "ess", "approx_kl", "clip_low", "clip_high")
    return {name: value for name, value in summarize(metrics).items() if not name.startswith(constant)}
