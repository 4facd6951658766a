"""Every kernel, compiled ahead of time for GPUs that need not be present, and what the compilers made of it.

`inspect_kernels()` builds the same `Launch` objects that the host wrappers issue, on meta tensors, compiles them with
`triton.compile` and reads registers, spills, shared and local memory, load width, matrix instructions and atomics from
the binaries. `faults()` says what of it is wrong, alone or beside a kept table of an earlier compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from repo_ops.kernels.launch import Launch, interpreting, shared_memory_limit
from repo_ops.kernels.logit_rows import RowStats, grads_launch, stats_launch
from repo_ops.kernels.tiled_logps import tiled_launches

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
# Llama 3's head; and a hidden size that fills no step, in rows off the 16-byte boundaries.
_HIDDEN, _ENTRIES, _ODD_HIDDEN = 4096, 128256, 1001


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
    tile: str
    """Block size, or rows x columns x depth of a product's tiles."""
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    local_bytes: int
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


def _product_cases(architecture: str) -> Iterator[Case]:
    """Plain in each dtype; with every option, and with a hidden size that nothing fits, in one; the join of shares."""
    targets, vector = _meta(_ROWS, dtype=torch.int64), _meta(_ROWS)
    wanted = {"with_entropy": True, "with_sum_p2": True, "with_argmax": True}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        operands = _meta(_ROWS, _HIDDEN, dtype=dtype), _meta(_ENTRIES, _HIDDEN, dtype=dtype)
        launches, _ = tiled_launches(*operands, targets, architecture=architecture)
        yield Case(f"tiled_logps {_name(dtype)}", launches[0], "logit", _product_bytes(launches[0], _HIDDEN))
        if dtype == torch.bfloat16:
            options: dict[str, Any] = {"bias": _meta(_ENTRIES), "inv_temperature": vector, "softcap": 30.0, **wanted}
            options |= {"rows": targets, "adapter": (_meta(_ROWS, 16, dtype=dtype), _meta(_ENTRIES, 16, dtype=dtype))}
            everything, _ = tiled_launches(*operands, targets, architecture=architecture, **options)
            bytes_each = _product_bytes(everything[0], _HIDDEN)
            yield Case("tiled_logps bfloat16 everything", everything[0], "logit", bytes_each)
            yield Case("join_shares everything", everything[1], "row's share", 16)
            yield Case("join_shares", launches[1], "row's share", 8)
            odd = _meta(_ROWS, _ODD_HIDDEN, dtype=dtype), _meta(_ENTRIES, _ODD_HIDDEN, dtype=dtype)
            uneven, _ = tiled_launches(*odd, targets, architecture=architecture)
            yield Case("tiled_logps bfloat16 odd", uneven[0], "logit", _product_bytes(uneven[0], _ODD_HIDDEN))


