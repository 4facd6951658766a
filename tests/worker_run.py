"""Whole runs of the tiny model on two ranks, their files left in the folder that is named. Prints a line a check."""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from tiny_runs import prepared

from repo_ops.trainer.distributed import is_sharded, leave, whole
from repo_ops.trainer.loop import train
from repo_ops.trainer.rollout import GenerationStopped

RUNS = {
    "replay": {"steps": 5, "lr": 1e-4, "beta": 0.01, "save_model": True},
    "lora": {
        "steps": 4,
        "lr": 1e-4,
        "beta": 0.01,
        "lora_rank": 4,
        "lora_targets": ["q_proj", "down_proj", "lm_head"],
        "recompute_layers": True,
        "save_model": True,
    },
}


def main():
    folder, quiet = (
        Path(sys.argv[1]),
        mock.patch.multiple(
            "repo_ops.trainer.reporting", draw_report=lambda *_, **__: None, write_page=lambda *_, **__: None
        ),
    )
    with quiet:
        for name, settings in RUNS.items():
            run = prepared(folder / name, **settings)
            train(run)
    ranks = run.learner.ranks

    def say(what, holds):
        if all(ranks.gather(bool(holds))) and ranks.is_first:
            print(f"check {what}", flush=True)

    kept = ranks.gather(sorted(run.buffer._rings))
    say("each prompt is kept on one rank", all(kept) and len(kept[0]) + len(kept[1]) == len({*kept[0], *kept[1]}) == 8)

    sampling = {"num_samples": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    prompts = ["r:abc=", "r:de=", "r:f="]
    everything = run.engine.generate(prompts, **sampling)
    say("completions are the same everywhere", ranks.gather(everything)[0] == everything)
    with whole(run.model):  # one rank generates, and generates more, while the other has nothing to do
        alone = run.engine.engine.generate(prompts, **sampling) if ranks.is_first else None
    say("sharing prompts out changes no completion", alone is None or tokens(alone) == tokens(everything))
    say(
        "parameters are split again",
        all(hasattr(p, "placements") for p in run.model.parameters()) and is_sharded(run.model),
    )
    no_prompt = run.engine.generate([], **sampling)
    one = run.engine.generate(prompts[:1], **sampling)
    say("a rank without a prompt", no_prompt == [] and tokens(one) == tokens(everything)[:1])

    run.engine.should_stop = lambda: ranks.is_first
    try:
        run.engine.generate(prompts, **sampling)
        stopped = False
    except GenerationStopped:
        stopped = True
    say("one rank stops all", stopped)

    run.engine.should_stop = lambda: False
    try:
        run.engine.generate([prompts[0], ""], **sampling)  # the second rank's
        heard = False
    except ValueError as error:
        heard = "expected at least one token" in str(error)
    say("a prompt that one rank refuses is heard of on all", heard)

    def mistake():
        assert ranks.is_first
        raise ValueError("a mistake in the reward")

    try:
        ranks.from_first(mistake)
        heard = False
    except ValueError as error:
        heard = str(error) == "a mistake in the reward"
    say("a mistake on the first rank is heard on all", heard)
    leave()


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    torch.set_num_threads(1)
    main()
