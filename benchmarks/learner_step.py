"""One learner step (loss + backward) of a whole model: ours beside TRL's GRPOTrainer, on the same completions.

    python benchmarks/learner_step.py --json benchmarks/results/learner_step-cpu.json

Ours is the trainer's own road: live sequences packed into shared-prefix rows, linear_policy_loss at the head; packing
is timed too. TRL's is the `_compute_loss` of a real GRPOTrainer and a backward, padded tensors made beforehand. Both
are on policy (no old log-probabilities: the ratio is 1), beta 0, loss type grpo. Loss and gradients are compared first.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import repo_ops
from repo_ops.benchmarks.machine import describe
from repo_ops.benchmarks.measure import interleave, spread
from repo_ops.benchmarks.peak import in_own_process, peak_bytes
from repo_ops.trainer.learner import Learner, ScoredSequence, count_items
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rows import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIB = 1 << 20
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}
"""(loss, gradients): how far the two may lie apart before they count as different work."""


@dataclass(frozen=True)
class Setting:
    """Groups of sampled completions of one length, some groups without a gradient."""

    groups: int
    samples: int
    prompt: int
    completion: int
    dead: float = 0.0
    """Share of groups whose advantages are all zero."""

    def __str__(self) -> str:
        text = f"{self.groups} groups x {self.samples}, {self.prompt} + {self.completion} tokens"
        return text + (f", {self.dead:.0%} of groups dead" if self.dead else "")


SETTINGS = {
    "short": Setting(8, 8, 30, 8),
    "long": Setting(2, 16, 96, 24),
    "dead": Setting(10, 8, 30, 8, dead=0.6),
    "tiny": Setting(3, 2, 4, 3, dead=0.34),
}
"""The first three make the table; "tiny" is for a quick look that everything runs."""


def sequences_of(setting: Setting, vocabulary: int, *, seed: int = 0) -> list[ScoredSequence]:
    """Random tokens, so that completions share nothing but their prompt; advantages normal, 0 in dead groups."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for group in range(setting.groups):
        prompt = torch.randint(3, vocabulary, (setting.prompt,), generator=random).tolist()
        alive = group >= round(setting.dead * setting.groups)
        for _ in range(setting.samples):
            completion = torch.randint(3, vocabulary, (setting.completion,), generator=random).tolist()
            advantage = torch.randn((), generator=random).item() if alive else 0.0
            found.append(ScoredSequence(tuple(prompt), tuple(completion), advantage, group=group))
    return found


Step = Callable[[], Tensor]
"""Clears the gradients, runs loss and backward, returns the detached loss."""


def ours(model: PreTrainedModel, tokenizer: object, sequences: list[ScoredSequence], dtype: str) -> Step:
    """The trainer's learner, up to the optimizer."""
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    learner = Learner(model, repo_ops.get_objective("grpo"), autocast=autocast)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        live = [sequence for sequence in sequences if learner.is_live(sequence)]
        loss, _ = learner.backward(live, learner.pack(live), count_items(sequences))
        return loss

    return step


