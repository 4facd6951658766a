"""One of two ranks that train the tiny model; started by test_trainer_checkpoint.py through torchrun.

`stop FOLDER`: an undisturbed run, and one in which a signal reaches rank 1 alone, which is then resumed and compared.
`kill FOLDER`: rank 1 is killed in the learner's fourth step.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import arguments, differences, outcome, prepared

from repo_ops.cli import main
from repo_ops.trainer.distributed import leave, whole_state
from repo_ops.trainer.learner import Learner
from repo_ops.trainer.loop import train
from repo_ops.trainer.rollout.sampler import Sampler
from repo_ops.trainer.stop import Stopped

RANK = int(os.environ["RANK"])


def stop(folder: Path) -> None:
    settings = {"steps": 6, "eval_steps": 4, "reward": f"{folder / 'reward.py'}:reward"}
    run = prepared(folder / "whole", **settings)
    train(run)
    dist.barrier()  # the first rank writes the metrics, and both read them here
    expected = outcome(run)
    draw, version = Sampler.draw, []

    def draws_and_is_stopped(self, *args):
        version.append(1)
        if RANK == 1 and cut.engine.engine.version == 4 and cut.learner.optimizer.state:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, *args)

    cut = prepared(folder / "cut", **settings)
    Sampler.draw = draws_and_is_stopped  # type: ignore[method-assign]
    try:
        train(cut)
    except Stopped as end:
        print(f"rank{RANK} {end}", flush=True)
    Sampler.draw = draw  # type: ignore[method-assign]
    resumed = prepared(folder / "cut", **settings, resume="auto")
    print(f"rank{RANK} resumed at {resumed.resumed_at}", flush=True)
    train(resumed)
    dist.barrier()
    found = differences(outcome(resumed), expected)
    print(f"rank{RANK} {'equal' if not found else found[:3]}", flush=True)
    state = whole_state(resumed.model)
    if RANK == 0:
        torch.save(state, folder / "final.pt")


def kill(folder: Path) -> None:
    step, made = Learner.step, []

    def dies(self, *args, **kwargs):
        made.append(1)
        if RANK == 1 and len(made) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Learner.step = dies  # type: ignore[method-assign]
    main(arguments(folder, steps=6, heldout_size=0, save_steps=1))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_report", "write_page"):
            patch.setattr(f"repo_ops.trainer.reporting.{name}", lambda *_, **__: None)
        {"stop": stop, "kill": kill}[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        leave()
