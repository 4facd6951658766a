"""Liger's GRPO loss on this library's head: same names, arguments, results and normalisation as liger-kernel 0.8.5.

    from repo_ops.integrations.liger import LigerFusedLinearGRPOLoss  # instead of liger_kernel.chunked_loss

Nothing of Liger is needed or imported. What is the same, bit by bit of its behaviour: which tokens are averaged by what
(`num_items_in_batch`, the mean over ranks of DAPO's count), CISPO's cap `epsilon_high` as a value of the ratio, LUSPO
counting padding where its per-token losses are a matrix, VESPO counting the ratios of masked tokens, the metrics, and
that logits of bfloat16 products are rounded to bfloat16 (`options=repo_ops.Options()` keeps them in float32).

What differs, on purpose: logits of float16 products stay in float32; a masked token cannot overflow into the loss, and
no exponential beyond exp(70) enters it; gradients are handed over once, so a second backward of one loss is refused;
refused by name are a mask other than 0 and 1, widths, a `beta` or a `vespo_k` below 0, a `delta` below
1 + epsilon_high, an FSDP-sharded weight, and ids outside the vocabulary in padding that LUSPO counts.
"""

from __future__ import annotations

from repo_ops.integrations.liger.loss import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    liger_fused_linear_grpo,
)

__all__ = ["LigerFusedLinearGRPOFunction", "LigerFusedLinearGRPOLoss", "liger_fused_linear_grpo"]
