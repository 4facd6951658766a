"""Draws the next token of every sequence and notes its log-probability, inside transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from repo_ops.terms.divergence import support_ids
from repo_ops.trainer.rollout import GenerationStopped, SamplingSettings


class Sampler(LogitsProcessor):
    """Token and log-probability of every sequence at every step, drawn from numbers that are given beforehand.

    `generate` is run without sampling: the scores handed back hold one finite entry a row, the token drawn here. So
    the log-probability is at hand at once, and nothing of size [B, V] outlives the step.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings

    def begin(self, uniforms: Tensor) -> None:
        """Starts a batch. uniforms: [B, steps] float64 in [0, 1)."""
        self.uniforms = uniforms
        self.token_ids = torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device)
        self.logps = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self.top_ids = self.token_ids.new_zeros(*uniforms.shape, self.settings.top_logps)
        self.top_logps = self.logps.new_zeros(*uniforms.shape, self.settings.top_logps)
        # which tokens the draw was among, by row and step; there is nothing to say where it was all of them
        self.kept_ids: list[dict[int, tuple[int, ...]]] = [{} for _ in range(len(uniforms))]
        # of the sequences that still run, their rows
        self.rows = torch.arange(len(uniforms), device=uniforms.device)
        self.prompt_width = 0

    def draw(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """The next token [B] after input_ids [B, T], from logits [B, V]."""
        # the step follows from the length: generate may compute a step again, or one too many, and drop it
        step, settings = input_ids.shape[1] - self.prompt_width, self.settings
        logps = torch.log_softmax(logits.float() / settings.temperature, dim=-1)
        if settings.top_k or settings.top_p < 1.0:
            logps = truncated(logps, settings.top_k, settings.top_p)
            for row, kept in zip(self.rows.tolist(), logps.isfinite()):
                self.kept_ids[row][step] = tuple(kept.nonzero().squeeze(1).tolist())
        chosen = logps.argmax(-1) if settings.greedy else inverse_cdf(logps, self.uniforms[self.rows, step])
        self.token_ids[self.rows, step] = chosen
        self.logps[self.rows, step] = logps.gather(1, chosen[:, None]).squeeze(1)
        if settings.top_logps:
            top = support_ids(logps.topk(settings.top_logps).indices, chosen)
            self.top_ids[self.rows, step] = top
            self.top_logps[self.rows, step] = logps.gather(1, top)
        return chosen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.draw(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class ShareEnded(StoppingCriteria):
    """Ends a call of `generate` for all sequences once this share of them has ended, or when somebody asks to stop."""

    def __init__(self, is_stop: Callable[[Tensor], Tensor], share: float, should_stop: Callable[[], bool]) -> None:
        self.is_stop = is_stop
        self.share = share
        self.should_stop = should_stop
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.should_stop():
            raise GenerationStopped
        now = self.is_stop(input_ids[:, -1])
        self.ended = now if self.ended is None else self.ended | now
        return (self.ended.float().mean() >= self.share).expand(len(input_ids))


def inverse_cdf(logps: Tensor, uniforms: Tensor) -> Tensor:
    """The token [B] at which the running sum of probabilities first exceeds the number drawn.

    Args:
        logps: [B, V] float32; -inf for tokens that must not be drawn.
        uniforms: [B] float64 in [0, 1).
    """
    # float64: over 49152 terms a float32 sum is off by more than the probability of a rare token
    cdf = logps.double().exp_().cumsum_(-1)
    total = cdf[:, -1:]
    # rounding may lift u * total to total itself, which no token exceeds
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # no NaN exceeds one either: the last token stands for it, until somebody looks for finite log-probabilities
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_max(logps.shape[1] - 1)


def truncated(logps: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities [B, V] of the kept tokens, renormalised; -inf elsewhere. top_k comes first, then top_p.

    Among equal probabilities at the edge of top_k or top_p the lower ids are kept.
    """
    ordered, ids = logps.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
        ordered = torch.log_softmax(ordered, dim=-1)
    if top_p < 1.0:
        mass_before = ordered.double().exp().cumsum(-1) - ordered.double().exp()
        ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
    ordered = torch.log_softmax(ordered, dim=-1)
    return torch.empty_like(logps).scatter_(1, ids, ordered)
