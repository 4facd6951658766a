"""Two ranks against one, through the learner: parameters after three steps in many settings. Prints a line a case."""

import os
import sys
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import repo_ops
from repo_ops.trainer.distributed import join, leave, whole_state
from repo_ops.trainer.learner import Learner, ScoredSequence
from repo_ops.trainer.lora import add_lora

LR = 1e-5  # 3 steps move a parameter by up to 3e-5, thirty times the tolerance
SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}


def model(tied=True, lora=(), kind="llama"):
    torch.manual_seed(0)
    if kind == "qwen3":
        made = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied)).eval()
    else:
        made = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    if lora:
        add_lora(made, rank=4, alpha=8, targets=list(lora))
        with torch.no_grad():  # B = 0 would leave A without a gradient in the first step
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return made


def steps(replay):
    """Three steps of 5 prompts with 4 completions each, uneven lengths, dead groups, empty completions."""
    generator = torch.Generator().manual_seed(5)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(3):
        sequences = []
        for group in range(5):
            prompt = tuple(number(0, 37) for _ in range(number(1, 6)))
            for member in range(6 if replay else 4):
                length = 0 if (group, member) == (1, 1) else number(1, 9)
                tokens = tuple(number(0, 37) for _ in range(length))
                off = member >= 4
                advantage = 0.0 if group == 2 else float(torch.randn(1, generator=generator))
                logps = tuple(-1.0 - number(0, 40) / 10 for _ in tokens)
                sequences.append(ScoredSequence(prompt, tokens, advantage, off, logps if off else (), group))
        yield sequences


def one_sequence(replay):
    """One live sequence in the step: one rank has nothing to compute."""
    for sequences in steps(replay):
        yield [replace(s, advantage=s.advantage if i == 3 else 0.0) for i, s in enumerate(sequences)]


def train(made, objective, data, **settings):
    learner = Learner(made, objective, off_policy_coef=0.7, temperature=0.8, **settings)
    return [learner.step(sequences, lr=LR) for sequences in data], learner


CASES = {
    **{
        # untied: many micro-batches, and not as many on one rank as on the other
        f"{name} {'tied' if tied else 'untied'}": ({"tied": tied}, {"name": name}, {} if tied else {"max_tokens": 12})
        for name in ("grpo", "dapo", "dr_grpo", "gspo", "repo")
        for tied in (True, False)
    },
    "repo, code's denominators": ({}, {"name": "repo", "row_norm": "official_code"}, {}),
    "kl": ({"tied": False}, {"name": "repo", "beta": 0.3}, {"max_tokens": 20}),
    "entropy bonus, qwen3": ({"kind": "qwen3"}, {"name": "repo", "entropy_coef": 0.1}, {}),
    "batch statistics": ({}, {"name": "grpo", "top_entropy_quantile": 0.5}, {}),
    "batch statistics, replay": ({"tied": False}, {"name": "repo", "top_entropy_quantile": 0.37}, {}),
    "recompute": ({}, {"name": "repo"}, {"recompute": True}),
    "cpu offload": ({"tied": False}, {"name": "repo", "beta": 0.3}, {"cpu_offload": True}),
    "replicas": ({}, {"name": "repo"}, {"replicas": 2}),
    "lora": ({"lora": ("q_proj", "down_proj")}, {"name": "repo", "beta": 0.3}, {}),
    "lora head": ({"tied": False, "lora": ("v_proj", "lm_head")}, {"name": "repo", "beta": 0.3}, {"recompute": True}),
    "lora tied head": ({"lora": ("lm_head",)}, {"name": "repo"}, {}),
    "one sequence": ({"tied": False}, {"name": "grpo"}, {"data": one_sequence}),
    "one sequence, kl": ({}, {"name": "repo", "beta": 0.3}, {"data": one_sequence}),
    "one sequence, lora": ({"lora": ("lm_head", "q_proj")}, {"name": "repo"}, {"data": one_sequence}),
    "bfloat16": ({"tied": False}, {"name": "repo"}, {"autocast": torch.bfloat16}),
}


def compare(ranks, how, objective, settings):
    """(largest difference of a parameter, largest way that a parameter went); None on other ranks than the first."""
    settings = dict(settings)
    data = settings.pop("data", steps)
    replay = objective["name"] == "repo"
    given = repo_ops.get_objective(**objective, **({"max_length": 8} if objective["name"] == "dr_grpo" else {}))
    start = model(**how).state_dict()
    over_ranks, learner = train(model(**how), given, data(replay), ranks=ranks, **settings)
    state = whole_state(learner.backbone.model)
    if not ranks.is_first:
        return None
    autocast = settings.get("autocast")
    worst, moved = 0.0, 0.0
    # alone, in one micro-batch and, where the ranks have one each, in many
    for max_tokens in (4096, 7) if not settings and given.reach != "batch" else (4096,):
        alone, single = train(model(**how), given, data(replay), max_tokens=max_tokens, autocast=autocast)
        apart, went = [], []
        for name, value in single.backbone.model.state_dict().items():
            apart.append((state[name] - value).abs().flatten())
            went.append((value - start[name]).abs().flatten())
        apart, went = torch.cat(apart), torch.cat(went)
        # rounding to bfloat16 turns Adam's first steps round where a gradient is small: on average it must be alike
        worst = max(worst, apart.max().item() if autocast is None else (apart.mean() / went.mean()).item())
        moved = max(moved, went.max().item())
        for ours, theirs in zip(over_ranks, alone, strict=True):
            assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
            for key in ours.keys() - {"time/learner", "learner/micro_batches", "learner/tokens"}:
                close = (1e-4 if autocast is None else 0.05) * max(1.0, abs(theirs[key]))
                assert abs(ours[key] - theirs[key]) <= close, (key, ours[key], theirs[key])
    return worst, moved


def main():
    ranks = join("cpu")
    for name, case in CASES.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        found = compare(ranks, *case)
        if found is not None:
            print(f"case {name}: {found[0]:.1e} {found[1]:.1e}", flush=True)
    leave()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ, "start with python -m torch.distributed.run"
    main()
