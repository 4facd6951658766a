"""How each kernel is launched: block size, warps and stages per architecture, in one table.

A row that nobody has timed says "predicted"; a measured row says device, shape and date. Results do not depend on the
row except for the order of a floating-point sum, and a given row gives the same bits on every run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Block size, warps and stages of one launch, and where the row comes from."""

    block: int
    num_warps: int
    num_stages: int
    device: str
    shape: str
    date: str
    """ISO date of the measurement, or "predicted"."""
    columns: int = 0
    """Vocabulary entries of a tile, in kernels that multiply; 0 elsewhere, as below."""
    depth: int = 0
    """Hidden elements of a step along the sum."""
    share: int = 0
    """Vocabulary entries of a program, in the order of whose sums the bits lie; a multiple of `columns`."""
    group: int = 0
    """Row blocks that go through the vocabulary side by side, so that the cache reads it once for all of them."""

    def tile_bytes(self, itemsize: int) -> int:
        """Shared memory of the operands' tiles in flight: one less than num_stages, at least one; an estimate."""
        return (self.block + self.columns) * self.depth * itemsize * max(1, self.num_stages - 1)


# A row program streams its logits once. 8 elements a thread are two 16-byte loads in flight (one for half types), and
# the three programs of 256 threads that fit on an SM even with bias, softcap and entropy keep 24 KiB in flight, above
# the 18 KiB that 3.3 TB/s at 700 ns asks of each of 132 SMs. 16 elements a thread take up to 178 registers: one program
# an SM, and spills on CDNA.
_ROW = (2048, 8, 1)
# CDNA wavefronts have 64 lanes: 4 of them are the same 256 threads.
_ROW_AMD = (2048, 4, 1)
_ROW_SHAPE = "[2048, 151936]"
_PRODUCT_SHAPE = "[8192, 4096] by 128256"
_TOKENS_SHAPE = "[131072] in 128 sequences"
_GROUPS_SHAPE = "[4096] in 256 groups"


def _tile(block: int, columns: int, depth: int, num_warps: int, num_stages: int, device: str) -> Config:
    # Rows share a weight tile in L2 and the weight its hidden states: 16 blocks of 128 rows of D = 4096 in bfloat16 are
    # 16 MiB of 40 to 126 MiB. 4096 entries a program make 32 programs a row block of a V of 128k, enough for a whole
    # device at 512 rows, and their number does not depend on the device, so that neither do the bits.
    return Config(block, num_warps, num_stages, device, _PRODUCT_SHAPE, "predicted", columns, depth, 4096, 16)


