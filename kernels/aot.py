"""Every kernel, compiled ahead of time for GPUs that need not be present, and what the compilers made of it.

`inspect_kernels()` takes the same `Launch` objects that the host wrappers issue, on meta tensors (aot_cases.py),
compiles them with `triton.compile` and reads registers, spills, shared and local memory, load width, matrix
instructions and atomics from the binaries (binaries.py). `faults()` says what of it is wrong, alone or beside a kept
table of an earlier compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

from repo_ops.kernels.aot_cases import cases
from repo_ops.kernels.binaries import TARGETS, Compiled, compile_case, require_compiler
from repo_ops.kernels.launch import shared_memory_limit


def inspect_kernels(
    architectures: Sequence[str] = tuple(TARGETS), *, match: str = "", jobs: int = 1, sass: bool = False
) -> list[Compiled]:
    """Compile every case in whose name the pattern `match` is found for every architecture, in `jobs` processes.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: the process interprets its kernels, or a compiler failed.
    """
    require_compiler()
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

    In itself: a spill, local memory, an atomic, memory from Triton's allocator, more shared memory than the
    architecture gives, no 16-byte load where rows are read, no matrix instruction where 16-bit operands are multiplied.
    Beside `kept` (`as_kept` of an earlier run): fewer programs on a unit, narrower loads, another family of matrix
    instructions, more bytes an element, a case that the table does not have. Register counts may move; what counts is
    the step of occupancy that they cost.
    """
    return [f"{row.case} on {row.architecture}: {text}" for row in rows for text in _faults_of(row, kept)]


def _faults_of(row: Compiled, kept: Mapping[str, Any] | None) -> Iterator[str]:
    for name in ("spills", "local_bytes", "atomics", "scratch_bytes"):
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