def trl(
    model: PreTrainedModel,
    tokenizer: object,
    sequences: list[ScoredSequence],
    dtype: str,
    *,
    checkpointing: bool = False,
) -> Step:
    """GRPOTrainer's own `_compute_loss` on the inputs that its generation step would hand it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    device = next(model.parameters()).device
    config = GRPOConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "repo-ops-benchmark-trl"),  # nothing is written to it
        per_device_train_batch_size=len(sequences),
        num_generations=_group_size(sequences),
        max_completion_length=len(sequences[0].token_ids),
        beta=0.0,
        loss_type="grpo",
        gradient_checkpointing=checkpointing,
        bf16=dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(sequences)}),
        processing_class=tokenizer,  # it insists on one; the step never reads it
    )
    trainer.current_gradient_accumulation_steps = 1
    if checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    model.train()  # as the trainer's loop does; the models here have no dropout
    inputs = {
        "prompt_ids": torch.tensor([s.prompt_ids for s in sequences], device=device),
        "completion_ids": torch.tensor([s.token_ids for s in sequences], device=device),
        "advantages": torch.tensor([s.advantage for s in sequences], device=device),
    }
    for name in ("prompt", "completion"):
        inputs[f"{name}_mask"] = torch.ones_like(inputs[f"{name}_ids"])

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(model, inputs)
        loss.backward()
        return loss.detach()

    return step


def trl_default(model: PreTrainedModel, tokenizer: object, sequences: list[ScoredSequence], dtype: str) -> Step:
    """The same with gradient checkpointing, which GRPOConfig switches on by default."""
    return trl(model, tokenizer, sequences, dtype, checkpointing=True)


SIDES = {"ours": ours, "trl": trl, "trl_default": trl_default}
LABELS = {"ours": "ours", "trl": "TRL GRPOTrainer", "trl_default": "TRL, gradient checkpointing (its default)"}


def _packed(model: PreTrainedModel, sequences: list[ScoredSequence]) -> list[MicroBatch]:
    learner = Learner(model, repo_ops.get_objective("grpo"))
    return learner.pack([sequence for sequence in sequences if learner.is_live(sequence)])


def _group_size(sequences: list[ScoredSequence]) -> int:
    return sum(sequence.group == sequences[0].group for sequence in sequences)


def run(setting: Setting, dtype: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Everything measured for one setting: rows of times and memory, and how far the sides lie apart."""
    model, tokenizer = load_model(settings.model)
    model.to(settings.device)
    sequences = sequences_of(setting, model.get_input_embeddings().num_embeddings)
    models = {side: copy.deepcopy(model) for side in settings.sides}
    del model
    steps = {side: SIDES[side](models[side], tokenizer, sequences, dtype) for side in settings.sides}
    tokens = dict.fromkeys(settings.sides, setting.groups * setting.samples * (setting.prompt + setting.completion))
    tokens["ours"] = sum(batch.tokens for batch in _packed(models["ours"], sequences)) if "ours" in models else 0
    losses = {side: step().item() for side, step in steps.items()}
    apart = {side: _apart(models["ours"], models[side]) for side in models if side != "ours" and "ours" in models}

    def clear() -> None:
        for each in models.values():
            each.zero_grad(set_to_none=True)

    clear()
    times = interleave(
        {side: _whole(step) for side, step in steps.items()},
        rounds=settings.rounds,
        clear=clear,
        device=settings.device,
    )
    clear()
    steps.clear()
    models.clear()  # the processes that come next need the memory
    rows = []
    for side in settings.sides:
        seconds = spread([ms / 1e3 for ms in times[side].both])
        row: dict[str, Any] = {"side": side, "label": LABELS[side], **asdict(seconds), "seconds": times[side].both}
        row["seconds"] = [round(ms / 1e3, 4) for ms in times[side].both]
        row["tokens"] = tokens[side]
        row["loss"], row["gradients_apart"] = losses[side], apart.get(side)
        row["loss_apart"] = abs(losses[side] - losses["ours"]) if side != "ours" and "ours" in losses else None
        row.update(dict.fromkeys(("peak_mib", "gradient_mib", "peak_by")))
        if not settings.no_memory:
            request = {"side": side, "setting": asdict(setting), "dtype": dtype}
            request |= {"model": settings.model, "device": settings.device}
            found = in_own_process(Path(__file__), request, threads=torch.get_num_threads())
            row["peak_mib"], row["gradient_mib"] = found["peak_bytes"] / MIB, found["gradient_bytes"] / MIB
            row["peak_by"] = found["by"]
        rows.append(row)
    return {"setting": asdict(setting), "title": f"{setting}, {dtype}", "dtype": dtype, "rows": rows}


def _whole(step: Step) -> Callable[[], Callable[[], object]]:
    """Both halves are one call here: a learner with several micro-batches alternates between them."""

    def forward() -> Callable[[], object]:
        step()
        return lambda: None

    return forward


