"""Two ranks that hold uneven shards of the vocabulary against one process; the worst relative error of each case."""

import torch
import torch.distributed as dist

from repo_ops import Options, get_objective, linear_logps, linear_policy_loss, linear_stats

V, CUTS = 101, (0, 70, 101)
HEADS = {
    "plain": {},
    "capped": {"softcap": 4.0, "logit_scale": 0.9, "temperature": 0.7},
    "rounded": {"options": Options(operand_dtype=torch.bfloat16)},
    "masked": {},  # nothing but -inf in the second shard
}


def error(found, expected):
    # a masked shard has gradients of 0
    return max(((a - b).norm() / (b.norm() + (not b.any()))).item() for a, b in zip(found, expected, strict=True))


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shard = slice(*CUTS[dist.get_rank() : dist.get_rank() + 2])
    # not contiguous, and clones keep that: NovaSky-AI/SkyRL#1886 lost what a collective made of such a tensor
    hidden, weight, bias = torch.randn(5, 3, 8).transpose(0, 1), torch.randn(V, 8), torch.randn(V)
    adapter = torch.randn(3, 5, 2), torch.randn(V, 2)
    targets, mask, advantages = torch.randint(0, V, (3, 5)), torch.rand(3, 5) < 0.8, torch.randn(3)
    targets[:, 0] = (hidden[:, 0] @ weight.T + bias + adapter[0][:, 0] @ adapter[1].T).argmax(-1)
    dlogps, dentropy = torch.randn(3, 5), torch.randn(3, 5)
    objective = get_objective("gspo", entropy_coef=0.1)

    def grads(weight, bias, low_weight, group, head):
        tensors = [t.clone().requires_grad_() for t in (hidden, weight, bias, adapter[0], low_weight)]
        h, w, b, low, up = tensors
        head = {**head, "bias": b, "adapter": (low, up), "tp_group": group, "mask": mask}
        stats = linear_logps(h, w, targets, with_entropy=True, **head)
        first = torch.autograd.grad((stats.logps * dlogps + stats.entropy * dentropy).sum(), tensors)
        found = linear_policy_loss(h, w, targets, advantages, objective=objective, **head)
        second = torch.autograd.grad(found.loss, tensors)
        beyond = linear_stats(h, w, targets, **head)
        values = [stats.logps, stats.entropy, found.loss.reshape(1), beyond.sum_p2, beyond.is_argmax.float()]
        return values, [first, second]

    for name, head in HEADS.items():
        if name == "masked":
            bias[CUTS[1] :] = -float("inf")
            targets.clamp_max_(CUTS[1] - 1)
        values, both = grads(weight[shard], bias[shard], adapter[1][shard], dist.group.WORLD, head)
        whole_values, whole_both = grads(weight, bias, adapter[1], None, head)
        worst = error(values, whole_values)
        for found, expected in zip(both, whole_both, strict=True):
            h, w, b, low, up = expected
            worst = max(worst, error(found, (h, w[shard], b[shard], low, up[shard])))
        print(f"rank{dist.get_rank()} {name} {worst:.1e}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
