"""TRL's GRPOTrainer, the same with our head installed, and RePOTrainer: time and memory of loss and backward.

    python benchmarks/trl_trainers.py --json benchmarks/results/trl_trainers-cpu.json

Every side is a real trainer on the same weights. It generates twice with the same seeds (so that replay has something
to draw), and the second generation is trained on: what is measured is `compute_loss` and the backward of that
micro-step, in turns. The first three sides compute the same loss and gradients, which is checked; with replay the step
holds more completions. No optimizer step is made and gradient checkpointing is off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repo_ops.benchmarks.machine import describe
from repo_ops.benchmarks.measure import interleave, spread
from repo_ops.benchmarks.peak import in_own_process, peak_bytes
from repo_ops.integrations.trl import RePOConfig, RePOTrainer, install, uninstall
from repo_ops.trainer.models import load_model
from repo_ops.trainer.tasks import load_task

MIB = 1 << 20
LABELS = {
    "trl": "TRL GRPOTrainer",
    "installed": "the same with install()",
    "rows": "RePOTrainer, replay off",
    "repo": "RePOTrainer with replay",
}
SIDES: dict[str, dict[str, Any]] = {"trl": {}, "installed": {}, "rows": {"replay": None}, "repo": {}}
"""Settings of RePOConfig; {} of the first two: they are TRL's own trainer."""
EQUAL = ("trl", "installed", "rows")
LIMITS = (1e-5, 1e-4)
"""(loss, gradients): how far equal sides may lie apart before they count as different work."""


@dataclass(frozen=True)
class Setting:
    """A generation."""

    model: str
    task: str
    prompts: int
    samples: int
    completion: int
    """Longest completion, tokens."""


SETTINGS = {
    "smollm2": Setting("smollm2", "products", prompts=8, samples=8, completion=8),
    "tiny": Setting("tiny", "reverse", prompts=6, samples=4, completion=6),
}


@dataclass
class Side:
    """One trainer after its second generation."""

    name: str
    trainer: Any
    inputs: Any
    generation_seconds: float
    """Of the second generation: sampling, rewards, and what its rows need."""

    def step(self) -> Tensor:
        """Clears the gradients, runs loss and backward, returns the detached loss."""
        model = self.trainer.model
        model.zero_grad(set_to_none=True)
        with head_of(self.name):
            loss = self.trainer.compute_loss(model, self.inputs)
            loss.backward()
        return loss.detach()

    def sequences(self) -> dict[str, int]:
        """How many completions the step holds, and how many of them are computed."""
        if "rows" not in self.inputs:
            rows = len(self.inputs["completion_ids"])
            return {"completions": rows, "replayed": 0, "computed": rows}
        rows = self.inputs["rows"]
        live = [row for row in rows if self.trainer.rows_loss.is_live(row)]
        return {"completions": len(rows), "replayed": sum(row.off_policy for row in rows), "computed": len(live)}


@contextmanager
def head_of(side: str) -> Iterator[None]:
    """Our head under TRL's while the side with it runs."""
    if side != "installed":
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


