"""What users get: the wheel, the sdist, the names they install, and the neighbours they must leave alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "repo_ops": "repo_ops",
    "kernels": "repo_ops/kernels",
    "trainer": "repo_ops/trainer",
    "benchmarks": "repo_ops/benchmarks",
}
SCRIPTS = Path(sysconfig.get_path("scripts"))


def run(command: Sequence[str | Path], cwd: Path, env: Mapping[str, str | Path] | None = None) -> str:
    """Standard output of a command, which must succeed within two minutes; its stderr is shown if it does not."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {k: str(v) for k, v in (env or {}).items()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    run([sys.executable, "-m", "pip", *arguments], cwd)


def sources(folder: str) -> list[str]:
    """Python files of a source folder, relative to it."""
    return sorted(p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the working tree."""
    target = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out, checkout, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_one_package_and_nothing_else_at_top_level(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names_in(wheel)}
    # A top-level `kernels` would overwrite the Hugging Face package of that name and break transformers.
    assert top == {"repo_ops", "repo_ops-0.1.0.dist-info"}
    assert wheel.name == "repo_ops-0.1.0-py3-none-any.whl"


def test_wheel_holds_every_source_file_and_the_type_marker(wheel: Path) -> None:
    expected = {f"{package}/{file}" for folder, package in FOLDERS.items() for file in sources(folder)}
    packed = set(names_in(wheel))
    assert {name for name in packed if name.endswith(".py")} == expected  # a sub-folder without __init__.py is lost
    assert {"repo_ops/py.typed", "repo_ops/kernels/__init__.py", "repo_ops/trainer/__init__.py"} <= packed


def test_wheel_carries_licence_command_and_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        read = {name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = read["repo_ops-0.1.0.dist-info/METADATA"]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in read["repo_ops-0.1.0.dist-info/licenses/LICENSE"]
    assert "repo-ops = repo_ops.cli:main" in read["repo_ops-0.1.0.dist-info/entry_points.txt"]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.6"]  # whatever else is wanted belongs in an extra


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, checkout], cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py", "trainer/__init__.py"} <= packed
    pip("wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (from_sdist,) = tmp_path.glob("*.whl")
    assert sorted(names_in(from_sdist)) == sorted(names_in(wheel))


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path that holds a stand-in for the Hugging Face package `kernels`."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("MAKER = 'somebody else'\n")
    return site


def test_installed_wheel_imports_from_anywhere_and_leaves_its_neighbour(
    wheel: Path, neighbour: Path, tmp_path: Path
) -> None:
    target = tmp_path / "installed"
    shutil.copytree(neighbour, target)
    pip("install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    code = """
        import kernels, repo_ops, repo_ops.kernels, repo_ops.trainer
        print(kernels.MAKER)
        for module in (repo_ops, repo_ops.kernels, repo_ops.trainer): print(module.__file__)
    """
    out = run([sys.executable, "-c", "\n".join(map(str.strip, code.split("\n")))], tmp_path, {"PYTHONPATH": target})
    assert out.splitlines() == [
        "somebody else",
        *(str(target / "repo_ops" / inner / "__init__.py") for inner in ("", "kernels", "trainer")),
    ]


# Printed when the interpreter ends: which package `import kernels` would load in that process.
TELL = """
import atexit, importlib.util
atexit.register(lambda: print("kernels is", importlib.util.find_spec("kernels").origin))
"""


@pytest.fixture(scope="module")
def telling_neighbour(neighbour: Path) -> Path:
    (neighbour / "sitecustomize.py").write_text(TELL)
    return neighbour


def test_the_check_below_sees_a_shadowed_package(telling_neighbour: Path) -> None:
    # Without a console script Python puts the repository root first: the accident that the next tests exclude.
    out = run([sys.executable, "-c", "pass"], ROOT, {"PYTHONPATH": telling_neighbour})
    assert f"kernels is {ROOT / 'kernels' / '__init__.py'}" in out


@pytest.mark.parametrize(
    "command",
    [
        ("repo-ops", "--help"),
        ("pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_packaging.py"),
    ],
    ids=lambda command: command[0],
)
def test_our_commands_in_the_repository_root_do_not_shadow_hugging_face_kernels(
    command: tuple[str, ...], telling_neighbour: Path
) -> None:
    out = run([SCRIPTS / command[0], *command[1:]], ROOT, {"PYTHONPATH": telling_neighbour})
    assert f"kernels is {telling_neighbour / 'kernels' / '__init__.py'}" in out


def test_in_this_very_process_kernels_and_trainer_are_not_ours() -> None:
    # Test workers are started differently from the pytest command, so they are asked themselves.
    for name in ("kernels", "trainer"):
        spec = find_spec(name)
        assert spec is None or not str(spec.origin).startswith(str(ROOT)), spec
