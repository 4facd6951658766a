"""Statistics of the logits hidden @ weight^T, tile by tile on the tensor cores, with no logits in memory.

A program multiplies a block of rows with one share of the vocabulary and keeps running sums over its tiles; a second,
small kernel joins the shares of each row in their order. Forward only: the gradient needs the logits again anyway, and
vendor GEMMs make them faster. It is for log-probabilities of old and reference policies where even one tile of logits
is too much memory.
"""

from __future__ import annotations

from repo_ops.kernels.tiled_logps.launches import tiled_launches, tiled_logps

__all__ = ["tiled_launches", "tiled_logps"]