@torch.no_grad()
def _apart(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """|g1 - g2| / |g1| over all parameters together."""
    theirs = dict(other.named_parameters())
    squares = torch.zeros(2, dtype=torch.float64)
    for name, parameter in one.named_parameters():
        if parameter.grad is None or theirs[name].grad is None:
            raise RuntimeError(f"{name}: expected a gradient from both sides")
        squares[0] += (parameter.grad.double() - theirs[name].grad.double()).square().sum().cpu()
        squares[1] += parameter.grad.double().square().sum().cpu()
    return (squares[0] / squares[1]).sqrt().item()


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one step of one side, from rest: model and inputs there, no gradients, no optimizer."""
    # the tiny step that loads libraries has a model of its own: a trainer patches the model that it gets
    warm_up = ("tiny", SETTINGS["tiny"])
    for name, setting in (warm_up, (request["model"], Setting(**request["setting"]))):
        model, tokenizer = load_model(name)
        model.to(request["device"])
        sequences = sequences_of(setting, model.get_input_embeddings().num_embeddings)
        step = SIDES[request["side"]](model, tokenizer, sequences, request["dtype"])
        if setting is SETTINGS["tiny"]:
            step()
    model.zero_grad(set_to_none=True)
    bytes_, how = peak_bytes(step, request["device"])
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {"peak_bytes": bytes_, "gradient_bytes": gradients, "by": how}


def table(found: dict[str, Any]) -> str:
    """The rows of one setting as aligned text."""
    ours_ = next((row for row in found["rows"] if row["side"] == "ours"), None)
    lines = [
        [
            "",
            "seconds [q1-q3]",
            "ours / it",
            "tokens",
            "peak MiB",
            "of it grads",
            "ours / it",
            "loss apart",
            "gradients apart",
        ]
    ]
    for row in found["rows"]:
        lines.append(
            [
                row["label"],
                f"{row['median']:.2f} [{row['q1']:.2f}-{row['q3']:.2f}]",
                "-" if ours_ is None else f"{ours_['median'] / row['median']:.3f}",
                str(row["tokens"]),
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                "-" if row["gradient_mib"] is None else f"{row['gradient_mib']:.0f}",
                "-" if ours_ is None or row["peak_mib"] is None else f"{ours_['peak_mib'] / row['peak_mib']:.3f}",
                "-" if row["loss_apart"] is None else f"{row['loss_apart']:.1e}",
                "-" if row["gradients_apart"] is None else f"{row['gradients_apart']:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"\n{found['title']}"]
    for first, *rest in lines:
        text.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    return "\n".join(text)


def differs(found: dict[str, Any]) -> list[str]:
    """Sides whose loss or gradients lie too far from ours."""
    loss, gradients = LIMITS[found["dtype"]]
    return [
        f"{row['label']}: loss apart {row['loss_apart']:.1e}, gradients apart {row['gradients_apart']:.1e}"
        for row in found["rows"]
        if row["loss_apart"] is not None and not (row["loss_apart"] <= loss and row["gradients_apart"] <= gradients)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 where the sides did not compute the same step, else 0."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--child"]:
        print(json.dumps(child(json.loads(given[1]))))
        return 0
    settings = _parse(given)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames settings that trl passes on
    machine = describe(settings.device, ["learner_step.py", *given])
    report: dict[str, Any] = {"machine": machine, "model": settings.model, "cases": []}
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}, model {settings.model}")
    wrong: list[str] = []
    for dtype, name in product(settings.dtype, settings.settings):
        found = run(SETTINGS[name], dtype, settings)
        report["cases"].append({"name": name, **found})
        print(table(found), flush=True)
        wrong += differs(found)
        if settings.json:
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            settings.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", choices=list(SETTINGS), default=["short", "long", "dead"])
    add("--dtype", nargs="+", choices=list(LIMITS), default=["float32"], help="bfloat16: autocast over float32 weights")
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    add("--model", default="smollm2", help='"smollm2", "tiny", a local Hugging Face folder or a hub id')
    add("--rounds", type=int, default=3, help="times that every side steps, in turns")
    add("--threads", type=int, default=None)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--json", type=Path, default=None, help="file for everything measured")
    add("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    settings = parser.parse_args(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return settings


if __name__ == "__main__":
    sys.exit(main())
