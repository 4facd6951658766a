"""The page of the advantage estimators."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

from sources import fields_of

from repo_ops.advantages import Estimator, estimator_names

ARGUMENTS = {
    "passk_analytic": ", k=2",
    "red_drop": ", generator=torch.Generator().manual_seed(0)",
    "remax": ", greedy_rewards=0.5",
}
"""What an estimator cannot do without."""

SETUP = """\
import torch
from repo_ops import group_advantages

rewards, group_ids = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
lengths = torch.tensor([5, 3, 4, 9])"""


def page() -> str:
    """The Markdown of docs/advantages.md."""
    parts = [
        "# Advantage estimators",
        "`group_advantages(rewards, group_ids, estimator=...)` compares each sample with the samples of its prompt. A "
        "function of `Rows` that returns [B] is an estimator too. Replayed rows (`off_policy=`) are compared among "
        'themselves (`mode="split"`) or together with fresh ones (`mode="mixed"`), where that means something.',
        ", ".join(f"[{name}](#{name})" for name in estimator_names()),
        "The examples go on from these tensors.",
        f"```python\n{SETUP}\n```",
    ]
    for name in estimator_names():
        parts += _section(name)
    return "\n\n".join(parts) + "\n"


def _section(name: str) -> list[str]:
    module = importlib.import_module(f"repo_ops.advantages.estimators.{name}")
    kind: type[Estimator] = module.Estimator
    parts = [f"## {name}", *inspect.cleandoc(module.__doc__ or "").split("\n\n")]
    rows = []
    for field in fields_of(kind):
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {default} | {field.text.replace('|', chr(92) + '|')} |")
    if rows:
        parts.append("\n".join(["| field | default | effect and usual value |", "| --- | --- | --- |", *rows]))
    notes = []
    if kind.needs_lengths:
        notes.append("Reads `lengths`.")
    if kind.takes_parts:
        notes.append("Takes rewards of K parts, [B, K].")
    if kind.mixed_refusal:
        notes.append(f'Refuses `mode="mixed"`: {kind.mixed_refusal}.')
    notes.append(f"Defined in [{name}.py](../repo_ops/advantages/estimators/{name}.py).")
    lengths = ", lengths=lengths" if kind.needs_lengths else ""
    call = f'group_advantages(rewards, group_ids, estimator="{name}"{lengths}{ARGUMENTS.get(name, "")})'
    return [*parts, " ".join(notes), f"```python\nadvantages = {call}\n```"]
