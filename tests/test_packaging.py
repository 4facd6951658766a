"""What users get: the wheel, the sdist, the names they install, and the neighbours they must leave alone."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import repo_ops

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = {
    "repo_ops": "repo_ops",
    "kernels": "repo_ops/kernels",
    "trainer": "repo_ops/trainer",
    "benchmarks": "repo_ops/benchmarks",
}
# What the tests read beside the packages; it travels with the sources and not with the wheel.
WITH_SOURCES = ("tests", "docs", ".ci", "Makefile", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md")
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
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *WITH_SOURCES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pip_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def pip_wheel(source: Path, out: Path) -> Path:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source]
    run(command, cwd=out, env={"SOURCE_DATE_EPOCH": "1760000000"})
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


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read("repo_ops-0.1.0.dist-info/METADATA").decode())


def test_wheel_says_what_it_is_and_needs(metadata: Message) -> None:
    assert metadata["Name"] == "repo-ops"
    assert metadata["Version"] == repo_ops.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.6"]  # whatever else is wanted belongs in an extra
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert str(metadata.get_payload()).startswith("# repo-ops\n")  # the page on an index is the README


def test_extras_of_the_wheel_are_those_that_readme_names(metadata: Message) -> None:
    named = re.findall(r"`([a-z0-9]+)`", re.split(r"Further extras?: ", README)[1].split("\n\n")[0])
    shown = {extra for line in re.findall(r"\[([a-z0-9,]+)\]'", README) for extra in line.split(",")}
    assert {*named, *shown} == {*metadata.get_all("Provides-Extra", [])}
    for line in metadata.get_all("Requires-Dist", []):
        assert not re.search(r"[<>=]=? *0\.0|@", line), f"{line}: an index takes no URL"


def test_wheel_registers_the_command_and_the_verl_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read("repo_ops-0.1.0.dist-info/licenses/LICENSE").decode()
        points = configparser.ConfigParser()
        points.read_string(archive.read("repo_ops-0.1.0.dist-info/entry_points.txt").decode())
    assert "Apache License" in licence
    assert {section: dict(points[section]) for section in points.sections()} == {
        "console_scripts": {"repo-ops": "repo_ops.cli:main"},
        "verl.plugins": {"repo_ops": "repo_ops.integrations.verl_plugin"},
    }
    for target in ("repo_ops/cli.py", "repo_ops/integrations/verl_plugin.py"):
        assert target in names_in(wheel)


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(checkout, tmp_path_factory.mktemp("sdist"))


def build_sdist(checkout: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, checkout]
    run(command, cwd=out, env={"SOURCE_DATE_EPOCH": "1760000000"})
    (built,) = out.glob("*.tar.gz")
    return built


def test_sdist_holds_what_its_tests_read(checkout: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {p.relative_to(checkout).as_posix() for name in WITH_SOURCES for p in [checkout / name] if p.is_file()}
    folders = [checkout / name for name in (*WITH_SOURCES, *FOLDERS) if (checkout / name).is_dir()]
    files |= {p.relative_to(checkout).as_posix() for folder in folders for p in folder.rglob("*") if p.is_file()}
    files = {name for name in files if not name.endswith(".pyc") and ".egg-info/" not in name}
    assert files | {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"} <= packed, files - packed


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert sorted(names_in(pip_wheel(sdist, tmp_path))) == sorted(names_in(wheel))


def test_the_same_files_and_time_give_the_same_bytes(checkout: Path, sdist: Path, wheel: Path, tmp_path: Path) -> None:
    again = tmp_path / "checkout"
    shutil.copytree(checkout, again, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    assert build_sdist(again, tmp_path).read_bytes() == sdist.read_bytes()
    pip_wheel(again, tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


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
