"""Vocabulary shards without a second process; two real ranks are in test_distributed.py."""

import torch
import torch.distributed as dist

from repo_ops import linear_logps
from repo_ops.head import gradients


def test_gradients_of_hidden_states_are_summed_over_ranks_in_float32(monkeypatch, tmp_path):
    # in bfloat16 every rank's addition would be rounded
    found = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda tensor, *_, **__: found.append(tensor.dtype))
    try:
        hidden = torch.randn(4, 8).bfloat16().requires_grad_()
        targets = torch.arange(4)
        logps = linear_logps(hidden, torch.randn(17, 8).bfloat16(), targets, tp_group=dist.group.WORLD).logps
        found.clear()  # those of the statistics
        logps.sum().backward()
    finally:
        dist.destroy_process_group()
    assert found == [torch.float32]
    assert hidden.grad.dtype == torch.bfloat16
