"""RePOTrainer on as many ranks as there are, with completions that depend on nothing but prompt and step.

    python tests/worker_trl_ddp.py FOLDER

Rank 0 writes the trained parameters and the buffer's state to FOLDER/result.pt.
"""

import hashlib
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl_host import PROMPTS, digits, settings, stored_qwen2, tokenizer

from repo_ops.integrations.trl import RePOConfig, RePOTrainer

GROUP = 4


def completions_of(prompts, trainer):
    """Of each group the same ones on one rank and on two; the k-th of a prompt is ragged and unlike the others."""
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    first = trainer.accelerator.process_index * len(prompts)
    for place, prompt in enumerate(prompts):
        key = f"{prompt} {trainer.state.global_step} {(first + place) % GROUP}"
        random = hashlib.sha256(key.encode()).digest()
        ids = [3 + byte % 40 for byte in random[: 1 + random[0] % 6]]
        found["prompt_ids"].append(trainer.processing_class(text=prompt)["input_ids"])
        found["completion_ids"].append(ids)
        found["logprobs"].append([-1.0 - byte / 256 for byte in random[: len(ids)]])
    return found


def main(folder):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = RePOTrainer(
        model=stored_qwen2(folder / f"model{os.environ.get('RANK', '0')}"),
        reward_funcs=digits,
        args=RePOConfig(
            **settings(
                folder / "out",
                per_device_train_batch_size=8 // ranks,
                num_generations=GROUP,
                num_train_epochs=4,
                learning_rate=0.05,
                optim="sgd",
                replay_min_size=4,
                replay_num=3,
                **({"ddp_backend": "gloo"} if ranks > 1 else {}),
            )
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        processing_class=tokenizer(),
        rollout_func=completions_of,
    )
    trainer.train()
    drawn = [entry["replay/drawn"] for entry in trainer.state.log_history if "replay/drawn" in entry]
    assert drawn[-1] > 0
    if trainer.accelerator.is_main_process:
        parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        state = {"parameters": parameters, "buffer": trainer.replay.buffer.state_dict(), "ranks": ranks}
        torch.save(state | {"wrapped": type(trainer.model_wrapped).__name__}, folder / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
