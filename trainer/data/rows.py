"""Rows of a data set, from a file, a folder or the hub, as a memory-mapped table."""

from __future__ import annotations

import difflib
import glob
import json
import random
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["open_rows", "prompt_hashes", "require_column", "some_of"]

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_rows(name: str, options: Mapping[str, Any], *, key: str = "data") -> Dataset:
    """The rows of a .jsonl, .json or .parquet file (wildcards allowed), of a folder, or of a data set of the hub.

    They stay on the disk and are read when they are asked for. A folder is one that `save_to_disk` wrote, or one of
    files that `datasets.load_dataset` knows.

    Args:
        name: the path or hub id.
        options: for `datasets.load_dataset`: `split` (train, unless told otherwise), `name`, `revision`, `cache_dir`...
        key: of the setting, for messages.
    Raises:
        ImportError: the package datasets is missing.
        ValueError: nothing there, or nothing that can be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{key}: expected the package datasets; pip install 'repo-ops[data]'") from error
    settings = {"split": "train", **options}
    reader = READERS.get(Path(name).suffix)
    path = Path(name).expanduser()
    if reader and not glob.glob(str(path)):
        raise ValueError(f"{key}: expected a file, got {name!r}, which is not there; check the path")
    try:
        with _quiet(datasets):
            if reader:
                rows = datasets.load_dataset(reader, data_files=str(path), **settings)
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(str(path))
                rows = saved[settings["split"]] if isinstance(saved, datasets.DatasetDict) else saved
            else:
                rows = datasets.load_dataset(str(path) if path.is_dir() else name, **settings)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"{key}: expected a .jsonl or .parquet file, a folder or a hub id that datasets can read, got {name!r} "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(rows, datasets.Dataset) or len(rows) == 0:
        raise ValueError(f"{key}: expected one split with rows, got {name!r} with {settings}; check {key}_args.split")
    return rows


def require_column(rows: Dataset, column: str, setting: str) -> None:
    """Refuses rows without the column.

    Raises:
        ValueError: names the setting, the columns there are, and the nearest.
    """
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"say which with --{setting}"
        raise ValueError(f"{setting}: expected a column of {sorted(rows.column_names)}, got {column!r}; {remedy}")


def prompt_hashes(rows: Dataset, column: str) -> np.ndarray[Any, Any]:
    """A number for each row's prompt, equal for equal prompts [n] int64; 8 bytes a row are all that is kept.

    Raises:
        ValueError: a prompt that is neither text nor a list of chat messages.
    """
    hashes = array("q")
    for batch in rows.select_columns([column]).iter(1000):
        for prompt in batch[column]:
            if not is_prompt(prompt):
                raise ValueError(
                    f"prompt_column: expected text or chat messages (role and content) in row {len(hashes)} of "
                    f"{column!r}, got {repr(prompt)[:60]}; clean the data"
                )
            text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
            digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "big", signed=True))
    return np.array(hashes, dtype=np.int64)


def is_prompt(value: Any) -> bool:
    """Whether it is text, or a list of messages that each have a role and a content."""
    if not isinstance(value, list):
        return isinstance(value, str) and value != ""
    has_both = (isinstance(m, dict) and m.get("role") and m.get("content") is not None for m in value)
    return bool(value) and all(has_both)


def some_of(count: int, wanted: int, *, seed: int) -> list[int]:
    """`wanted` different places out of `count`, in random order, a function of the seed."""
    return random.Random(f"data {seed}").sample(range(count), wanted)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the bars that datasets draws while it reads: they tear a progress display apart."""
    were_disabled = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
