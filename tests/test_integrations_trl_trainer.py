"""RePOTrainer through TRL's own training loop: the loss that TRL would have, replay that replays, exact resume."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset

trl = pytest.importorskip("trl", minversion="1.16")
from trl_host import PROMPTS, digits, grpo, settings, stored_qwen2, tokenizer  # noqa: E402

import repo_ops  # noqa: E402
from repo_ops.integrations.trl import RePOConfig, RePOTrainer, install, uninstall  # noqa: E402
from repo_ops.integrations.trl.replay import prompt_key  # noqa: E402

SGD = {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "temperature": 0.8}
"""Not Adam, which makes of a gradient that is 0 but for rounding (a key's bias) a step of full size."""


@pytest.fixture(autouse=True)
def nothing_is_left_in_place():
    yield
    with contextlib.suppress(RuntimeError):
        uninstall()


def repo(folder, *, reward=digits, prompts=PROMPTS, kind=RePOTrainer, model=None, named=None, **more):
    defaults = {"replay_min_size": 4, "replay_num": 3, "replay_capacity": 8}
    return kind(
        model=stored_qwen2(folder / "model") if model is None else model,
        reward_funcs=reward,
        args=RePOConfig(**settings(folder, **(defaults | more))),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer(),
        **(named or {}),
    )


def parameters_after(trainer, **how):
    trainer.train(**how)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(ours, theirs, *, atol=1e-6):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --- without replay: TRL's own step

LOSSES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo", "epsilon_high": 0.28, "scale_rewards": False},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-3},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.5},
    "vespo": {"loss_type": "vespo"},
    "delta": {"delta": 1.5},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "truncated completions masked": {"mask_truncated_completions": True},
    "kl": {"beta": 0.05, "use_bias_correction_kl": False},
    "unbiased kl": {"beta": 0.05},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "beta": 0.05},
    "off-policy mask": {"num_iterations": 2, "max_steps": 4, "off_policy_mask_threshold": 0.01},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


NEVER_DRAWS = {"replay_min_size": 1000, "replay_capacity": 1000}
# without replay, objective and shared rows there would be nothing of ours to test
ROWS = {"shared": {"replay": None}, "separate": {"shared_rows": False, **NEVER_DRAWS}}


SEPARATE = ("dapo", "gspo", "unbiased kl", "off-policy mask", "truncated completions masked")
"""Rows only decide where log-probabilities come from: a few losses show that they arrive."""
PAIRS = [*((loss, "shared") for loss in LOSSES), *((loss, "separate") for loss in SEPARATE)]


@pytest.mark.parametrize(("loss", "rows"), PAIRS)
def test_without_replayed_rows_it_trains_to_the_parameters_of_trl(tmp_path, loss, rows):
    more = SGD | LOSSES[loss]
    theirs = parameters_after(grpo(tmp_path / "theirs", **more))
    trainer = repo(tmp_path / "ours", **ROWS[rows], **more)
    same(parameters_after(trainer), theirs)
    start = dict(stored_qwen2(tmp_path / "start").named_parameters())
    assert max((start[n] - p).abs().max() for n, p in theirs.items()) > 1e-3


def test_with_nothing_of_ours_it_is_trl_to_the_last_bit(tmp_path):
    install()
    theirs = parameters_after(grpo(tmp_path / "theirs", max_steps=3, learning_rate=1e-2))
    more = {"max_steps": 3, "learning_rate": 1e-2, "replay": None, "shared_rows": False}
    ours = parameters_after(repo(tmp_path / "ours", **more))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_buffer_that_never_draws_changes_no_bit(tmp_path):
    without = parameters_after(repo(tmp_path / "off", replay=None, **SGD))
    trainer = repo(tmp_path / "on", **NEVER_DRAWS, **SGD)
    ours = parameters_after(trainer)
    assert len(trainer.replay.buffer) > 0
    for name, value in without.items():
        assert torch.equal(ours[name], value), name


