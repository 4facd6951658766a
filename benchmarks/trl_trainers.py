"""TRL's GRPOTrainer, the same with our head installed, and RePOTrainer: time and memory of loss and backward.

    python benchmarks/trl_trainers.py --json benchmarks/results/trl_trainers-cpu.json

Every side is a real trainer on the same weights. It generates twice with the same seeds (so that replay has something
to draw), and the second generation is trained on: what is measured is `compute_loss` and the backward of that
micro-step, in turns. The first three sides compute the same loss and gradients, which is checked; with replay the step
holds more completions. No optimizer step is made and gradient checkpointing is off.

`--train_steps 3` also lets GRPOTrainer.train() make three optimizer steps with our head and without it, from the same
weights and seeds, and compares all that the head could have changed. `--rounds 0` measures nothing else, and leaves
what an existing file of --json says of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from repo_ops.benchmarks.machine import describe
from repo_ops.benchmarks.measure import interleave, spread
from repo_ops.benchmarks.peak import in_own_process, peak_bytes
from repo_ops.integrations.trl import RePOConfig, RePOTrainer, install, uninstall
from repo_ops.integrations.trl.head import Installed
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
OPTIMIZERS = {"sgd": 0.05, "adamw_torch": 1e-5}
"""How GRPOTrainer is trained, and at which rate: Adam moves a parameter by the rate, however small its gradient."""


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
TRAINED = {**SETTINGS, "smollm2": Setting("smollm2", "products", prompts=4, samples=4, completion=8)}
"""The generation of each training step: every step of both sides is compared, not timed, so that it may be smaller."""


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
def head_of(side: str) -> Iterator[Installed | None]:
    """Our head under TRL's while the side with it runs."""
    if side != "installed":
        yield None
        return
    head = install()
    try:
        yield head
    finally:
        uninstall()


def examples_of(setting: Setting) -> list[dict[str, Any]]:
    """The prompts of a setting with their answers."""
    task = load_task(setting.task, train_size=setting.prompts, heldout_size=0)
    return [{"prompt": example.prompt, **example.columns} for example in task.train]


