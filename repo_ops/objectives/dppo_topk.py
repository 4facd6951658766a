"""DPPO with the divergence over the behaviour's K most likely tokens and one bin for the rest.

Reads extras at K ids per token, the behaviour's top K with the sampled token in the last place where it is absent
(repo_ops.terms.divergence.support_ids): "topk_behaviour_logps" [..., K] are the behaviour's log-probabilities, and
"topk_offsets" [..., K] the current policy's relative to the sampled token (repo_ops.logit_offsets), so that the one
sweep over the vocabulary is enough. Source: arXiv 2602.04879; sail-sg/Stable-RL, core_algos.py; K = 20 in
arXiv 2606.10968.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from repo_ops.objectives import dppo
from repo_ops.terms import divergence
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(dppo.Objective):
    requires: ClassVar[tuple[str, ...]] = ("topk_offsets", "topk_behaviour_logps")

    def _divergence(self, tokens: Tokens) -> Tensor:
        current = tokens.extras["topk_offsets"] + tokens.logps.detach()[:, None]
        return divergence.SUPPORT[self.divergence](current, tokens.extras["topk_behaviour_logps"])


def reference(
    objective: Objective,
    logps: list[float],
    old_logps: list[float],
    advantage: float,
    *,
    sampler_logps: list[float],
    topk_offsets: list[list[float]],
    topk_behaviour_logps: list[list[float]],
) -> list[float]:
    """Per-token losses of one sequence, by the formula."""
    given = {"old_logps": old_logps, "sampler_logps": sampler_logps}
    losses = []
    for t, logp in enumerate(logps):
        p, q = [math.exp(logp + x) for x in topk_offsets[t]], [math.exp(x) for x in topk_behaviour_logps[t]]
        p, q = ([*x, max(1 - sum(x), 1e-12)] for x in (p, q))
        far = sum(abs(x - y) for x, y in zip(p, q)) / 2
        if objective.divergence == "kl":
            far = sum(y * math.log(y / x) for x, y in zip(p, q))
        moved = logp - given[objective.anchor or objective.behaviour][t]
        above, below = moved > 0 and far > objective.delta_high, moved < 0 and far > objective.delta_low
        if not objective.symmetric:
            above, below = above and advantage > 0, below and advantage < 0
        log_ratio = logp - given[objective.behaviour][t]
        ratio = math.exp(log_ratio)
        if objective.form == "repo":
            ratio = min(math.exp(min(log_ratio, 20.0)), objective.ratio_cap or math.inf) * logp
        keep = not (above or below)
        losses.append(-keep * objective.adv_tau * advantage * ratio + objective.kl_tau * log_ratio**2)
    return losses


HALF, LESS, TENTH = math.log(0.5), math.log(0.4), math.log(0.1)
VECTORS = [
    # the sampled token is among the two and moved by 0.1, the other one by nothing: TV 0.1
    ((HALF, LESS, 2.0, {"topk_offsets": [0.0, TENTH - HALF], "topk_behaviour_logps": [LESS, TENTH]}), (-2.5, -2.5)),
    # it moved as little, but another token lost 0.4: TV 0.4, which (token, rest) would not have seen
    ((HALF, LESS, 2.0, {"topk_offsets": [0.0, TENTH - HALF], "topk_behaviour_logps": [LESS, HALF]}), (0.0, 0.0)),
]