def test_generations_of_two_optimizer_steps(tmp_path):
    # TRL puts any of the generation's completions into a step, we whole groups: the two are compared by our own rows
    more = SGD | {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 4}
    same(*(parameters_after(repo(tmp_path / kind, **rows, **more)) for kind, rows in ROWS.items()))


def test_only_live_sequences_are_computed(tmp_path):
    def reward(completions, prompts, **_):  # every group but one is all alike
        return [float(sum(c.isdigit() for c in text)) if p == "1+1=" else 1.0 for text, p in zip(completions, prompts)]

    trainer = repo(tmp_path / "ours", replay=None, reward=reward, **SGD | {"max_steps": 8})
    ours = parameters_after(trainer)
    theirs = parameters_after(grpo(tmp_path / "theirs", reward=reward, **SGD | {"max_steps": 8}))
    same(ours, theirs)
    live = [entry["rows/live"] for entry in trainer.state.log_history if "rows/live" in entry]
    assert live
    assert max(live) <= 4  # one group of four, of the two in a step
    assert len(live) < 8


# --- replay


class Watched(RePOTrainer):
    """Keeps what each generation stored and each micro-step trained on."""

    def __init__(self, *args, **named):
        self.seen, self.generated = [], []
        super().__init__(*args, **named)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.generated.append((self.state.global_step, output, self._rewards.clone()))
        return output

    def _compute_loss(self, model, inputs):
        if "rows" in inputs:
            self.seen.append((self.state.global_step, inputs["rows"]))
        return super()._compute_loss(model, inputs)


def unpadded(output, row):
    prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
    completion = output["completion_ids"][row][output["completion_mask"][row].bool()].tolist()
    return tuple(prompt), tuple(completion)


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2}, {"shared_rows": False}]
)
def test_replay_replays_what_was_generated(tmp_path, more):
    """Nothing is lost, rows are whole, and none is drawn in the generation that made it."""
    epochs = {"prompts": PROMPTS[:4], "num_train_epochs": 4}
    trainer = repo(tmp_path, kind=Watched, replay_capacity=64, learning_rate=1e-2, **epochs, **more)
    trainer.train()
    made = {}
    for version, output, rewards in trainer.generated:
        for row in range(len(rewards)):
            made.setdefault(unpadded(output, row), []).append((version, float(rewards[row].sum())))
    # (a) everything eligible is stored: a prompt's groups, one a generation that held it, and all of their samples
    buffer = trainer.replay.buffer
    assert len(buffer) == sum(map(len, made.values())) == sum(len(rewards) for _, _, rewards in trainer.generated)
    groups = {
        (unpadded(output, i)[0], v) for v, output, _ in trainer.generated for i in range(len(output["prompt_ids"]))
    }
    assert buffer.metrics(trainer.state.global_step)["replay/distinct_groups"] == len(groups) > 4
    # (b) a replayed row has the tokens, prompt, log-probabilities and reward of one earlier sample
    replayed = [(version, row) for version, rows in trainer.seen for row in rows if row.off_policy]
    assert len({(version, row.group) for version, row in replayed}) >= 4
    for version, row in replayed:
        stored = [s for s in buffer.samples(prompt_key(row.prompt_ids)) if s.token_ids == row.token_ids]
        earlier = [v for v, _ in made[row.prompt_ids, row.token_ids]]
        assert min(earlier) < version
        assert any(s.logps == row.old_logps and s.version in earlier for s in stored)
        assert all(s.reward in {reward for _, reward in made[row.prompt_ids, row.token_ids]} for s in stored)
        assert len(row.old_logps) == len(row.token_ids)
    # with its group: the fresh rows of the same micro-step hold the same prompt
    for _, rows in trainer.seen:
        prompts = {row.group: row.prompt_ids for row in rows if not row.off_policy}
        assert all(prompts[row.group] == row.prompt_ids for row in rows if row.off_policy)
    # (c) split advantages: those of a prompt's replayed rows add up to zero on their own
    for _, rows in trainer.seen:
        for group in {row.group for row in rows if row.off_policy}:
            assert abs(sum(row.advantage for row in rows if row.off_policy and row.group == group)) < 1e-3


