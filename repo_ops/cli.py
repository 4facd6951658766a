"""The console script `repo-ops`. Each subcommand imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

__all__ = ["COMMANDS", "main"]


def train(arguments: Sequence[str]) -> None:
    """Train a language model; `repo-ops train --help` lists the settings."""
    from repo_ops.trainer.config import parse_config

    dry = {"--dry-run", "--dry_run"}
    config = parse_config([argument for argument in arguments if argument not in dry])
    if dry & set(arguments):
        from repo_ops.trainer.dry_run import plan_of_run

        try:
            plan = plan_of_run(config)
        except (ValueError, ImportError) as error:
            _refuse("train", str(error))
        if os.environ.get("RANK", "0") == "0":  # under torchrun one speaks for all
            print(plan)
        return
    from repo_ops.trainer.distributed import leave
    from repo_ops.trainer.failed import RunFailed
    from repo_ops.trainer.loop import train
    from repo_ops.trainer.run import prepare
    from repo_ops.trainer.stop import Stopped
    from repo_ops.trainer.summary import show_run

    try:
        run = prepare(config)
    except (ValueError, ImportError, RunFailed) as error:
        _refuse("train", str(error))
    try:
        found = train(run, name=config.objective)
    except RunFailed as error:
        print(f"repo-ops train: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as end:
        if run.learner.ranks.is_first:
            print(f"repo-ops train: {end}", file=sys.stderr)
        leave()
        raise SystemExit(0 if end.saved else 1) from None
    except (ValueError, TypeError, OSError) as error:
        _fail("train", error, run.folder, str(error))  # a full disk, say; what else goes wrong shows its traceback
    except RuntimeError as error:
        # gloo's words where a connection was closed or reset, and where one writes to it
        if not any(words in str(error) for words in ("by peer", "Broken pipe")):
            raise
        where = f"rank {run.learner.ranks.rank} lost another rank, which ended before it"
        _fail("train", error, run.folder, f"{where}; see what that one or torchrun says, then --resume auto goes on")
    if run.learner.ranks.is_first:
        show_run(found, folder=run.folder)
    leave()


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate a model on prompts from a file or a task: rewards, pass@k, intervals."""
    from repo_ops.trainer.evaluation import parse_evaluation, run_evaluation
    from repo_ops.trainer.failed import RunFailed

    settings = parse_evaluation(arguments)
    try:
        run_evaluation(settings)
    except RunFailed as error:
        print(f"repo-ops evaluate: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (ValueError, ImportError) as error:
        _refuse("evaluate", str(error))


def demo(arguments: Sequence[str]) -> None:
    """Train SmolLM2-135M on products with GRPO and with RePO, and compare them."""
    from repo_ops.trainer.demo import parse_demo, run_demo
    from repo_ops.trainer.failed import RunFailed

    settings = parse_demo(arguments)
    try:
        run_demo(settings)
    except RunFailed as error:
        print(f"repo-ops demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except ImportError as error:
        _refuse("demo", str(error))


def plan(arguments: Sequence[str]) -> None:
    """Predict the time and memory of a fused head on a GPU, beside the alternatives."""
    from repo_ops.cost import main

    main(arguments)


def kernels(arguments: Sequence[str]) -> None:
    """Compile the Triton kernels for GPUs that need not be here; registers, spills, load widths."""
    from repo_ops.kernels.aot import main

    raise SystemExit(main(arguments))


def bench(arguments: Sequence[str]) -> None:
    """Time, memory and error of the fused losses beside their peers on this machine."""
    from repo_ops.benchmarks.compare import main

    raise SystemExit(main(arguments))


def report(arguments: Sequence[str]) -> None:
    """Make report.html of a run again, or of several runs side by side."""
    from repo_ops.trainer.report import main

    main(arguments)


def doctor(arguments: Sequence[str]) -> None:
    """Versions, devices, the backend that is chosen and why, and a test of it; for bug reports."""
    from repo_ops.doctor import main

    raise SystemExit(main(arguments))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "demo": demo,
    "report": report,
    "plan": plan,
    "doctor": doctor,
    "kernels": kernels,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand. A mistake in the settings exits with status 2 and one sentence on standard error."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name in COMMANDS:
        try:
            COMMANDS[name](rest)
        except ModuleNotFoundError as error:
            package = (error.name or "repo_ops").split(".")[0]
            if package == "repo_ops":
                raise
            # torch brings the triton that fits it, but not in its builds for a CPU
            remedy = package if package in ("torch", "triton") else "'repo-ops[train]'"
            _refuse(name, f"needs the package {package}; pip install {remedy}")
    else:
        _refuse("", f"expected a command of {', '.join(COMMANDS)}, got {name!r}")


def _refuse(command: str, message: str) -> NoReturn:
    print(f"{f'repo-ops {command}'.strip()}: {message}", file=sys.stderr)
    raise SystemExit(2)


def _fail(command: str, error: Exception, folder: Path, message: str) -> NoReturn:
    where = ""
    with suppress(OSError):  # the disk may be full
        (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)))
        where = f"\n(traceback: {folder / 'traceback.txt'})"
    print(f"repo-ops {command}: {' '.join(message.split())}{where}", file=sys.stderr)
    raise SystemExit(1)


def _help() -> str:
    lines = [f"  {name:<8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: repo-ops COMMAND [--help] [--KEY VALUE ...]", "", *lines])
