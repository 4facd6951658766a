"""Checkpoints on disk: whole or not there at all, checked before they are used, the newest ones kept.

    checkpoints/step-00000012/
        manifest.json               step, settings, versions, and size and checksum of every other file
        .metadata, __0_0.distcp ... parameters and optimizer, each rank its shards (torch.distributed.checkpoint)
        rank-0.pt ...               what each rank has for itself: random states, data position, replay buffer
        metrics.jsonl               the run's metrics up to this step

A checkpoint is written into a hidden folder, flushed to the disk and renamed, so that a crash at any moment leaves the
one before it. Reading unpickles: resume only from folders that you trust.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Checkpoint", "Checkpoints", "Snapshot", "newest_whole", "steps_of"]

FORMAT = 1
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
PREFIX, DRAFT, DAMAGED = "step-", ".draft-", ".damaged"
CHUNK = 1 << 22

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on after a step."""

    step: int
    sharded: dict[str, Any]
    """Tensors and DTensors of the parameters and the optimizer."""
    own: dict[str, Any]
    """What this rank alone knows; plain containers, numbers, strings and tensors."""
    header: dict[str, Any]
    """For the manifest; JSON. The same on every rank."""
    metrics: bytes
    """The lines of metrics.jsonl up to the step; read by the first rank alone, which writes them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that lies on disk, its files counted and checked."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it holds."""
        return int(self.manifest["step"])

    def own_states(self) -> list[dict[str, Any]]:
        """What each rank of the saved run had for itself, in the order of ranks."""
        files = [self.folder / f"rank-{rank}.pt" for rank in range(self.manifest["world_size"])]
        return [torch.load(file, weights_only=True, map_location="cpu") for file in files]


