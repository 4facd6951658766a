"""Any objective as a NeMo-RL LossFunction.

    loss_fn = repo_ops.integrations.nemo_rl.NemoRLLoss(get_objective("gspo"))  # where ClippedPGLossFn(...) is made

Who divides: this loss, by the step's global_valid_toks or global_valid_seqs, which NeMo-RL passes. The shares of all
micro-batches and ranks add up to the step's loss; NeMo-RL multiplies by the number of ranks that average gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repo_ops.objectives import Objective
from repo_ops.policy_loss import policy_loss
from repo_ops.reduce import NumItems, counts_tokens

READS = {"old_logps": "prev_logprobs", "sampler_logps": "generation_logprobs", "ref_logps": "reference_policy_logprobs"}
"""What an objective reads -> NeMo-RL's name of it in `data`."""


class NemoRLLoss:
    """`objective` under NeMo-RL's LossFunction protocol, fed with log-probabilities of the next tokens.

    Raises:
        ImportError: NeMo-RL is missing. ValueError: the objective reads what its batches do not hold.
    """

    def __init__(self, objective: Objective) -> None:
        try:
            interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        except ImportError as error:
            raise ImportError(f"nemo_rl is needed for its loss types; install NeMo-RL ({error})") from error
        if unknown := sorted(objective.reads - set(READS)):
            raise ValueError(f"objective: reads {', '.join(unknown)}, which NeMo-RL's batches do not hold")
        self.objective = objective
        self.input_type = interfaces.LossInputType.LOGPROB
        by_tokens = counts_tokens(objective.reduction)
        self.loss_type = interfaces.LossType.TOKEN_LEVEL if by_tokens else interfaces.LossType.SEQUENCE_LEVEL
        self.metric_normalizations: dict[str, Any] = {}
        """metric -> what it was divided by, filled by calls: trainers that pass counts of 1 divide by this later."""
        self._normalizer = getattr(interfaces, "MetricNormalizer", None)  # older NeMo-RL has none

    def __call__(
        self,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(this micro-batch's share of the step's loss, metrics that add up likewise).

        Args:
            data: [B, S] token_mask, advantages, prev_logprobs and what else the objective reads, entry t of token t;
                [B] sample_mask; under top-k or top-p sampling [B, S - 1] curr_logprobs_keep_mask, 0 where a
                log-probability is a stand-in. next_token_logprobs: [B, S - 1], entry t of token t + 1.
        """
        length = next_token_logprobs.shape[1]
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()[:, :length]
        if "curr_logprobs_keep_mask" in data:
            mask = mask & data["curr_logprobs_keep_mask"][:, :length].bool()
        reads = {ours: name for ours, name in READS.items() if ours in self.objective.reads}
        given: dict[str, Any] = {ours: data[name][:, 1:] for ours, name in reads.items()}
        given["old_logps"] = data["prev_logprobs"][:, 1:]
        found = policy_loss(
            next_token_logprobs,
            data["advantages"][:, 1:],
            objective=self.objective,
            mask=mask,
            num_items=NumItems(global_valid_seqs, global_valid_toks),
            **given,
        )
        shares = {
            name: value.total / torch.as_tensor(global_valid_toks).clamp_min(1)
            for name, value in found.metrics.items()
            if not name.endswith(("_max", "_min"))
        }
        shares["loss"] = found.loss.detach()
        numbers = torch.stack([value.to(torch.float32) for value in shares.values()]).tolist()
        metrics: dict[str, Any] = dict(zip(shares, numbers, strict=True))
        if self._normalizer is not None:
            self.metric_normalizations |= dict.fromkeys(metrics, self._normalizer.TOKENS)
            if not counts_tokens(self.objective.reduction):
                self.metric_normalizations["loss"] = self._normalizer.SEQUENCES
            self.metric_normalizations["num_valid_samples"] = self._normalizer.NONE
        return found.loss, {**metrics, "num_valid_samples": float(data["sample_mask"].sum())}
