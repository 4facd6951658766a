"""One rank of two: its half of the sequences, with batch statistics over both, must give its half of the gradient."""

import dataclasses
import sys

import objective_cases as cases
import torch
import torch.distributed as dist

import repo_ops

SETTINGS = {
    "bapo": {"target": 0.6},
    "bapo_open_code": {},
    "clip_cov": {"fraction": 0.1, "cov_min": -9.0, "cov_max": 9.0},
    "kl_cov": {"fraction": 0.2},
    "high_entropy": {"top_entropy_quantile": 0.3},
}


def half(given: cases.Batch, first: int, last: int) -> cases.Batch:
    rows = slice(int(given.cu_seqlens[first]), int(given.cu_seqlens[last]))
    return cases.Batch(cases.part(given.tokens, rows, given.lengths[first:last]), given.off_policy[first:last])


def gradient(objective, given, counts):
    logps = given.tokens.logps.clone().requires_grad_()
    result = repo_ops.policy_loss(logps, entropy=given.tokens.entropy, num_items=counts, **given.arguments(objective))
    return torch.autograd.grad(result.loss, logps)[0]


def main() -> int:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    wrong = []
    for name, hyper in SETTINGS.items():
        differs = False
        for cut in (3, 5, 0):  # uneven halves, and one rank without a token
            given = cases.batch()
            counts = repo_ops.NumItems.of(given.lengths)
            alone = cases.make(name, **hyper)
            whole = gradient(alone, given, counts)
            first, last = ((0, cut), (cut, len(given.lengths)))[rank]
            rows = slice(int(given.cu_seqlens[first]), int(given.cu_seqlens[last]))
            shared = dataclasses.replace(alone, process_group=dist.group.WORLD)
            got = gradient(shared, half(given, first, last), counts)
            if not torch.allclose(got, whole[rows], rtol=1e-12, atol=1e-14):
                wrong.append(f"{name} cut at {cut}")
            differs = differs or not torch.allclose(gradient(alone, half(given, first, last), counts), whole[rows])
        somewhere = torch.tensor(float(differs))
        dist.all_reduce(somewhere)
        if not somewhere:
            wrong.append(f"{name}: a rank's own statistics would have done")
    dist.destroy_process_group()
    print(f"rank {rank}: {wrong or 'equal'}", flush=True)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
