"""GSPO-token: GSPO's clipped sequence ratio with an advantage per token, s_t = sg(s) exp(logp - sg(logp)).

s = exp(mean_t(logps - old_logps)); loss -min(s_t A_t, clip(s_t) A_t). Equal to GSPO in value and gradient where A is
the same for all tokens of a sequence. Source: arXiv 2507.18071.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repo_ops.objectives import gspo
from repo_ops.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective(gspo.Objective):
    def log_ratio(self, tokens: Tokens) -> Tensor:
        return super().log_ratio(tokens).detach() + tokens.logps - tokens.logps.detach()


reference = gspo.reference

VECTORS = [*gspo.VECTORS]  # one advantage per sequence: GSPO's own numbers
