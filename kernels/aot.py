"""Every kernel, compiled ahead of time for GPUs that need not be present, and what the compilers made of it.

`inspect_kernels()` builds the same `Launch` objects that the host wrappers issue, on meta tensors, compiles them with
`triton.compile` and reads registers, spills, shared and local memory, load width and atomics from the binaries.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from repo_ops.kernels.clipped_ratio import ratio_launch
from repo_ops.kernels.group_advantages import advantages_launch
from repo_ops.kernels.launch import Launch, interpreting
from repo_ops.kernels.logit_rows import RowStats, grads_launch, stats_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Those of Qwen3, whose rows start at 16-byte boundaries, and of Qwen2.5's tokenizer, whose rows start anywhere.
_VOCABULARIES = {"aligned": 151936, "odd": 151665}
_ROWS, _TOKENS, _GROUPED = 2048, 131072, 4096


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, and the bytes that it moves for each element by its docstring's count."""

    name: str
    launch: Launch
    element: str
    bytes_per_element: float


@dataclass(frozen=True)
class Compiled:
    """What one case became on one architecture."""

    case: str
    kernel: str
    architecture: str
    block: int
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    local_bytes: int
    programs_per_unit: int
    """Programs that fit on one SM or CU at once by registers and warps (an upper bound)."""
    loads: dict[int, int]
    """Width in bytes -> number of global load instructions."""
    stores: dict[int, int]
    atomics: int
    tensor_core: int
    """Matrix instructions; none of these kernels has a product to make."""
    bfloat16_roundings: int
    """Instructions that round float32 to bfloat16 to nearest; AMD below gfx950 does it by integer arithmetic."""
    grid_axes: tuple[str, ...]
    offset_bits: tuple[int, ...]
    """Widths of the products of two run-time integers: a row index and a stride."""
    element: str
    bytes_per_element: float


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _row_cases(architecture: str) -> Iterator[Case]:
    """Each dtype and each alignment, bare and with every option; not every product of them."""
    vector, ids = _meta(_ROWS), _meta(_ROWS, dtype=torch.int64)
    given = RowStats(vector, vector, vector, vector)
    for dtype, vocabulary in itertools.product((torch.float32, torch.bfloat16, torch.float16), _VOCABULARIES):
        tile = _meta(_ROWS, _VOCABULARIES[vocabulary], dtype=dtype)
        label, size = f"{_name(dtype)} {vocabulary}", tile.element_size()
        options: dict[str, Any] = {"bias": _meta(tile.shape[1]), "inv_temperature": vector, "softcap": 30.0}
        stats = partial(stats_launch, tile, ids, architecture=architecture)
        grads = partial(grads_launch, tile, ids, given, vector, architecture=architecture)
        if dtype != torch.float16:
            everything = stats(with_entropy=True, with_sum_p2=True, **options)[0]
            yield Case(f"row_stats {label} everything", everything, "logit", size)
            yield Case(f"row_grads {label} everything", grads(vector, **options)[0], "logit", 2 * size)
        if vocabulary == "aligned":
            yield Case(f"row_stats {label}", stats()[0], "logit", size)
            yield Case(f"row_grads {label}", grads()[0], "logit", 2 * size)
        if dtype == torch.float32:
            yield Case(f"row_grads {label} to bfloat16", grads(vector, out_dtype=torch.bfloat16)[0], "logit", size + 2)
            if vocabulary == "aligned":
                yield Case(f"row_grads {label} to float16", grads(out_dtype=torch.float16)[0], "logit", size + 2)


def _ratio_cases(architecture: str) -> Iterator[Case]:
    token = _meta(_TOKENS)
    plain: dict[str, Any] = {"old_logps": token, "weights": token, "low": 0.8, "high": 1.28}
    full = plain | {"ref_logps": token, "kl_weights": token, "correction": token, "delta": 3.0, "beta": 0.04}
    bounds = full | {"low": token, "high": token}
    for level, name, options in (
        ("token", "plain", plain),
        ("token", "everything", full),
        ("token", "bounds by token", bounds),
        ("sequence", "everything", full),
        ("prefix", "everything", full),
    ):
        starts = None if level == "token" else _meta(129, dtype=torch.int64)
        launch, _ = ratio_launch(token, token, level=level, cu_seqlens=starts, architecture=architecture, **options)
        moved = _bytes_by_element(launch, _TOKENS)
        # read again: logps for the KL term; logps and old_logps for a mean or a shifted log-ratio. A sequence's
        # gradient is written, read and written again.
        moved += 4 * ("ref_logps" in options) + 8 * (level != "token") + 8 * (level == "sequence")
        yield Case(f"clipped_ratio {level} {name}", launch, "token", moved)


