"""Our head in place of TRL's chunked log-probabilities, under every trainer that uses them.

TRL's GRPO, RLOO, SFT, DPO and KTO trainers ask `trl.trainer.utils._ChunkedLogProbFunction` for the log-probability of
each label; it is looked up at each call. `install` puts another object there, and tells the same module that it takes
the scored rows alone (on a CPU TRL would compute masked rows too and throw them away).
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from repo_ops.arguments import layout
from repo_ops.head import gemm, sweep
from repo_ops.head.gradients import Gradients
from repo_ops.head.inputs import HeadInputs, RowStats, Wanted
from repo_ops.head.plan import make_plan
from repo_ops.head_arguments import HeadSettings, head_inputs
from repo_ops.integrations.trl.version import SUPPORTED, supported_trl
from repo_ops.options import Options, as_options

ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
OUTPUTS = frozenset({"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"})


@dataclass(eq=False)
class Installed:
    """Our head in TRL's place, and proof that it ran."""

    calls: int = 0
    """Forward passes of the head since `install()`."""
    rows: int = 0
    """Tokens that they scored; masked ones are not computed."""
    backwards: int = 0
    """Backward passes."""
    options: Options | None = None
    replaced: tuple[Any, Any] = (None, None)
    """TRL's own `_ChunkedLogProbFunction` and `_use_triton`."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy",),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's five statistics of each label; `chunk_size` is ours to choose."""
        if unknown := set(outputs) - OUTPUTS:
            raise ValueError(f"outputs: expected some of {sorted(OUTPUTS)}, got {sorted(unknown)}; update repo-ops")
        _check_whole(weight)
        options = as_options(self.options)
        call = _Call(
            self,
            HeadSettings(None, temperature, final_logit_softcapping, logit_scale),
            Wanted("entropy" in outputs, "log_sum_sq_probs" in outputs, "is_top1" in outputs),
            "mean_logits" in outputs,
            options,
            options.rounds_to(hidden.device.type) or hidden.dtype,
        )
        return _Statistics.apply(hidden, weight, bias, targets, call)


_installed: Installed | None = None


def install(*, options: Options | None = None) -> Installed:
    """Proof of work: an object whose `calls` and `rows` count what our head computed under TRL's trainers.

    Log-probabilities, entropies and gradients are those of TRL in float32 (to rounding: half a step of the logits), at
    the temperature, softcap and logit scale that TRL passes. Under autocast the products run in the autocast dtype, as
    TRL's do, and sums stay in float32. A second call changes nothing, warns, and returns the same object.

    Args:
        options: memory budget and backend of the head (see repo_ops.Options).
    Raises:
        ImportError: TRL is absent or of another version than 1.16.
        RuntimeError: Unsloth or somebody else has replaced what we would replace.
    """
    global _installed
    supported_trl()
    from trl.trainer import utils

    if _installed is not None:
        if utils._ChunkedLogProbFunction is not _installed:
            raise RuntimeError("install: another library replaced our head since; undo that first, or restart")
        warnings.warn("install: our head is in place already; nothing was changed", stacklevel=2)
        return _installed
    _check_untouched(utils)
    ours = Installed(options=as_options(options), replaced=(utils._ChunkedLogProbFunction, utils._use_triton))
    utils._ChunkedLogProbFunction = ours
    utils._use_triton = _take_scored_rows_only
    _installed = ours
    return ours


def uninstall() -> None:
    """Put TRL's own functions back.

    Raises:
        RuntimeError: our head is not in place, or something else has been put over it.
    """
    global _installed
    if _installed is None:
        raise RuntimeError("uninstall: our head is not in place; install() puts it there")
    from trl.trainer import utils

    if utils._ChunkedLogProbFunction is not _installed or utils._use_triton is not _take_scored_rows_only:
        raise RuntimeError("uninstall: another library replaced our head since install(); undo that first")
    utils._ChunkedLogProbFunction, utils._use_triton = _installed.replaced
    _installed = None


def _take_scored_rows_only(device: torch.device) -> bool:
    return True


