"""Steps whose loss or gradient was not finite: what they were made of is written down, and too many in a row end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repo_ops.trainer.distributed import inside
from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.learner import support_ids
from repo_ops.trainer.rows import idle_batch

if TYPE_CHECKING:
    from repo_ops.trainer.learner import Learner, ScoredSequence

__all__ = ["NonfiniteGuard", "NotFinite"]


class NotFinite(RunFailed):
    """Too many steps in a row were not finite. The parameters are those before them."""


class NonfiniteGuard:
    """Looks at every step, and dumps those that were not finite to folder/nonfinite/step_N.pt.

    Args:
        limit: so many such steps in a row end the run.
        say: where the words go.
    """

    def __init__(self, learner: Learner, folder: Path, *, limit: int, say: Callable[[str], None]) -> None:
        self.learner = learner
        self.folder = folder / "nonfinite"
        self.limit = limit
        self.say = say
        self.in_a_row = 0

    def check(self, step: int, sequences: Sequence[ScoredSequence], metrics: Mapping[str, float]) -> None:
        """To be called after the learner's step, on all ranks, while the gradients are still there.

        Raises:
            NotFinite: the limit is reached; on all ranks.
        """
        if not metrics["learner/nonfinite"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = self.dump(step, sequences, metrics)
        look = f"look at it: python -c \"import torch; print(torch.load({str(path)!r})['summary'])\""
        self.say(
            f"step {step}: the loss or the gradient was not finite; the parameters were left as they were, the batch "
            f"is in {path}"
        )
        if self.in_a_row == self.limit:
            raise NotFinite(
                f"{self.limit} steps in a row were not finite (nonfinite_limit); the last batch is in {path}; {look}; "
                "usual remedies: a lower lr, --dtype float32, --autocast false"
            )

    def dump(self, step: int, sequences: Sequence[ScoredSequence], metrics: Mapping[str, float]) -> Path:
        """Writes what this rank computed of the step; every rank a file of its own."""
        learner, ranks = self.learner, self.learner.ranks
        mine = learner.share([sequence for sequence in sequences if learner.is_live(sequence)])
        named = [(name, p) for name, p in learner.backbone.model.named_parameters() if p.requires_grad]
        gradients = {name: n for name, p in named if p.grad is not None and (n := _nonfinite(p.grad))}
        parameters = {name: n for name, p in named if (n := _nonfinite(p))}
        logps = current_logps(learner, mine)
        content: dict[str, Any] = {
            "step": step,
            **{name: metrics[name] for name in ("loss", "grad_norm", "lr")},
            "nonfinite_gradients": gradients,
            "nonfinite_parameters": parameters,
            "prompt_ids": [list(s.prompt_ids) for s in mine],
            "token_ids": [list(s.token_ids) for s in mine],
            "advantages": torch.tensor([s.advantage for s in mine]),
            "off_policy": torch.tensor([s.off_policy for s in mine], dtype=torch.bool),
            "sampler_logps": [torch.tensor(s.logps) for s in mine],
            "logps": logps,
        }
        content["summary"] = _summary(content)
        self.folder.mkdir(exist_ok=True)
        path = self.folder / (f"step_{step}.pt" if ranks.size == 1 else f"step_{step}_rank_{ranks.rank}.pt")
        torch.save(content, path)
        return path


@torch.no_grad()
def current_logps(learner: Learner, mine: Sequence[ScoredSequence]) -> list[Tensor]:
    """Log-probability of each token of this rank's sequences under the policy as it is, over what it was drawn from."""
    batches = learner.pack(mine)
    batches += [idle_batch()] * (learner.ranks.most(len(batches)) - len(batches))
    found = [torch.empty(0)] * len(mine)
    for batch in batches:
        here, backbone = batch.to(learner.ranks.device), learner.backbone
        kept = support_ids([mine[i] for i in batch.sequences], learner.ranks.device)
        logps = inside(backbone.model, lambda: backbone.logps(here, learner.temperature, kept))  # noqa: B023
        ends = batch.cu_seqlens.tolist()
        for place, sequence in enumerate(batch.sequences):
            found[sequence] = logps[ends[place] : ends[place + 1]].cpu()
    return found


def _nonfinite(tensor: Tensor) -> int:
    """How many entries are NaN or infinite, of a sharded tensor those that lie on this rank."""
    local = getattr(tensor, "_local_tensor", tensor)
    return int((~torch.isfinite(local)).sum())


def _summary(content: Mapping[str, Any]) -> str:
    lines = [f"step {content['step']}: loss {content['loss']}, gradient norm {content['grad_norm']}"]
    for kind in ("parameters", "gradients"):
        found: dict[str, int] = content[f"nonfinite_{kind}"]
        first = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:5])
        lines.append(f"{kind} that are not finite: {len(found)}" + (f", first {first}" if found else ""))
    for kind in ("logps", "sampler_logps"):
        wrong = [i for i, logps in enumerate(content[kind]) if not torch.isfinite(logps).all()]
        lines.append(f"sequences with {kind} that are not finite: {wrong or 'none'}")
    wrong = (~torch.isfinite(content["advantages"])).nonzero()[:, 0].tolist()
    lines.append(f"sequences with advantages that are not finite: {wrong or 'none'}")
    lines.append(f"keys of this file: {', '.join(content)}")
    return "\n".join(lines)
