"""Whole runs under torchrun on two gloo ranks, against the same runs on one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVLLM
from test_distributed import launch
from tiny_runs import TINY, arguments, no_pictures, prepared, repeatable  # noqa: F401
from worker_run import RUNS

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.door import check_ranks
from repo_ops.trainer.loop import train
from repo_ops.trainer.models import load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of two-rank runs, and what the worker printed."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, [line for line in launch("worker_run.py", str(folder)) if line.startswith("check ")]


@pytest.mark.slow
def test_what_ranks_do_together_holds_on_all(over_ranks: tuple[Path, list[str]]) -> None:
    assert over_ranks[1] == [
        "check each prompt is kept on one rank",
        "check completions are the same everywhere",
        "check sharing prompts out changes no completion",
        "check parameters are split again",
        "check a rank without a prompt",
        "check one rank stops all",
        "check a prompt that one rank refuses is heard of on all",
        "check the gathered model is as large as planned",
        "check activations of a shard are as planned",
        "check a mistake on the first rank is heard on all",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_run_of_one(name: str, over_ranks: tuple[Path, list[str]], tmp_path: Path) -> None:
    train(prepared(tmp_path, **RUNS[name]))
    found, expected = repeatable(over_ranks[0] / name), repeatable(tmp_path)
    assert len(found) == len(expected) == RUNS[name]["steps"] + 1
    for ours, alone in zip(found, expected, strict=True):
        assert ours.keys() == alone.keys()
        for key in ours.keys() - {"learner/micro_batches", "learner/tokens"}:  # a prompt may be computed on both
            assert ours[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key
    assert found[-1]["replay/drawn"] > 0
    assert any(line["learner/skipped"] == 0 for line in found[1:])
    ours, alone = (load_model(str(folder / "model"))[0].state_dict() for folder in (over_ranks[0] / name, tmp_path))
    start = load_model("tiny")[0].state_dict()
    assert ours.keys() == alone.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, alone[key], rtol=0, atol=1e-6, msg=key)
    trained = [key for key in start if not torch.equal(alone[key], start[key])]
    # a head with an adapter, tied before, is exported as a head of its own
    layers = ("q_proj", "down_proj", "lm_head")
    assert trained == [key for key in start if name != "lora" or key.split(".")[-2] in layers]


@pytest.mark.slow
def test_torchrun_starts_a_run_from_the_repository_root(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    scripts = Path(sys.executable).parent
    launch = [scripts / "torchrun", "--standalone", "--nproc_per_node", "2", scripts / "repo-ops"]
    command = [*map(str, launch), *arguments(tmp_path, steps=1, replicas=2)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "gradients reduced in float32) sharded over 2 ranks in 2 copies, no autocast" in done.stdout
    assert done.stdout.count("Result") == 1  # one rank speaks
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [0, 1]


@pytest.mark.slow
def test_two_ranks_share_a_vllm_server(tmp_path: Path) -> None:
    """The first gathers the weights and sends them; each asks for the completions of its prompts."""
    model, tokenizer = load_model("tiny")
    settings = {"engine": "vllm_server", "steps": 3, "lr": 1e-4, "reward": "prefix_match"}
    with FakeVLLM(copy.deepcopy(model), tokenizer) as server:
        settings["engine_args"] = {"url": server.url}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        scripts = Path(sys.executable).parent
        start = [scripts / "torchrun", "--standalone", "--nproc_per_node", "2", scripts / "repo-ops"]
        command = [*map(str, start), *arguments(tmp_path / "two", **settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, done.stderr[-4000:]
        sent = sum(path == "/collective_rpc" and b["method"] == "repo_ops_load_folder" for path, b in server.requests)
    assert sent == 4  # before the first step and after each, by one rank
    assert f"completions from vLLM 0.32.0 at {server.url}, in float32" in done.stdout
    with FakeVLLM(model, tokenizer) as server:
        train(prepared(tmp_path / "one", **{**settings, "engine_args": {"url": server.url}}))
    found, expected = repeatable(tmp_path / "two"), repeatable(tmp_path / "one")
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    for ours, alone in zip(found, expected, strict=True):
        assert ours.keys() == alone.keys()
        for key in ours.keys() - {"learner/micro_batches", "learner/tokens"}:
            assert ours[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), key
    assert all(line["sampler_gap_abs"] < 1e-4 < line["grad_norm"] for line in found[1:])


def test_two_ranks_have_no_vllm_in_process(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), **{**TINY, "engine": "vllm"})
    with pytest.raises(
        ValueError, match=r"engine: expected hf or vllm_server with 2 ranks, got vllm.*; start a server"
    ):
        check_ranks(config, Ranks(0, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 2}, "replicas: expected a divisor of the 1 ranks, got 2"),
        ({"cpu_offload": True}, "cpu_offload: expected a sharded model, got one rank; start more with torchrun"),
        ({"liger": True}, "liger: expected a GPU, whose kernels these are, got cpu; leave it out"),
        (
            {"lora_rank": 2, "lora_targets": ["k_proj", "kproj"]},
            "lora_targets: expected layers of the model, .*'kproj'",
        ),
        ({"lora_rank": 2, "lora_targets": ["embed_tokens"]}, "lora_targets: expected linear layers, .* a Embedding"),
        ({"lora_rank": 2, "lora_targets": "all"}, "lora_targets: expected 'all-linear' or a list"),
        ({"lora_alpha": 2.0}, "lora_alpha: expected nothing without lora_rank, got 2.0; add --lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha: expected more than 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **settings)


def test_a_rank_by_itself_asks_nobody() -> None:
    ranks = Ranks()
    assert (ranks.is_first, ranks.group, ranks.keeps("anything")) == (True, None, True)
    metrics = {"replay/size": 4.0, "replay/age_steps_mean": 2.0, "replay/age_steps_p95": 3.0}
    assert ranks.buffer_metrics(metrics) == metrics


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (7, 3), (3, 5)])
def test_slices_of_ranks_are_the_whole_and_alike(count: int, size: int) -> None:
    parts = [list(Ranks(rank, size).slice(range(count))) for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
