"""The repository speaks of itself only, and its folders keep what packaging needs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh", ""}

FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~$}])/(?:work|root|home|opt|Users)/\w"),
    "a package index by address": re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url"
    ),
    "a file outside the repository": re.compile(r"\.\./shared"),
    "a note to the people at work": re.compile(r"(?i)\bas an ai\b|\bthis (?:work ?session|chat|conversation)\b"),
    "a marker of an unfinished merge": re.compile(r"^(?:<{7}|>{7}) ", re.M),
}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /home/anna/data", "a path of one machine"),
        ("pip install --index-url https://x", "a package index by address"),
        ("see ../shared/notes", "a file outside the repository"),
    ],
)
def test_the_scan_sees_what_it_should(text: str, what: str) -> None:
    assert FORBIDDEN[what].search(text)


def test_files_name_no_machine_no_index_and_nothing_outside() -> None:
    wrong = []
    for path in tracked():
        if path.suffix not in TEXT or path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for what, pattern in FORBIDDEN.items():
            for hit in pattern.finditer(text):
                line = text.count("\n", 0, hit.start()) + 1
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {hit.group()!r} is {what}")
    assert not wrong, "\n".join(wrong)


def test_no_large_or_binary_surprises() -> None:
    # Weights, wheels and runs have slipped into repositories this way; the pictures of the README are smaller.
    large = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size}" for p in tracked() if p.is_file() and p.stat().st_size > 500_000
    ]
    assert not large, large


def test_every_source_folder_is_a_package() -> None:
    folders = {p.parent for top in ("kernels", "repo_ops", "trainer", "benchmarks") for p in (ROOT / top).rglob("*.py")}
    assert folders
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []
    assert not (ROOT / "tests" / "__init__.py").exists()  # importlib mode; a package here would hide the installed one
