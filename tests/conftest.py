"""What every test shares: no network, one seed, and a loud word about GPU tests that did not run."""

import os

import pytest

# A test that would reach a model hub fails at once, instead of hanging where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_NO_GPU = "needs a GPU, and torch sees none here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

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
    import torch

    torch.manual_seed(0)
