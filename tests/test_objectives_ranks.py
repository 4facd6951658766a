"""Statistics over a batch are the same on one rank and on two."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "worker_objectives.py"


def test_two_ranks_have_the_gradient_of_one():
    # a safe path keeps the repository root, and its folder kernels/, off the path of -m; the worker's neighbours stay
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
