"""The comparison in one command: methods x shapes, time, memory and error against float64, as a table, json and csv."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from repo_ops.benchmarks.accuracy import Errors, errors, truth
from repo_ops.benchmarks.as_csv import write_csv
from repo_ops.benchmarks.inputs import Case, DeadKind, Inputs, make_inputs
from repo_ops.benchmarks.machine import describe
from repo_ops.benchmarks.measure import Times, interleave, spread
from repo_ops.benchmarks.methods import METHODS, Forward, Step, floor_dtype
from repo_ops.benchmarks.peak import in_own_process, peak_bytes
from repo_ops.benchmarks.shapes import MODELS, Shape, shape_named

__all__ = ["compare", "main", "memory_of", "table"]

MIB = 1 << 20
_SCRIPT = Path(__file__).with_name("memory_of.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 where a method's loss or gradients were not those of the others, else 0."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings = _parse(given)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = settings.device
    report: dict[str, Any] = {"machine": describe(device, ["bench_linear_policy_loss.py", *given]), "cases": []}
    machine = report["machine"]
    print(f"{machine['device']}, {machine['threads']} threads, {machine['cpu']}, torch {torch.__version__}")
    wrong = 0
    for case in _cases(settings):
        found = compare(
            case,
            settings.methods,
            rounds=settings.rounds,
            check=not settings.no_check,
            memory=not settings.no_memory,
            note=_note,
        )
        report["cases"].append(found)
        print(table(found), flush=True)
        wrong += sum(bool(row["wrong"]) for row in found["rows"])
        if settings.json:  # after every case: a run cut short keeps what it has
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            settings.json.write_text(json.dumps(report, indent=1) + "\n")
        if settings.csv:
            settings.csv.parent.mkdir(parents=True, exist_ok=True)
            write_csv(report, settings.csv)
    return 1 if wrong else 0


def compare(
    case: Case,
    methods: Sequence[str],
    *,
    rounds: int,
    check: bool = True,
    memory: bool = True,
    note: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Everything measured for one case, in plain containers: `case`, `skipped` (method -> reason) and `rows`."""
    skipped = {name: why for name in methods if (why := METHODS[name].why_not(case))}
    taking_part = [name for name in methods if name not in skipped]
    note(f"{case}: inputs")
    inputs = make_inputs(case)
    exact = truth(inputs) if check else None
    forwards: dict[str, Forward] = {}
    accuracy: dict[str, Errors] = {}
    for name in taking_part:  # also what warms every method up
        note(f"{case}: first step of {name}")
        forwards[name] = METHODS[name].build(inputs)
        step = _run(forwards[name], inputs)
        if exact is not None and METHODS[name].exact_work:
            accuracy[name] = errors(step, inputs, exact)
        del step
    inputs.clear()
    del exact
    note(f"{case}: {rounds} rounds of {len(forwards)} methods")
    times = interleave(
        {name: _separate(forward) for name, forward in forwards.items()},
        rounds=rounds,
        clear=inputs.clear,
        device=case.device,
    )
    peaks: dict[str, dict[str, Any]] = {}
    if memory and case.device != "cpu":
        peaks = {name: _peak(forwards[name], inputs) for name in forwards}
    live = inputs.mask * (inputs.advantages != 0)[:, None] if not case.entropy else inputs.mask
    title, floor = str(case), str(floor_dtype(case)).removeprefix("torch.")
    title += f", bare GEMMs in {floor}" if floor != case.dtype else ""
    result: dict[str, Any] = {"case": case.to_dict(), "title": title, "live_share": live.mean().item()}
    del inputs, forwards  # frees memory for the processes that come next
    if memory and case.device == "cpu":
        for name in taking_part:
            note(f"{case}: memory of {name}")
            request = {"method": name, "case": case.to_dict()}
            peaks[name] = in_own_process(_SCRIPT, request, threads=torch.get_num_threads())
    result["skipped"] = skipped
    result["rows"] = [_row(name, case, times[name], peaks.get(name), accuracy.get(name)) for name in taking_part]
    note("")
    return result


