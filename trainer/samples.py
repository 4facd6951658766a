"""Completions of a step as rows: a few of them as a table and in samples.jsonl, all of them as parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from repo_ops.trainer.groups import Group
    from repo_ops.trainer.learner import ScoredSequence

__all__ = ["SampleRow", "read_samples", "rows_of_step", "sample_table", "spread", "write_completions", "write_samples"]

SAMPLES_FILE = "samples.jsonl"
COMPLETIONS_FOLDER = "completions"
T = TypeVar("T")

SampleRow = dict[str, Any]
"""What `rows_of_step` puts into it."""


def rows_of_step(step: int, groups: Sequence[Group], sequences: Sequence[ScoredSequence]) -> list[SampleRow]:
    """One row for every completion of a step's groups, fresh ones first in each.

    version: how many optimizer steps the policy had made that sampled it; logp: the sum over its tokens of their
    log-probabilities then, in nats; finished: it ended by itself, within the allowed tokens; rewards/NAME: of each
    function where there are several, unweighted.
    """
    advantages: dict[tuple[int, bool], list[float]] = {}
    for sequence in sequences:
        advantages.setdefault((sequence.group, sequence.off_policy), []).append(sequence.advantage)
    rows = []
    for index, group in enumerate(groups):
        parts = [*group.parts, *(sample.rewards for sample in group.replayed)]
        for (completion, reward, replayed), given in zip(group.rows(), parts, strict=True):
            left = advantages.get((index, replayed))  # none: a dead part that was left out of the step
            rows.append(
                {
                    "step": step,
                    "group": index,
                    "prompt": group.example.prompt,
                    "completion": completion.text,
                    "reward": reward,
                    "advantage": left.pop(0) if left else 0.0,
                    "replayed": replayed,
                    "version": getattr(completion, "version", step - 1),
                    "tokens": len(completion.token_ids),
                    "finished": completion.finished,
                    "logp": sum(completion.logps),
                    **({f"rewards/{name}": value for name, value in given.items()} if len(given) > 1 else {}),
                }
            )
    return rows


def spread(rows: Sequence[SampleRow], count: int) -> list[SampleRow]:
    """At most `count` of the rows: fresh ones from the worst to the best reward, then replayed ones likewise."""
    parts = [[row for row in rows if row["replayed"] is replayed] for replayed in (False, True)]
    parts = [sorted(part, key=lambda row: row["reward"]) for part in parts if part]
    chosen = []
    for index, part in enumerate(parts):
        chosen += evenly(part, min(len(part), count // len(parts) + (index < count % len(parts))))
    return chosen


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items: the first, the last and some between; more often than once where there are fewer."""
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count if items else 0)]


def sample_table(rows: Sequence[SampleRow], *, title: str) -> Table:
    """One line a row; of a prompt that is too long its end is shown, of a completion its beginning."""
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("prompt", ratio=2, no_wrap=True)
    table.add_column("completion", ratio=3, no_wrap=True)
    for name in ("reward", "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for row in rows:
        table.add_row(
            _EndOf(one_line(row["prompt"])),
            Text(one_line(row["completion"]), overflow="ellipsis"),
            f"{row['reward']:.3g}",
            f"{row['advantage']:+.2f}",
            "replay" if row["replayed"] else "fresh",
        )
    return table


def one_line(text: str) -> str:
    """The text without anything that would break a line or move a cursor."""
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)


class _EndOf:
    """Text that is cut at its beginning, and shows its end."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, text = options.max_width, self.text
        if cell_len(text) > width:
            text = text[-width:]
            while cell_len(text) > width - 1:  # wide characters take two cells
                text = text[1:]
            text = "…" + text
        yield Text(text, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def write_samples(folder: Path, rows: Sequence[SampleRow]) -> None:
    """Append to folder/samples.jsonl."""
    with (folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_samples(folder: Path) -> list[SampleRow]:
    """The rows of folder/samples.jsonl; none where it is missing."""
    path = folder / SAMPLES_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_completions(folder: Path, step: int, rows: Sequence[SampleRow]) -> Path:
    """All completions of a step as folder/completions/step_N.parquet; a step made again replaces its file."""
    import pyarrow
    from pyarrow import parquet

    path = folder / COMPLETIONS_FOLDER / f"step_{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path
