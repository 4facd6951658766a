"""Folders that are built once and kept: converted checkpoints, warm-started tiny models."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where models are kept: `cache_dir`, else $REPO_OPS_CACHE, else ~/.cache/repo-ops."""
    return Path(cache_dir or os.environ.get("REPO_OPS_CACHE") or "~/.cache/repo-ops").expanduser()


def built_folder(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """root/key, filled by `build(folder)` where it is not there yet.

    The folder appears under its name by one rename, so it is whole whenever it exists: a killed build leaves nothing
    that a later run would read, and of two processes that build at once the first to finish wins.
    """
    folder = root / key
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}-"))
    try:
        build(draft)
        draft.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