def _product_bytes(launch: Launch, hidden_size: int) -> float:
    """Of the operands' tiles, for each logit; nearly all come from L2."""
    config, itemsize = launch.config, launch.arguments["weight"].element_size()
    return hidden_size * itemsize * (1 / config.block + 1 / config.columns)


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
    return [
        *_row_cases(architecture),
        *_product_cases(architecture),
        *_ratio_cases(architecture),
        *_group_cases(architecture),
    ]


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
        measured = _read_amd(binary.asm)
    else:
        measured = _read_nvidia(binary.asm, sass)
    ttir = str(binary.asm["ttir"])
    resident = _resident_programs(architecture, measured["registers"], binary.metadata.shared, config.num_warps)
    return Compiled(
        case=case.name,
        kernel=case.launch.kernel.__name__,
        architecture=architecture,
        tile="x".join(str(size) for size in (config.block, config.columns, config.depth) if size),
        num_warps=config.num_warps,
        programs_per_unit=resident,
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


def _resident_programs(architecture: str, registers: int, shared_bytes: int, num_warps: int) -> int:
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


def faults(rows: Sequence[Compiled], kept: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with the binaries, one sentence each; empty if nothing is.

    In itself: a spill, local memory, an atomic, more shared memory than the architecture gives, no 16-byte load where
    rows are read, no matrix instruction where 16-bit operands are multiplied. Beside `kept` (`as_kept` of an earlier
    run): fewer programs on a unit, narrower loads, another family of matrix instructions, more bytes an element, a case
    that the table does not have. Register counts may move; what counts is the step of occupancy that they cost.
    """
    return [f"{row.case} on {row.architecture}: {text}" for row in rows for text in _faults_of(row, kept)]


def _faults_of(row: Compiled, kept: Mapping[str, Any] | None) -> Iterator[str]:
    for name in ("spills", "local_bytes", "atomics"):
        if count := getattr(row, name):
            yield f"{count} {name.replace('_', ' ')}"
    limit = shared_memory_limit(row.architecture)
    if row.shared_bytes > limit:
        yield f"{row.shared_bytes} bytes of shared memory, above {limit}"
    if row.kernel in _STREAMING and not row.case.endswith(" odd") and 16 not in row.loads:
        yield "no 16-byte load"
    if row.kernel == "tiled_logps_kernel" and "float32" not in row.case and not row.tensor_core:
        yield "no matrix instruction"
    if kept is None:
        return
    before = kept["cases"].get(row.architecture, {}).get(row.case)
    if before is None:
        yield "not in the kept table; write it anew with --keep"
        return
    for name, worse in (("programs_per_unit", -1), ("bytes_per_element", 1)):
        if (getattr(row, name) - before[name]) * worse > 1e-9:
            yield f"{name.replace('_', ' ')} went from {before[name]:g} to {getattr(row, name):g}"
    for name in ("loads", "stores"):
        widest = max(map(int, before[name]), default=0)
        if max(getattr(row, name), default=0) < widest:
            yield f"no {name[:-1]} of {widest} bytes any more"
    if set(row.tensor_core) != set(before["tensor_core"]):
        yield f"matrix instructions went from {before['tensor_core']} to {row.tensor_core}"


_STREAMING = ("row_stats_kernel", "row_grads_kernel", "tiled_logps_kernel")
_KEPT_FIELDS = ("registers", "shared_bytes", "programs_per_unit", "loads", "stores", "tensor_core", "bytes_per_element")


def as_kept(rows: Sequence[Compiled]) -> dict[str, Any]:
    """The rows as plain values for a JSON file: what `faults` compares later rows with."""
    table: dict[str, Any] = {"triton": triton.__version__, "cases": {}}
    for row in rows:
        fields = dataclasses.asdict(row)
        table["cases"].setdefault(row.architecture, {})[row.case] = {name: fields[name] for name in _KEPT_FIELDS}
    return table


KEPT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kernels.json"


def read_kept(path: Path) -> dict[str, Any] | None:
    """The kept table, or None, said on standard error, where another Triton wrote it: its registers are others.

    Raises:
        FileNotFoundError: there is none at `path`.
    """
    table: dict[str, Any] = json.loads(path.read_text())
    if table["triton"] != triton.__version__:
        print(
            f"{path}: kept by triton {table['triton']}, this is {triton.__version__}: not compared with it",
            file=sys.stderr,
        )
        return None
    return table


def _keep(rows: Sequence[Compiled], path: Path) -> None:
    """Write the rows to `path`; what the same Triton made of other cases stays."""
    table = as_kept(rows)
    if path.is_file():
        before = json.loads(path.read_text())
        if before["triton"] == table["triton"]:
            for architecture, cases_of in before["cases"].items():
                table["cases"][architecture] = cases_of | table["cases"].get(architecture, {})
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Print the table of all kernels for the wanted architectures; 1 if one of them is at fault."""
    parser = argparse.ArgumentParser(
        prog="repo-ops kernels", description="Compile every Triton kernel for GPUs that need not be here."
    )
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="architectures")
    parser.add_argument("--match", default="", help="regular expression on the names of cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", help="also write the table to this Markdown file")
    parser.add_argument("--check", action="store_true", help="fail where a kernel got worse than in the kept table")
    parser.add_argument("--keep", action="store_true", help="write these rows into the kept table")
    parser.add_argument("--kept", type=Path, default=KEPT, help="JSON file of the kept table")
    parser.add_argument("--tune", action="store_true", help="instead time launch configurations on the GPU here")
    options = parser.parse_args(arguments)
    if options.tune:
        from repo_ops.kernels import tune

        return tune.main()
    if options.check and not options.kept.is_file():
        parser.error(f"--kept: expected a file, found none at {options.kept}; make it with --keep")
    rows = inspect_kernels(options.arch, match=options.match, jobs=options.jobs)
    table = format_table(rows)
    found = faults(rows, read_kept(options.kept) if options.check else None)
    passed = "no spills, no local memory, no atomics, all loads and products as wide as they can be"
    verdict = f"{len(rows)} binaries: {passed if not found else 'FAILED ' + '; '.join(found)}"
    print(f"{table}\n\n{verdict}")
    if options.out:
        Path(options.out).write_text(f"{table}\n\n{verdict}\n")
    if options.keep and not found:
        _keep(rows, options.kept)
    return 1 if found else 0


_HEAD = [
    *("case", "arch", "tile, warps", "regs", "spills", "shared", "local", "programs/SM", "loads", "stores"),
    *("atomics", "matrix", "B/element"),
]


def format_table(rows: Sequence[Compiled]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for row in rows:
        cells = [
            *(row.case, row.architecture, f"{row.tile}, {row.num_warps}", row.registers, row.spills),
            *(row.shared_bytes, row.local_bytes, row.programs_per_unit, _counts(row.loads), _counts(row.stores)),
            *(row.atomics, " ".join(f"{n}x{name}" for name, n in row.tensor_core.items()) or "-"),
            f"{row.bytes_per_element:.4g}/{row.element}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _counts(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}B" for width, count in widths.items()) or "-"
