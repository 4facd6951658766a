"""The console script, as a shell sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

from repo_ops.cli import COMMANDS, main

SCRIPT = Path(sys.executable).with_name("repo-ops")


def test_help_lists_the_commands_and_imports_neither_transformers_nor_the_trainer() -> None:
    code = "import sys; from repo_ops.cli import main; main(['--help']); main([])\n"
    code += "print([m for m in sys.modules if m in ('transformers', 'matplotlib', 'repo_ops.trainer')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.count("usage: repo-ops COMMAND") == 2
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_settings_are_checked_before_torch_models_are_imported() -> None:
    code = "import sys; from repo_ops.cli import main\n"
    code += "try: main(['train', '--stepps', '3'])\n"
    code += "except SystemExit as error: print(error.code, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "2 False"
    assert "unknown key 'stepps'; did you mean 'steps'?" in done.stderr


def test_the_installed_script_runs_from_the_repository_root() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: repo-ops COMMAND")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], f"repo-ops: expected a command of {', '.join(COMMANDS)}, got 'trian'"),
        (["train", "--objective", "grop"], "repo-ops train: objective: expected one of "),
        (["train", "--objective_args.eps_hihg", "1"], "repo-ops train: eps_hihg: objective 'grpo' has "),
        (["train", "--replay", "varianc"], "repo-ops train: strategy: "),
        (["train", "--advantage_estimator", "grop"], "repo-ops train: estimator: "),
        (["train", "--advantage_args.widht", "1"], "repo-ops train: widht: "),
        (["train", "--device", "gpu"], "repo-ops train: device: expected one that torch can use here, got 'gpu'"),
        (
            ["train", "--device", "cuda:99"],
            "repo-ops train: device: expected one that torch can use here, got 'cuda:99'",
        ),
        (["train", "--task", "sums"], "repo-ops train: task: expected one of "),
        (["train", "--task_args.digit", "2"], "repo-ops train: task_args.digit: expected an option of task 'products'"),
        (["train", "--reward", "exact"], "repo-ops train: reward: expected one of "),
        (["train", "--reward", "math:pie"], "repo-ops train: reward: expected a function 'pie' in math, found None"),
        (["train", "--device", "foo"], "repo-ops train: device: expected one that torch can use here, got 'foo'"),
        (["train", "--cpu_offload", "true"], "repo-ops train: cpu_offload: expected a sharded model, got one rank"),
        (["train", "--replicas", "2"], "repo-ops train: replicas: expected a divisor of the 1 ranks, got 2"),
        (["train", "--model", "no/such/folder"], "repo-ops train: model: expected "),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_status_2(capsys, tmp_path: Path, arguments, sentence: str) -> None:
    """The same in a dry run."""
    where = ["--output_dir", str(tmp_path)] if arguments[0] == "train" else []
    for dry in ([], ["--dry-run"]) if where else ([],):
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, *where, *dry])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(sentence)
        assert len(error.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_missing_package_names_the_extra(capsys, monkeypatch) -> None:
    def command(arguments: object) -> None:
        import a_package_that_nobody_has  # noqa: F401

    monkeypatch.setitem(COMMANDS, "train", command)
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 2
    assert "needs the package a_package_that_nobody_has; pip install 'repo-ops[train]'" in capsys.readouterr().err
