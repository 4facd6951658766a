"""Every kernel and launch configuration, compiled ahead of time for GPUs that are not here (kernels/aot.py)."""

import dataclasses
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
    "join_shares_kernel",
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
    # the largest kernel takes longest to compile: here for one architecture of each vendor, by the command for all
    product = {"tiled_logps_kernel"} if request.param in ("sm_90", "gfx942") else set()
    assert {row["kernel"] for row in chosen} == KERNELS | product
    return chosen


def cases_where(rows, condition):
    return [row["case"] for row in rows if condition(row)]


def test_no_spills_and_no_local_memory(rows):
    assert cases_where(rows, lambda row: row["spills"] or row["local_bytes"]) == []


def test_no_atomics(rows):
    assert cases_where(rows, lambda row: row["atomics"]) == []


def test_no_memory_from_an_allocator(rows):
    """Descriptors take theirs from an allocator that is set for one thread and missing in others (verl #4676)."""
    assert not cases_where(rows, lambda row: row["scratch_bytes"])


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
    # one program a unit would leave the memory idle while it computes; a product keeps loads in flight by itself
    alone = {row["kernel"] for row in rows if row["programs_per_unit"] < 2}
    assert alone <= {"tiled_logps_kernel"}
    assert all(row["programs_per_unit"] >= 1 for row in rows)


def test_row_offsets_are_64_bit(rows):
    """A row index times a stride passes 2^31 at N = 14135 of V = 151936 (Liger #803)."""
    widths = {row["kernel"]: set(row["offset_bits"]) for row in rows}
    assert widths["row_stats_kernel"] == {64}
    assert widths["row_grads_kernel"] == {64}
    assert widths.get("tiled_logps_kernel", {64}) == {64}
    assert all(bits <= {64} for bits in widths.values())


def test_grids_have_one_axis(rows):
    """The second axis of a CUDA grid ends at 65535 (Liger #1294)."""
    assert {tuple(row["grid_axes"]) for row in rows} == {("x",)}


def test_products_run_on_the_matrix_units_and_nothing_else_does(rows):
    family = {"sm_90": "wgmma", "gfx942": "mfma"}
    for row in rows:
        product = row["kernel"] == "tiled_logps_kernel"
        assert list(row["tensor_core"]) == ([family[row["architecture"]]] if product else []), row["case"]


def test_operands_of_products_arrive_16_bytes_at_a_time(rows):
    products = [row for row in rows if row["kernel"] == "tiled_logps_kernel" and not row["case"].endswith(" odd")]
    assert cases_where(products, lambda row: row["loads"].get("16", 0) < 8) == []


def test_nothing_is_at_fault_beside_the_kept_table(report):
    assert report["faults"] == []


def test_bfloat16_gradients_are_rounded_to_nearest(report):
    """The interpreter cuts them, so that this cannot be seen there. (CDNA3 rounds by integer arithmetic: no name.)"""
    nvidia = [row for row in report["rows"] if row["architecture"].startswith("sm_")]
    narrowing = [row for row in nvidia if row["kernel"] == "row_grads_kernel" and "bfloat16" in row["case"]]
    assert len({row["architecture"] for row in narrowing}) == 4
    assert cases_where(narrowing, lambda row: not row["bfloat16_roundings"]) == []


def test_a_target_at_the_peak_is_found_by_comparing(report):
    # z - peak becomes one fused multiply-add that leaves the product raw * c unrounded: half an ulp off 0 at the peak
    # for most c = 1 / temperature; it cost every second greedy token its is_argmax, and peaked rows their digits
    assert "oge" in report["scalar_comparisons"]


def test_bytes_moved_are_counted(report):
    count = {row["case"]: row["bytes_per_element"] for row in report["rows"]}
    assert count["row_stats float32 aligned"] == 4
    assert count["row_grads float32 aligned to bfloat16"] == 6
    assert count["row_grads bfloat16 aligned"] == 4
    # rows of 2 * 4096 bytes for each of 128 rows and of 256 columns of a tile
    assert count["tiled_logps bfloat16"] == 8192 / 128 + 8192 / 256
    # logps, old, advantages, weights; loss, dlogps, ratio, two flags
    assert count["clipped_ratio token plain"] == 4 * 4 + 3 * 4 + 2


def test_other_lengths_and_temperatures_reuse_the_binary(report):
    """Vocabularies of one alignment class, batch sizes, slices that start anywhere, temperatures, bounds and betas."""
    groups = dict(report["keys"])
    levels = groups.pop("different levels (must differ)")
    assert len(set(levels)) == 3  # the key does tell launches apart
    assert len(groups) == 10
    for name, keys in groups.items():
        assert len(keys) == 3, name
        assert len(set(keys)) == 1, f"{name}: {set(keys)}"