def test_stored_log_probabilities_are_those_of_the_policy_that_sampled(tmp_path):
    trainer = repo(tmp_path, kind=Watched, max_steps=1, learning_rate=0.0, temperature=0.7)
    trainer.train()
    _, output, _ = trainer.generated[0]
    model = trainer.model.eval()
    for row in range(8):
        prompt, completion = unpadded(output, row)
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        (sample,) = {s for s in trainer.replay.buffer.samples(prompt_key(prompt)) if s.token_ids == completion}
        torch.testing.assert_close(torch.tensor(sample.logps), expected, rtol=0, atol=1e-5)


def test_replay_makes_more_groups_effective_than_grpo_has(tmp_path):
    def coin(completions, **_):  # rarely a difference within a group
        return [float("7" in c) for c in completions]

    trainer = repo(tmp_path, reward=coin, prompts=PROMPTS[:2], num_train_epochs=12, learning_rate=1e-3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "groups/effective" in entry]
    effective, fresh = (sum(entry[name] for entry in logs) for name in ("groups/effective", "groups/effective_on"))
    assert sum(entry["replay/groups_drawn"] for entry in logs) > 0
    assert effective > fresh


def test_replay_of_one_step_is_the_loss_of_the_library(tmp_path):
    """Gradient of a step with replayed rows against repo_ops.policy_loss on the model's own logits, separate rows."""
    from repo_ops import group_advantages, policy_loss

    trainer = repo(
        tmp_path, kind=Watched, prompts=PROMPTS[:2], num_train_epochs=3, off_policy_coef=0.7, loss_type="grpo"
    )
    gradients = {}

    def keep(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        before.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    before = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    _, rows = trainer.seen[-1]
    assert sum(row.off_policy for row in rows) == 6
    model = stored_qwen2(tmp_path / "again")
    model.load_state_dict(before)
    logps = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.prompt_ids + row.token_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0])
    replayed = torch.tensor([row.off_policy for row in rows])
    old = [torch.tensor(r.old_logps) if r.off_policy else p.detach() for r, p in zip(rows, logps)]
    rewards = torch.tensor([digits([tokenizer().decode(r.token_ids, skip_special_tokens=True)])[0] for r in rows])
    groups = torch.tensor([row.group for row in rows])
    found = policy_loss(
        torch.cat(logps),
        group_advantages(rewards, groups, off_policy=replayed),
        objective="repo",
        old_logps=torch.cat(old),
        off_policy=replayed,
        off_policy_coef=0.7,
        cu_seqlens=torch.tensor([0, *(len(p) for p in logps)]).cumsum(0),
    )
    found.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("exact", [False, True])
def test_under_autocast_the_head_is_rounded_unless_it_is_to_be_float32(tmp_path, monkeypatch, exact):
    seen, trainer = [], repo(tmp_path, head_float32=exact, bf16=True, max_steps=2, num_train_epochs=4)
    for name in ("linear_policy_loss", "linear_logps"):
        ours = getattr(repo_ops, name)

        def watched(hidden, *arguments, ours=ours, **named):
            seen.append(named["options"].rounds_to("cpu") or hidden.dtype)
            return ours(hidden, *arguments, **named)

        monkeypatch.setattr(repo_ops, name, watched)
    trainer.train()
    assert len(seen) >= 4  # each step's loss, and log-probabilities for the buffer
    assert set(seen) == {torch.float32 if exact else torch.bfloat16}


