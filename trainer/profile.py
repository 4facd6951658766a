"""A trace of some steps by torch.profiler, and on a GPU a history of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["profiled"]


@contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path, device: torch.device) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of each step that is done; steps[0] to steps[1] are recorded.

    Leaves folder/profile/steps_A_B.json (for chrome://tracing or Perfetto), steps_A_B.txt (the operations that take
    longest) and on a GPU memory_A_B.pickle (for pytorch.org/memory_viz).

    Args:
        steps: first and last step to record; None records nothing.
    """
    if steps is None:
        yield lambda step: None
        return
    first, last = steps
    folder = folder / "profile"
    folder.mkdir(exist_ok=True)
    profile = torch.profiler.profile(profile_memory=True)

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        profile.start()

    def end() -> None:
        profile.stop()
        profile.export_chrome_trace(str(folder / f"steps_{first}_{last}.json"))
        order = f"self_{device.type}_time_total"
        (folder / f"steps_{first}_{last}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=40))
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_{first}_{last}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    recording = False

    def done(step: int) -> None:
        nonlocal recording
        if not recording and first <= step + 1 <= last:  # a resumed run may come in late
            begin()
            recording = True
        elif recording and step == last:
            end()
            recording = False

    yield done
