"""Fused, exact, memory-lean policy losses for the GRPO family, led by RePO (arXiv 2506.09340).

A name is imported when it is first used, and torch with it: `repo-ops --help` need not wait for it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; the same names, by module, stand in _HOMES
    from repo_ops import replay
    from repo_ops.advantages import group_advantages
    from repo_ops.integrations.transformers import patch_causal_lm
    from repo_ops.linear_logps import TokenStats, linear_logps
    from repo_ops.linear_policy_loss import linear_policy_loss
    from repo_ops.linear_stats import VocabularyStats, linear_stats
    from repo_ops.loss_inputs import PolicyLoss
    from repo_ops.metrics import Stat, summarize
    from repo_ops.objectives import Objective, get_objective, objective_names
    from repo_ops.options import Options
    from repo_ops.policy_loss import policy_loss
    from repo_ops.reduce import NumItems
    from repo_ops.replay import ReplayBuffer
    from repo_ops.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "NumItems",
    "Objective",
    "Options",
    "PolicyLoss",
    "ReplayBuffer",
    "Stat",
    "TokenStats",
    "Tokens",
    "VocabularyStats",
    "get_objective",
    "group_advantages",
    "linear_logps",
    "linear_policy_loss",
    "linear_stats",
    "objective_names",
    "patch_causal_lm",
    "policy_loss",
    "replay",
    "summarize",
]

_HOMES = {
    "advantages": ["group_advantages"],
    "integrations.transformers": ["patch_causal_lm"],
    "linear_logps": ["TokenStats", "linear_logps"],
    "linear_policy_loss": ["linear_policy_loss"],
    "linear_stats": ["VocabularyStats", "linear_stats"],
    "loss_inputs": ["PolicyLoss"],
    "metrics": ["Stat", "summarize"],
    "objectives": ["Objective", "get_objective", "objective_names"],
    "options": ["Options"],
    "policy_loss": ["policy_loss"],
    "reduce": ["NumItems"],
    "replay": ["ReplayBuffer"],
    "tokens": ["Tokens"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """This package, in which `linear_logps` is the function, not the module of that name that holds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # importing a submodule puts it here under its own name
        if isinstance(value, ModuleType) and _HOME_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that exists

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        elif name.startswith("_"):  # what Python and its tools ask every module for
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            try:
                value = import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