def test_evaluation_neither_draws_nor_stores(tmp_path):
    more = {"num_train_epochs": 2, "prompts": PROMPTS[:2], "learning_rate": 1e-3}
    trainer = repo(tmp_path, **more)
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    trainer.train()
    before = json.dumps(trainer.replay.buffer.state_dict())
    found = trainer.evaluate()
    assert json.dumps(trainer.replay.buffer.state_dict()) == before
    assert "eval_reward" in found


def test_resume_gives_the_bits_of_an_unbroken_run(tmp_path):
    more = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "replay": "random"}
    more["shuffle_dataset"] = False  # TRL's sampler starts its first order again on resume, whatever the epoch
    whole = repo(tmp_path / "whole", **more, prompts=PROMPTS[:4])
    expected = parameters_after(whole)
    again = repo(tmp_path / "again", **more, prompts=PROMPTS[:4])
    found = parameters_after(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.replay.buffer.state_dict() == whole.replay.buffer.state_dict()
    assert again.replay.buffer.metrics(6)["replay/drawn"] > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    (tmp_path / "whole" / "checkpoint-3" / "replay_buffer.pt").unlink()
    with pytest.raises(ValueError, match=r"expected replay_buffer\.pt in"):
        repo(tmp_path / "third", **more).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_second_train_goes_on_with_the_buffer_of_the_first(tmp_path):
    trainer = repo(tmp_path, max_steps=3, prompts=PROMPTS[:2], replay="recency")
    trainer.train()
    newest, size = trainer.replay.buffer.newest, len(trainer.replay.buffer)
    trainer.train()  # whose steps begin at 0 again
    assert len(trainer.replay.buffer) >= size
    assert trainer.replay.buffer.newest > newest
    ages = [entry["replay/age_steps_mean"] for entry in trainer.state.log_history if "replay/size" in entry]
    assert ages
    assert min(ages) >= 0


def test_what_could_not_be_scored_is_not_stored(tmp_path):
    def reward(completions, **_):
        return [None if i % 4 == 0 else float(i) for i in range(len(completions))]

    trainer = repo(tmp_path, reward=reward, max_steps=2, learning_rate=0.0)
    trainer.train()
    assert len(trainer.replay.buffer) == 12
    assert trainer.replay.not_stored == 4


# --- objectives, estimators, truncated sampling


@pytest.mark.parametrize("name", ["repo", "kimi", "dr_grpo", "deepseek_v32", "high_entropy"])
def test_any_objective_trains(tmp_path, name):
    trainer = repo(tmp_path, objective=name, prompts=PROMPTS[:2], num_train_epochs=3, learning_rate=1e-2)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    found = parameters_after(trainer)
    assert any((found[n] != p).any() for n, p in start.items())
    assert all(p.isfinite().all() for p in found.values())
    assert (trainer.ref_model is not None) == (name == "deepseek_v32")
    assert sum(e.get("replay/rows_drawn", 0) for e in trainer.state.log_history) > 0


def test_an_estimator_of_ours_gives_the_advantages(tmp_path):
    trainer = repo(tmp_path, kind=Watched, replay=None, advantage_estimator="rloo", max_steps=1)
    trainer.train()
    _, _, rewards = trainer.generated[0]
    total = rewards.sum(1).view(2, 4)
    expected = total - (total.sum(1, keepdim=True) - total) / 3  # leave one out
    found = Counter(round(row.advantage, 4) for row in trainer.seen[0][1])
    assert found == Counter(round(x, 4) for x in expected.flatten().tolist())


def kept_ids_rollout(prompts, trainer):
    """Samples from the three likeliest tokens, and says which they were."""
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "support_ids": []}
    for prompt in prompts:
        ids = trainer.processing_class(text=prompt)["input_ids"]
        tokens, logps, kept = [], [], []
        for _ in range(4):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1] / trainer.temperature
            top = logits.topk(3)
            choice = torch.multinomial(top.values.softmax(0), 1).item()
            tokens.append(top.indices[choice].item())
            logps.append(top.values.log_softmax(0)[choice].item())
            kept.append(top.indices.tolist())
        for name, value in zip(found, (ids, tokens, logps, kept), strict=True):
            found[name].append(value)
    return found