def _check_untouched(utils: ModuleType) -> None:
    theirs, use_triton = utils._ChunkedLogProbFunction, utils._use_triton
    for found in (theirs, use_triton):
        if found.__module__ != "trl.kernels.chunked_logprob":
            raise RuntimeError(
                f"install: expected TRL's own head, got {found.__module__}.{found.__qualname__}; another library "
                "patched it, and ours would take its place: undo that first"
            )
    takes = tuple(inspect.signature(theirs.forward).parameters)[1:]
    if takes != ARGUMENTS:
        raise RuntimeError(
            f"install: expected the head of TRL {SUPPORTED} with arguments {', '.join(ARGUMENTS)}, "
            f"got {', '.join(takes)}; pip install 'trl{SUPPORTED}'"
        )


def _check_whole(weight: Tensor) -> None:
    """Refuse a head that TRL gathered from FSDP2 shards outside its unit: only this rank's gradient would reach it."""
    if torch.is_grad_enabled() and type(weight.grad_fn).__name__.startswith("_ToTorchTensor"):
        raise RuntimeError(
            "lm_head: expected a head that FSDP2 gathers in the model's own unit, got one in a unit of its own, whose "
            "gradient would lack the other ranks' part; leave the head out of the wrap policy (transformer blocks only)"
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """One use of the head, without its tensors."""

    installed: Installed
    settings: HeadSettings
    wanted: Wanted
    mean_logits: bool
    options: Options
    rounds_to: torch.dtype

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> HeadInputs:
        """The head over its rows; made anew in the backward, so that no copy of the weight waits for it."""
        settings = dataclasses.replace(self.settings, bias=bias)
        where = layout(targets, None, None)
        return head_inputs(hidden, weight, targets, where, settings, rounds_to=self.rounds_to).with_copies()


class _Statistics(torch.autograd.Function):
    """Like repo_ops.linear_logps, with TRL's further statistics, and DeepSpeed's gathering of the head around both."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call
    ) -> tuple[Tensor | None, ...]:
        head = call.head(hidden, weight, bias, targets)
        plan = make_plan(head, call.options, call.wanted)
        with gemm.without_autocast(hidden):
            stats = sweep.statistics(head, plan, wanted=call.wanted)
            mean_logits = _mean_logits(head) if call.mean_logits else None
        call.installed.calls += 1
        call.installed.rows += head.num_rows
        log_sum_p2 = None if stats.sum_p2 is None else stats.sum_p2.log()
        ctx.save_for_backward(hidden, weight, bias, targets, *stats)
        ctx.call = call
        ctx.set_materialize_grads(False)
        constants = (log_sum_p2, mean_logits, stats.is_argmax)
        ctx.mark_non_differentiable(*(value for value in constants if value is not None))
        return stats.logps, stats.entropy, *constants

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden, weight, bias, targets, *stats = ctx.saved_tensors
        call, found = ctx.call, RowStats(*stats)
        # ZeRO-3 has taken the weight apart again since the forward
        with maybe_gather_lm_head_ctx(weight, bias), gemm.without_autocast(hidden):
            head = call.head(hidden, weight, bias, targets)
            grads = Gradients(head, [*ctx.needs_input_grad[:3], False, False])
            plan = make_plan(head, call.options, call.wanted)
            dlogps = torch.zeros_like(found.logps) if dlogps is None else dlogps
            sweep.gradients(head, plan, found, dlogps, dentropy, grads)
        call.installed.backwards += 1
        return (*grads.finish()[:3], None, None)


def _mean_logits(head: HeadInputs) -> Tensor:
    """[N] mean over the vocabulary of softcap(logit_scale * (hidden weight^T + bias)) / temperature."""
    scale, inv = head.logit_scale, head.inv_temperature
    if head.softcap is None:  # the mean of products is the product with the mean
        mean = head.hidden.to(head.exact_dtype) @ head.weight.mean(0, dtype=head.exact_dtype)
        if head.bias is not None:
            mean = mean + head.bias.mean(dtype=head.exact_dtype)
        return mean * scale * inv
    rows = max(1, (1 << 25) // len(head.weight))
    found = [head.hidden.new_zeros(0, dtype=head.exact_dtype)]
    for start in range(0, head.num_rows, rows):
        hidden = head.hidden[start : start + rows]
        tile = hidden.new_empty((len(hidden), len(head.weight)), dtype=head.exact_dtype)
        gemm.logits_(tile, hidden, head.weight)
        tile = tile if head.bias is None else tile.add_(head.bias)
        found.append(tile.mul_(scale / head.softcap).tanh_().mean(1) * head.softcap)
    return torch.cat(found) * inv
