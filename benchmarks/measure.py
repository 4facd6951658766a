"""Milliseconds of rival methods, taken in turns so that a slow minute of the machine falls on all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Spread", "Times", "interleave", "spread"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 1000 else 1
        return f"{self.median:.{digits}f} [{self.q1:.{digits}f}-{self.q3:.{digits}f}]"


@dataclass
class Times:
    """Milliseconds of each round."""

    forward: list[float]
    backward: list[float]

    @property
    def both(self) -> list[float]:
        """Forward and backward of each round together."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def spread(values: list[float]) -> Spread:
    """Median and quartiles of `values`, by linear interpolation."""
    q1, median, q3 = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return Spread(median, q1, q3)


def interleave(
    forwards: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    rounds: int,
    clear: Callable[[], object] = lambda: None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Times]:
    """Times of every method in `rounds` rounds, each round in an order of its own.

    Args:
        forwards: name -> a function that runs the forward and returns the function that runs its backward.
        clear: called before each step, unmeasured: drops the gradients of the last one.
    """
    times = {name: Times([], []) for name in forwards}
    order = list(forwards)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            clear()
            gc.collect()
            gc.disable()
            try:
                forward, backward = _time(forwards[name], device)
            finally:
                gc.enable()
            times[name].forward.append(forward)
            times[name].backward.append(backward)
    return times


def _time(forward: Callable[[], Callable[[], object]], device: str) -> tuple[float, float]:
    if device != "cpu":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        marks[0].record()
        backward = forward()
        marks[1].record()
        backward()
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
    start = time.perf_counter()
    backward = forward()
    middle = time.perf_counter()
    backward()
    end = time.perf_counter()
    return (middle - start) * 1e3, (end - middle) * 1e3
