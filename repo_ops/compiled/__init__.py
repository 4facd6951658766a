"""The fused head under torch.compile: three operators that a graph holds as they are, so that fullgraph=True passes.

A compiled function cannot look into the sweep (masks give shapes that depend on data, objectives are Python). So while
Dynamo traces, the public functions build calls of `torch.ops.repo_ops.*` instead, whose implementations are the eager
ones. An operator takes tensors and an int: what is constant in a call (an objective, options) is kept in a table
(`calls`), and the int is its place there. Outside of torch.compile none of this is used.

`stats_operator` and `loss_operator` hold, in this order: what is traced, its autograd function, the operator with its
fake kernel beside it.
"""

from __future__ import annotations

from repo_ops.compiled.arguments import HeadArguments
from repo_ops.compiled.loss_operator import linear_policy_loss
from repo_ops.compiled.stats_operator import linear_stats

__all__ = ["HeadArguments", "linear_policy_loss", "linear_stats"]
