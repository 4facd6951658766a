"""Two ranks inside hosts: prints one line a case, its name and the largest relative error against one process."""

import copy
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from repo_ops import get_objective, patch_causal_lm, policy_loss
from repo_ops.integrations import liger as ours

ROWS = {0: slice(0, 1), 1: slice(1, 4)}  # uneven


def model_of(tied):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (4, 9), generator=generator)
    live = torch.rand(4, 9, generator=generator) < torch.tensor([0.9, 0.7, 0.0, 0.5])[:, None]
    live[:, 0] = False
    return ids, torch.where(live, ids, -100), torch.randn(4, generator=generator), live.sum()


def loss_of(model, rows):
    ids, labels, advantages, tokens = batch()
    out = model(input_ids=ids[rows], labels=labels[rows])
    objective = get_objective("dapo")
    share = policy_loss(out.logps, advantages[rows], objective=objective, mask=out.mask, num_items=tokens).loss
    return share - 0.01 * out.entropy.sum() / tokens


def worst(model, expected):
    errors = []
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        errors.append(((grad - expected[name]).norm() / expected[name].norm()).item())
    return max(errors)


def expected_of(model):
    alone = copy.deepcopy(model)
    patch_causal_lm(alone)
    loss_of(alone, slice(0, 4)).backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def fsdp2(wrapping, tied):
    model = model_of(tied)
    expected = expected_of(model)
    patch_causal_lm(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if wrapping == "own":
        fully_shard(model.lm_head)
    if wrapping == "tail":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    (loss_of(model, ROWS[dist.get_rank()]) * dist.get_world_size()).backward()  # FSDP averages
    return worst(model, expected)


def accelerated():
    """accelerate's FSDP2, with the wrap that puts the head into a unit of its own."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = model_of(False)
    expected = expected_of(model)
    patch_causal_lm(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer", "Linear"],
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin  # on a CPU accelerate itself would take DDP
    model = fsdp2_prepare_model(accelerator, model)
    accelerator.backward(loss_of(model, ROWS[accelerator.process_index]) * accelerator.num_processes)
    return worst(model, expected)


def liger():
    """DAPO's count over ranks, which Liger and this library take the mean of."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    generator = torch.Generator().manual_seed(2)
    ids, labels, advantages, tokens = batch()
    hidden, weight = torch.randn(4, 9, 8, generator=generator), torch.randn(64, 8, generator=generator)
    # as many sequences on both: Liger reduces once a sequence, and hangs or adds up the wrong counts otherwise
    rows, mask = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2), (labels != -100).float()
    error = 0.0
    for count in (None, tokens):
        found = []
        for module in (ours.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
            leaves = [hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()]
            loss, _ = module(beta=0.0, use_ref_model=False, compiled=False)(
                *leaves, ids[rows], mask[rows], advantages[rows], num_items_in_batch=count
            )
            found.append([loss.detach()[None], *torch.autograd.grad(loss, leaves)])
        error = max([error, *(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(*found, strict=True))])
    return error


def verl_head():
    """A vocabulary over two ranks: the host adds the ranks' gradients of the hidden states."""
    from repo_ops.integrations.verl import linear_cross_entropy

    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(32, 8, generator=generator)
    labels, slopes = torch.randint(0, 32, (9,), generator=generator), torch.randn(2, 9, generator=generator)

    def run(leaves, group):
        logps, entropy = linear_cross_entropy(*leaves, labels, 0.8, "none", group)
        return logps, entropy, torch.autograd.grad((slopes[0] * logps + slopes[1] * entropy).sum(), leaves)

    want = run([hidden.clone().requires_grad_(), weight.clone().requires_grad_()], None)
    shard = slice(0, 16) if dist.get_rank() == 0 else slice(16, 32)
    got = run([hidden.clone().requires_grad_(), weight[shard].clone().requires_grad_()], dist.group.WORLD)
    whole = got[2][0].clone()
    dist.all_reduce(whole)
    pairs = [(got[0], want[0]), (got[1], want[1]), (whole, want[2][0]), (got[2][1], want[2][1][shard])]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def main():
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    cases = {
        "fsdp2-root": (fsdp2, "root", False),
        "fsdp2-tied": (fsdp2, "root", True),
        "fsdp2-tail": (fsdp2, "tail", False),
        "fsdp2-own": (fsdp2, "own", False),
        "liger": (liger,),
        "verl": (verl_head,),
        "accelerate": (accelerated,),
    }
    for name in sys.argv[1:] or cases:
        run, *arguments = cases[name]
        error = torch.tensor(run(*arguments))
        dist.all_reduce(error, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(name, f"{error.item():.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    main()
