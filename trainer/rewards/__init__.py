"""Rewards: plain functions `f(prompts, completions, **columns) -> list[float | None]`, called with a whole batch.

Here those of a run are found by name, checked against the data, asked, and counted.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from repo_ops.trainer.rewards import answers
from repo_ops.trainer.rewards.answers import exact_match
from repo_ops.trainer.rewards.child import Child
from repo_ops.trainer.rewards.score import RewardFunction, Scores, missing_columns, score
from repo_ops.trainer.rewards.serve import load_function

if TYPE_CHECKING:
    from repo_ops.trainer.rollout import Completion
    from repo_ops.trainer.tasks import Example

__all__ = [
    "OWN_COLUMNS",
    "RewardFunction",
    "Rewards",
    "Scores",
    "exact_match",
    "load_reward",
    "reward_metrics",
    "score",
]

log = logging.getLogger(__name__)

BUILT_IN = ("exact_match", "number_match", "prefix_match", "soft_overlong")
OWN_COLUMNS = ("num_tokens", "finished", "max_new_tokens")
"""What reward functions may read beside the data's columns: tokens of the completion, whether it ended by itself, and
how many tokens it could have had."""


class Rewards:
    """Reward functions by name with their weights.

    Args:
        functions: name -> (function, weight). The first one decides whether a prompt counts as solved.
    """

    def __init__(self, functions: Mapping[str, tuple[RewardFunction, float]]) -> None:
        self.functions = dict(functions)
        self._shown: set[str] = set()

    @classmethod
    def load(cls, weights: Mapping[str, float], *, timeout: float | None = None) -> Rewards:
        """The functions that the keys name (see `load_reward`), called by what stands behind the colon.

        Raises:
            ValueError: no such function.
        """
        labels = [name.rpartition(":")[2] for name in weights]
        return cls(
            {
                label if labels.count(label) == 1 else name: (load_reward(name, timeout=timeout), weight)
                for label, (name, weight) in zip(labels, weights.items())
            }
        )

    def check(self, columns: Sequence[str]) -> None:
        """Refuses data that lack a column which a function insists on.

        Raises:
            ValueError: names the column, the function, and the nearest column there is.
        """
        for name, (function, _) in self.functions.items():
            for column in missing_columns(function, [*columns, *OWN_COLUMNS]):
                near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
                remedy = f"did you mean {near[0]!r}?" if near else "add it to the data"
                if column == "answer":
                    remedy = "name it with --answer_column" + (f" {near[0]}" if near else "")
                raise ValueError(
                    f"reward {name}: expected the data to have a column {column!r}, got {sorted(columns)}; {remedy}"
                )

    def score(self, rows: Sequence[tuple[Example, Completion]], *, max_new_tokens: int) -> Scores:
        """What each completion of an example earned. A message of a failing function is logged once."""
        shared = set.intersection(*(set(example.columns) for example, _ in rows)) if rows else set()
        columns = {name: [example.columns[name] for example, _ in rows] for name in sorted(shared)}
        found = score(
            self.functions,
            [example.prompt for example, _ in rows],
            [completion.text for _, completion in rows],
            {
                **columns,
                "num_tokens": [len(completion.token_ids) for _, completion in rows],
                "finished": [completion.finished for _, completion in rows],
                "max_new_tokens": [max_new_tokens] * len(rows),
            },
        )
        for name, messages in found.errors.items():
            for message in dict.fromkeys(messages):
                self._show(
                    f"reward {name}: {messages.count(message)} of {len(rows)} samples left out: {message}", message
                )
        if found.timeouts:
            self._show(f"rewards: {found.timeouts} of {len(rows)} samples left out at a deadline", "a deadline")
        return found

    def close(self) -> None:
        """Ends the child processes."""
        for function, _ in self.functions.values():
            if hasattr(function, "close"):
                function.close()

    def _show(self, sentence: str, key: str) -> None:
        if key not in self._shown and len(self._shown) < 100:
            self._shown.add(key)
            log.warning("%s (said once; reward/errors and reward/timeouts count)", sentence)


def load_reward(name: str, *, timeout: float | None = None) -> RewardFunction:
    """The reward function of that name: a built-in one, "package.module:function" or "path/to/file.py:function".

    Args:
        timeout: seconds that one call of a function of your own may take; it then runs in a process of its own, which
            is killed when they are over. None: it runs in this process, for as long as it likes.
    Raises:
        ValueError: no such function.
    """
    if name in BUILT_IN:
        return getattr(answers, name)
    if name == "math_verify":
        return answers.MathVerify()
    if ":" not in name:
        raise ValueError(
            f"reward: expected one of {', '.join((*BUILT_IN, 'math_verify'))}, 'module:function' or "
            f"'path/to/file.py:function', got {name!r}"
        )
    return load_function(name) if timeout is None else Child(name, timeout).start()


def reward_metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """Mean and std of each function's own values, unweighted, and what was lost, over batches of one step."""
    found = {}
    for name in scores[0].parts:
        values = [value for batch in scores for value in batch.parts[name] if value is not None]
        found[f"rewards/{name}/mean"] = fmean(values) if values else float("nan")
        found[f"rewards/{name}/std"] = pstdev(values) if values else float("nan")
    found["reward/errors"] = float(sum(len(messages) for batch in scores for messages in batch.errors.values()))
    found["reward/timeouts"] = float(sum(batch.timeouts for batch in scores))
    return found
