"""A trace of some steps by torch.profiler, and on a GPU a history of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["profiled"]


@contextmanager
def profiled(
    steps: tuple[int, int] | None,
    folder: Path,
    device: torch.device,
    *,
    resumed_at: int | None = None,
    say: Callable[[str], None],
) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of each step that is done; steps[0] to steps[1] are recorded.

    Leaves folder/profile/steps_A_B.json (for chrome://tracing or Perfetto), steps_A_B.txt (the operations that take
    longest) and on a GPU memory_A_B.pickle (for pytorch.org/memory_viz), A and B being the first and the last step that
    were recorded: a run may end, or go on from a checkpoint, between steps[0] and steps[1].

    Args:
        steps: first and last step to record; None records nothing.
        resumed_at: steps that were made before.
        say: gets a sentence where there is nothing left to record.
    """
    if steps is None:
        yield lambda step: None
        return
    first, last = steps
    if (resumed_at or 0) >= last:
        say(f"profile_steps: nothing is recorded of {first} to {last}, the run goes on from step {resumed_at}")
    recording = _Recording(folder / "profile", device)

    def done(step: int) -> None:
        recording.last = step
        if step == last:
            recording.end()
        elif first <= step + 1 <= last:
            recording.begin(step + 1)

    try:
        if resumed_at is not None:
            done(resumed_at)
        yield done
    finally:
        recording.end()


class _Recording:
    """What runs between `begin` and `end`; further calls of either do nothing."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.on_gpu = device.type == "cuda"
        self.order = f"self_{device.type}_time_total"
        self.profile: torch.profiler.profile | None = None
        self.first = self.last = 0

    def begin(self, step: int) -> None:
        if self.profile is not None:
            return
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.first = step
        self.profile = torch.profiler.profile(profile_memory=True)
        self.profile.start()

    def end(self) -> None:
        if self.profile is None:
            return
        profile, self.profile = self.profile, None
        profile.stop()
        self.folder.mkdir(exist_ok=True)
        # a step that was cut off is in it, too, and in its name where it is the only one
        name = f"{self.first}_{max(self.first, self.last)}"
        profile.export_chrome_trace(str(self.folder / f"steps_{name}.json"))
        table = profile.key_averages().table(sort_by=self.order, row_limit=40)
        (self.folder / f"steps_{name}.txt").write_text(table)
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