def table(found: dict[str, Any]) -> str:
    """The rows of one case as aligned text."""
    rows = {row["method"]: row for row in found["rows"]}
    floor, ours = (rows[name]["both"]["median"] if name in rows else None for name in ("floor", "ours"))
    head = ["", "forward ms", "backward ms", "both ms [q1-q3]", "x floor", "x ours", "peak MiB", "of it grads"]
    head += ["logp err", "dH err", "dW err"]
    lines = [head]
    for row in rows.values():
        both = row["both"]["median"]
        grads = row["gradient_mib"]
        lines.append(
            [
                METHODS[row["method"]].label + (" WRONG" if row["wrong"] else ""),
                f"{row['forward']['median']:.1f}",
                f"{row['backward']['median']:.1f}",
                row["both"]["text"],
                "-" if floor is None else f"{both / floor:.2f}",
                "-" if ours is None else f"{both / ours:.2f}",
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                "-" if grads is None else f"{grads:.0f}",
                *_shown_errors(row["errors"]),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [f"\n{found['title']}"]
    for line in lines:
        first, *rest = line
        text.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    text += [f"WRONG: {row['label']}: {', '.join(row['wrong'])}" for row in rows.values() if row["wrong"]]
    text += [f"left out: {METHODS[name].label}: {why}" for name, why in found["skipped"].items()]
    return "\n".join(text)


def _shown_errors(found: dict[str, float | None] | None) -> list[str]:
    values = [None if found is None else found[name] for name in ("logp", "dhidden", "dweight")]
    return ["-" if value is None else f"{value:.1e}" for value in values]


def _row(name: str, case: Case, times: Times, peak: dict[str, Any] | None, accuracy: Errors | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "label": METHODS[name].label}
    for part in ("forward", "backward", "both"):
        values = getattr(times, part)
        row[part] = {**asdict(spread(values)), "text": str(spread(values)), "ms": [round(v, 3) for v in values]}
    row["peak_mib"] = None if peak is None else peak["peak_bytes"] / MIB
    row["gradient_mib"] = None if peak is None else peak["gradient_bytes"] / MIB
    row["peak_by"] = None if peak is None else peak["by"]
    row["errors"] = None if accuracy is None else asdict(accuracy)
    row["wrong"] = [] if accuracy is None else accuracy.too_large(case.dtype)
    return row


def _separate(forward: Forward) -> Callable[[], Callable[[], object]]:
    return lambda: forward().backward


def _run(forward: Forward, inputs: Inputs) -> Step:
    inputs.clear()
    step = forward()
    step.backward()
    return step


def _peak(forward: Forward, inputs: Inputs) -> dict[str, Any]:
    """Peak of one step from rest, and how much of it are the gradients, which every method has to hand over."""
    inputs.clear()
    bytes_, how = peak_bytes(lambda: _run(forward, inputs), inputs.case.device)
    return {"peak_bytes": bytes_, "gradient_bytes": inputs.gradient_bytes, "by": how}


def memory_of(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one method in one case, for a process of its own: a step to warm up, one step under the meter."""
    case, method = Case.from_dict(request["case"]), METHODS[request["method"]]
    # torch.compile would compile the real size anew, so such a method warms up on it
    first = case.shape if method.compiles else Shape("warm-up", 2 * case.length, 64, 512)
    warm = make_inputs(Case.from_dict({**request["case"], "shape": asdict(first)}))
    _run(method.build(warm), warm)
    del warm
    inputs = make_inputs(case)
    return _peak(method.build(inputs), inputs)


def _cases(settings: argparse.Namespace) -> list[Case]:
    kinds: list[tuple[float, DeadKind]] = []
    for dead in settings.dead:
        kinds += [(dead / 100, kind) for kind in settings.dead_kind] if dead else [(0.0, "masked")]
    return [
        Case(
            shape_named(text, device=settings.device),
            dtype=dtype,
            dead=dead,
            dead_kind=kind,
            frozen=settings.frozen,
            entropy=settings.entropy,
            length=settings.length,
            device=settings.device,
        )
        for dtype, text, (dead, kind) in product(settings.dtype, settings.shapes, kinds)
    ]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="repo-ops bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["SmolLM2-135M"], help=f"MODEL, MODEL:ROWS or NxDxV; {', '.join(MODELS)}; all")
    add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    add("--dead", nargs="+", type=float, default=[0], metavar="PERCENT", help="rows that carry no gradient")
    add("--dead-kind", nargs="+", choices=["masked", "zero_advantage"], default=["masked"])
    add("--frozen", action="store_true", help="no gradient for the head, as under LoRA")
    add("--entropy", action="store_true", help="entropy bonus with its gradient")
    add("--length", type=int, default=64, help="tokens of a sequence; Liger works sequence by sequence")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--rounds", type=int, default=7, help="times that every method is run, in turns")
    add("--threads", type=int, default=None, help="of the CPU; None: torch's default")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--json", type=Path, default=None, help="file for everything measured")
    add("--csv", type=Path, default=None, help="file for medians, quartiles, memory and errors, a line a method")
    add("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    add("--no-check", action="store_true", help="skip the comparison with float64")
    settings = parser.parse_args(arguments)
    settings.shapes = list(MODELS) if settings.shapes == ["all"] else settings.shapes
    if settings.rounds < 1 or not all(0 <= dead < 100 for dead in settings.dead):
        parser.error(f"expected --rounds >= 1 and 0 <= --dead < 100, got {settings.rounds} and {settings.dead}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    try:
        for text in settings.shapes:
            shape_named(text, device=settings.device)
    except ValueError as error:
        parser.error(str(error))
    return settings


def _note(text: str) -> None:
    """One line that the next one overwrites; nothing where standard error is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
