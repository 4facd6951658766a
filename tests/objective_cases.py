"""What the objective tests share: every objective, a random batch, and settings that switch fields on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from repo_ops import objectives
from repo_ops.objectives import Objective
from repo_ops.step_loss import policy_losses
from repo_ops.tokens import Tokens

FILES = sorted({m.name for m in pkgutil.iter_modules(objectives.__path__)} - {"base", "recipes"})
NAMES = objectives.objective_names()
LENGTHS = (3, 1, 6, 0, 4, 9, 2, 5)
"""A single token, an empty sequence, and sums (30) that no tile of 7 rows divides."""

CONST = {"max_length": 16}
NEEDED = {"dr_grpo": CONST}
"""Hyper-parameters without which a name is refused."""


def module(name: str) -> ModuleType:
    """The file that holds objective `name`."""
    return importlib.import_module(f"repo_ops.objectives.{objectives.RECIPES.get(name, (name,))[0]}")


def make(name: str, **hyper: Any) -> Objective:
    """The objective with whatever it cannot do without."""
    return objectives.get_objective(name, **{**NEEDED.get(name, {}), **hyper})


@dataclasses.dataclass(eq=False)
class Batch:
    """Packed tokens of sequences with LENGTHS, everything that any objective reads, float64."""

    tokens: Tokens
    off_policy: Tensor

    @property
    def lengths(self) -> Tensor:
        assert self.tokens.lengths is not None
        return self.tokens.lengths

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))

    def arguments(self, objective: Objective, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Keyword arguments of both losses; extras only where they are read."""
        t = self.tokens
        found: dict[str, Any] = {name: getattr(t, name).to(dtype) for name in ("old_logps", "ref_logps")}
        assert t.sampler_logps is not None
        found["sampler_logps"] = t.sampler_logps.to(dtype)
        found["advantages"] = t.advantages.to(dtype)
        found["extras"] = {n: v.to(dtype) for n, v in t.extras.items() if n in objective.reads or n == "baseline"}
        return {**found, "cu_seqlens": self.cu_seqlens, "objective": objective}


def batch(seed: int = 0, *, lengths: Sequence[int] = LENGTHS, spread: float = 0.6, per_token: bool = False) -> Batch:
    """Random policies that differ by about `spread` nats a token; advantages below 0, so that SPO may read them."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    n = int(sizes.sum())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logps = -0.05 - normal(n).abs()
    support = torch.log_softmax(normal(n, 6), -1)[:, :3]
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    advantages = normal(n) if per_token else normal(len(sizes))[owner]
    tokens = Tokens(
        logps=logps,
        old_logps=(logps + spread * normal(n)).clamp_max(-0.01),
        advantages=advantages,
        lengths=sizes,
        ref_logps=(logps + spread * normal(n)).clamp_max(-0.01),
        sampler_logps=(logps + spread * normal(n)).clamp_max(-0.01),
        sampler_known=torch.ones(n, dtype=torch.bool),
        entropy=normal(n).abs(),
        extras={
            "topk_offsets": support - logps[:, None],
            "topk_behaviour_logps": torch.log_softmax(support + 0.5 * normal(n, 3), -1) - 0.1,
            "baseline": -normal(len(sizes)).abs()[owner],
        },
    )
    return Batch(tokens, torch.arange(len(sizes)) % 2 == 1)


def suited(name: str, given: Batch, objective: Objective) -> Batch:
    """The batch, with rewards <= 0 for the objective that reads them as log-probabilities."""
    if getattr(objective, "form", None) != "cross_entropy":
        return given
    return Batch(dataclasses.replace(given.tokens, advantages=-given.tokens.advantages.abs()), given.off_policy)


def losses(objective: Objective, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Per-token losses and the gradient of their sum, by autograd on the objective with its modifiers."""
    logps = tokens.logps.detach().clone().requires_grad_()
    found = policy_losses(objective, dataclasses.replace(tokens, logps=logps))
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    return found.detach(), gradient


def part(tokens: Tokens, rows: Tensor | slice, lengths: Tensor | None) -> Tokens:
    """Some of the tokens."""
    fields = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens) if f.name != "lengths"}
    cut = {name: value[rows] for name, value in fields.items() if isinstance(value, Tensor)}
    extras = {name: value[rows] for name, value in tokens.extras.items()}
    return Tokens(**cut, lengths=lengths, extras=extras)


