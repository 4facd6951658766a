"""Runs a file of golden cases: `python tests/golden.py FILE [--kind loss]`, a row a case, exit status 1 on any failure.

Loss cases run twice: `policy_loss` in float64 must match loss and d loss / d logps to rtol 1e-9 and atol 1e-12, and
`linear_policy_loss` in float32, on a head that has exactly the case's log-probabilities, must match the loss and the
gradient of hidden and weight to 2e-5 of the largest entry.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from golden_advantages import agrees, compared
from golden_head import UnreachableError, head_of, ranked
from golden_names import Call, NotCoveredError, translate
from golden_vocab import vocab_errors
from torch import Tensor

import repo_ops

Case = dict[str, Any]
KINDS = ("loss", "vocab", "advantage", "selection")
EXACT = 1e-9
FUSED = 2e-5
FIELDS = {"logp": "logps", "oldlogp": "old_logps", "reflogp": "ref_logps", "samplogp": "sampler_logps", "mask": "mask"}


class Outcome(NamedTuple):
    """What became of a case: errors in units of their own tolerance, and why it failed if it did."""

    float64: float | None
    fused: float | None
    failure: str | None


def cases_of(path: Path) -> list[Case]:
    """The cases of a file, each loss case with its fixture's numbers in it."""
    content = json.loads(path.read_text())
    for case in content["cases"]:
        if case["kind"] == "loss":
            case |= content["fixtures"][case["fixture"]] if "fixture" in case else case["inputs"]
    return content["cases"]


def run(case: Case) -> Outcome:
    """One case of any kind."""
    if case["kind"] == "loss":
        return _loss(case)
    if case["kind"] == "vocab":
        try:
            error = vocab_errors(case)
        except NotCoveredError as refusal:
            return Outcome(None, None, f"not covered: {refusal}")
        return Outcome(error, None, None if error <= EXACT else f"float64 error {error:.1e}")
    if case["kind"] not in KINDS:
        return Outcome(None, None, f"not covered: kind {case['kind']!r}")
    try:
        pairs = compared(case)
    except KeyError as missing:
        return Outcome(None, None, f"not covered: {missing}")
    wrong = [f"{name}: got {got}, expected {want}" for name, got, want in pairs if not agrees(got, want)]
    return Outcome(None, None, "; ".join(wrong) or None)


def _loss(case: Case) -> Outcome:
    try:
        call = translate(case)
        repo_ops.get_objective(call.objective, **call.hyper)
    except (NotCoveredError, ValueError) as refusal:
        return Outcome(None, None, f"not covered: {refusal}")
    exact = _float64(case, call)
    try:
        fused = _float32(case, call)
    except UnreachableError as reason:
        return Outcome(exact, None, f"no head has these numbers: {reason}")
    wrong = [f"float64 error {exact:.1e}"] * (not exact <= EXACT) + [f"fused error {fused:.1e}"] * (not fused <= FUSED)
    return Outcome(exact, fused, "; ".join(wrong) or None)


def _arguments(case: Case, call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of both losses, from the case's numbers and the call's own."""
    found: dict[str, Any] = {
        ours: torch.tensor(case[theirs], dtype=dtype) for theirs, ours in FIELDS.items() if theirs in case
    }
    for name, value in call.arguments.items():
        found[name] = torch.tensor(value) if isinstance(value, list) else value
    if "extras" in found:
        found["extras"] = {name: torch.tensor(v, dtype=dtype) for name, v in found["extras"].items()}
    found["advantages"] = torch.tensor(case["A"] if call.advantages is None else call.advantages, dtype=dtype)
    found["objective"] = repo_ops.get_objective(call.objective, **call.hyper)
    return found


def _float64(case: Case, call: Call) -> float:
    arguments = _arguments(case, call, torch.float64)
    logps = arguments.pop("logps").requires_grad_()
    entropy = case.get("inputs_extra", {}).get("entropy")
    if entropy is not None:
        arguments["entropy"] = torch.tensor(entropy, dtype=torch.float64)
    result = repo_ops.policy_loss(logps, **arguments)
    (dlogps,) = torch.autograd.grad(result.loss, logps)
    pairs = ((result.loss, case["expected"]["loss"]), (dlogps, case["expected"]["dlogp"]))
    return _worst(_relative(got.detach(), torch.tensor(want, dtype=torch.float64)) for got, want in pairs)


def _relative(got: Tensor, want: Tensor) -> float:
    """Largest |got - want| / (|want| + 1e-3), which is at most 1e-9 under rtol 1e-9 and atol 1e-12."""
    return float(((got - want).abs() / (want.abs() + 1e-3)).max()) if want.numel() else 0.0


def _float32(case: Case, call: Call) -> float:
    arguments = _arguments(case, call, torch.float32)
    del arguments["logps"]
    live = torch.tensor(case["mask"]) != 0
    # what lies under a zero mask must not matter, so a head without it may put anything there
    logps = torch.where(live, torch.tensor(case["logp"], dtype=torch.float64), -1.0)
    entropy = None
    if "entropy" in case.get("inputs_extra", {}):
        # a golden file may give entropies that no head has; which tokens a quantile keeps depends on their order only
        entropy = torch.full_like(logps, 1.0)
        given = torch.tensor(case["inputs_extra"]["entropy"], dtype=torch.float64)
        entropy[live] = ranked(given[live], logps[live])
        logps = torch.where(live, logps, -0.5)
    hidden, weight, targets = head_of(logps, entropy)
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = torch.tensor(case["expected"]["dlogp"], dtype=torch.float64)
    every_logp = torch.log_softmax(exact[0] @ exact[1].t(), -1)
    found = every_logp.gather(-1, targets[..., None])[..., 0]
    want = torch.autograd.grad(found, exact, expected)
    fused = [x.float().requires_grad_() for x in (hidden, weight)]
    result = repo_ops.linear_policy_loss(*fused, targets, **arguments)
    result.loss.backward()
    loss = abs(float(result.loss.detach()) - case["expected"]["loss"]) / max(1.0, abs(case["expected"]["loss"]))
    return _worst([loss, *(_scaled(got.grad, w) for got, w in zip(fused, want))])


def _scaled(got: Tensor | None, want: Tensor) -> float:
    """Largest error in units of the largest entry, or of 0.1 where all are smaller."""
    assert got is not None
    return float((got - want).abs().max()) / max(0.1, float(want.abs().max())) if want.numel() else 0.0


def _worst(errors: Iterable[float]) -> float:
    """The largest, infinite if one is no number."""
    return max(float("inf") if math.isnan(error) else error for error in errors)


def report(cases: Iterable[Case]) -> int:
    """Prints a row a case; the number of failures."""
    failures = total = 0
    for case in cases:
        outcome = run(case)
        errors = "  ".join(
            f"{name} {error:.1e}" if error is not None else f"{name} {'-':>7}"
            for name, error in (("float64", outcome.float64), ("fused", outcome.fused))
        )
        verdict = "FAIL" if outcome.failure else "ok"
        print(f"{verdict:4}  {case['kind']:9}  {case['id']:34}  {errors}  {outcome.failure or ''}".rstrip())
        failures += bool(outcome.failure)
        total += 1
    print(f"{total - failures} of {total} cases pass")
    return failures


def main() -> int:
    """Exit status: 0 when every case passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kind", choices=KINDS, help="run the cases of one kind only")
    chosen = parser.parse_args()
    return int(report(c for c in cases_of(chosen.file) if chosen.kind in (None, c["kind"])) > 0)


if __name__ == "__main__":
    sys.exit(main())
