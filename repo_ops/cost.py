"""What a head costs, before it runs: predicted milliseconds and bytes on a device, ours beside the alternatives.

Everything here is predicted, by these formulas:
    GEMM time   = passes * 2 N V D / (peak FLOP/s * GEMM_SHARE)
    row traffic = bytes per logit * N V / (peak bytes/s * BANDWIDTH_SHARE)
    dW traffic  = 8 V D bytes per chunk beyond what its GEMM hides, which is all of it from 2 * flops / bandwidth rows a
                  chunk on (arithmetic intensity C / 4 FLOP per byte against the device's)
GEMM_SHARE is what cuBLAS reaches at these shapes on an H100: 728 of 989 TFLOP/s (huggingface/trl#7244: bare forward and
backward GEMMs of (8192, 4096, 151936) in 42 ms). It is assumed for the other devices too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repo_ops.head.plan import GPU_ROWS

GEMM_SHARE = 728 / 989
BANDWIDTH_SHARE = 0.9
GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Vendor's dense bfloat16 peak and memory bandwidth."""

    tflops: float
    terabytes_per_second: float
    memory_gib: int


DEVICES = {
    "A100": Device(312, 2.04, 80),
    "H100": Device(989, 3.35, 80),
    "H200": Device(989, 4.8, 141),
    "B200": Device(2250, 8.0, 180),
    "MI300X": Device(1307, 5.3, 192),
    "L4": Device(121, 0.3, 24),
    "RTX4090": Device(165, 1.01, 24),
}

MODELS = {  # (D, V)
    "SmolLM2-135M": (576, 49152),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-2-2B": (2304, 256000),
    "Qwen3-4B": (2560, 151936),
    "Qwen3-8B": (4096, 151936),
    "Llama-3-8B": (4096, 128256),
    "Qwen3-32B": (5120, 151936),
}


@dataclass(frozen=True)
class Method:
    """Passes of N V D multiply-adds and memory traffic of a way to compute loss and gradients from bfloat16 inputs."""

    passes: int
    frozen_passes: int
    bytes_per_logit: int
    """Written and read again beyond what the GEMMs themselves read."""
    stored_bytes_per_logit: int
    """Alive at once for every logit of the batch; 0 where a tile is reused."""


METHODS = {
    # float32 tile written by the GEMM instead of bfloat16 (2), read twice (4 + L2), bfloat16 dlogits written (2)
    "repo-ops, one sweep": Method(3, 2, 8, 0),
    "repo-ops, two sweeps": Method(4, 3, 12, 0),
    # every peer that returns per-token log-probabilities recomputes the tile in the backward
    "4 passes, bfloat16 tiles": Method(4, 3, 6, 0),
    # bfloat16 logits, float32 copy, float32 and bfloat16 gradients
    "full logits": Method(3, 2, 24, 12),
}


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one loss and its gradients."""

    milliseconds: float
    gemm_milliseconds: float
    tile_bytes: int
    gradient_bytes: int


def predict(
    method: Method,
    device: Device,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    frozen: bool,
    rows: int = GPU_ROWS,
) -> Prediction:
    """Predicted cost of `method` for `tokens` live rows, in tiles of `rows`."""
    passes = method.frozen_passes if frozen else method.passes
    flops, bandwidth = device.tflops * 1e12 * GEMM_SHARE, device.terabytes_per_second * 1e12 * BANDWIDTH_SHARE
    logits = tokens * vocab_size
    gemm = passes * 2 * logits * hidden_size / flops
    traffic = method.bytes_per_logit * logits / bandwidth
    if not frozen and not method.stored_bytes_per_logit:
        chunks = -(-tokens // rows)
        one_gemm = 2 * min(rows, tokens) * vocab_size * hidden_size / flops
        traffic += chunks * max(0.0, 8 * vocab_size * hidden_size / bandwidth - one_gemm)
    tile = method.stored_bytes_per_logit * logits or 4 * min(rows, tokens) * vocab_size
    # the weight's gradient is summed in float32 and handed over in bfloat16
    gradients = 2 * tokens * hidden_size + (0 if frozen else 6 * vocab_size * hidden_size)
    return Prediction(1e3 * (gemm + traffic), 1e3 * gemm, tile, gradients)


def head_shape(model: str) -> tuple[int, int]:
    """(D, V) of a model: a name of MODELS (an organisation before it is ignored) or a folder with config.json.

    Raises:
        ValueError: neither.
    """
    folder = Path(model) / "config.json"
    if folder.is_file():
        config = json.loads(folder.read_text())
        config = config.get("text_config", config)
        return config["hidden_size"], config["vocab_size"]
    name = model.rsplit("/", 1)[-1]
    if name not in MODELS:
        raise ValueError(f"model: expected a folder with config.json or one of {', '.join(MODELS)}, got {model!r}")
    return MODELS[name]


def table(tokens: int, hidden_size: int, vocab_size: int, device: str, *, dead: float, frozen: bool) -> list[str]:
    """Lines that set the methods side by side; only ours leaves out the share `dead` of tokens without gradient."""
    lines = [
        f"{tokens} tokens, D = {hidden_size}, V = {vocab_size}, {dead:.0%} of them without gradient, "
        f"{'frozen' if frozen else 'trained'} head, bfloat16, {device}: predicted, not measured",
        f"{'method':<26}{'ms':>9}{'of its GEMMs':>14}{'tile or logits':>16}{'gradients':>12}{'fits':>6}",
    ]
    for name, method in METHODS.items():
        live = round(tokens * (1 - dead)) if name.startswith("repo-ops") else tokens
        cost = predict(method, DEVICES[device], live, hidden_size, vocab_size, frozen=frozen)
        fits = cost.tile_bytes + cost.gradient_bytes < DEVICES[device].memory_gib * GIB
        lines.append(
            f"{name:<26}{cost.milliseconds:>9.1f}{cost.milliseconds / max(cost.gemm_milliseconds, 1e-9):>13.2f}x"
            f"{cost.tile_bytes / GIB:>12.2f} GiB{cost.gradient_bytes / GIB:>8.2f} GiB{'yes' if fits else 'no':>6}"
        )
    return lines


def main(arguments: Sequence[str]) -> None:
    """Print the predicted cost of a head on one device, or on all."""
    parser = argparse.ArgumentParser(prog="repo-ops plan", description="Predicted time and memory of a fused head.")
    parser.add_argument("--model", required=True, help=f"a folder with config.json, or one of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=8192, help="completion tokens in a micro-batch")
    parser.add_argument("--dead", type=float, default=0.0, help="share of them masked or with zero advantage, 0 to 1")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained (LoRA elsewhere)")
    parser.add_argument("--device", choices=[*DEVICES, "all"], default="H100")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or not 0 <= options.dead < 1:
        parser.error(f"expected --tokens >= 1 and 0 <= --dead < 1, got {options.tokens} and {options.dead}")
    try:
        shape = head_shape(options.model)
    except ValueError as error:
        parser.error(str(error))
    for device in DEVICES if options.device == "all" else [options.device]:
        print("\n".join(table(options.tokens, *shape, device, dead=options.dead, frozen=options.frozen)), end="\n\n")
