"""Two ranks, FSDP2 in several wrappings: every parameter's gradient against one process. Prints one line a case."""

import copy
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from repo_ops import NumItems, linear_policy_loss
from repo_ops.causal_lm import find_head

ROWS = {0: (0, 2), 1: (2, 4)}


class Model(Qwen2ForCausalLM):
    def policy_loss(self, ids, mask, advantages, num_items):
        hidden = self.model(input_ids=ids).last_hidden_state[:, :-1]
        found = linear_policy_loss(
            hidden,
            targets=ids[:, 1:],
            advantages=advantages,
            mask=mask,
            objective="dapo",
            num_items=num_items,
            **find_head(self).arguments(hidden),
        )
        return found.loss


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (4, 9), generator=generator)
    # ragged, so that a mean over ranks of means would be wrong; rank 1's first row has no live token at all
    mask = torch.rand(4, 8, generator=generator) < torch.tensor([0.9, 0.7, 0.0, 0.5])[:, None]
    return ids, mask, torch.randn(4, generator=generator)


def grads_of_one_process(model):
    ids, mask, advantages = batch()
    model.policy_loss(ids, mask, advantages, None).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def run(wrapping, tied, accumulation):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = Model(config)
    expected = grads_of_one_process(copy.deepcopy(model))
    for layer in model.model.layers:
        fully_shard(layer)
    if wrapping == "own":
        fully_shard(model.lm_head)
    if wrapping == "tail":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    register_fsdp_forward_method(model, "policy_loss")
    ids, mask, advantages = batch()
    items = NumItems.of(mask.sum(1))
    first, last = ROWS[dist.get_rank()]
    micro = torch.arange(first, last).tensor_split(accumulation)
    for rows in micro:
        # FSDP averages over ranks; a micro-batch without a live token takes part like any other
        loss = model.policy_loss(ids[rows], mask[rows], advantages[rows], items) * dist.get_world_size()
        loss.backward()
    worst = 0.0
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        worst = max(worst, ((grad - expected[name]).norm() / expected[name].norm()).item())
    return worst


def main():
    dist.init_process_group("gloo")
    for wrapping in ("root", "tail", "own"):
        for tied in (False, True):
            if tied and wrapping != "root":
                continue  # fully_shard itself refuses a tied weight in two units
            for accumulation in (1, 2):
                try:
                    outcome = f"{run(wrapping, tied, accumulation):.1e}"
                except TypeError as error:
                    outcome = f"refused: {error}"
                if dist.get_rank() == 0:
                    print(wrapping, "tied" if tied else "untied", accumulation, outcome, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    main()