def by_reference(name: str, objective: Objective, given: Batch) -> list[float]:
    """The file's `reference` on the batch, flattened."""
    reference, t = module(name).reference, given.tokens
    rows = [list(range(int(a), int(b))) for a, b in zip(given.cu_seqlens, given.cu_seqlens[1:]) if b > a]

    def listed(values: Tensor, row: list[int]) -> Any:
        return values[torch.tensor(row)].tolist()

    named = [p.name for p in inspect.signature(reference).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if objective.reach == "batch":
        columns = [[listed(values, row) for row in rows] for values in (t.logps, t.old_logps)]
        found = reference(objective, *columns, [float(t.advantages[row[0]]) for row in rows])
        return [x for row in found for x in row]
    found = []
    for row in rows:
        extra = {n: listed(getattr(t, n, t.extras.get(n)), row) for n in named}
        if "baseline" in extra:
            extra["baseline"] = extra["baseline"][0]
        found += reference(
            objective, listed(t.logps, row), listed(t.old_logps, row), float(t.advantages[row[0]]), **extra
        )
    return found


WIDE = {"clip": "ring", "eps_low": 0.1, "eps_high": 0.1}
SAMPLED = {"sampler_weight": "token_mask"}
# field -> (settings under which it is read, another value); a pair under "file.field" wins
SWITCHES: dict[str, tuple[dict[str, Any], Any]] = {
    "reduction": ({}, "token-sum"),
    "max_length": ({"reduction": "const", "max_length": 16}, 32),
    "beta": ({}, 0.1),
    "kl": ({"beta": 0.1}, "k2"),
    "kl_reduction": ({"beta": 0.1}, "token-sum"),
    "entropy_coef": ({}, 0.01),
    "row_norm": ({"reduction": "seq-mean-token-mean"}, "official_code"),
    "sampler_weight": ({}, "token_truncate"),
    "sampler_min": (SAMPLED, 0.9),
    "sampler_max": (SAMPLED, 1.1),
    "off_policy_mask": ({}, 0.0),
    "top_entropy_quantile": ({}, 0.3),
    "eps_low": ({}, 0.01),
    "eps_high": ({}, 0.01),
    "delta": ({}, 1.7),
    "ratio_level": ({}, "prefix_min"),
    "log_ratio_clamp": ({}, 0.3),
    "tau": ({}, 0.9),
    "tau_pos": ({}, 3.0),
    "tau_neg": ({}, 3.0),
    "k_pos": ({}, 1.0),
    "k_neg": ({}, 1.0),
    "lambda_pos": ({}, 1.0),
    "lambda_neg": ({}, 1.0),
    "weight_min": ({}, 0.9),
    "weight_max": ({}, 0.6),
    "form": ({}, "repo"),
    "spo.form": ({}, "cross_entropy"),
    "kimi.form": ({}, "k1.5"),
    "slope": ({}, 0.3),
    "q_max": ({"form": "cross_entropy"}, -0.5),
    "fraction": ({"cov_min": -9.0}, 0.4),
    "kl_cov.fraction": ({}, 0.4),
    "kl_coef": ({}, 0.3),
    "cov_min": ({"fraction": 0.5, "cov_min": -9.0}, 0.1),
    "cov_max": ({"fraction": 0.5, "cov_min": -9.0}, 0.0),
    "seed": ({"fraction": 0.3, "cov_min": -9.0}, 1),
    "divergence": ({"delta_low": 0.08, "delta_high": 0.08}, "kl"),
    "delta_low": ({}, 0.01),
    "delta_high": ({}, 0.01),
    "dppo_topk.delta_low": ({}, 0.9),
    "dppo_topk.delta_high": ({}, 0.9),
    "symmetric": ({}, True),
    "ratio_cap": ({"form": "repo"}, 1.1),
    "behaviour": ({}, "sampler_logps"),
    "anchor": ({}, "sampler_logps"),
    "adv_tau": ({}, 0.5),
    "kl_tau": ({}, 0.1),
    "surrogate": ({}, "ppo"),
    "minpro.eps_low": ({"surrogate": "ppo"}, 0.01),
    "minpro.eps_high": ({"surrogate": "ppo"}, 0.01),
    "cap": ({}, 0.9),
    "include_current": ({}, True),
    "cap_prefix_at_1": ({}, True),
    "rule": ({}, "open_code"),
    "target": ({"target": 9.0}, 0.0),
    "low_start": ({"target": 0.0}, 0.8),
    "low_max": ({"target": 9.0}, 0.7),
    "low_step": ({"target": 9.0}, 0.0),
    "high_start": ({"target": 0.0}, 1.6),
    "high_max": ({"target": 9.0}, 1.4),
    "high_step": ({"target": 9.0}, 0.0),
    "clip": ({}, "one_side"),
    "weight": ({}, "ratio"),
    "rec.eps_low": ({"clip": "two_side"}, 0.6),
    "rec.eps_high": ({"clip": "two_side"}, 2.0),
    "eps_ring_low": (WIDE, 0.2),
    "eps_ring_high": (WIDE, 0.2),
    "advantage_temperature": ({"weight": "advantage"}, 3.0),
    "regularizer": ({}, "k2"),
    "regularizer_coef": ({"regularizer": "forward_kl"}, 0.5),
    "cispo.eps_low": ({}, 0.2),
    "cispo.eps_high": ({}, 0.1),
}
ACROSS_RANKS = {"process_group"}
"""Fields whose effect takes more than one process: tests/worker_objectives.py."""
