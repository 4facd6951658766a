"""GSPO: one ratio per sequence, s = exp(mean_t(logps - old_logps)); loss -min(s A, clip(s) A) for each of its tokens.

The mean over tokens of the attached s gives d loss / d logp_t = -A s / T on every token, where s is not clipped.
Source: arXiv 2507.18071 eq. 5-7. `luspo` (arXiv 2602.05261) is the same loss times the sequence's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from repo_ops.objectives import grpo


@dataclass(frozen=True, kw_only=True)
class Objective(grpo.Objective):
    ratio_level: str = "sequence_mean"
    """Whose ratio is clipped: the sequence's, as a geometric mean over its tokens."""
    eps_low: float = 3e-4
    """Clip width of the sequence ratio below 1; 3e-4, far narrower than a token ratio's."""
    eps_high: float = 4e-4
    """Clip width of the sequence ratio above 1; 4e-4."""


reference = grpo.reference

ROOT_E = math.sqrt(math.e)
VECTORS = [
    (([-1.0, -2.0], [-1.0, -2.0], 2.0), ([-2.0, -2.0], [-2.0, -2.0])),  # on policy: -A, whatever the length
    (([-1.0, -2.0], [-1.5, -1.5], 1.0), ([-1.0, -1.0], [-1.0, -1.0])),  # token ratios cancel: s = 1
    (([-1.0, -1.0], [-2.0, -1.0], 1.0), ([-1.0004, -1.0004], [0.0, 0.0])),  # s = e^0.5 is clipped as a whole
    (([-1.0, -1.0], [-2.0, -1.0], -1.0), ([ROOT_E, ROOT_E], [ROOT_E, ROOT_E])),  # and pulled back if A < 0
]
