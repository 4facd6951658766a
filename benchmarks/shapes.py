"""Problem sizes named after language models, cut to what a machine holds."""

from __future__ import annotations

from dataclasses import dataclass

from repo_ops.cost import MODELS as HEADS

__all__ = ["MODELS", "Shape", "quick_shape", "shape_named"]

MODELS = {name: HEADS[name] for name in ("SmolLM2-135M", "Qwen3-0.6B", "Qwen2.5-1.5B", "Qwen3-8B", "Llama-3-8B")}
"""(D, V) of the head of each model."""

GPU_ROWS = 8192
CPU_ROWS = 1024
CPU_PRODUCTS = 8e10
"""Multiply-adds of one pass on a CPU: about a second on two cores."""
CPU_WEIGHT_BYTES = 1 << 30
"""A larger float32 head loses three quarters of its vocabulary on a CPU: peers hold up to four copies of it."""


@dataclass(frozen=True)
class Shape:
    """N rows of D numbers against a vocabulary of V."""

    model: str
    rows: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        full = MODELS.get(self.model, (self.hidden, self.vocab))[1]
        cut = "" if self.vocab == full else f" (V / {full // self.vocab})"
        return f"{self.model}{cut} N={self.rows} D={self.hidden} V={self.vocab}"


def shape_named(text: str, *, device: str = "cpu") -> Shape:
    """The shape of "MODEL", "MODEL:ROWS" or "NxDxV"; a bare model gets the rows and vocabulary that `device` holds.

    Raises:
        ValueError: unknown model, or not a shape.
    """
    name, _, rows = text.partition(":")
    numbers = text.split("x")
    if len(numbers) == 3 and all(n.isdecimal() and int(n) > 0 for n in numbers):
        n, d, v = map(int, numbers)
        return Shape("custom", n, d, v)
    if name not in MODELS or (rows and not (rows.isdecimal() and int(rows) > 0)):
        raise ValueError(f"shapes: expected MODEL, MODEL:ROWS or NxDxV, MODEL of {', '.join(MODELS)}, got {text!r}")
    d, v = MODELS[name]
    if device != "cpu":
        return Shape(name, int(rows or GPU_ROWS), d, v)
    if 4 * d * v > CPU_WEIGHT_BYTES:
        v //= 4
    affordable = 1 << int(CPU_PRODUCTS / (d * v)).bit_length() - 1
    return Shape(name, int(rows or min(CPU_ROWS, affordable)), d, v)


def quick_shape(model: str) -> Shape:
    """A thirty-second of the vocabulary and few rows: milliseconds a step, for a look at trends, not for a table."""
    d, v = MODELS[model]
    return Shape(model, 64, d, v // 32)
