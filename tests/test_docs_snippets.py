"""The written pages of docs/: their Python runs as printed, in a process of its own; their links lead on.

Every ```python block of a page is run, the later ones with the names of the earlier ones, as a reader would paste them.
A page names the packages that its code needs in a line `<!-- needs: trl, datasets -->`; without them it is skipped.
Code that cannot run here (a configuration of a cluster, a fragment) stands in a block of another language.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "hosts").glob("*.md")])


def blocks(page: Path) -> list[str]:
    """The page's Python, each block behind as many empty lines as stand above it: errors name the page's lines."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in found]


def needs(page: Path) -> list[str]:
    named = re.search(r"<!-- needs: (.+?) -->", page.read_text(encoding="utf-8"))
    return [] if named is None else [name.strip() for name in named.group(1).split(",")]


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "page.py"
    code = [f"exec(compile({block!r}, {str(page)!r}, 'exec'), globals())" for block in blocks(page)]
    script.write_text("\n".join(code), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # as users have it
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def test_there_are_pages() -> None:
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_printed(page: Path, tmp_path: Path) -> None:
    if not blocks(page):
        pytest.skip("no Python on this page")
    if absent := [name for name in needs(page) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(absent)}")
    done = run(page, tmp_path)
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_an_error_on_a_page_is_seen_and_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# T\n\n```python\na = 1\n```\n\ntext\n\n```python\n\nassert a == 2\n```\n")
    done = run(page, tmp_path)
    assert done.returncode != 0
    assert "line 11" in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"