def compiled(**changes):
    """A binary without a fault, but for `changes`."""
    from repo_ops.kernels import binaries

    row = binaries.Compiled(
        case="tiled_logps bfloat16", kernel="tiled_logps_kernel", architecture="sm_90", tile="128x256x64", num_warps=8,
        registers=254, spills=0, shared_bytes=147456, local_bytes=0, scratch_bytes=0, programs_per_unit=1,
        loads={16: 36, 8: 3}, stores={4: 3}, atomics=0, tensor_core={"wgmma": 4}, bfloat16_roundings=0,
        grid_axes=("x",), offset_bits=(64,),
        element="logit", bytes_per_element=96.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 3}, "3 spills"),
        ({"local_bytes": 8}, "8 local bytes"),
        ({"atomics": 1}, "1 atomics"),
        ({"scratch_bytes": 128}, "128 scratch bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, above 232448"),
        ({"loads": {8: 80}}, "no 16-byte load; no load of 16 bytes any more"),
        ({"tensor_core": {}}, "no matrix instruction; matrix instructions went from {'wgmma': 4} to {}"),
        ({"tensor_core": {"mma": 64}}, "matrix instructions went from {'wgmma': 4} to {'mma': 64}"),
        ({"programs_per_unit": 0}, "programs per unit went from 1 to 0"),
        ({"bytes_per_element": 128.0}, "bytes per element went from 96 to 128"),
        ({"stores": {2: 6}}, "no store of 4 bytes any more"),
        ({"case": "tiled_logps bfloat16 new"}, "not in the kept table; write it anew with --keep"),
        ({"architecture": "sm_80", "shared_bytes": 65536}, "not in the kept table; write it anew with --keep"),
    ],
)
def test_what_is_worse_than_the_kept_table_is_a_fault(changes, message):
    from repo_ops.kernels import aot

    kept = json.loads(json.dumps(aot.as_kept([compiled()])))
    row = compiled(**changes)
    assert aot.faults([compiled()], kept) == []
    assert "; ".join(text.split(": ", 1)[1] for text in aot.faults([row], kept)) == message


def test_what_costs_no_occupancy_is_no_fault():
    from repo_ops.kernels import aot

    kept = json.loads(json.dumps(aot.as_kept([compiled()])))
    better = {"registers": 255, "shared_bytes": 98304, "programs_per_unit": 2, "bytes_per_element": 64.0}
    assert aot.faults([compiled(**better)], kept) == []
    assert aot.faults([compiled(case="row_stats float32", kernel="row_stats_kernel", tensor_core={})]) == []


def test_occupancy_counts_registers_warps_and_shared_memory():
    from repo_ops.kernels.binaries import resident_programs

    assert resident_programs("sm_90", 32, 0, 8) == 8  # 64 warps
    assert resident_programs("sm_90", 255, 0, 4) == 2  # 65536 registers / 256 / 128 threads
    assert resident_programs("sm_90", 64, 98304, 4) == 2  # 228 KiB / 97 KiB
    assert resident_programs("sm_120", 64, 98304, 4) == 1  # 100 KiB
    assert resident_programs("gfx942", 128, 32768, 4) == 2  # 64 KiB of LDS
    assert resident_programs("gfx942", 256, 0, 4) == 2  # 2 waves a SIMD


def test_a_table_of_another_triton_is_named_and_not_compared_with(tmp_path, capsys):
    from repo_ops.kernels import aot

    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(aot.as_kept([compiled()]) | {"triton": "1.0"}))
    assert aot.read_kept(path) is None
    assert "kept by triton 1.0" in capsys.readouterr().err
    assert aot.read_kept(aot.KEPT)["cases"].keys() == set(ARCHITECTURES)


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


def command(tmp_path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-c", "from repo_ops.cli import main; main()", "kernels", "--arch", "sm_90", "--jobs", "1"]
    line += ["--match", "group_advantages split", "--kept", str(tmp_path / "kept.json"), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)


def test_the_command_prints_the_table_and_its_verdict(tmp_path):
    done = command(tmp_path, "--out", str(tmp_path / "table.md"), "--keep")
    assert done.returncode == 0, done.stderr
    assert "no spills, no local memory, no atomics" in done.stdout
    assert (tmp_path / "table.md").read_text() == done.stdout
    kept = json.loads((tmp_path / "kept.json").read_text())
    kept["cases"]["sm_90"]["group_advantages split"]["programs_per_unit"] += 1
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    done = command(tmp_path, "--check")
    assert done.returncode == 1, done.stderr
    assert "FAILED group_advantages split on sm_90: programs per unit went from" in done.stdout


def test_keeping_some_rows_leaves_the_others(tmp_path):
    from repo_ops.kernels import aot

    path = tmp_path / "kernels.json"
    aot._keep([compiled(), compiled(case="other")], path)
    aot._keep([compiled(registers=1)], path)
    cases = json.loads(path.read_text())["cases"]["sm_90"]
    assert {name: row["registers"] for name, row in cases.items()} == {"tiled_logps bfloat16": 1, "other": 254}
    path.write_text(path.read_text().replace(aot.triton.__version__, "1.0"))
    aot._keep([compiled()], path)
    assert list(json.loads(path.read_text())["cases"]["sm_90"]) == ["tiled_logps bfloat16"]


def test_a_check_without_a_kept_table_says_how_to_make_one(tmp_path):
    done = command(tmp_path, "--check")
    assert done.returncode == 2
    assert "--kept: expected a file, found none" in done.stderr
