"""Two gloo ranks against one process: FSDP2, the learner, vocabulary shards, advantages and counts over ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def launch(worker: str, *arguments: str) -> list[str]:
    """Lines that `worker` printed on two ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(TESTS / worker)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_fsdp2_gradients_are_those_of_one_process_or_the_wrapping_is_refused():
    lines = [line for line in launch("worker_fsdp2.py") if line.startswith(("root", "tail", "own"))]
    # root x {untied, tied} x accumulation {1, 2}, tail and own units untied x {1, 2}
    assert len(lines) == 8
    for line in lines:
        wrapping, tied, _, outcome = line.split(maxsplit=3)
        if wrapping == "own":
            assert outcome.startswith("refused: weight: expected a plain tensor, got a DTensor")
        else:
            assert float(outcome) < 1e-5, (wrapping, tied)


@pytest.mark.slow
def test_vocabulary_shards_give_the_values_and_gradients_of_the_whole():
    lines = [line for line in launch("worker_tensor_parallel.py") if line.startswith("rank")]
    assert len(lines) == 8  # two ranks, four heads
    for line in lines:
        # rounded, a gradient's entry may fall on the other side of a tie
        assert float(line.split()[-1]) < (1e-3 if "rounded" in line else 1e-5), line


@pytest.mark.slow
def test_advantages_and_counts_over_ranks_are_those_of_one_process():
    lines = [line for line in launch("worker_advantages.py") if line.startswith("rank")]
    assert sorted(lines) == ["rank0 equal", "rank1 equal"]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does():
    found = {}
    for line in launch("worker_learner.py"):
        if line.startswith("case "):
            name, numbers = line.removeprefix("case ").split(": ")
            found[name] = [float(number) for number in numbers.split()]
    assert len(found) == 25
    assert found.pop("bfloat16")[0] < 0.05  # of the way that the parameters went
    for name, (apart, moved) in found.items():
        assert apart < 1e-6, name
        assert moved > 2e-5, name


@pytest.mark.slow
def test_inside_hosts_two_ranks_give_what_one_process_gives():
    pytest.importorskip("accelerate")
    pytest.importorskip("liger_kernel")
    lines = [line.split() for line in launch("worker_hosts.py") if line.startswith(("fsdp2", "liger", "verl", "accel"))]
    assert [name for name, _ in lines] == [
        "fsdp2-root", "fsdp2-tied", "fsdp2-tail", "fsdp2-own", "liger", "verl", "accelerate"
    ]  # fmt: skip
    for name, error in lines:
        assert float(error) < 1e-5, name
