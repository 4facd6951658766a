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

    Leaves in the folder steps_A_B.json (for chrome://tracing or Perfetto), steps_A_B.txt (the operations that take
    longest) and on a GPU memory_A_B.pickle (for pytorch.org/memory_viz), A and B being the first and the last step that
    were recorded: a run may end, or go on from a checkpoint, between steps[0] and steps[1].

    Args:
        steps: first and last step to record; None records nothing.
        resumed_at: steps that were made before; None: a new run, whose evaluation before step 1 is not recorded.
        say: gets a sentence where there is nothing left to record.
    """
    if steps is None:
        yield lambda step: None
        return
    first, last = max(steps[0], (resumed_at or 0) + 1), steps[1]
    if first > last:
        say(f"profile_steps: nothing is recorded of {steps[0]} to {last}, the run goes on from step {resumed_at}")
    profile: torch.profiler.profile | None = None
    newest = 0

    def done(step: int) -> None:
        nonlocal profile, newest
        newest = step
        if step == last:
            end()
        elif profile is None and first <= step + 1 <= last:
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            profile = torch.profiler.profile(profile_memory=True)
            profile.start()

    def end() -> None:
        nonlocal profile
        if profile is None:
            return
        profile.stop()
        folder.mkdir(exist_ok=True)
        # a step that was cut off is in it, too, and in its name where it is the only one
        name = f"{first}_{max(first, newest)}"
        profile.export_chrome_trace(str(folder / f"steps_{name}.json"))
        table = profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=40)
        (folder / f"steps_{name}.txt").write_text(table)
        profile = None
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    try:
        if resumed_at is not None:
            done(resumed_at)
        yield done
    finally:
        end()