def make_trainer(name: str, setting: Setting, folder: Path, reward: Callable[..., list[float]], **more: Any) -> Any:
    """The trainer of a side on weights just loaded."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

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
        **(replay if name == "repo" else SIDES[name]),
        **more,
    )
    return trainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(examples_of(setting)),
        processing_class=tokenizer,
    )


def make_side(name: str, setting: Setting, folder: Path) -> Side:
    """The trainer of a side with two generations made; equal seeds, so equal completions on all sides."""
    from transformers import set_seed

    made = make_trainer(name, setting, folder, first_line_match)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    batch = [dict(example) for example in examples_of(setting) for _ in range(setting.samples)]
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


@dataclass
class Trained:
    """A run of GRPOTrainer.train(): what each optimizer step saw, and what all of them left."""

    logps: list[Tensor] = field(default_factory=list)
    """[B, T] of each step, 0 where a token is masked."""
    logps_from_float64: list[float] = field(default_factory=list)
    """Largest distance of each step's log-probabilities from `exact_logps` of the same hidden states."""
    logps_from_narrower_tiles: list[float] = field(default_factory=list)
    """Largest distance of TRL's from its own with chunks of the vocabulary a quarter as wide: its rounding."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of each step, as the optimizer gets them."""
    completions: list[list[str]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    our_calls: int = 0
    """Forward passes of our head."""
    trl_calls: int = 0
    """Forward passes of TRL's own head."""


def train(name: str, setting: Setting, folder: Path, **more: Any) -> Trained:
    """What `GRPOTrainer.train()` does with our head ("installed") or without it ("trl")."""
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer import utils

    seen, theirs = Trained(), utils._ChunkedLogProbFunction.forward

    def reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        seen.completions.append(list(completions))
        seen.rewards.append(first_line_match(completions, answer))
        return seen.rewards[-1]

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            seen.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer = make_trainer(name, setting, folder, reward, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(KeepGradients())
    seen.before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    score = trainer._get_per_token_logps_and_entropies

    def keep_logps(model: Any, input_ids: Tensor, *arguments: Any, **named: Any) -> Any:
        with hidden_states_of(trainer.model) as hidden:
            found = score(model, input_ids, *arguments, **named)
        logps = found[0].detach()
        exact = exact_logps(trainer, torch.cat(hidden), input_ids, logps.shape[1])
        if name == "trl":
            calls, narrow = seen.trl_calls, utils._CHUNKED_LOGPROB_CHUNK_SIZE // 4
            with torch.no_grad(), mock.patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", narrow):
                others = score(model, input_ids, *arguments, **named)[0]
            seen.trl_calls = calls
            seen.logps_from_narrower_tiles.append(float((logps - others).abs().max()))
        seen.logps.append(logps)
        seen.logps_from_float64.append(float((logps - exact)[logps != 0].abs().max()))
        return found

    @functools.wraps(theirs)
    def count_theirs(*arguments: Any) -> Any:
        seen.trl_calls += 1
        return theirs(*arguments)

    trainer._get_per_token_logps_and_entropies = keep_logps
    with mock.patch.object(utils._ChunkedLogProbFunction, "forward", staticmethod(count_theirs)), head_of(name) as head:
        trainer.train()
    seen.our_calls = 0 if head is None else head.calls
    seen.after = {n: p.detach() for n, p in trainer.model.named_parameters()}
    return seen


@contextmanager
def hidden_states_of(model: Any) -> Iterator[list[Tensor]]:
    """What the head of `model` is given meanwhile, [B, T, D] a forward pass."""
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _module, _inputs, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def exact_logps(trainer: Any, hidden: Tensor, input_ids: Tensor, length: int) -> Tensor:
    """[B, length] float64 log-probabilities of the last tokens from the float32 hidden states and head."""
    head = trainer.model.get_output_embeddings().weight.double()
    logits = hidden[:, -length - 1 : -1].double() @ head.T / trainer.temperature
    return logits.log_softmax(-1).gather(-1, input_ids[:, -length:, None])[..., 0]


def compare_training(setting: Setting, steps: int) -> list[dict[str, Any]]:
    """A row an optimizer: `steps` steps of GRPOTrainer.train() with our head beside the same without it."""
    rows = []
    for optimizer, rate in OPTIMIZERS.items():
        common = {"max_steps": steps, "optim": optimizer, "learning_rate": rate, "lr_scheduler_type": "constant"}
        with tempfile.TemporaryDirectory() as folder:
            theirs = train("trl", setting, Path(folder), save_strategy="no", **common)
            ours = train("installed", setting, Path(folder), save_strategy="no", **common)
        moves = [{n: p - run.before[n] for n, p in run.after.items()} for run in (theirs, ours)]
        distances = torch.cat([(ours.after[n] - p).abs().flatten() for n, p in theirs.after.items()])
        rows.append(
            {
                **common,
                "tokens": [int((logps != 0).sum()) for logps in theirs.logps],
                "mean_rewards": [sum(step) / len(step) for step in theirs.rewards],
                "same_completions": theirs.completions == ours.completions,
                "same_rewards": theirs.rewards == ours.rewards,
                "logps_apart": [float((a - b).abs().max()) for a, b in zip(theirs.logps, ours.logps)],
                "trl_apart_from_itself": theirs.logps_from_narrower_tiles,
                "logps_from_float64": {"installed": ours.logps_from_float64, "trl": theirs.logps_from_float64},
                "gradients_apart": [_apart(a, b) for a, b in zip(theirs.gradients, ours.gradients)],
                "gradients_apart_largest": [
                    max(float((a[n] - b[n]).abs().max()) for n in a) for a, b in zip(theirs.gradients, ours.gradients)
                ],
                "moved_largest": max(float(move.abs().max()) for move in moves[0].values()),
                "moves_apart": _apart(*moves),
                "parameters": len(distances),
                "parameters_apart": _apart(theirs.after, ours.after),
                "parameters_apart_largest": float(distances.max()),
                "parameters_beyond_1e-6": int((distances > 1e-6).sum()),
                "head_calls": {
                    "installed": {"ours": ours.our_calls, "trl": ours.trl_calls},
                    "not installed": {"ours": theirs.our_calls, "trl": theirs.trl_calls},
                },
            }
        )
    return rows


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


def training_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `compare_training` as a Markdown table."""
    lines = [["", *(f"{row['max_steps']} steps of {row['optim']} at {row['learning_rate']:g}" for row in rows)]]
    lines.append(["---"] * len(lines[0]))

    def add(name: str, number: Callable[[dict[str, Any]], str]) -> None:
        lines.append([name, *map(number, rows)])

    def steps(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: _shown(row[name])

    add("completions and rewards", lambda row: "same" if row["same_completions"] and row["same_rewards"] else "DIFFER")
    add("log-probabilities apart, largest of each step", steps("logps_apart"))
    add("TRL's apart from its own in tiles a quarter as wide", steps("trl_apart_from_itself"))
    exact = "apart from float64 of the same hidden states"
    add(f"ours {exact}", lambda row: _shown(row["logps_from_float64"]["installed"]))
    add(f"TRL's {exact}", lambda row: _shown(row["logps_from_float64"]["trl"]))
    add("gradients apart, of their norm", steps("gradients_apart"))
    add("largest gradient apart", steps("gradients_apart_largest"))
    add("parameters apart, largest", lambda row: f"{row['parameters_apart_largest']:.0e}")
    add("beyond 1e-6", lambda row: f"{row['parameters_beyond_1e-6']} of {row['parameters']:,}")
    add("moves apart, of their norm", lambda row: f"{row['moves_apart']:.0e}")
    add("calls of our head + TRL's, installed", lambda row: "{ours} + {trl}".format(**row["head_calls"]["installed"]))
    add(
        "calls of our head + TRL's, not installed",
        lambda row: "{ours} + {trl}".format(**row["head_calls"]["not installed"]),
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


def differs(found: dict[str, Any]) -> list[str]:
    """Sides whose loss or gradients lie too far from TRL's, and training that took another course."""
    return [
        f"{row['max_steps']} steps of {row['optim']}: not the same completions and rewards, parameters to 1e-6 (with "
        f"Adam: moves to 1e-3) and calls of the head; see the table"
        for row in found.get("training", {}).get("rows", [])
        if not (row["same_completions"] and row["same_rewards"] and _is_same_course(row))
    ] + [
        f"{row['label']}: loss apart {row['loss_apart']:.1e}, gradients apart {row['gradients_apart']:.1e}"
        for row in found["rows"]
        if row["loss_apart"] is not None
        and not (row["loss_apart"] <= LIMITS[0] and row["gradients_apart"] <= LIMITS[1])
    ]


def _is_same_course(row: dict[str, Any]) -> bool:
    # Adam makes a step of full size of a gradient that is nothing but rounding, so there the whole move is compared
    near = row["moves_apart"] <= 1e-3 and (row["optim"] != "sgd" or row["parameters_beyond_1e-6"] == 0)
    calls, steps = row["head_calls"], row["max_steps"]
    ours = calls["installed"]["ours"] == steps and calls["not installed"]["ours"] == 0
    return near and ours and calls["installed"]["trl"] == 0 and calls["not installed"]["trl"] == steps


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
    found = {"machine": machine, **run(settings)} if settings.rounds else {"rows": []}
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}, model {settings.model}\n")
    if settings.rounds:
        print(table(found))
    if settings.train_steps:
        setting = TRAINED[settings.model]
        rows = compare_training(setting, settings.train_steps)
        found["training"] = {"machine": machine, "setting": asdict(setting), "rows": rows}
        print(training_table(rows))
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(settings.json.read_text()) if settings.json.exists() else {}
        kept |= {name: value for name, value in found.items() if value}
        settings.json.write_text(json.dumps(kept, indent=1) + "\n")
    wrong = differs(found)
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(SETTINGS), default="smollm2", help='"tiny" is for a look that everything runs')
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    add("--rounds", type=int, default=3, help="times that every side steps, in turns; 0: no times, no memory")
    add("--train_steps", type=int, default=0, help="also train so many steps with our head and without it, and compare")
    add("--threads", type=int, default=None)
    add("--json", type=Path, default=None, help="file for everything measured; what it says of the rest is kept")
    add("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    settings = parser.parse_args(arguments)
    if settings.rounds < 0 or settings.train_steps < 0 or not (settings.rounds or settings.train_steps):
        parser.error("--rounds, --train_steps: expected numbers >= 0, one of them > 0")
    return settings


if __name__ == "__main__":
    sys.exit(main())