# The product's tiles: 128 by 256 on Hopper and Blackwell, where 256 threads (sm_90) or tensor memory (sm_100) hold the
# 128 KiB of accumulators: at half the columns, L2 would have to deliver a third more bytes. 128 by 128 elsewhere, for
# the registers (sm_80, gfx942) or 99 KiB of shared memory (sm_120; sm_86 and sm_89, which take the row of sm_80).
TABLE: dict[tuple[str, str, str], Config] = {
    ("row_stats", "sm_80", "*"): Config(*_ROW, "A100", _ROW_SHAPE, "predicted"),
    ("row_stats", "sm_90", "*"): Config(*_ROW, "H100", _ROW_SHAPE, "predicted"),
    ("row_stats", "sm_100", "*"): Config(*_ROW, "B200", _ROW_SHAPE, "predicted"),
    ("row_stats", "sm_120", "*"): Config(*_ROW, "RTX 5090", _ROW_SHAPE, "predicted"),
    ("row_stats", "gfx942", "*"): Config(*_ROW_AMD, "MI300X", _ROW_SHAPE, "predicted"),
    ("row_stats", "interpreter", "*"): Config(16384, 1, 1, "CPU", "[65, 49152]", "predicted"),
    ("row_grads", "sm_80", "*"): Config(*_ROW, "A100", _ROW_SHAPE, "predicted"),
    ("row_grads", "sm_90", "*"): Config(*_ROW, "H100", _ROW_SHAPE, "predicted"),
    ("row_grads", "sm_100", "*"): Config(*_ROW, "B200", _ROW_SHAPE, "predicted"),
    ("row_grads", "sm_120", "*"): Config(*_ROW, "RTX 5090", _ROW_SHAPE, "predicted"),
    ("row_grads", "gfx942", "*"): Config(*_ROW_AMD, "MI300X", _ROW_SHAPE, "predicted"),
    ("row_grads", "interpreter", "*"): Config(16384, 1, 1, "CPU", "[65, 49152]", "predicted"),
    ("tiled_logps", "sm_80", "*"): _tile(128, 128, 64, 8, 3, "A100"),
    ("tiled_logps", "sm_90", "*"): _tile(128, 256, 64, 8, 3, "H100"),
    ("tiled_logps", "sm_100", "*"): _tile(128, 256, 64, 8, 3, "B200"),
    ("tiled_logps", "sm_120", "*"): _tile(128, 128, 64, 8, 3, "RTX 5090"),
    ("tiled_logps", "gfx942", "*"): _tile(128, 128, 64, 4, 2, "MI300X"),
    # NVIDIA's tensor cores do not multiply float32; each thread holds its operands of a whole step in registers
    ("tiled_logps", "sm_80", "float32"): _tile(64, 64, 16, 4, 2, "A100"),
    ("tiled_logps", "sm_90", "float32"): _tile(64, 64, 16, 4, 2, "H100"),
    ("tiled_logps", "sm_100", "float32"): _tile(64, 64, 16, 4, 2, "B200"),
    ("tiled_logps", "sm_120", "float32"): _tile(64, 64, 16, 4, 2, "RTX 5090"),
    ("tiled_logps", "gfx942", "float32"): _tile(64, 64, 32, 4, 2, "MI300X"),
    # Without 16-byte loads a thread takes its elements one by one: fewer of them, or their addresses spill.
    ("tiled_logps_uneven", "*", "*"): _tile(64, 64, 32, 4, 2, "any"),
    ("tiled_logps_uneven", "*", "float32"): _tile(64, 64, 16, 4, 2, "any"),
    ("tiled_logps_uneven", "interpreter", "*"): Config(
        32, 1, 1, "CPU", "[33, 31] by 5003", "predicted", 128, 32, 512, 2
    ),
    ("tiled_logps", "interpreter", "*"): Config(32, 1, 1, "CPU", "[33, 64] by 5003", "predicted", 128, 32, 512, 2),
    ("ratio_tokens", "*", "*"): Config(512, 4, 1, "any", _TOKENS_SHAPE, "predicted"),
    ("ratio_sequences", "*", "*"): Config(512, 4, 1, "any", _TOKENS_SHAPE, "predicted"),
    # A mask takes two scalar registers an element on CDNA: more than one element a thread spills them.
    ("ratio_tokens", "gfx942", "*"): Config(256, 4, 1, "MI300X", _TOKENS_SHAPE, "predicted"),
    ("ratio_sequences", "gfx942", "*"): Config(256, 4, 1, "MI300X", _TOKENS_SHAPE, "predicted"),
    # The interpreter scans element by element, so its blocks are small: they also cross block borders on short inputs.
    ("ratio_tokens", "interpreter", "*"): Config(64, 1, 1, "CPU", "[300] in 6 sequences", "predicted"),
    ("ratio_sequences", "interpreter", "*"): Config(64, 1, 1, "CPU", "[300] in 6 sequences", "predicted"),
    ("group_advantages", "*", "*"): Config(128, 1, 1, "any", _GROUPS_SHAPE, "predicted"),
    ("group_advantages", "interpreter", "*"): Config(16, 1, 1, "CPU", "[64] in 8 groups", "predicted"),
}


