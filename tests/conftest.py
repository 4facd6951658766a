"""What every test shares: no network, one seed, kernels that run on CPU tensors, and a loud word about GPU tests."""

import os

import pytest
import torch

# A test that would reach a model hub fails at once, instead of hanging where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Triton reads this when a kernel's module is first imported. It changes what can run on CPU tensors, not what runs by
# default: backend="auto" takes the PyTorch arithmetic there. Compiling ahead of time needs a process without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_NO_GPU = "needs a GPU, and torch sees none here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unrun = [r for r in terminalreporter.stats.get("skipped", []) if _NO_GPU in str(r.longrepr)]
    if unrun:
        terminalreporter.write_line(
            f"{len(unrun)} GPU tests did NOT run: torch sees no GPU. Run `pytest -m gpu` on a machine with one.",
            yellow=True,
            bold=True,
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generator state, whatever ran before it."""
    torch.manual_seed(0)
