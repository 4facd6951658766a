"""One function a method: the same GRPO loss and gradients from the same inputs, each the way its authors call it.

A method is built once for its inputs; its forward returns the loss, and `loss.backward()` puts the gradients into
hidden.grad and weight.grad.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import repo_ops
from repo_ops.benchmarks.inputs import ENTROPY_COEF, EPS, Case, Inputs
from repo_ops.head.gemm import multiplies

__all__ = ["METHODS", "Method", "Step", "floor_dtype"]


@dataclass(frozen=True, eq=False)
class Step:
    """What a forward leaves behind."""

    backward: Callable[[], object]
    loss: Tensor | None = None
    logps: Tensor | None = None
    """[B, T] detached; None where the method does not hand them out."""


Forward = Callable[[], Step]


@dataclass(frozen=True)
class Method:
    """A way to compute the loss and its gradients."""

    label: str
    build: Callable[[Inputs], Forward]
    package: str | None = None
    """Distribution that it needs beside torch."""
    entropy: bool = True
    """Whether it can give the entropy with its gradient."""
    compiles: bool = False
    """Whether its first call compiles, so that memory is read off a later one."""
    only_dtype: str | None = None
    sixteen_bit_gradients: bool = False
    """Whether d hidden of 16-bit inputs is a product of 16-bit operands, which some CPUs have no instructions for."""
    exact_work: bool = True
    """False: bare GEMMs, which have no loss to compare."""

    def why_not(self, case: Case) -> str | None:
        """Why the method takes no part in `case`; None if it does."""
        if self.package is not None:
            try:
                version(self.package)
            except PackageNotFoundError:
                return f"{self.package} is not installed"
        if case.entropy and not self.entropy:
            return "gives no entropy gradient"
        if self.only_dtype not in (None, case.dtype):
            return f"for {self.only_dtype} only"
        if self.sixteen_bit_gradients and floor_dtype(case) == torch.float32 != getattr(torch, case.dtype):
            return f"PyTorch multiplies {case.dtype} in loops on this processor: minutes a step"
        if self.compiles and case.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "torch.compile needs a C++ compiler"
        return None


def grpo_loss(logps: Tensor, inputs: Inputs, entropy: Tensor | None = None) -> Tensor:
    """The GRPO loss of [B, T] log-probabilities in plain PyTorch: mean over sequences of the mean over tokens."""
    log_ratio = logps - inputs.old_logps
    ratio, advantages = log_ratio.exp(), inputs.advantages[:, None]
    per_token = -torch.min(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    if entropy is not None:
        per_token = per_token - ENTROPY_COEF * entropy
    return ((per_token * inputs.mask).sum(1) / inputs.mask.sum(1).clamp(min=1)).mean()


def _step(loss: Tensor, logps: Tensor | None) -> Step:
    return Step(loss.backward, loss.detach(), None if logps is None else logps.detach())


def ours(inputs: Inputs, options: repo_ops.Options | None = None) -> Forward:
    """repo_ops.linear_policy_loss: gradients formed in the forward."""
    coef = ENTROPY_COEF if inputs.case.entropy else 0.0
    objective = repo_ops.get_objective("grpo", eps_low=EPS, eps_high=EPS, entropy_coef=coef)

    def forward() -> Step:
        found = repo_ops.linear_policy_loss(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.advantages,
            objective=objective,
            mask=inputs.mask,
            old_logps=inputs.old_logps,
            options=options,
        )
        return _step(found.loss, found.logps)

    return forward


def ours_16_bit_logits(inputs: Inputs) -> Forward:
    """The same with logits rounded to the inputs' dtype, as most peers do."""
    return ours(inputs, repo_ops.Options(logits_dtype=inputs.hidden.dtype))


def ours_logps(inputs: Inputs) -> Forward:
    """repo_ops.linear_logps, then repo_ops.policy_loss: the gradient arrives later and tiles are recomputed."""
    coef = ENTROPY_COEF if inputs.case.entropy else 0.0
    objective = repo_ops.get_objective("grpo", eps_low=EPS, eps_high=EPS, entropy_coef=coef)

    def forward() -> Step:
        stats = repo_ops.linear_logps(
            inputs.hidden, inputs.weight, inputs.targets, mask=inputs.mask, with_entropy=inputs.case.entropy
        )
        found = repo_ops.policy_loss(
            stats.logps,
            inputs.advantages,
            objective=objective,
            mask=inputs.mask,
            old_logps=inputs.old_logps,
            entropy=stats.entropy,
        )
        return _step(found.loss, found.logps)

    return forward


