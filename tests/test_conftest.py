"""A suite that leaves GPU tests out must say so."""

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SUITE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_on_a_gpu(n):
    raise AssertionError("must not run without a GPU")

def test_elsewhere():
    pass
"""


def test_gpu_tests_without_a_gpu_are_skipped_aloud(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [Path(sysconfig.get_path("scripts")) / "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    done = subprocess.run(
        [*map(str, command), "-p", "conftest", "-p", "no:cacheprovider", "test_suite.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout
    assert "3 GPU tests did NOT run" in done.stdout
