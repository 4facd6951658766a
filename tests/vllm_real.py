"""The vLLM engines with the real vLLM and SmolLM2 on a CPU: `make test-vllm`. `make test` does not collect this file.

Log-probabilities are compared with a forward of transformers over the whole text, in float32 on both sides. They differ
by up to 3e-5, and by up to 2e-4 once noise has made the weights larger: both add the numbers up in another order. With
weights of the step before they differ by more than 1.
"""

import copy
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import sampled
import torch

from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rollout import EngineError, GenerationStopped, SamplingSettings, never
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.rollout.load import ServerSettings
from repo_ops.trainer.rollout.vllm_engine import EXTENSION
from repo_ops.trainer.rollout.vllm_local import VLLMInProcess
from repo_ops.trainer.rollout.vllm_server import VLLMServer
from repo_ops.trainer.rollout.vllm_worker import WeightUpdates

pytestmark = pytest.mark.timeout(3600)

PROMPTS = ["2 * 5 = 10\n9 * 3 = 27\n6 * 7 =", "The", "1 * 1 = 1\n12 * 3 = 36\n2 * 4 =", "The"]
SETTINGS = SamplingSettings(num_samples=3, max_new_tokens=7, temperature=1.0, seed=5)
TOLERANCE = 1e-3
RUN = {
    "model": "smollm2", "task": "products", "prompts_per_step": 2, "group_size": 4, "train_size": 2, "heldout_size": 2,
    "heldout_samples": 1, "objective": "repo", "replay": "variance", "replay_min_size": 4, "replay_num": 4,
    "autocast": "false", "lr": 1e-4, "save_model": "false", "device": "cpu", "threads": 1, "sample_steps": 1,
    "sample_rows": 16,
}  # fmt: skip
# by place: no group is dead, so that every step has fresh tokens to compare
REWARD = """
def reward(prompts, completions, **columns):
    return [float(place % 3) for place in range(len(completions))]
"""
VLLM = {"max_model_len": 256, "enforce_eager": "true", "gpu_memory_utilization": 0.2}


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


def gap(engine, temperature, **settings):
    """Largest distance between the engine's log-probabilities and those of a forward over the whole text."""
    groups = engine.generate(PROMPTS, replace(SETTINGS, temperature=temperature, **settings))
    return sampled.gap(engine.model, engine.tokenizer, PROMPTS, groups, temperature)