def naive(inputs: Inputs) -> Forward:
    """Full logits in the inputs' dtype, float32 log-softmax, gather: what a loop over `model(...).logits` does."""

    def forward() -> Step:
        logits = inputs.hidden @ inputs.weight.T
        log_probs = torch.log_softmax(logits.float(), -1)
        logps = log_probs.gather(-1, inputs.targets[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1) if inputs.case.entropy else None
        return _step(grpo_loss(logps, inputs, entropy), logps)

    return forward


def trl(inputs: Inputs) -> Forward:
    """trl.kernels.ChunkedLogProbFunction, called as trl.trainer.utils.add_fused_lm_head calls it.

    The trainer also asks for the entropy at every step, as a metric; here only cases with an entropy bonus do.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    compact = _use_triton(inputs.hidden.device)  # the trainer drops masked rows on GPUs only
    wanted = ("entropy",) if inputs.case.entropy else ()
    mask = inputs.mask.bool()

    def forward() -> Step:
        hidden = inputs.hidden[mask] if compact else inputs.hidden.reshape(-1, inputs.hidden.shape[-1])
        targets = inputs.targets[mask] if compact else inputs.targets.reshape(-1)
        found = ChunkedLogProbFunction.apply(
            hidden, inputs.weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted
        )[:2]
        logps = _placed(found[0], mask, compact)
        entropy = None if found[1] is None else _placed(found[1], mask, compact)
        return _step(grpo_loss(logps, inputs, entropy), logps)

    return forward


def _placed(values: Tensor, mask: Tensor, compact: bool) -> Tensor:
    if compact:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
    return values.view(mask.shape).masked_fill(~mask, 0)


def liger(inputs: Inputs, *, one_chunk: bool = False, of: str = "liger_kernel.chunked_loss") -> Forward:
    """Liger's LigerFusedLinearGRPOLoss(compiled=False), a sequence at a time as is its default."""
    module = import_module(of).LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=len(inputs.targets) if one_chunk else 1,
        epsilon_low=EPS,
        epsilon_high=EPS,
        loss_type="grpo",
    )

    def forward() -> Step:
        loss, _ = module(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.mask,
            inputs.advantages,
            old_per_token_logps=inputs.old_logps,
        )
        return _step(loss, None)

    return forward


def liger_one_chunk(inputs: Inputs) -> Forward:
    """The same with all sequences in one chunk, which spares it an added-up [V, D] buffer per sequence."""
    return liger(inputs, one_chunk=True)


def ours_as_liger(inputs: Inputs) -> Forward:
    """Ours behind Liger's class: the import is all that changes."""
    return liger(inputs, of="repo_ops.integrations.liger")


def cce(inputs: Inputs) -> Forward:
    """Cut cross-entropy with reduction "none": its kernels on a GPU, its torch.compile form on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    how = "cce" if inputs.hidden.is_cuda else "torch_compile"
    targets = inputs.targets.masked_fill(inputs.mask == 0, -100)

    def forward() -> Step:
        logps = -linear_cross_entropy(inputs.hidden, inputs.weight, targets, reduction="none", impl=how)
        return _step(grpo_loss(logps.float(), inputs), logps)

    return forward


def floor_dtype(case: Case) -> torch.dtype:
    """The inputs' dtype; float32 on a CPU without products of 16-bit operands, which takes 70 times as long in them."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype if multiplies(dtype, torch.device(case.device)) else torch.float32


def floor(inputs: Inputs, *, preallocated: bool = True) -> Forward:
    """Three bare GEMMs over all rows, live or not: logits, d hidden, d weight, in `floor_dtype`."""
    dtype = floor_dtype(inputs.case)
    hidden, weight = inputs.hidden.detach().flatten(0, 1).to(dtype), inputs.weight.detach().to(dtype)
    shapes = ((len(hidden), len(weight)), hidden.shape, weight.shape)
    logits, dhidden, dweight = (hidden.new_zeros(s) if preallocated else None for s in shapes)

    def forward() -> Step:
        made = torch.mm(hidden, weight.T, out=logits)

        def backward() -> tuple[Tensor, Tensor]:
            return torch.mm(made, weight, out=dhidden), torch.mm(made.T, hidden, out=dweight)

        return Step(backward)

    return forward


def fresh_floor(inputs: Inputs) -> Forward:
    """The same three GEMMs into memory that is allocated anew each time, as any real step's is."""
    return floor(inputs, preallocated=False)


METHODS = {
    "floor": Method("3 bare GEMMs, preallocated", floor, exact_work=False),
    "fresh_floor": Method("3 bare GEMMs, fresh outputs", fresh_floor, exact_work=False),
    "ours": Method("ours: linear_policy_loss", ours),
    "ours_16_bit_logits": Method("ours, bf16 logits (opt-in)", ours_16_bit_logits, only_dtype="bfloat16"),
    "ours_logps": Method("ours: linear_logps + policy_loss", ours_logps),
    "ours_as_liger": Method("ours, by Liger's class", ours_as_liger, entropy=False),
    "naive": Method("full logits", naive, sixteen_bit_gradients=True),
    "trl": Method("TRL ChunkedLogProbFunction", trl, package="trl"),
    "liger": Method("Liger FusedLinearGRPO", liger, package="liger-kernel", entropy=False),
    "liger_one_chunk": Method("Liger, all sequences at once", liger_one_chunk, package="liger-kernel", entropy=False),
    "cce": Method(
        "Cut cross-entropy", cce, package="cut-cross-entropy", entropy=False, compiles=True, sixteen_bit_gradients=True
    ),
}
