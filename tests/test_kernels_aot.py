"""Every kernel and launch configuration, compiled ahead of time for GPUs that are not here (kernels/aot.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {
    "row_stats_kernel",
    "row_grads_kernel",
    "ratio_tokens_kernel",
    "ratio_sequences_kernel",
    "group_advantages_kernel",
}


# Compiling takes a minute or two where Triton's cache is empty, and several on a machine that does other work.
pytestmark = pytest.mark.timeout(1200)


def run(*arguments, interpret):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=1100)


@pytest.fixture(scope="session")
def report():
    """One process compiles everything once."""
    script = Path(__file__).with_name("aot_report.py")
    done = run(str(script), interpret=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=ARCHITECTURES)
def rows(report, request):
    chosen = [row for row in report["rows"] if row["architecture"] == request.param]
    assert {row["kernel"] for row in chosen} == KERNELS
    return chosen


def cases_where(rows, condition):
    return [row["case"] for row in rows if condition(row)]


def test_no_spills_and_no_local_memory(rows):
    assert cases_where(rows, lambda row: row["spills"] or row["local_bytes"]) == []


def test_no_atomics(rows):
    assert cases_where(rows, lambda row: row["atomics"]) == []


def test_row_kernels_load_16_bytes_at_a_time(rows):
    of_rows = [row for row in rows if row["kernel"].startswith("row_")]
    assert len(of_rows) >= 5
    assert cases_where(of_rows, lambda row: not row["loads"].get("16")) == []


def test_the_assembler_keeps_the_widths_of_the_ptx(report):
    """The widths above are read from PTX, since disassembling takes longer than compiling; this case from both."""
    disassembled = report["disassembled"]
    same = [row for row in report["rows"] if row["case"] == disassembled["case"] and row["architecture"] == "sm_90"]
    assert disassembled["loads"]["16"] == same[0]["loads"]["16"] == 2
    assert disassembled["stores"]["16"] == same[0]["stores"]["16"] == 1


def test_aligned_gradients_store_16_bytes_at_a_time(rows):
    of_rows = [row for row in rows if row["kernel"] == "row_grads_kernel" and "aligned" in row["case"]]
    assert cases_where(of_rows, lambda row: not row["stores"].get("16")) == []


def test_several_programs_share_a_unit(rows):
    # one program a unit would leave the memory idle while it computes
    assert cases_where(rows, lambda row: row["programs_per_unit"] < 2) == []


def test_row_offsets_are_64_bit(rows):
    """A row index times a stride passes 2^31 at N = 14135 of V = 151936 (Liger #803)."""
    widths = {row["kernel"]: set(row["offset_bits"]) for row in rows}
    assert widths["row_stats_kernel"] == {64}
    assert widths["row_grads_kernel"] == {64}
    assert all(bits <= {64} for bits in widths.values())


def test_grids_have_one_axis(rows):
    """The second axis of a CUDA grid ends at 65535 (Liger #1294)."""
    assert {tuple(row["grid_axes"]) for row in rows} == {("x",)}


def test_no_matrix_instructions(rows):
    assert cases_where(rows, lambda row: row["tensor_core"]) == []


def test_bfloat16_gradients_are_rounded_to_nearest(report):
    """The interpreter cuts them, so that this cannot be seen there. (CDNA3 rounds by integer arithmetic: no name.)"""
    nvidia = [row for row in report["rows"] if row["architecture"].startswith("sm_")]
    narrowing = [row for row in nvidia if row["kernel"] == "row_grads_kernel" and "bfloat16" in row["case"]]
    assert len({row["architecture"] for row in narrowing}) == 4
    assert cases_where(narrowing, lambda row: not row["bfloat16_roundings"]) == []


def test_bytes_moved_are_counted(report):
    count = {row["case"]: row["bytes_per_element"] for row in report["rows"]}
    assert count["row_stats float32 aligned"] == 4
    assert count["row_grads float32 aligned to bfloat16"] == 6
    assert count["row_grads bfloat16 aligned"] == 4
    # logps, old, advantages, weights; loss, dlogps, ratio, two flags
    assert count["clipped_ratio token plain"] == 4 * 4 + 3 * 4 + 2


def test_other_lengths_and_temperatures_reuse_the_binary(report):
    """Vocabularies of one alignment class, batch sizes, slices that start anywhere, temperatures, bounds and betas."""
    groups = dict(report["keys"])
    levels = groups.pop("different levels (must differ)")
    assert len(set(levels)) == 3  # the key does tell launches apart
    assert len(groups) == 8
    for name, keys in groups.items():
        assert len(keys) == 3, name
        assert len(set(keys)) == 1, f"{name}: {set(keys)}"


def test_cpu_tensors_are_refused_where_kernels_are_compiled(report):
    assert report["refusal"].startswith("tile: expected a tensor on a GPU that Triton supports, got device cpu")
    assert "TRITON_INTERPRET=1" in report["refusal"]


def test_an_interpreting_process_cannot_compile():
    code = "from repo_ops.kernels import aot; aot.inspect_kernels(['sm_90'])"
    done = run("-c", code, interpret=True)
    assert done.returncode != 0
    assert "RuntimeError: kernels: TRITON_INTERPRET=1 was set when triton was imported" in done.stderr


def test_unknown_architecture_is_named():
    code = "from repo_ops.kernels import aot; aot.inspect_kernels(['sm_90', 'sm_42'])"
    done = run("-c", code, interpret=False)
    assert "ValueError: architectures: expected some of sm_80" in done.stderr
    assert done.stderr.rstrip().endswith("got sm_42")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, repo_ops.kernels; print('triton' in sys.modules)"
    done = run("-c", code, interpret=False)
    assert done.stdout.strip() == "False", done.stderr


def test_the_command_prints_the_table_and_its_verdict(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from repo_ops.cli import main; main()", "kernels", "--arch", "sm_90"]
    command += ["--match", "group_advantages split", "--jobs", "1", "--out", str(tmp_path / "table.md")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no spills, no local memory, no atomics" in done.stdout
    assert (tmp_path / "table.md").read_text() == done.stdout