class Checkpoints:
    """Writes the checkpoints of a run. Every rank calls the same methods in the same order.

    Args:
        folder: holds the checkpoints; made when the first one is written.
        keep: how many stay; older ones go once a newer one is whole.
        background: copy the state and let a thread write it, while training goes on.
        say: gets a sentence where a checkpoint could not be written.
        latest: step of the checkpoint that the run goes on from.
    """

    def __init__(
        self, folder: Path, *, keep: int, background: bool, say: Callable[[str], None], latest: int | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.latest = latest
        self._say = say
        # a group of its own: the thread's collectives must not meet those of training
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: tuple[int, Callable[[], None]] | None = None
        # DCP says so at every save and load of a run without ranks
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint; where that fails, says so and leaves the earlier ones as they were."""
        self.finish()
        job = partial(write, self.folder, keep=self.keep, group=self._group)
        if self._thread is None:
            self._writing = snapshot.step, partial(job, snapshot)
            self.finish()
        else:
            held = replace(snapshot, sharded=_copied(snapshot.sharded))
            self._writing = snapshot.step, self._thread.submit(job, held).result

    def finish(self) -> None:
        """Waits until what was begun lies on disk. `latest` is then the newest step that does."""
        if self._writing is None:
            return
        (step, result), self._writing = self._writing, None
        try:
            result()
            self.latest = step
        except CannotWrite as error:
            newest = "there is none before it" if self.latest is None else f"the newest is that of step {self.latest}"
            self._say(f"step {step}: the checkpoint could not be written ({error}); {newest}")


class CannotWrite(Exception):  # noqa: N818
    """A checkpoint could not be written; the message is the reason."""


def write(folder: Path, snapshot: Snapshot, *, keep: int, group: dist.ProcessGroup | None) -> None:
    """The checkpoint of `snapshot` in `folder`, of which at most `keep` stay.

    Raises:
        CannotWrite: on every rank, if any of them failed. Nothing of the attempt is left then.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    name = f"{PREFIX}{snapshot.step:08d}"
    draft = folder / f"{DRAFT}{name}"
    rank = dist.get_rank(group) if group is not None else 0
    try:
        together(lambda: _begin(draft) if rank == 0 else None, group)
        try:
            save(snapshot.sharded, storage_writer=FileSystemWriter(draft), process_group=group)
        except CheckpointException as error:
            raise CannotWrite(_reason(next(iter(error.failures.values()))[0])) from error
        own = together(lambda: _write_own(draft, rank, snapshot), group)
        files = {file: facts for each in own for file, facts in each.items()}
        manifest = {**snapshot.header, "format": FORMAT, "step": snapshot.step, "world_size": len(own), "files": files}
        together(lambda: _commit(folder, draft, name, manifest, keep) if rank == 0 else None, group)
    except CannotWrite:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def together(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `action` returned on every rank, in the order of ranks.

    Raises:
        CannotWrite: on all ranks, if the file system refused it on any.
    """
    found: tuple[T | None, str | None]
    try:
        found = action(), None
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        found = None, _reason(error)
    everywhere = [found] * (1 if group is None else dist.get_world_size(group))
    if group is not None:
        dist.all_gather_object(everywhere, found, group=group)
    for _, problem in everywhere:
        if problem is not None:
            raise CannotWrite(problem)
    return [value for value, _ in everywhere]  # type: ignore[misc]


def _begin(draft: Path) -> None:
    draft.parent.mkdir(parents=True, exist_ok=True)
    for left_over in draft.parent.glob(f"{DRAFT}*"):  # of a process that was killed while it wrote
        shutil.rmtree(left_over)
    draft.mkdir()


def _write_own(draft: Path, rank: int, snapshot: Snapshot) -> dict[str, list[int]]:
    """Writes this rank's file; [size, checksum] of every file that it wrote, DCP's among them."""
    content = io.BytesIO()
    torch.save(snapshot.own, content)
    _write(draft / f"rank-{rank}.pt", content.getbuffer())
    files = [draft / f"rank-{rank}.pt", *sorted(draft.glob(f"__{rank}_*"))]
    if rank == 0:
        _write(draft / METRICS, snapshot.metrics)
        files += [draft / METRICS, draft / ".metadata"]
    return {file.name: [file.stat().st_size, checksum(file)] for file in files}


def _commit(folder: Path, draft: Path, name: str, manifest: dict[str, Any], keep: int) -> None:
    _write(draft / MANIFEST, json.dumps(manifest, indent=1).encode())
    _flush_names(draft)
    draft.rename(folder / name)
    _flush_names(folder)
    for step in steps_of(folder)[keep:]:
        shutil.rmtree(folder / f"{PREFIX}{step:08d}", ignore_errors=True)


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, newest first; whether they are whole is not looked at."""
    names = [path.name[len(PREFIX) :] for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_whole(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole; None where there is no checkpoint at all.

    Damaged ones are said, and put aside under another name: the run will write those steps again.

    Raises:
        ValueError: there are checkpoints, but no whole one. They stay as they are.
    """
    problems: dict[Path, str] = {}
    for step in steps_of(folder):
        path = folder / f"{PREFIX}{step:08d}"
        try:
            found = read(path)
        except ValueError as error:
            problems[path] = str(error)
            continue
        for damaged, problem in problems.items():
            aside = damaged.with_name(damaged.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            say(f"{problem}; it was put aside as {aside.name}, that of step {step} is used instead")
        return found
    if problems:
        raise ValueError(
            f"resume: expected a whole checkpoint in {folder}, got only damaged ones ({'; '.join(problems.values())}); "
            "begin anew in another --output_dir"
        )
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file of it checked.

    Raises:
        ValueError: it is damaged or no checkpoint; the message says where.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path}: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} cannot be read ({_reason(error)})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path}: expected format {FORMAT}, got {manifest.get('format')}")
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path}: {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"checkpoint {path}: {name} has {file.stat().st_size} bytes instead of {size}")
        if checksum(file) != crc:
            raise ValueError(f"checkpoint {path}: the content of {name} has changed since it was written")
    return Checkpoint(path, manifest)


def checksum(file: Path) -> int:
    """CRC-32 of a file's content. It is to find accidents, not forgeries, and reads faster than a disk."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_names(folder: Path) -> None:
    """Until a folder itself is flushed, a power cut may lose the names in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(state)  # type: ignore[return-value]
    finally:
        stager.close()


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return text.splitlines()[0]
