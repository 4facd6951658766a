"""What the compilers made of a launch, read from the binary: PTX and SASS for NVIDIA, assembly for AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from repo_ops.kernels.aot_cases import Case
from repo_ops.kernels.launch import Launch, interpreting, shared_memory_limit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """What one case became on one architecture."""

    case: str
    kernel: str
    architecture: str
    tile: str
    """Block size, or rows x columns x depth of a product's tiles."""
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    local_bytes: int
    scratch_bytes: int
    """Global memory that a launch would ask of Triton's allocator, which is set per thread and missing in others."""
    programs_per_unit: int
    """Programs that fit on one SM or CU at once by registers, warps and shared memory (an upper bound)."""
    loads: dict[int, int]
    """Width in bytes -> number of global load instructions, into registers or shared memory."""
    stores: dict[int, int]
    atomics: int
    tensor_core: dict[str, int]
    """Matrix instructions by family: mma, wgmma, tcgen05 or mfma -> number."""
    bfloat16_roundings: int
    """Instructions that round float32 to bfloat16 to nearest; AMD below gfx950 does it by integer arithmetic."""
    grid_axes: tuple[str, ...]
    offset_bits: tuple[int, ...]
    """Widths of the products of two run-time integers, scalars or tensors: a row index and a stride."""
    element: str
    bytes_per_element: float


