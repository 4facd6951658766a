"""Two ranks, FSDP2 in several wrappings under TRL's head with ours in place; prints one line a case."""

import copy
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head
from trl_host import tiny_qwen2

from repo_ops.integrations.trl import install


def run(wrapping, tied):
    model = tiny_qwen2(tie_word_embeddings=tied)
    reference = copy.deepcopy(model)
    ranks = dist.get_world_size()
    ids = torch.randint(0, model.config.vocab_size, (ranks, 2, 9), generator=torch.Generator().manual_seed(1))
    for rows in ids:
        logps = torch.log_softmax(reference(input_ids=rows).logits[:, :-1], -1).gather(-1, rows[:, 1:, None])
        (-logps.mean() / ranks).backward()
    add_fused_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if wrapping == "own":
        fully_shard(model.lm_head)
    if wrapping == "tail":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    mine = ids[dist.get_rank()]
    out = model(input_ids=mine, attention_mask=torch.ones_like(mine), labels=mine, fused_lm_head=True)
    (-out.log_probs.mean()).backward()
    worst = 0.0
    for p, q in zip(model.parameters(), reference.parameters()):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        worst = max(worst, ((grad - q.grad).norm() / q.grad.norm()).item())
    return worst


def main():
    dist.init_process_group("gloo")
    installed = install()
    for wrapping, tied in (("root", False), ("root", True), ("tail", False), ("own", False)):
        before = installed.calls
        try:
            outcome = f"{run(wrapping, tied):.1e}"
            assert installed.calls > before
        except RuntimeError as error:
            outcome = f"refused: {error}"
        if dist.get_rank() == 0:
            print(wrapping, "tied" if tied else "untied", outcome, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    main()
