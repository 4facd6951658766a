"""The real path of a run, from the console's arguments to the files it leaves, on the tiny model."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch

import repo_ops
from repo_ops.cli import main
from repo_ops.head import gemm
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import PromptStream
from repo_ops.trainer.groups import seed_of
from repo_ops.trainer.learner import Learner, ScoredSequence
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rollout import Completion, encode_prompts
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.run import Run, precision_notes, prepare
from repo_ops.trainer.tasks import Example

# 4 of 8 prompts a step: they come round at step 3, so that 4 steps are enough for a replay of every prompt
SMALL = {
    "model": "tiny",
    "task": "reverse",
    "steps": 4,
    "prompts_per_step": 4,
    "group_size": 4,
    "train_size": 8,
    "heldout_size": 3,
    "heldout_samples": 2,
    "lr": 1e-4,
    "autocast": False,
    "threads": 1,
}
REPLAY = {"objective": "repo", "replay": "variance", "replay_num": 4, "replay_min_size": 4}
CLOCK = ("time/", "memory/", "tokens_per_second", "mfu")  # what two runs of the same seed may differ in


def arguments(folder: Path, **settings: object) -> list[str]:
    words = ["train", "--output_dir", str(folder)]
    for name, value in {**SMALL, **settings}.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def prepared(folder: Path, **settings: object) -> Run:
    return prepare(TrainConfig(output_dir=str(folder), save_model=False, **{**SMALL, **settings}))  # type: ignore[arg-type]


def repeatable(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in read_metrics(folder)]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_a_run_from_the_console_leaves_its_files_and_can_be_repeated(tmp_path: Path, capsys) -> None:
    main(arguments(tmp_path / "a", **REPLAY))
    out = capsys.readouterr().out
    assert "step   4/4" in out
    assert "train reward, last 5 steps" in out
    lines = read_metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[0]) > {"eval/sampled_mean", "eval/greedy_mean"}
    assert "eval/sampled_mean" in lines[4]
    assert not any(name.startswith("eval/") for line in lines[1:4] for name in line)
    expected = {
        *("reward/mean", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"),
        *("groups/effective_on", "groups/effective_off", "groups/effective"),
        *("replay/size", "replay/distinct_prompts", "replay/age_steps_mean", "replay/share_of_sequences"),
        *("rewards/exact_match/mean", "rewards/exact_match/std", "reward/errors", "reward/timeouts"),
        *("loss", "grad_norm", "lr", "tokens_per_second", "memory/peak_mb"),
        *("time/generate", "time/learner", "time/rest"),
    }
    assert all(expected <= set(line) for line in lines[1:])
    assert {"off_policy/ess", "off_policy/ratio_max", "off_policy/clip_low", "off_policy/clip_high"} <= set(lines[4])
    assert lines[4]["replay/distinct_prompts"] == 8
    assert lines[4]["replay/size"] == 4 * 4 * 4  # every sample of every step: far below the capacity
    assert lines[4]["replay/drawn"] > 0
    assert all(line["memory/peak_mb"] > 50 for line in lines[1:])
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000
    model, tokenizer = load_model(str(tmp_path / "a" / "model"))
    start, _ = load_model("tiny")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    assert encode_prompts(tokenizer, ["r:abc="])

    config = ["--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")]
    main(["train", *config, "--save_model", "false"])
    assert repeatable(tmp_path / "b") == repeatable(tmp_path / "a")
    assert not (tmp_path / "b" / "model").exists()
    main(["train", *config, "--save_model", "false", "--seed", "1"])
    assert repeatable(tmp_path / "b") != repeatable(tmp_path / "a")


@dataclass
class Watched:
    """What went through a run: completions by step and prompt, and what the learner was given."""

    generated: list[dict[str, list[Completion]]] = field(default_factory=list)
    learned: list[list[ScoredSequence]] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    generate, step = HFGenerate.generate, Learner.step

    def watched_generate(self, prompts, settings):
        groups = generate(self, prompts, settings)
        if settings.num_samples == SMALL["group_size"]:  # not an evaluation
            seen.generated.append(dict(zip(prompts, groups, strict=True)))
        return groups

    def watched_step(self, sequences, *, lr):
        seen.learned.append(list(sequences))
        return step(self, sequences, lr=lr)

    monkeypatch.setattr(HFGenerate, "generate", watched_generate)
    monkeypatch.setattr(Learner, "step", watched_step)
    return seen


def test_replay_really_replays(tmp_path: Path, watched: Watched) -> None:
    run = prepared(tmp_path, **REPLAY, steps=6)
    train(run)
    name_of = {
        tuple(ids): prompt
        for group in watched.generated
        for prompt, ids in zip(group, encode_prompts(run.tokenizer, list(group)), strict=True)
    }
    stored: dict[str, dict[tuple[int, ...], list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    replayed_prompts = set()
    for generated, learned in zip(watched.generated, watched.learned, strict=True):
        fresh = [s for s in learned if not s.off_policy]
        assert len(fresh) == 16  # every fresh completion is there, with its own tokens
        assert sorted(s.token_ids for s in fresh) == sorted(c.token_ids for g in generated.values() for c in g)
        for prompt in generated:
            drawn = [s for s in learned if s.off_policy and name_of[s.prompt_ids] == prompt]
            # the prompt's earlier samples, and so none of this step: they are stored after the loop below
            assert len(drawn) == min(4, sum(map(len, stored[prompt].values())))
            for s in drawn:
                assert s.logps in stored[prompt][s.token_ids]
                replayed_prompts.add(prompt)
        for prompt, completions in generated.items():
            for c in completions:
                stored[prompt][c.token_ids].append(c.logps)
    assert len(replayed_prompts) == len(stored) == 8  # all of the pool


def test_replayed_rewards_and_advantages_are_those_of_their_own_group(tmp_path: Path, watched: Watched) -> None:
    run = prepared(tmp_path, **REPLAY, steps=5)
    train(run)
    answers = {e.prompt: e.columns["answer"] for e in run.task.train}
    text_of = {c.token_ids: c.text for group in watched.generated for cs in group.values() for c in cs}
    prompt_of = {tuple(ids): p for p, ids in zip(answers, encode_prompts(run.tokenizer, list(answers)), strict=True)}
    checked = 0
    for learned in watched.learned:
        for group in {s.group for s in learned}:
            for replayed in (False, True):
                members = [s for s in learned if s.group == group and s.off_policy is replayed]
                rewards = [float(text_of[s.token_ids].strip() == answers[prompt_of[s.prompt_ids]]) for s in members]
                if len(members) < 2:
                    continue
                r = torch.tensor(rewards, dtype=torch.float64)
                expected = (r - r.mean()) / (r.std() + 1e-4)
                assert [s.advantage for s in members] == pytest.approx(expected.tolist(), abs=1e-5)
                checked += replayed and bool(r.std() > 0)
    assert checked > 0


def test_replay_off_is_bit_identical_to_no_buffer(tmp_path: Path) -> None:
    results = []
    settings = (
        {"objective": "repo"},
        {"objective": "repo", "replay": "variance", "replay_min_size": 999, "replay_capacity": 999},
        {"objective": "grpo"},
    )
    for i, each in enumerate(settings):
        run = prepared(tmp_path / str(i), **each)
        train(run)
        results.append((weights(run), [line.get("loss") for line in read_metrics(run.folder)]))
    for found, losses in results[1:]:
        assert losses == results[0][1]
        assert all(torch.equal(found[name], value) for name, value in results[0][0].items())


def reward_file(folder: Path, body: str) -> str:
    path = folder / "reward.py"
    path.write_text(f"def reward(prompts, completions, **columns):\n    return {body}\n")
    return f"{path}:reward"


def test_all_groups_dead(tmp_path: Path) -> None:
    run = prepared(tmp_path, reward=reward_file(tmp_path, "[0.0] * len(prompts)"), **REPLAY)
    before = weights(run)
    train(run)
    for line in read_metrics(tmp_path)[1:]:
        assert line["learner/skipped"] == 1
        assert line["learner/nonfinite"] == line["groups/effective"] == line["grad_norm"] == 0
        assert line["frac_reward_zero_std"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


def test_dynamic_sampling_fills_the_step_with_groups_that_differ(tmp_path: Path, watched: Watched) -> None:
    # by the prompt: half of the pool is dead whatever the model says
    body = "[float(len(set(p[2:-1])) % 2 and i % 2) for i, p in enumerate(prompts)]"
    settings = {"reward": reward_file(tmp_path, body), "heldout_size": 0, "steps": 3, "prompts_per_step": 2}
    run = prepared(tmp_path, dynamic_sampling_max_rounds=4, **settings)
    alive = {e.prompt for e in run.task.train if len(set(e.prompt[2:-1])) % 2}
    assert 2 <= len(alive) < 8
    train(run)
    lines = read_metrics(tmp_path)[1:]
    assert run.prompts.taken == sum(line["groups/rounds"] for line in lines) == len(watched.generated) > 3
    assert len({seed_of(run.config, step, round_) for step in range(3) for round_ in range(3)}) == 9
    for line, learned in zip(lines, watched.learned, strict=True):
        assert {s.group for s in learned} == {0, 1}
        assert line["groups/effective"] == 1  # every group of the step
        assert line["reward/scored"] == 8 * line["groups/rounds"]
        assert line["groups/discarded"] == 2 * line["groups/rounds"] - 2
        # half of the living groups' completions have 1; over all that was generated, the dead groups too
        assert line["reward/mean"] == pytest.approx(0.5 * (1 - line["frac_reward_zero_std"]))


def test_dynamic_sampling_that_finds_nothing_ends_and_says_so(tmp_path: Path, watched: Watched) -> None:
    reward = reward_file(tmp_path, "[0.0] * len(prompts)")
    train(prepared(tmp_path, reward=reward, dynamic_sampling_max_rounds=3, steps=2, heldout_size=0))
    assert len(watched.generated) == 4  # the pool is two batches: a third would ask again
    assert [len(learned) for learned in watched.learned] == [16, 16]  # dead groups fill the step
    assert [line["learner/skipped"] for line in read_metrics(tmp_path)[1:]] == [1, 1]


def test_dynamic_sampling_asks_a_prompt_once_in_a_step(tmp_path: Path, watched: Watched) -> None:
    """Batches of 3 of 7: the next round over the pool begins within a step, and may hold what the step has had."""
    settings = {"train_size": 7, "prompts_per_step": 3, "steps": 4, "heldout_size": 0}
    reward = reward_file(tmp_path, "[0.0] * len(prompts)")
    run = prepared(tmp_path, reward=reward, dynamic_sampling_max_rounds=5, **settings)
    train(run)
    calls, overlaps = iter(watched.generated), 0
    for line in read_metrics(tmp_path)[1:]:
        batches = [list(next(calls)) for _ in range(int(line["groups/rounds"]))]
        prompts = [prompt for batch in batches for prompt in batch]
        assert len(prompts) == len(set(prompts)) == 3 + line["groups/discarded"]
        overlaps += any(len(batch) < 3 for batch in batches)
    assert next(calls, None) is None
    assert overlaps > 0
    assert len(watched.generated) <= run.prompts.taken <= 4 * 5


def test_rounds_that_are_not_needed_change_nothing(tmp_path: Path) -> None:
    reward = reward_file(tmp_path, "[float(i % 2) for i in range(len(prompts))]")
    found = []
    for rounds in (1, 5):
        run = prepared(tmp_path / str(rounds), reward=reward, dynamic_sampling_max_rounds=rounds, steps=2)
        train(run)
        found.append((repeatable(run.folder), weights(run)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_dead_groups_out_of_the_denominator(tmp_path: Path, watched: Watched) -> None:
    """With half of the groups dead and completions of one length, the others count twice as much."""
    body = "[float(len(set(p[2:-1])) % 2 and i % 2) for i, p in enumerate(prompts)]"
    settings = {"reward": reward_file(tmp_path, body), "heldout_size": 0, "steps": 1, "objective": "dr_grpo"}
    losses, sequences = [], []
    for drop in (False, True):
        run = prepared(tmp_path / str(drop), drop_dead_groups=drop, **settings)
        train(run)
        losses.append(read_metrics(run.folder)[1]["grad_norm"])
        sequences.append({s.group for s in watched.learned[-1]})
    dead = len(sequences[0]) - len(sequences[1])
    assert 0 < dead < 4
    # dr_grpo divides by the number of sequences
    assert losses[1] == pytest.approx(losses[0] * 4 / (4 - dead), rel=1e-4)


def test_several_rewards_with_weights_from_the_console(tmp_path: Path) -> None:
    other = reward_file(tmp_path, "[0.25 * (c == 4) for c in columns['max_new_tokens']]")
    weights_of = json.dumps({"prefix_match": 1.0, "soft_overlong": 0.5, other: 2.0})
    main(arguments(tmp_path / "run", rewards=weights_of, max_new_tokens=4, steps=2, save_model=False))
    for line in read_metrics(tmp_path / "run")[1:]:
        assert line["rewards/reward/mean"] == 0.25
        total = line["rewards/prefix_match/mean"] + 0.5 * line["rewards/soft_overlong/mean"] + 2.0 * 0.25
        assert line["reward/mean"] == pytest.approx(total)
        assert -1 <= line["rewards/soft_overlong/mean"] < 0


def test_a_reward_that_hangs_or_raises_does_not_end_the_run(tmp_path: Path, caplog) -> None:
    hang = "[1.0] * len(prompts) if columns['num_tokens'][0] < 0 else exec('while True: pass')"
    run = prepared(tmp_path, reward=reward_file(tmp_path, hang), reward_timeout=0.2, heldout_size=0, steps=1)
    train(run)
    assert read_metrics(tmp_path)[1]["reward/timeouts"] == 16
    assert "rewards: 16 of 16 samples left out at a deadline" in caplog.text
    run = prepared(tmp_path, reward=reward_file(tmp_path, "[1 / (i % 4) for i in range(len(prompts))]"), heldout_size=0)
    train(run)
    assert [line["reward/errors"] for line in read_metrics(tmp_path)[1:]] == [16] * 4
    assert caplog.text.count("ZeroDivisionError") == 1


def test_completions_without_a_reward_are_left_out(tmp_path: Path, watched: Watched) -> None:
    body = "[None if i % 4 == 3 else float(len(c) % 2) for i, c in enumerate(completions)]"
    run = prepared(tmp_path, reward=reward_file(tmp_path, body), heldout_size=0, **REPLAY)
    train(run)
    lines = read_metrics(tmp_path)
    assert [line["reward/scored"] for line in lines[1:]] == [12] * 4
    assert lines[4]["replay/size"] == 4 * 12
    assert [sum(not s.off_policy for s in learned) for learned in watched.learned] == [12] * 4
    assert lines[0] == {"step": 0}  # no held-out prompts, no evaluation
    nothing = prepared(tmp_path, reward=reward_file(tmp_path, "[None] * len(prompts)"), heldout_size=0, **REPLAY)
    train(nothing)
    assert all(line["learner/skipped"] == 1 for line in read_metrics(tmp_path)[1:])


def test_empty_completions_count_and_are_never_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = HFGenerate.generate

    def with_an_empty_one(self, prompts, settings):
        groups = generate(self, prompts, settings)
        return [[Completion((), (), "", False), *group[1:]] for group in groups]

    monkeypatch.setattr(HFGenerate, "generate", with_an_empty_one)
    run = prepared(tmp_path, reward=reward_file(tmp_path, "[float(len(c) % 2) for c in completions]"), **REPLAY)
    train(run)
    lines = read_metrics(tmp_path)
    assert lines[4]["replay/size"] == 4 * 12
    assert all(line["reward/scored"] == 16 for line in lines[1:])
    assert any(line["learner/skipped"] == 0 for line in lines[1:])


def test_a_step_that_is_not_finite_is_said_and_survived(tmp_path: Path, monkeypatch, capsys) -> None:
    step = Learner.step

    def poisoned(self, sequences, *, lr):
        one = sequences[0]
        # the ratio overflows, and with a negative advantage nothing clips it
        bad = ScoredSequence(one.prompt_ids, one.token_ids, -1.0, True, (-1e4,) * len(one.token_ids))
        return step(self, [*sequences, bad], lr=lr)

    monkeypatch.setattr(Learner, "step", poisoned)
    train(prepared(tmp_path, steps=2))
    assert "step 1: the loss or the gradient was not finite; the parameters were left" in capsys.readouterr().out
    assert [line["learner/nonfinite"] for line in read_metrics(tmp_path)[1:]] == [1, 1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["grad_norm"] is None


def test_every_prompt_comes_round_before_any_comes_again() -> None:
    pool = [Example(str(i), f"{i}=", {}) for i in range(6)]

    def keys(batch: int = 3, seed: int = 3) -> list[str]:
        prompts = PromptStream(pool, batch=batch, seed=seed)
        return [example.key for _ in range(8) for example in prompts.take()]

    stream = keys()
    assert [sorted(stream[i : i + 6]) for i in range(0, 24, 6)] == [list("012345")] * 4
    assert stream[:6] != stream[6:12]
    assert stream == keys()
    assert stream != keys(seed=4)
    wide = keys(batch=4)
    for step in range(8):  # 4 does not divide 6: no prompt twice in a step, the rest waits for another round
        assert len(set(wide[4 * step : 4 * step + 4])) == 4


def test_the_position_among_the_prompts_is_one_number() -> None:
    pool = [Example(str(i), f"{i}=", {}) for i in range(7)]
    whole, resumed = (PromptStream(pool, batch=2, seed=0) for _ in range(2))
    for _ in range(5):
        whole.take()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed.take() for _ in range(4)] == [whole.take() for _ in range(4)]
    for other, name in (
        (PromptStream(pool[:6], batch=2, seed=0), "the training prompts: expected 7 as in the checkpoint, got 6"),
        (PromptStream(pool, batch=3, seed=0), "prompts_per_step: expected 2"),
        (PromptStream(pool, batch=2, seed=1), "seed: expected 0"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            other.load_state_dict(whole.state_dict())


def test_demo_trains_both_from_the_same_start_and_shows_them(tmp_path: Path, capsys) -> None:
    main(
        [
            "demo",
            "--model",
            "tiny",
            "--task",
            "reverse",
            "--steps",
            "2",
            "--output_dir",
            str(tmp_path),
            "--threads",
            "1",
        ]
    )
    out = capsys.readouterr().out
    assert "GRPO" in out
    assert "RePO (variance)" in out
    assert f"picture and report: {tmp_path / 'report.png'}, {tmp_path / 'report.html'}" in out
    assert (tmp_path / "report.png").is_file()
    grpo, repo = read_metrics(tmp_path / "grpo"), read_metrics(tmp_path / "repo")
    assert grpo[0] == repo[0]
    assert grpo[1]["reward/mean"] == repo[1]["reward/mean"]
    assert "replay/size" in repo[2]
    assert "replay/size" not in grpo[2]


@pytest.mark.parametrize(("settings", "name"), [({"replay": "recency"}, "replay"), ({"top_k": 5}, "top_k, top_p")])
def test_dppo_topk_refuses_what_its_divergence_has_no_numbers_for(tmp_path: Path, settings, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* with dppo_topk"):
        prepared(tmp_path, objective="dppo_topk", **settings)


def test_dppo_topk_trains_on_the_likeliest_tokens_that_were_asked_for(tmp_path: Path, watched: Watched) -> None:
    reward = reward_file(tmp_path, "[float(i % 2) for i in range(len(prompts))]")
    train(prepared(tmp_path, objective="dppo_topk", divergence_top_k=3, steps=1, reward=reward))
    assert {len(ids) for s in watched.learned[0] for ids in s.top_ids} == {3}
    # sampler and learner compute the same float32 model
    assert read_metrics(tmp_path)[1]["divergence"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_truncated_sampling_trains_over_the_kept_tokens(tmp_path, beta):
    """Over the whole vocabulary the log-probabilities would be off by the mass that was cut off: 0.1 and more here."""
    settings = {"top_k": 5, "top_p": 0.9, "temperature": 1.5, "reward": "prefix_match", "beta": beta}
    run = prepared(tmp_path, steps=2, lr=1e-3, **settings)
    train(run)
    steps = [row for row in read_metrics(run.folder) if row["step"]]
    gaps = [row["sampler_gap_abs"] for row in steps if "sampler_gap_abs" in row]
    assert gaps
    assert max(gaps) < 1e-4
    if beta:
        # the reference over the same tokens: before the first update both are one model
        assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert steps[1]["kl"] > 0


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_layers_on_a_processor_without_its_products_are_said_to_be_slow(monkeypatch, tmp_path, fast) -> None:
    monkeypatch.setattr(gemm, "multiplies", lambda dtype, device: fast or dtype != torch.bfloat16)
    slow = "bfloat16 products run in slow loops on this processor, which has none: --autocast false --dtype float32"
    assert (slow in prepared(tmp_path / "a", autocast=True).notes) is not fast
    assert slow not in prepared(tmp_path / "b", autocast=False).notes


def test_a_float32_head_on_a_gpu_is_said_to_be_slow() -> None:
    gpu, said = torch.device("cuda"), "the head multiplies in float32, which is slow on a GPU"
    assert [note.split(":")[0] for note in precision_notes(TrainConfig(), gpu)] == [said]
    for settings in ({"head_autocast": True}, {"autocast": False}, {"dtype": "bfloat16"}):
        assert precision_notes(TrainConfig(**settings), gpu) == []


def test_a_run_whose_head_rounds_its_operands(tmp_path) -> None:
    run = prepared(tmp_path, steps=2, lr=1e-3, autocast=True, head_autocast=True)
    assert any(note.endswith("the learner computes its layers in bfloat16, its head too") for note in run.notes)
    seen, loss = [], repo_ops.linear_policy_loss
    with mock.patch.object(
        repo_ops, "linear_policy_loss", lambda *a, **k: seen.append(k["options"].operand_dtype) or loss(*a, **k)
    ):
        train(run)
    assert set(seen) == {torch.bfloat16}