_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """(type of each parameter, value of each compile-time one): the launches that agree here share one binary.

    The kernels turn Triton's own specialisation off (values that are 1 or divide by 16, pointers that are aligned), so
    nothing else of an argument enters the code.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return types, constants


def compile_case(case: Case, architecture: str, *, sass: bool = False) -> Compiled:
    """Compile one case for one architecture and read the result.

    With `sass`, load and store widths of NVIDIA code come from the disassembled binary and not from its PTX.

    Raises:
        RuntimeError: the process interprets its kernels (TRITON_INTERPRET=1), so there is nothing to compile.
    """
    require_compiler()
    types, constants = specialization(case.launch)
    source = ASTSource(case.launch.kernel, types, constants)
    binary = triton.compile(source, target=TARGETS[architecture], options=case.launch.options)
    config = case.launch.config
    if architecture.startswith("gfx"):
        measured = _read_amd(binary.asm)
    else:
        measured = _read_nvidia(binary.asm, sass)
    ttir = str(binary.asm["ttir"])
    resident = resident_programs(architecture, measured["registers"], binary.metadata.shared, config.num_warps)
    return Compiled(
        case=case.name,
        kernel=case.launch.kernel.__name__,
        architecture=architecture,
        tile="x".join(str(size) for size in (config.block, config.columns, config.depth) if size),
        num_warps=config.num_warps,
        scratch_bytes=getattr(binary.metadata, "global_scratch_size", 0),  # Triton 3.2 has no such memory
        programs_per_unit=resident,
        shared_bytes=binary.metadata.shared,
        grid_axes=tuple(sorted(set(re.findall(r"tt\.get_program_id (\w)", ttir)))),
        offset_bits=_offset_bits(ttir),
        element=case.element,
        bytes_per_element=case.bytes_per_element,
        **measured,
    )


def require_compiler() -> None:
    if interpreting():
        raise RuntimeError(
            "kernels: TRITON_INTERPRET=1 was set when triton was imported, so this process cannot compile;"
            " unset it and start another process"
        )


def _offset_bits(ttir: str) -> tuple[int, ...]:
    # a product without a constant has two run-time factors
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+x)?i(\d+)", ttir)
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    return tuple(int(bits) for left, right, bits in products if left not in constants and right not in constants)


def _counted(widths: Sequence[int]) -> dict[int, int]:
    return dict(sorted(Counter(widths).items(), reverse=True))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_SASS_BYTES = {"128": 16, "64": 8, "": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_SASS_MEMORY = re.compile(
    r"(LDG|LDGSTS|STG)\.E(?:\.(?:BYPASS|CONSTANT|EF|EL|LU|STRONG|GPU|SYS))*\.?(128|64|U16|S16|U8|S8|)(?:\..*)?"
)
_WARPS_PER_SM = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}


def resident_programs(architecture: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that one SM or CU holds at once, as far as registers, warps and shared memory say."""
    allotted = -(-max(registers, 1) // 8) * 8
    if architecture.startswith("gfx"):
        # 512 registers a lane on each of a CU's 4 SIMDs, given out by 8, at most 8 waves a SIMD; 64 KiB of LDS
        warps, shared, reserved = 4 * min(8, 512 // allotted), shared_memory_limit(architecture), 0
    else:
        # 65536 registers; the largest program leaves 1 KiB of an SM's memory to the system, as does every other one
        warps = min(_WARPS_PER_SM[architecture], 65536 // (allotted * 32))
        shared, reserved = shared_memory_limit(architecture) + 1024, 1024
    return min(warps // num_warps, shared // (shared_bytes + reserved) if shared_bytes else warps)


def _read_nvidia(asm: dict[str, Any], sass: bool) -> dict[str, Any]:
    usage_text, instructions = _object_dump(asm["cubin"], sass)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage_text)}
    ptx = asm["ptx"]
    loads, stores = _ptx_accesses(ptx, "ld"), _ptx_accesses(ptx, "st")
    copies = re.findall(r"cp\.async\.\w+\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    loads += [int(width, 0) for width in copies]
    if sass:
        found = [match for match in map(_SASS_MEMORY.fullmatch, instructions) if match]
        loads, stores = ([_SASS_BYTES[m[2]] for m in found if m[1].startswith(name)] for name in ("LDG", "STG"))
    return {
        "registers": usage["REG"],
        # a spilled register lies in the stack frame, which is in local memory
        "spills": usage["STACK"] // 4,
        "local_bytes": usage["LOCAL"] + usage["STACK"],
        "loads": _counted(loads),
        "stores": _counted(stores),
        "atomics": len(re.findall(r"^\s*(?:@!?%p\d+ )?(?:atom|red)\.", ptx, re.MULTILINE)),
        "tensor_core": dict(Counter(re.findall(r"\b(mma|wgmma|tcgen05)\.(?:sync|mma_async|mma)\b", ptx))),
        "bfloat16_roundings": len(re.findall(r"cvt\.rn\.bf16(?:x2)?\.f32", ptx)),
    }


def _ptx_accesses(ptx: str, operation: str) -> list[int]:
    """Width in bytes of each global load or store."""
    found = re.findall(rf"\b{operation}\.global(?:\.[a-z]\w*?)*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]


def _object_dump(cubin: bytes, sass: bool) -> tuple[str, list[str]]:
    """Resource usage, and the instructions' names where asked for (disassembling takes longer than compiling)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", *(["-sass"] if sass else []), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return text, names


_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
_AMD_BYTES |= {f"{name}_d16": _AMD_BYTES[name] for name in ("ushort", "short", "ubyte", "byte")}
_AMD_BYTES |= {"short_d16": 2, "short_d16_hi": 2, "ubyte_d16_hi": 1, "byte_d16_hi": 1, "sbyte": 1, "sshort": 2}


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    notes = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)", text, re.MULTILINE)
    stores = re.findall(r"^\s+(?:global|buffer|flat)_store_(\w+)", text, re.MULTILINE)
    return {
        # of both kinds, which share one file
        "registers": notes["vgpr_count"],
        "spills": notes["vgpr_spill_count"] + notes["sgpr_spill_count"],
        "local_bytes": notes["private_segment_fixed_size"],
        "loads": _counted([_AMD_BYTES[name] for name in loads]),
        "stores": _counted([_AMD_BYTES[name] for name in stores]),
        "atomics": len(re.findall(r"^\s+(?:global|buffer|flat|ds)_\w*(?:atomic|cmpst)", text, re.MULTILINE)),
        "tensor_core": dict(Counter(re.findall(r"^\s+v_s?(mfma)", text, re.MULTILINE))),
        "bfloat16_roundings": len(re.findall(r"v_cvt_pk_bf16_f32", text)),
    }
