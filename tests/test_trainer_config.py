"""Settings: each mistake is one sentence that names the key, and no key goes unread."""

import inspect
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import repo_ops.trainer
from repo_ops.head import gemm
from repo_ops.trainer.config import ELSEWHERE, TrainConfig, learning_rate, parse_config, save_config
from repo_ops.trainer.demo import Demo, demo_configs, parse_demo


def test_names_given_for_those_of_trl_are_settings() -> None:
    settings = {each.name for each in fields(TrainConfig)}
    assert not settings & {*ELSEWHERE}
    assert {name.split(".")[0] for name in ELSEWHERE.values()} <= settings


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_config(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repaly", "variance"], "unknown key 'repaly'; did you mean 'replay'?"),
        (["--group-size=4"], "unknown key 'group-size'; did you mean 'group_size'?"),
        (["--objectiv_args.eps_high", "0.3"], "unknown key 'objectiv_args'; did you mean 'objective_args'?"),
        (["--zzz"], "unknown key 'zzz'; see --help"),
        (["--learning_rate", "1e-6"], "unknown key 'learning_rate'; what TRL calls so is 'lr' here"),
        (["--epsilon_high=0.28"], "unknown key 'epsilon_high'; what TRL calls so is 'objective_args.eps_high' here"),
        (["--group_size", "1"], "group_size: expected at least 2, got 1"),
        (["--steps=0"], "steps: expected at least 1, got 0"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--lr", "-1"], "lr: expected at least 0, got -1.0"),
        (["--temperature", "0"], "temperature: expected more than 0, got 0.0"),
        (["--betas", "[0.9, 1.0]"], "betas: expected two numbers in [0, 1), got (0.9, 1.0)"),
        (["--top_p", "1.5"], "top_p: expected more than 0 and at most 1, got 1.5"),
        (["--top_p", "0.9"], "top_k, top_p: expected 0 and 1, or a top_k up to 512, got 0 and 0.9"),
        (["--top_k", "513"], "top_k, top_p: expected 0 and 1, or a top_k up to 512, got 513 and 1.0"),
        (["--engine_args.url", "http://a"], "engine_args: expected none with engine hf, got url"),
        (["--engine", "vllm", "--engine_args.seed", "1"], "engine_args: seed is not yours to set: every request has"),
        (["--engine", "vllm_server", "--engine_args.ulr", "x"], "engine_args: unknown key 'ulr'; did you mean 'url'?"),
        (
            ["--engine", "vllm_server", "--engine_args.timeout", "0"],
            "engine_args.timeout: expected more than 0 seconds",
        ),
        (["--warmup", "9", "--steps", "5"], "warmup: expected at most steps = 5, got 9"),
        (["--prompts_per_step", "9", "--train_size", "8"], "prompts_per_step: expected at most train_size = 8, got 9"),
        (["--objective_args.beta", "0.1"], "objective_args: beta has a key of its own"),
        (["--replay", "random", "--top_k", "5"], "top_k, top_p: expected 0 and 1 with replay, got 5 and 1.0"),
        (["--replay", "random", "--replay_capacity", "4"], "replay_capacity: expected at least replay_min_size = 8"),
        (["--lora_alpha", "8"], "lora_alpha: expected nothing without lora_rank, got 8.0; add --lora_rank"),
        (["--sample_steps", "0", "--sample_rows", "9"], "sample_rows: expected nothing without sample_steps, got 9"),
        (["--project", "mine"], "project: expected nothing without report_to, got 'mine'; add --report_to"),
        (
            ["--autocast", "false", "--head_autocast", "true"],
            "head_autocast: expected nothing without autocast, got True; add --autocast",
        ),
        (
            ["--dtype", "bfloat16", "--head_autocast", "true"],
            "head_autocast: expected nothing with dtype bfloat16, whose head is rounded, got True; leave it out",
        ),
        (["--save_steps", "null", "--keep_last", "3"], "keep_last: expected nothing without checkpoints, got 3"),
        (
            ["--eval_steps", "5", "--heldout_size", "0"],
            "eval_steps: expected held-out prompts beside it, got none and 5",
        ),
        (
            ["--data", "x.jsonl", "--reward", "exact_match", "--eval_data_args.split", "test"],
            "eval_data_args: expected nothing without eval_data, got {'split': 'test'}; add --eval_data",
        ),
        (
            ["--data", "x.jsonl", "--reward", "exact_match", "--eval_steps", "5"],
            "eval_steps: expected held-out prompts beside it, got none and 5; set heldout_size or eval_data",
        ),
        (["--chat", "true"], "chat: expected nothing without data, got True; add --data"),
        (["--max_prompt_tokens", "9"], "max_prompt_tokens: expected nothing without data, got 9; add --data"),
        (["--data", "x.jsonl"], "reward: expected one with data, got none; for example --reward exact_match"),
        (["--data", "x.jsonl", "--task", "gcd"], "task: expected none with data, got 'gcd'"),
        (["--reward", "exact_match", "--rewards.prefix_match", "1"], "reward: expected none with rewards"),
        (["--reward_timeout", "0"], "reward_timeout: expected more than 0, got 0.0"),
        (["--eval_k", "[1, 9]"], "eval_k: expected numbers from 1 to heldout_samples = 8, got [1, 9]"),
        (["--dynamic_sampling_max_rounds", "0"], "dynamic_sampling_max_rounds: expected at least 1, got 0"),
        (["--lr", "fast"], "Got value: fast"),
        (["--schedule", "step"], "Got value: step"),
        (["--config", "nowhere.yaml"], "config: expected a readable YAML file, got nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(capsys, arguments)


def test_yaml_dotted_overrides_and_their_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1.0e-4\nsteps: 3\nobjective_args: {eps_low: 0.1}\nbetas: [0.8, 0.9]\n")
    config = parse_config(["--config", str(file), "--steps", "5", "--objective_args.eps_high", "0.3"])
    assert config == TrainConfig(lr=1e-4, steps=5, objective_args={"eps_low": 0.1, "eps_high": 0.3}, betas=(0.8, 0.9))


def test_an_unknown_key_in_yaml_names_the_file(capsys, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stepps: 3\n")
    assert f"{file}: unknown key 'stepps'; did you mean 'steps'?" in refused(capsys, [f"--config={file}"])
    file.write_text("- steps\n")
    assert "config: expected key: value lines" in refused(capsys, ["--config", str(file)])


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(
        replay="variance", betas=(0.8, 0.9), objective_args={"eps_high": 0.3}, max_grad_norm=float("inf")
    )
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_every_key_is_read_somewhere() -> None:
    folder = Path(repo_ops.trainer.__file__).parent
    source = "\n".join(path.read_text() for path in folder.glob("*.py") if path.name != "config.py")
    own = (folder / "config.py").read_text().split("def learning_rate")[1]
    own += "".join(inspect.getsource(each.fget) for each in vars(TrainConfig).values() if isinstance(each, property))
    unread = [f.name for f in fields(TrainConfig) if not re.search(rf"(config|self)\.{f.name}\b", source + own)]
    assert unread == []


def test_every_key_has_a_line_of_help(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert re.search(rf"--{field.name} \S+ (?!\(type)", text), f"{field.name} has no description"


def test_learning_rate_by_hand() -> None:
    base = TrainConfig(lr=8.0, steps=6, warmup=2)
    linear, cosine = replace(base, schedule="linear"), replace(base, schedule="cosine")
    assert [learning_rate(base, s) for s in range(1, 7)] == [4, 8, 8, 8, 8, 8]
    assert [learning_rate(linear, s) for s in range(1, 7)] == [4, 8, 8, 6, 4, 2]
    # cos(pi p) at p = 0, 1/4, 1/2, 3/4 of the way from 8 to 0
    assert [round(learning_rate(cosine, s), 4) for s in range(1, 7)] == [4, 8, 8, 6.8284, 4, 1.1716]


@pytest.mark.parametrize("fast", [True, False])
def test_the_demo_computes_in_bfloat16_only_where_the_processor_does(monkeypatch, fast) -> None:
    monkeypatch.setattr(gemm, "multiplies", lambda dtype, device: fast or dtype != torch.bfloat16)
    assert [config.autocast for config in demo_configs(Demo()).values()] == [fast, fast]


def test_demo_reads_its_own_keys(capsys) -> None:
    assert parse_demo(["--steps", "3", "--model", "tiny"]) == Demo(steps=3, model="tiny")
    with pytest.raises(SystemExit):
        parse_demo(["--stps", "3"])
    assert "unknown key 'stps'; did you mean 'steps'?" in capsys.readouterr().err


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="lr: expected at least 0, got nan"):
        TrainConfig(lr=float("nan"))
    with pytest.raises(ValueError, match="rewards: expected finite weights"):
        TrainConfig(rewards={"exact_match": float("nan")})