def make_side(name: str, setting: Setting, folder: Path) -> Side:
    """The trainer of a side with two generations made; equal seeds, so equal completions on all sides."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    task = load_task(setting.task, train_size=setting.prompts, heldout_size=0)
    examples = [{"prompt": example.prompt, **example.columns} for example in task.train]
    model, tokenizer = load_model(setting.model)
    replay = {"replay_num": setting.samples, "replay_min_size": setting.samples}
    kind, trainer = (GRPOConfig, GRPOTrainer) if name in ("trl", "installed") else (RePOConfig, RePOTrainer)
    config = kind(
        output_dir=str(folder),
        per_device_train_batch_size=setting.prompts * setting.samples,
        num_generations=setting.samples,
        max_completion_length=setting.completion,
        loss_type="grpo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **({} if kind is GRPOConfig else replay | SIDES[name]),
    )
    made = trainer(
        model=model,
        reward_funcs=first_line_match,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    batch = [dict(example) for example in examples for _ in range(setting.samples)]
    seconds = 0.0
    with head_of(name):
        for step in range(2):
            set_seed(step)
            made.state.global_step = step
            started = time.perf_counter()
            inputs = made._prepare_inputs([dict(row) for row in batch])
            seconds = time.perf_counter() - started
    return Side(name, made, inputs, seconds)


def first_line_match(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion's first line is the answer."""
    return [float(text.split("\n")[0].strip() == wanted.strip()) for text, wanted in zip(completions, answer)]


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Everything measured: a row a side."""
    setting = SETTINGS[settings.model]
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: make_side(name, setting, Path(folder)) for name in settings.sides}
        losses, gradients = {}, {}
        for name, side in sides.items():
            losses[name] = side.step().item()
            gradients[name] = {n: p.grad.clone() for n, p in side.trainer.model.named_parameters()}
        apart = {name: _apart(gradients["trl"], gradients[name]) for name in EQUAL if name in sides and "trl" in sides}
        gradients.clear()
        times = interleave(
            {name: _whole(side) for name, side in sides.items()},
            rounds=settings.rounds,
            clear=lambda: [side.trainer.model.zero_grad(set_to_none=True) for side in sides.values()],
        )
        rows = []
        for name, side in sides.items():
            seconds = [ms / 1e3 for ms in times[name].both]
            rows.append(
                {
                    "side": name,
                    "label": LABELS[name],
                    **asdict(spread(seconds)),
                    "seconds": [round(s, 4) for s in seconds],
                    "generation_seconds": round(side.generation_seconds, 3),
                    **side.sequences(),
                    "loss": losses[name],
                    "loss_apart": abs(losses[name] - losses["trl"]) if name in apart else None,
                    "gradients_apart": apart.get(name),
                    "peak_mib": None,
                }
            )
        sides.clear()  # the processes that come next need the memory
    for row in rows if not settings.no_memory else []:
        request = {"side": row["side"], "model": settings.model}
        found = in_own_process(Path(__file__), request, threads=torch.get_num_threads())
        row["peak_mib"], row["gradient_mib"] = found["peak_bytes"] / MIB, found["gradient_bytes"] / MIB
        row["peak_by"] = found["by"]
    return {"setting": asdict(setting), "rows": rows}


def _whole(side: Side) -> Callable[[], Callable[[], object]]:
    def forward() -> Callable[[], object]:
        side.step()
        return lambda: None

    return forward


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|g1 - g2| / |g1| over all parameters together."""
    difference = sum((one[n].double() - other[n].double()).square().sum() for n in one)
    return float((difference / sum(g.double().square().sum() for g in one.values())) ** 0.5)


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one step of one side, beyond weights and inputs; no gradients there before, no optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        make_side(request["side"], SETTINGS["tiny"], Path(folder)).step()  # loads libraries, starts threads
        side = make_side(request["side"], SETTINGS[request["model"]], Path(folder))
    model = side.trainer.model
    model.zero_grad(set_to_none=True)
    bytes_, how = peak_bytes(side.step)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {"peak_bytes": bytes_, "gradient_bytes": gradients, "by": how}


def table(found: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    base = next((row for row in found["rows"] if row["side"] == "trl"), None)
    head = [
        "",
        "loss + backward, s [q1-q3]",
        "of TRL's",
        "generation, s",
        "completions",
        "computed",
        "peak MiB",
        "of TRL's",
    ]
    lines = [[*head, "loss apart", "gradients apart"]]
    lines.append(["---"] * len(lines[0]))
    for row in found["rows"]:
        peak, share = row["peak_mib"], base is not None and base["peak_mib"]
        lines.append(
            [
                row["label"],
                f"{row['median']:.2f} [{row['q1']:.2f}-{row['q3']:.2f}]",
                "-" if base is None else f"{row['median'] / base['median']:.2f}x",
                f"{row['generation_seconds']:.1f}",
                f"{row['completions'] - row['replayed']} + {row['replayed']}",
                str(row["computed"]),
                "-" if peak is None else f"{peak:.0f}",
                "-" if peak is None or not share else f"{peak / share:.2f}x",
                "-" if row["loss_apart"] is None else f"{row['loss_apart']:.0e}",
                "-" if row["gradients_apart"] is None else f"{row['gradients_apart']:.0e}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differs(found: dict[str, Any]) -> list[str]:
    """Sides whose loss or gradients lie too far from TRL's."""
    return [
        f"{row['label']}: loss apart {row['loss_apart']:.1e}, gradients apart {row['gradients_apart']:.1e}"
        for row in found["rows"]
        if row["loss_apart"] is not None
        and not (row["loss_apart"] <= LIMITS[0] and row["gradients_apart"] <= LIMITS[1])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 where sides that should compute the same step did not, else 0."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames settings that trl passes on
    if given[:1] == ["--child"]:
        print(json.dumps(child(json.loads(given[1]))))
        return 0
    settings = _parse(given)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    machine = describe("cpu", ["trl_trainers.py", *given])
    found = run(settings)
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}, model {settings.model}\n")
    print(table(found))
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    wrong = differs(found)
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(SETTINGS), default="smollm2", help='"tiny" is for a look that everything runs')
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    add("--rounds", type=int, default=3, help="times that every side steps, in turns")
    add("--threads", type=int, default=None)
    add("--json", type=Path, default=None, help="file for everything measured")
    add("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
