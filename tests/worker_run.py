"""Whole runs of the tiny model on two ranks, their files left in the folder that is named. Prints a line a check."""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from tiny_runs import prepared

from repo_ops.trainer.distributed import inside, is_sharded, leave, whole
from repo_ops.trainer.footprint import Workload, parts_at_peak
from repo_ops.trainer.loop import train
from repo_ops.trainer.rollout import GenerationStopped, SamplingSettings

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

    sampling = SamplingSettings(num_samples=2, max_new_tokens=5, temperature=1.0, seed=3)
    prompts = ["r:abc=", "r:de=", "r:f=", "r:abc="]  # one twice, the second time on the other rank
    everything = run.engine.generate(prompts, sampling)
    say("completions are the same everywhere", ranks.gather(everything)[0] == everything)
    with whole(run.model):  # one rank generates, and generates more, while the other has nothing to do
        alone = run.engine.engine.generate(prompts, sampling) if ranks.is_first else None
    say("sharing prompts out changes no completion", alone is None or tokens(alone) == tokens(everything))
    say(
        "parameters are split again",
        all(hasattr(p, "placements") for p in run.model.parameters()) and is_sharded(run.model),
    )
    no_prompt = run.engine.generate([], sampling)
    one = run.engine.generate(prompts[:1], sampling)
    say("a rank without a prompt", no_prompt == [] and tokens(one) == tokens(everything)[:1])

    run.engine.should_stop = lambda: ranks.is_first
    try:
        run.engine.generate(prompts, sampling)
        stopped = False
    except GenerationStopped:
        stopped = True
    say("one rank stops all", stopped)

    run.engine.should_stop = lambda: False
    try:
        run.engine.generate([prompts[0], ""], sampling)  # the second rank's
        heard = False
    except ValueError as error:
        heard = "expected at least one token" in str(error)
    say("a prompt that one rank refuses is heard of on all", heard)

    planned = prepared(folder / "planned", autocast=True)
    held, kept, peak = held_and_kept(planned)
    say("the gathered model is as large as planned", held == peak.generating["gathered model"])
    say("activations of a shard are as planned", abs(kept / peak.learning["activations of a micro-batch"] - 1) < 0.02)

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


def held_and_kept(run):
    """Bytes of the weights that this rank holds while it generates; those that autograd keeps of a micro-batch, and the
    plan's for both.
    """
    model = run.model
    work = Workload(run.config, [5, 5], 4, ranks=2)
    with whole(model):
        head = model.get_output_embeddings().weight
        held = sum(p.nbytes for p in model.parameters()) + 2 * head.numel()  # autocast keeps a copy of the head
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    size = (work.rows, work.row)
    mask = torch.ones(work.rows, 1, work.row, work.row, dtype=torch.bool)
    rows = {"input_ids": torch.zeros(size, dtype=torch.int64), "position_ids": torch.arange(work.row).expand(size)}

    def forward():
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            hidden = model.get_decoder()(**rows, attention_mask=mask, use_cache=False).last_hidden_state
        rest = {p.untyped_storage()._cdata for p in (model.model.norm.weight, model.get_output_embeddings().weight)}
        return hidden, rest

    hidden, rest = inside(model, forward)
    # the layers' weights have been given back: their storages are empty
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in rest) + mask.numel()
    hidden.sum().backward()
    return held, kept, parts_at_peak(work, model.config, torch.device("cpu"))


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    torch.set_num_threads(1)
    main()
