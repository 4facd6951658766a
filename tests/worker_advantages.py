"""One rank of two: advantages and counts over both ranks' rows against one process that holds all of them."""

import torch
import torch.distributed as dist

from repo_ops import NumItems, group_advantages

CASES = {"bnpo": {}, "reinforce_pp": {}, "grpo": {"scale": "batch"}, "gpg": {}, "rloo": {}}


def main():
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(14, generator=generator).round(decimals=1)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])  # the cut at 5 goes through prompt 1
    replayed = torch.arange(14) % 3 == 0
    lengths = torch.randint(1, 9, (14,), generator=generator)
    wrong = []
    for cut in (5, 14):  # uneven halves, and one rank without a row
        mine = slice(0, cut) if rank == 0 else slice(cut, 14)
        for name, hyper in CASES.items():
            given = {"estimator": name, **hyper}
            whole = group_advantages(rewards, ids, off_policy=replayed, lengths=lengths, **given)
            part = {"off_policy": replayed[mine], "lengths": lengths[mine]}
            got = group_advantages(rewards[mine], ids[mine], process_group=group, **part, **given)
            if not torch.equal(got, whole[mine]):
                wrong.append(f"{name} cut at {cut}")
        parts = torch.rand(14, 2, generator=torch.Generator().manual_seed(1)).round()
        whole = group_advantages(parts, ids, estimator="bnpo")
        if not torch.equal(
            group_advantages(parts[mine], ids[mine], estimator="bnpo", process_group=group), whole[mine]
        ):
            wrong.append(f"bnpo of two parts cut at {cut}")
        for flags in (None, replayed):
            counts = NumItems.of(lengths[mine], None if flags is None else flags[mine], process_group=group)
            expected = NumItems.of(lengths, flags)
            if [int(n) for n in vars(counts).values()] != [int(n) for n in vars(expected).values()]:
                wrong.append(f"counts cut at {cut}")
    print(f"rank{rank} {wrong or 'equal'}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
