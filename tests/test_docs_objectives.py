"""The pages of docs/ that are made from source say what the source says now, and what they show runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from repo_ops.advantages import estimator_names
from repo_ops.objectives import objective_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
OBJECTIVES = DOCS / "objectives"
INDEX, YOUR_OWN, ADVANTAGES = OBJECTIVES / "README.md", OBJECTIVES / "your_own.md", DOCS / "advantages.md"


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(code: list[str], page: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    return names


def test_pages_say_what_the_source_says(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "generate"), "--text-only", "--into", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.md")}
    there = {path.relative_to(DOCS) for path in [*OBJECTIVES.glob("*.md"), ADVANTAGES]} - {YOUR_OWN.relative_to(DOCS)}
    assert there == set(fresh), "run `make docs`; delete pages of objectives that are gone"
    stale = [str(path) for path, text in fresh.items() if (DOCS / path).read_text(encoding="utf-8") != text]
    assert not stale, f"run `make docs`: {stale}"


def test_every_objective_has_a_page_and_a_picture() -> None:
    names = set(objective_names())
    assert {path.stem for path in OBJECTIVES.glob("*.md")} == names | {"README", "your_own"}
    assert {path.stem for path in (OBJECTIVES / "img").glob("*.png")} == names
    sizes = [path.stat().st_size for path in OBJECTIVES.rglob("*.png")]
    assert max(sizes) < 60_000
    assert sum(sizes) < 2_000_000


@pytest.mark.parametrize("name", objective_names())
def test_example_of_page_runs(name: str) -> None:
    page = OBJECTIVES / f"{name}.md"
    (example,) = examples(page)
    names = run([*examples(INDEX), example], page)
    assert f'get_objective("{name}"' in example
    assert names["out"].loss.isfinite()
    assert torch.count_nonzero(names["hidden"].grad) > 0


def test_examples_of_your_own_run_at_the_scope_they_name() -> None:
    code = examples(YOUR_OWN)
    names = run(code, YOUR_OWN)
    assert names["objective"].reach == "token"
    assert all(names[tensor].grad.isfinite().all() for tensor in ("hidden", "weight"))
    own = [block for block in code if "linear_policy_loss(" in block]
    assert len(own) == 2
    for block in own:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_a_scope_that_is_too_narrow_is_refused() -> None:
    from repo_ops import policy_loss

    def mean_ratio(tokens: Any) -> torch.Tensor:
        return -tokens.spread(tokens.sequence_mean(tokens.log_ratio)).exp() * tokens.advantages

    mean_ratio.scope = "token"  # type: ignore[attr-defined]
    logps = -torch.rand(2, 3)
    with pytest.raises(TypeError, match="scope"):
        policy_loss(logps, torch.ones(2), objective=mean_ratio, old_logps=logps)


@pytest.mark.parametrize("name", estimator_names())
def test_example_of_estimator_runs(name: str) -> None:
    first, *others = examples(ADVANTAGES)
    (example,) = [block for block in others if f'estimator="{name}"' in block]
    advantages = run([first, example], ADVANTAGES)["advantages"]
    assert advantages.shape == (4,)
    assert advantages.isfinite().all()


def test_links_lead_somewhere() -> None:
    for page in [*OBJECTIVES.glob("*.md"), ADVANTAGES]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"