def command_line(folder, steps, *, ranks=1, **settings):
    """A run of the console script; its process when it is done."""
    (folder / "reward.py").write_text(REWARD)
    settings = {**RUN, "steps": steps, "output_dir": folder, "reward": f"{folder / 'reward.py'}:reward", **settings}
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    scripts = Path(sys.executable).parent
    launch = [scripts / "torchrun", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [*launch, scripts / "repo-ops", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=3000)


def trained(folder, steps, **settings):
    """What a run said, and its metrics by step."""
    done = command_line(folder, steps, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [row for row in read_metrics(folder) if row["step"]]
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    return done.stdout, found


def check_gaps(steps, say, what):
    """The weights that vLLM samples from are the policy's, on the last step as on the first."""
    gaps = [row["sampler_gap_abs"] for row in steps]
    moved = [math.sqrt(2 * row["off_policy/approx_kl"]) for row in steps[1:]]
    say(f"{what}: mean |sampler - trainer log-probability| by step: {' '.join(f'{gap:.1e}' for gap in gaps)}")
    assert all(gap < TOLERANCE for gap in gaps)
    # stale weights would show: on replayed tokens, which older weights sampled, the policy has gone much further
    say(f"{what}: the same on replayed tokens, root mean square: {' '.join(f'{gap:.1e}' for gap in moved)}")
    assert min(moved) > 10 * TOLERANCE
    assert all(row["replay/share_of_sequences"] > 0 and row["grad_norm"] > 0 for row in steps[1:])


@pytest.fixture
def say(capsys):
    """Prints a line, whatever pytest does with what tests print."""

    def line(text):
        with capsys.disabled():
            print(f"\n    {text}", flush=True)

    return line


def test_training_in_process(tmp_path, say):
    """RePO: from step 2 on both prompts come round with replayed samples."""
    arguments = {f"engine_args.{name}": value for name, value in VLLM.items()}
    said, steps = trained(tmp_path, 5, engine="vllm", **arguments)
    sampler = re.search("completions from vLLM .* in this process, in float32, max_model_len 256; .* in float32", said)
    assert sampler, said
    say(sampler[0])
    check_gaps(steps, say, "in process")


@pytest.fixture(scope="module")
def vllm_serve(tmp_path_factory):
    """vLLM's own server in other processes, started as `vllm serve` starts it: (settings, its process)."""
    folder = tmp_path_factory.mktemp("server")
    model, _ = load_model("smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"model": model.name_or_path, "port": port, "host": "127.0.0.1", "dtype": "float32"}
    arguments |= {"logprobs-mode": "processed_logprobs", "worker-extension-cls": EXTENSION, "max-logprobs": 64}
    arguments |= {"max-model-len": 256, "gpu-memory-utilization": 0.2}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_API_KEY", "open sesame")  # of the server, and of all that call it
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENGINE_READY_TIMEOUT_S": "3000"}
    with (folder / "log").open("w") as log:
        # a session of its own: the engine is a child of the server, and both have to go
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
        try:
            for _ in range(1500):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield ServerSettings(url=f"http://127.0.0.1:{port}", retries=0, timeout=1200.0), process
        finally:
            end(process)
            patch.undo()


def end(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def server(vllm_serve):
    return vllm_serve[0]


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    """Five steps of one process with the server: its folder, what it said, its metrics."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *trained(folder, 5, **to(server))


def to(server):
    return {"engine": "vllm_server", "engine_args.url": server.url, "engine_args.timeout": server.timeout}


def test_training_with_a_server(alone, server, say):
    _, said, steps = alone
    sampler = re.search(f"completions from vLLM .* at {server.url}, in float32, max_model_len 256; .* float32", said)
    assert sampler, said
    say(sampler[0])
    check_gaps(steps, say, "with a server")


def test_two_ranks_with_a_server_make_the_run_of_one(alone, server, tmp_path, say):
    """The first gathers and sends the weights, each asks for its prompt; the completions are those of one rank."""
    said, steps = trained(tmp_path, 3, ranks=2, **to(server))
    assert "sharded over 2 ranks" in said
    check_gaps(steps, say, "with a server, two ranks")
    folder, _, steps_alone = alone
    ours, theirs = ([(row["step"], row["completion"]) for row in shown(each)] for each in (tmp_path, folder))
    assert ours == theirs[: len(ours)]
    assert {step for step, _ in ours} == {1, 2, 3}
    apart = {}
    # not what counts: a prompt may be computed on both ranks
    left_out = ("time/", "memory/", "tokens_per_second", "learner/micro_batches", "learner/tokens", "eval/")
    for row, other in zip(steps, steps_alone):
        for name in (name for name in row.keys() | other.keys() if not name.startswith(left_out)):
            expected = pytest.approx(other[name], rel=1e-3, abs=TOLERANCE, nan_ok=True)
            assert row[name] == expected, (row["step"], name)
        apart[row["step"]] = abs(row["grad_norm"] / other["grad_norm"] - 1)
    say(f"two ranks against one: gradient norms apart by {max(apart.values()):.1e} of themselves")


def shown(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").open()]


def test_two_ranks_with_an_engine_in_process_are_refused(tmp_path):
    done = command_line(tmp_path, 2, ranks=2, engine="vllm", model="tiny", task="reverse")
    assert done.returncode != 0
    assert "engine: expected hf or vllm_server with 2 ranks, got vllm, which lives in one process" in done.stderr


def test_the_server_samples_from_the_policy(server, smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    engine = VLLMServer(model, tokenizer, settings=server)
    engine.sync(0)
    assert gap(engine, 0.7) < TOLERANCE
    assert gap(engine, 1.3, top_k=9, top_p=0.9) < TOLERANCE
    assert gap(engine, 1.0, greedy=True, top_logps=3) < TOLERANCE
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    assert gap(engine, 2.0) > 1e-2
    engine.sync(1)
    assert gap(engine, 2.0) < TOLERANCE


def generated_tokens(server):
    """How many tokens the server has generated so far."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=600) as answer:
        found = re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def test_the_server_stops_when_asked(server, smollm2):
    engine = VLLMServer(*smollm2, stop=(), settings=server)
    engine.sync(0)
    before = generated_tokens(server)
    engine.should_stop = lambda: generated_tokens(server) > before
    with pytest.raises(GenerationStopped):
        engine.generate(PROMPTS, replace(SETTINGS, num_samples=16, max_new_tokens=200))
    engine.should_stop = never
    engine.generate(PROMPTS, SETTINGS)
    assert generated_tokens(server) - before < 0.9 * len(PROMPTS) * 16 * 200


def test_the_server_s_refusal_is_passed_on(server, smollm2):
    engine = VLLMServer(*smollm2, settings=server)
    engine.sync(0)
    engine._limits["max_model_len"] = 10**6
    with pytest.raises(EngineError, match=r"status 400: .*256"):
        engine.generate(PROMPTS, replace(SETTINGS, max_new_tokens=300))


def test_a_server_without_the_key_refuses(server, smollm2, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another")
    with pytest.raises(EngineError, match=r"status 401: .*; set VLLM_API_KEY to the server's key"):
        VLLMServer(*smollm2, settings=server)


def test_weights_of_another_run_are_noticed(server, smollm2, say):
    engine, other = (VLLMServer(*smollm2, settings=server) for _ in range(2))
    engine.sync(0)
    other.sync(0)
    with pytest.raises(EngineError, match="no longer holds the weights that it was sent after step 0") as failed:
        engine.generate(PROMPTS, SETTINGS)
    say(failed.value)


def test_other_weights_on_the_server_end_the_run(server, smollm2, monkeypatch, say):
    """Another run's weights come in between the sending and the comparison."""
    model = copy.deepcopy(smollm2[0])
    with torch.no_grad():
        model.model.norm.weight[7] += 1e-3
    engine, other = VLLMServer(*smollm2, settings=server), VLLMServer(model, smollm2[1], settings=server)
    ask = engine._client.ask

    def spoiled(path, body, *, timeout):
        if path == "/reset_prefix_cache":
            other.sync(1)
        return ask(path, body, timeout=timeout)

    monkeypatch.setattr(engine._client, "ask", spoiled)
    with pytest.raises(EngineError, match=r"model\.norm\.weight differs from the policy's") as failed:
        engine.sync(1)
    say(failed.value)


def test_a_server_that_dies(vllm_serve, smollm2, tmp_path, say):
    """The last test of the server."""
    settings, process = vllm_serve
    engine = VLLMServer(*smollm2, settings=settings)
    engine.sync(0)
    engine.should_stop = lambda: bool(end(process))
    gone = r"the server is gone \(.*\); see its log, and start it again"
    with pytest.raises(EngineError, match=gone) as failed:
        engine.generate(PROMPTS, SETTINGS)
    say(failed.value)
    with pytest.raises(EngineError, match=gone):
        engine.sync(1)
    assert not list(Path(settings.folder).glob("repo-ops-weights-*"))
    done = command_line(tmp_path, 1, **to(settings), **{"engine_args.retries": 0})
    assert done.returncode == 2
    assert re.search(f"^repo-ops train: engine: GET {settings.url}/v1/models: {gone}$", done.stderr, re.MULTILINE)


@pytest.fixture(scope="module")
def engine(smollm2):
    """The last to be made: it makes this process vLLM's, too."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    model = copy.deepcopy(smollm2[0])
    arguments = {**VLLM, "enforce_eager": True}
    return VLLMInProcess(model, smollm2[1], source=model.name_or_path, dtype="float32", **arguments)


def test_generate_before_sync_is_refused(engine):
    with pytest.raises(EngineError, match="expected sync"):
        engine.generate(PROMPTS, SETTINGS)
    engine.sync(0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_logps_are_those_of_transformers(engine, temperature):
    assert gap(engine, temperature) < TOLERANCE


def test_the_seed_decides(engine):
    groups = engine.generate(PROMPTS, replace(SETTINGS, temperature=1.5))
    again, other = (engine.generate(PROMPTS, replace(SETTINGS, seed=s, temperature=1.5)) for s in (5, 6))
    ids = [[[c.token_ids for c in group] for group in each] for each in (groups, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][1] != ids[0][3]  # equal prompts are not sampled alike
    assert len(set(ids[0][1])) > 1


def test_greedy_and_likely_tokens_are_those_of_transformers(engine, smollm2):
    ours, theirs = (
        each.generate(PROMPTS, replace(SETTINGS, greedy=True, top_logps=4))
        for each in (engine, HFGenerate(engine.model, smollm2[1]))
    )
    for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert (mine.token_ids, mine.text, mine.finished) == (other.token_ids, other.text, other.finished)
        assert mine.top_ids == other.top_ids
        torch.testing.assert_close(torch.tensor(mine.top_logps), torch.tensor(other.top_logps), atol=TOLERANCE, rtol=0)


def test_kept_tokens_are_those_of_transformers(engine, smollm2):
    settings = replace(SETTINGS, temperature=1.3, top_k=9, top_p=0.9)
    assert gap(engine, 1.3, top_k=9, top_p=0.9) < TOLERANCE
    for ours in chain(*engine.generate(PROMPTS, settings)):
        assert all(1 <= len(kept) <= 9 and token in kept for token, kept in zip(ours.token_ids, ours.kept_ids))
    ours, theirs = (each.generate(PROMPTS, settings) for each in (engine, HFGenerate(engine.model, smollm2[1])))
    # the first token has the same predecessors whatever is drawn
    assert [g[0].kept_ids[0] for g in ours] == [g[0].kept_ids[0] for g in theirs]


@pytest.mark.parametrize("part", ["embed_tokens", "self_attn", "mlp", "layernorm", "model.norm"])
def test_each_kind_of_weight_arrives(engine, part):
    """Apart from each other: a tied head, fused projections and norms reach vLLM in different ways."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.2)
    assert gap(engine, 2.0) > 1e-2
    engine.sync(1)
    assert gap(engine, 2.0) < TOLERANCE


def test_other_weights_end_the_run(engine, monkeypatch):
    load = WeightUpdates.repo_ops_load

    def load_and_spoil(self, weights):
        load(self, weights)
        self.model_runner.get_model().model.norm.weight.data[7] += 1e-3

    monkeypatch.setattr(
        type(engine._llm.llm_engine.model_executor.driver_worker.worker), "repo_ops_load", load_and_spoil
    )
    with pytest.raises(EngineError, match=r"model\.norm\.weight differs from the policy's"):
        engine.sync(2)
    monkeypatch.undo()
    engine.sync(2)


def test_should_stop(engine):
    asked = iter(range(100))
    engine.should_stop = lambda: next(asked) >= 3
    with pytest.raises(GenerationStopped):
        engine.generate(PROMPTS, SETTINGS)
    engine.should_stop = never
    assert gap(engine, 1.0) < TOLERANCE  # nothing of the broken-off call comes back
