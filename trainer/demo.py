"""`repo-ops demo`: a real language model, trained twice from the same start, once without replay and once with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from repo_ops.trainer.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

__all__ = ["CAPTION", "Demo", "demo_configs", "parse_demo", "run_demo"]

CAPTION = (
    "One seed and one small task. Both runs start from the same weights and see the same prompts with the same seeds. "
    "Replay raises the share of prompts with a gradient by construction. Not claimed: that it ends with a higher "
    "reward, or that it is worth its extra seconds here."
)


@dataclass(frozen=True)
class Demo:
    """Settings of the comparison."""

    model: str = "smollm2"
    """"smollm2", "tiny", a folder in Hugging Face format, or a hub id."""
    task: str = "products"
    """Task to train on."""
    steps: int = 30
    """Steps of each of the two runs."""
    replay: str = "variance"
    """Replay strategy of the RePO run."""
    output_dir: str = "runs/demo"
    """Folder for both runs, the table and the picture."""
    seed: int = 0
    """Of both runs."""
    threads: int | None = None
    """CPU threads of torch (none: its own choice)."""


def parse_demo(arguments: Sequence[str]) -> Demo:
    """The Demo that command line arguments describe."""
    from repo_ops.trainer.config import parse_settings

    return parse_settings(Demo, arguments, prog="repo-ops demo", description="Train twice, with and without replay.")


def demo_configs(demo: Demo) -> dict[str, TrainConfig]:
    """Settings of the two runs by name: the same but for the replay."""
    import torch

    from repo_ops.head import gemm

    folder = Path(demo.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grpo = TrainConfig(
        model=demo.model,
        task=demo.task,
        steps=demo.steps,
        seed=demo.seed,
        threads=demo.threads,
        autocast=gemm.multiplies(torch.bfloat16, device),  # in PyTorch's own loops a step takes a minute
        objective="grpo",
        output_dir=str(folder / "grpo"),
        save_model=False,
        save_steps=None,
    )
    repo = replace(grpo, objective="repo", replay=demo.replay, output_dir=str(folder / "repo"))
    return {"GRPO": grpo, f"RePO ({demo.replay})": repo}


def run_demo(demo: Demo, console: Console | None = None) -> dict[str, dict[str, float]]:
    """Trains both, prints one table, draws one picture and one page; returns the numbers of the table by run."""
    from rich.console import Console

    from repo_ops.trainer.loop import train
    from repo_ops.trainer.report import draw_report, write_page
    from repo_ops.trainer.run import prepare
    from repo_ops.trainer.summary import summary_table

    console = console or Console()
    configs = demo_configs(demo)
    found = {name: train(prepare(config), name=name, console=console) for name, config in configs.items()}
    title = f"{demo.model} on {demo.task}, {demo.steps} steps each"
    console.print(summary_table(found, title=title, caption=CAPTION))
    folders = {name: Path(config.output_dir) for name, config in configs.items()}
    picture = draw_report(folders, Path(demo.output_dir) / "report.png", title=title)
    page = write_page(folders, Path(demo.output_dir) / "report.html", picture=picture, title=title)
    console.print(f"picture and report: {picture}, {page}", highlight=False, soft_wrap=True)
    return found