def _group_cases(architecture: str) -> Iterator[Case]:
    rewards, starts, flags = _meta(_GROUPED), _meta(257, dtype=torch.int64), _meta(_GROUPED, dtype=torch.bool)
    for mode in ("split", "mixed"):
        launch, _ = advantages_launch(rewards, starts, off_policy=flags, mode=mode, architecture=architecture)
        yield Case(f"group_advantages {mode}", launch, "member", _bytes_by_element(launch, _GROUPED))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_by_element(launch: Launch, count: int) -> int:
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor) and value.numel() == count]
    return sum(tensor.element_size() for tensor in tensors)


def cases(architecture: str) -> list[Case]:
    """Every kernel with its launch configuration for `architecture`: each dtype, alignment and option at least once."""
    return [*_row_cases(architecture), *_ratio_cases(architecture), *_group_cases(architecture)]


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
    _require_compiler()
    types, constants = specialization(case.launch)
    source = ASTSource(case.launch.kernel, types, constants)
    binary = triton.compile(source, target=TARGETS[architecture], options=case.launch.options)
    config = case.launch.config
    if architecture.startswith("gfx"):
        measured = _read_amd(binary.asm, config.num_warps)
    else:
        measured = _read_nvidia(binary.asm, architecture, config.num_warps, sass)
    ttir = str(binary.asm["ttir"])
    return Compiled(
        case=case.name,
        kernel=case.launch.kernel.__name__,
        architecture=architecture,
        block=config.block,
        num_warps=config.num_warps,
        shared_bytes=binary.metadata.shared,
        grid_axes=tuple(sorted(set(re.findall(r"tt\.get_program_id (\w)", ttir)))),
        offset_bits=_offset_bits(ttir),
        element=case.element,
        bytes_per_element=case.bytes_per_element,
        **measured,
    )


def _require_compiler() -> None:
    if interpreting():
        raise RuntimeError(
            "kernels: TRITON_INTERPRET=1 was set when triton was imported, so this process cannot compile;"
            " unset it and start another process"
        )


def _offset_bits(ttir: str) -> tuple[int, ...]:
    # constants are named %c4096_i32 and the like, so a product without one has two run-time factors
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : i(\d+)", ttir)
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    return tuple(int(bits) for left, right, bits in products if left not in constants and right not in constants)