def launch_config(kernel: str, architecture: str, dtype: torch.dtype) -> Config:
    """The row of TABLE for this kernel: exact, then any dtype, then the nearest older architecture, then any.

    Raises:
        KeyError: the kernel has no row that fits.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    for name in [*_fallbacks(architecture), "*"]:
        for key in ((kernel, name, dtype_name), (kernel, name, "*")):
            if key in TABLE:
                return TABLE[key]
    raise KeyError(f"{kernel}: no launch configuration for {architecture}, {dtype_name}; add a row to TABLE")


def _fallbacks(architecture: str) -> list[str]:
    """This architecture, then the tabled ones that stand for it: sm_80 for sm_89, gfx942 for an unknown gfx."""
    if not architecture.startswith("sm_"):
        # Intel GPUs and anything else without rows of their own: 256 threads a program as on sm_80.
        return [architecture] if architecture == "interpreter" else [architecture, _family(architecture)]
    tabled = {int(name[3:]) for _, name, _ in TABLE if name.startswith("sm_")}
    wanted = int(architecture[3:])
    older = sorted((version for version in tabled if version <= wanted), reverse=True) or [min(tabled)]
    return [architecture, *(f"sm_{version}" for version in older)]


def _family(architecture: str) -> str:
    return "gfx942" if architecture.startswith("gfx") else "sm_80"


# What one program may ask for: CUDA C Programming Guide, table of compute capabilities; CDNA 3 ISA, LDS.
_SHARED_MEMORY = {"sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376}
_SHARED_MEMORY |= {"sm_90": 232448, "sm_100": 232448, "sm_103": 232448, "sm_110": 232448, "sm_120": 101376}
_SHARED_MEMORY |= {"sm_121": 101376, "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840}


def shared_memory_limit(architecture: str) -> int:
    """Bytes of shared memory that one program may use; of an architecture that is not known, the least of all."""
    return _SHARED_MEMORY.get(architecture, min(_SHARED_MEMORY.values()))


def interpreting() -> bool:
    """True where TRITON_INTERPRET=1 was set before triton was imported, so that kernels run on CPU tensors."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@triton.jit
def _probe():
    pass


def architecture_of(device: torch.device) -> str:
    """Name of the device's architecture as TABLE spells it: "sm_90", "gfx942", "xpu", "interpreter"."""
    if interpreting():
        return "interpreter"
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return device.type


def narrows_in_place(architecture: str) -> bool:
    """Whether a kernel may write to bytes that another of its threads has read before a barrier.

    NVIDIA's barrier orders that. AMD's and Intel's order shared memory alone. CDNA runs a program on one compute unit,
    whose cache takes loads and stores in the order of their issue; RDNA may spread it over two.
    """
    return architecture == "interpreter" or architecture.startswith(("sm_", "gfx9"))


@dataclass(frozen=True)
class Launch:
    """One kernel call, made but not yet issued; `repo_ops.kernels.aot` compiles the same object for other machines."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Fused multiply-add is asked for by name: Triton's default changes between versions."""
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        """Issue the launch on `device`. A grid of no programs issues nothing."""
        if self.programs == 0:
            return
        with on_device(device):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which `device` is current: Triton launches there, whatever device the pointers belong to."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def check_runnable(name: str, tensor: Tensor) -> None:
    """Raise ValueError where no Triton kernel can run on this tensor's device."""
    if tensor.device.type in ("cpu", "mps") and not (tensor.device.type == "cpu" and interpreting()):
        raise ValueError(
            f"{name}: expected a tensor on a GPU that Triton supports, got device {tensor.device}; use the PyTorch"
            " backend, or set TRITON_INTERPRET=1 before importing triton to run the kernels on CPU tensors"
        )


def check_vector(
    name: str, value: Tensor | None, length: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Tensor | None:
    """`value` itself, contiguous, or None where it is None.

    Raises:
        TypeError: not a tensor of one of `dtypes`.
        ValueError: not of shape [length], or on another device.
    """
    if value is None:
        return None
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a {names} tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {names}, got {str(value.dtype).removeprefix('torch.')}; convert it before the call"
        )
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(value.shape)}; flatten it to one row per token")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}; move it first")
    return value.contiguous()


def check_positive(name: str, value: float | None) -> float | None:
    """`value` as a float > 0, or None where it is None; ValueError otherwise."""
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return float(value)