def test_kept_ids_make_the_ratio_of_a_truncated_sampler_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    more = {"replay": None, "top_k": 3, "max_steps": 2, "temperature": 0.9, "objective": "grpo_tis"}
    trainer = repo(tmp_path, named={"rollout_func": kept_ids_rollout}, **more)
    trainer.train()
    ratios = [e["policy/sampler_ratio"] for e in trainer.state.log_history if "policy/sampler_ratio" in e]
    assert len(ratios) == 2
    assert all(abs(ratio - 1) < 1e-4 for ratio in ratios)

    def without(prompts, trainer):
        return {name: value for name, value in kept_ids_rollout(prompts, trainer).items() if name != "support_ids"}

    with pytest.raises(ValueError, match="support_ids: expected the kept ids of each token"):
        repo(tmp_path, named={"rollout_func": without}, **more).train()


# --- refusals

REFUSED = {
    "loss_type": ({"loss_type": "bnpo"}, "loss_type: expected one of"),
    "unknown loss": ({"loss_type": "grrpo"}, "loss_type: expected one of"),
    "cispo's cap": ({"loss_type": "cispo"}, "epsilon_high: expected the largest ratio"),
    "quantile": ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: expected its default 1.0, got 0.2"),
    "bonus": ({"entropy_coef": 0.01}, "entropy_coef: expected its default"),
    "adaptive": ({"use_adaptive_entropy": True}, "use_adaptive_entropy: expected its default"),
    "delta of sapo": ({"loss_type": "sapo", "delta": 2.0}, "delta: expected its default None, got 2.0"),
    "tau of grpo": ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos: expected its default"),
    "k of grpo": ({"vespo_k_pos": 1.0}, "vespo_k_pos: expected its default"),
    "epsilon of ours": ({"objective": "repo", "epsilon": 0.3}, "epsilon: expected its default 0.2, got 0.3"),
    "loss_type of ours": ({"objective": "repo", "loss_type": "grpo"}, "loss_type: expected its default 'dapo'"),
    "kl of ours": ({"objective": "repo", "use_bias_correction_kl": False}, "use_bias_correction_kl: expected its"),
    "two betas": ({"objective": "repo", "beta": 0.1, "objective_args": {"beta": 0.2}}, "beta: expected 0.1"),
    "kl of sequences": (
        {"importance_sampling_level": "sequence", "beta": 0.1},
        "use_bias_correction_kl: expected False",
    ),
    "unknown objective": ({"objective": "rpo"}, "objective: expected one of .* did you mean"),
    "unknown hyper": ({"objective": "repo", "objective_args": {"eps": 1}}, "eps: objective 'repo' has"),
    "hyper without": ({"objective_args": {"eps_low": 0.1}}, "objective_args: expected none without objective"),
    "extras": ({"objective": "dppo_topk"}, "objective: expected one that reads"),
    "misaligned": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_generations": 4},
        "steps_per_generation: expected a multiple",
    ),
    "strategy": ({"replay": "newest"}, "replay: expected one of full_scope, random"),
    "capacity": ({"replay_capacity": 2}, "replay_capacity: expected at least replay_min_size = 4, got 2"),
    "coefficient": ({"off_policy_coef": 0.0}, "off_policy_coef: expected more than 0"),
    "top_p": ({"top_p": 0.9}, "replay: expected top_p=1"),
    "kwargs": ({"generation_kwargs": {"top_k": 3}}, "replay: expected top_p=1"),
    "aggregation": ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation: expected"),
    "batch scale": ({"scale_rewards": "batch"}, "scale_rewards: expected 'group' or 'none'"),
    "mode": ({"advantage_mode": "apart"}, "advantage_mode: expected 'split' or 'mixed'"),
    "mixed without": ({"advantage_mode": "mixed", "replay": None}, "advantage_mode: expected 'split' without replay"),
    "estimator": ({"advantage_estimator": "grpoo"}, "grpoo"),
    "estimator's": ({"advantage_args": {"eps": 1}}, "advantage_args: expected none"),
    "two scales": (
        {"advantage_estimator": "rloo", "scale_rewards": "none"},
        "scale_rewards: expected its default 'group' with advantage_estimator, got 'none'",
    ),
    "two sums": (
        {"advantage_estimator": "rloo", "replay": None, "multi_objective_aggregation": "normalize_then_sum"},
        "multi_objective_aggregation: expected its default",
    ),
    "two samplers": (
        {"use_vllm": True, "objective": "grpo", "objective_args": {"sampler_weight": "token_mask"}},
        "objective_args: expected no sampler_weight .* set vllm_importance_sampling_mode",
    ),
    "a sampler's weight of its own": (
        {"use_vllm": True, "objective": "areal"},
        "vllm_importance_sampling_correction: expected False with objective 'areal', which corrects by itself",
    ),
    "a reference in the loss": ({"objective": "spo"}, "objective: expected one that reads a reference policy for its"),
    "length": (
        {"objective": "dr_grpo", "objective_args": {"max_length": 0}},
        "max_length: expected tokens > 0, got 0",
    ),
    "regex": ({"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex; the stored"),
    "hyper of nothing": (
        {"replay": None, "shared_rows": False, "objective_args": {"eps_low": 0.1}},
        "objective_args: expected none without objective",
    ),
    "no such level": (
        {"loss_type": "sapo", "importance_sampling_level": "sequence"},
        "importance_sampling_level: expected 'token' with loss_type 'sapo', got 'sequence'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_option_that_the_loss_does_not_read_is_refused(tmp_path, what):
    options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        RePOConfig(**settings(tmp_path, **({"replay_min_size": 4, "replay_capacity": 8} | options)))


def test_settings_of_what_is_off_are_named(tmp_path):
    with pytest.warns(UserWarning, match="replay_num, off_policy_coef: not read with replay=None"):
        RePOConfig(**settings(tmp_path, replay=None, replay_num=4, off_policy_coef=0.5))
    with pytest.warns(UserWarning, match="row_tokens: not read with shared_rows=False"):
        RePOConfig(**settings(tmp_path, shared_rows=False, row_tokens=512))


def test_what_the_trainer_cannot_do_is_refused(tmp_path):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="args: expected a RePOConfig, got GRPOConfig"):
        RePOTrainer(model=stored_qwen2(tmp_path / "m"), reward_funcs=digits, args=GRPOConfig(**settings(tmp_path)))
    with pytest.raises(ValueError, match=r"top_p, top_k, .*: expected none, since TRL's engines do not report"):
        repo(tmp_path, replay=None, top_p=0.9)
    model = stored_qwen2(tmp_path / "m", attention_dropout=0.1)
    with pytest.raises(ValueError, match="shared_rows: expected a model without dropout"):
        repo(tmp_path, model=model)
    repo(tmp_path, model=model, shared_rows=False)


@pytest.mark.slow
def test_two_ranks_train_to_the_parameters_of_one(tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(here)}
    environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
        command = [sys.executable, *launch, str(here / "worker_trl_ddp.py"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(torch.load(folder / "result.pt", weights_only=True))
    one, two = found
    assert (two["ranks"], two["wrapped"]) == (2, "DistributedDataParallel")
    assert one["buffer"] == two["buffer"]
    same(two["parameters"], one["parameters"], atol=2e-6)


def test_lora_trains_with_shared_rows(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    more = {"replay": None, **SGD}
    theirs = parameters_after(grpo(tmp_path / "theirs", peft_config=config, **more_of_trl(more)))
    ours = parameters_after(repo(tmp_path / "ours", named={"peft_config": config}, **more))
    same(ours, theirs)


def more_of_trl(more):
    return {name: value for name, value in more.items() if name != "replay"}