def _counted(widths: Sequence[int]) -> dict[int, int]:
    return dict(sorted(Counter(widths).items(), reverse=True))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_SASS_BYTES = {"128": 16, "64": 8, "": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_SASS_MEMORY = re.compile(r"(LDG|STG)\.E(?:\.(?:CONSTANT|EF|EL|LU|STRONG|GPU|SYS))*\.?(128|64|U16|S16|U8|S8|)(?:\..*)?")
_REGISTER_FILE, _WARPS_PER_SM = 65536, {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}


def _read_nvidia(asm: dict[str, Any], architecture: str, num_warps: int, sass: bool) -> dict[str, Any]:
    usage_text, instructions = _object_dump(asm["cubin"], sass)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage_text)}
    resident_warps = _REGISTER_FILE // (-(-usage["REG"] // 8) * 8 * 32)
    ptx = asm["ptx"]
    loads, stores = _ptx_accesses(ptx, "ld"), _ptx_accesses(ptx, "st")
    if sass:
        found = [match for match in map(_SASS_MEMORY.fullmatch, instructions) if match]
        loads, stores = ([_SASS_BYTES[m[2]] for m in found if m[1] == name] for name in ("LDG", "STG"))
    return {
        "registers": usage["REG"],
        # a spilled register lies in the stack frame, which is in local memory
        "spills": usage["STACK"] // 4,
        "local_bytes": usage["LOCAL"] + usage["STACK"],
        "programs_per_unit": min(resident_warps, _WARPS_PER_SM[architecture]) // num_warps,
        "loads": _counted(loads),
        "stores": _counted(stores),
        "atomics": len(re.findall(r"^\s*(?:@!?%p\d+ )?(?:atom|red)\.", ptx, re.MULTILINE)),
        "tensor_core": len(re.findall(r"^\s*(?:w?g?mma|tcgen05)\.", ptx, re.MULTILINE)),
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


def _read_amd(asm: dict[str, Any], num_warps: int) -> dict[str, Any]:
    text = asm["amdgcn"]
    notes = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    registers = notes["vgpr_count"] + notes.get("agpr_count", 0)
    # 512 registers a lane on each of a CU's 4 SIMDs, given out by 8, at most 8 waves a SIMD
    resident_waves = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_(\w+)", text, re.MULTILINE)
    stores = re.findall(r"^\s+(?:global|buffer|flat)_store_(\w+)", text, re.MULTILINE)
    return {
        "registers": registers,
        "spills": notes["vgpr_spill_count"] + notes["sgpr_spill_count"],
        "local_bytes": notes["private_segment_fixed_size"],
        "programs_per_unit": resident_waves // num_warps,
        "loads": _counted([_AMD_BYTES[name] for name in loads]),
        "stores": _counted([_AMD_BYTES[name] for name in stores]),
        "atomics": len(re.findall(r"^\s+(?:global|buffer|flat|ds)_\w*(?:atomic|cmpst)", text, re.MULTILINE)),
        "tensor_core": len(re.findall(r"^\s+v_s?mfma", text, re.MULTILINE)),
        "bfloat16_roundings": len(re.findall(r"v_cvt_pk_bf16_f32", text)),
    }


def inspect_kernels(
    architectures: Sequence[str] = tuple(TARGETS), *, match: str = "", jobs: int = 1, sass: bool = False
) -> list[Compiled]:
    """Compile every case in whose name the pattern `match` is found for every architecture, in `jobs` processes.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: the process interprets its kernels, or a compiler failed.
    """
    _require_compiler()
    unknown = sorted(set(architectures) - set(TARGETS))
    if unknown:
        raise ValueError(f"architectures: expected some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    work = [
        (architecture, index, sass)
        for architecture in architectures
        for index, case in enumerate(cases(architecture))
        if re.search(match, case.name)
    ]
    if jobs == 1:
        return [_compile_nth(item) for item in work]
    # fork: a child inherits the imports, which cost more than a compilation
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_nth, work, chunksize=4))


def _compile_nth(item: tuple[str, int, bool]) -> Compiled:
    architecture, index, sass = item
    return compile_case(cases(architecture)[index], architecture, sass=sass)


def main(arguments: Sequence[str]) -> int:
    """Print the table of all kernels for the wanted architectures; 1 if one spills, uses local memory or atomics."""
    parser = argparse.ArgumentParser(
        prog="repo-ops kernels", description="Compile every Triton kernel for GPUs that need not be here."
    )
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="architectures")
    parser.add_argument("--match", default="", help="regular expression on the names of cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", help="also write the table to this Markdown file")
    options = parser.parse_args(arguments)
    rows = inspect_kernels(options.arch, match=options.match, jobs=options.jobs)
    table = format_table(rows)
    bad = [f"{row.case} on {row.architecture}" for row in rows if row.spills or row.local_bytes or row.atomics]
    verdict = (
        f"{len(rows)} binaries: {'no spills, no local memory, no atomics' if not bad else 'FAILED ' + ', '.join(bad)}"
    )
    print(f"{table}\n\n{verdict}")
    if options.out:
        with open(options.out, "w") as file:
            file.write(f"{table}\n\n{verdict}\n")
    return 1 if bad else 0


_HEAD = [
    *("case", "arch", "block x warps", "regs", "spills", "shared", "local", "programs/SM", "loads", "stores"),
    *("atomics", "B/element"),
]


def format_table(rows: Sequence[Compiled]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for row in rows:
        cells = [
            *(row.case, row.architecture, f"{row.block} x {row.num_warps}", row.registers, row.spills),
            *(row.shared_bytes, row.local_bytes, row.programs_per_unit, _counts(row.loads), _counts(row.stores)),
            *(row.atomics, f"{row.bytes_per_element:g}/{row.element}"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _counts(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}B" for width, count in widths.items()) or "-"
