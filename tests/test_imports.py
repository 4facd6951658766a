"""Who may import whom: trainer -> repo_ops -> repo_ops.kernels, and `import repo_ops` needs torch alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "kernels": "repo_ops.kernels",
    "repo_ops": "repo_ops",
    "trainer": "repo_ops.trainer",
    "benchmarks": "repo_ops.benchmarks",
}


def imported_names(source: str, package: str) -> list[tuple[str, bool]]:
    """Full dotted name of everything imported, and whether that happens inside a function."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found.extend((f"{module}.{alias.name}", lazy) for alias in node.names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(path: str, source: str) -> list[str]:
    """What a file, given by its path in the repository, imports against the rules."""
    folder, *inner = Path(path).parent.parts or ("",)
    package = ".".join([PACKAGES.get(folder, folder), *inner])
    wrong = []
    for name, lazy in imported_names(source, package):
        if within(name, "kernels") or within(name, "trainer"):
            wrong.append(f"{path}: {name}: say repo_ops.{name}; the bare name is another project's package")
        elif folder == "kernels" and within(name, "repo_ops") and not within(name, "repo_ops.kernels"):
            wrong.append(f"{path}: {name}: kernels know nothing of the library above them")
        elif folder == "repo_ops" and any(within(name, above) for above in ("repo_ops.trainer", "repo_ops.benchmarks")):
            # a host's trainer may borrow the learner's rows; `import repo_ops` never does
            borrows = path.startswith("repo_ops/integrations/") and within(name, "repo_ops.trainer")
            if not (lazy and (path == "repo_ops/cli.py" or borrows)):
                wrong.append(f"{path}: {name}: only functions in cli.py and integrations may import what lies above")
        elif folder == "trainer" and within(name, "repo_ops.benchmarks"):
            wrong.append(f"{path}: {name}: benchmarks lie above the trainer")
    return wrong


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("tests/test_x.py", "import kernels", 1),
        ("trainer/loop.py", "from trainer.rows import pack", 1),
        ("trainer/loop.py", "from repo_ops.trainer.rows import pack\nfrom repo_ops import linear_logps", 0),
        ("kernels/rows.py", "from repo_ops.kernels.launch import table\nimport triton", 0),
        ("kernels/rows.py", "from repo_ops import Options", 1),
        ("kernels/rows.py", "from .launch import table", 0),
        ("kernels/rows.py", "from ..head import plan", 1),
        ("repo_ops/head/plan.py", "def f():\n    from repo_ops.trainer import loop", 1),
        ("repo_ops/cli.py", "def f():\n    from repo_ops.trainer import loop", 0),
        ("repo_ops/cli.py", "from repo_ops.trainer import loop", 1),
        ("repo_ops/integrations/trl/rows.py", "def f():\n    from repo_ops.trainer import rows", 0),
        ("repo_ops/integrations/trl/rows.py", "from repo_ops.trainer import rows", 1),
        ("repo_ops/integrations/trl/rows.py", "def f():\n    from repo_ops.benchmarks import peak", 1),
        ("repo_ops/replay/buffer.py", "import kernels_of_mine, trainers", 0),
    ],
)
def test_the_scan_sees_what_it_should(path: str, source: str, count: int) -> None:
    assert len(violations(path, source)) == count


def test_imports_point_one_way() -> None:
    files = [p for folder in (*PACKAGES, "tests") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 5
    wrong = [line for p in files for line in violations(p.relative_to(ROOT).as_posix(), p.read_text())]
    assert not wrong, "\n".join(wrong)


# What each folder may import beside the standard library and itself; pyproject.toml requires the same.
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "repo_ops": {
        "accelerate",
        "nemo_rl",
        "peft",
        "prime_rl",
        "torch",
        "transformers",
        "trl",
        "verl",
    },  # all but torch inside functions or integrations
    "benchmarks": {
        "cut_cross_entropy",
        "datasets",
        "liger_kernel",
        "matplotlib",
        "pytest",
        "torch",
        "transformers",
        "trl",
    },
    "trainer": {
        "datasets",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "jsonargparse",
        "liger_kernel",
        "math_verify",
        "matplotlib",
        "numpy",
        "peft",
        "pyarrow",
        "reasoning_gym",
        "rich",
        "safetensors",
        "tokenizers",
        "torch",
        "trackio",
        "transformers",
        "vllm",
        "wandb",
        "yaml",
    },
}


@pytest.mark.parametrize("folder", THIRD_PARTY)
def test_what_is_imported_is_what_the_extras_install(folder: str) -> None:
    known = THIRD_PARTY[folder] | set(sys.stdlib_module_names) | {"repo_ops"}
    for path in (ROOT / folder).rglob("*.py"):
        inner = path.parent.relative_to(ROOT / folder).parts
        names = imported_names(path.read_text(), ".".join([PACKAGES[folder], *inner]))
        unknown = {name.partition(".")[0] for name, _ in names} - known
        assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}: name it here and in an extra, or do without"


def python(code: str, cwd: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # as users have it
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_name_of_repo_ops_loads_torch_and_nothing_else(tmp_path: Path) -> None:
    python(
        """
import sys, torch
before = set(sys.modules)
import repo_ops
for name in repo_ops.__all__:
    getattr(repo_ops, name)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"repo_ops", *sys.stdlib_module_names}, new
assert not {"repo_ops.trainer", "repo_ops.benchmarks", "repo_ops.kernels"} & set(sys.modules)
""",
        tmp_path,
    )


def test_the_command_and_its_help_do_not_wait_for_torch(tmp_path: Path) -> None:
    python(
        """
import sys
import repo_ops
from repo_ops.cli import main
main(["--help"])
try:
    main(["trian"])
except SystemExit as end:
    assert end.code == 2
assert repo_ops.__version__
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy", "transformers", "rich", "jsonargparse"}, loaded
""",
        tmp_path,
    )


def test_functions_keep_their_names_beside_the_modules_that_hold_them(tmp_path: Path) -> None:
    # `repo_ops.linear_logps` is the function, however its module of the same name came to be imported
    python(
        """
from repo_ops.linear_logps import linear_logps
import repo_ops.linear_policy_loss
import repo_ops

assert repo_ops.linear_logps is linear_logps
assert callable(repo_ops.linear_policy_loss) and callable(repo_ops.linear_stats) and callable(repo_ops.policy_loss)
assert repo_ops.causal_lm.find_head  # a module that nobody imported by name
assert {*repo_ops.__all__} <= {*dir(repo_ops)}
assert not hasattr(repo_ops, "linear_logp")
""",
        tmp_path,
    )


def test_library_works_where_transformers_and_triton_are_absent(tmp_path: Path) -> None:
    python(
        """
import importlib.util, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("transformers", "triton"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("triton") is None
assert importlib.util.find_spec("transformers") is None
import torch, repo_ops

hidden = torch.randn(5, 8, requires_grad=True)
weight = torch.randn(11, 8, requires_grad=True)
targets = torch.tensor([0, 10, 3, 3, 7])
stats = repo_ops.linear_logps(hidden, weight, targets)
truth = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, targets[:, None])[:, 0]
assert (stats.logps.double() - truth).abs().max() < 1e-5, (stats.logps, truth)

out = repo_ops.linear_policy_loss(hidden[None], weight, targets[None], torch.ones(1), objective="grpo")
out.loss.backward()
expected, = torch.autograd.grad(-truth.mean(), hidden)  # on policy the surrogate's gradient is that of -mean(logp) * A
assert (hidden.grad - expected).abs().max() < 1e-5
""",
        tmp_path,
    )
