"""What the README shows runs as printed, and what it names exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_as_printed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    # An example may go on from the ones above it, as a reader would paste them.
    for code in EXAMPLES[: number + 1]:
        exec(compile(code, f"README.md, example {number + 1}", "exec"), names)
    loss = names["out"].loss
    assert loss.isfinite()
    for parameter in (names["backbone"].weight, names["head"].weight):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert torch.count_nonzero(parameter.grad) > 0


def test_drop_in_example_stays_short() -> None:
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 12, f"{len(lines)} lines"


def test_commands_and_links_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`\n]+`|```sh.*?```", README, re.S)))):
        assert re.search(rf"^{target}:", makefile, re.M), f"README names `make {target}`, the Makefile does not"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"
