"""The vLLM engines with the real vLLM and SmolLM2 on a CPU: `make test-vllm`. `make test` does not collect this file.

Log-probabilities are compared with a forward of transformers over the whole text, in float32 on both sides. They differ
by up to 3e-5, and by up to 2e-4 once noise has made the weights larger: both add the numbers up in another order. With
weights of the step before they differ by more than 1.
"""

import copy
import os
import subprocess
import sys
import time
import urllib.request
from itertools import chain
from pathlib import Path

import pytest
import torch

from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rollout import EngineError, GenerationStopped, encode_prompts, never
from repo_ops.trainer.rollout.engine_args import ServerSettings
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.rollout.vllm_local import EXTENSION, VLLMInProcess
from repo_ops.trainer.rollout.vllm_server import VLLMServer
from repo_ops.trainer.rollout.vllm_worker import WeightUpdates

pytestmark = pytest.mark.timeout(1500)

PROMPTS = ["2 * 5 = 10\n9 * 3 = 27\n6 * 7 =", "The", "1 * 1 = 1\n12 * 3 = 36\n2 * 4 =", "The"]
SETTINGS = {"num_samples": 3, "max_new_tokens": 7, "seed": 5}
TOLERANCE = 1e-3
PORT = 8129
RUN = {
    "model": "smollm2", "task": "products", "prompts_per_step": 2, "group_size": 4, "train_size": 2, "heldout_size": 2,
    "heldout_samples": 1, "objective": "repo", "replay": "variance", "replay_min_size": 4, "replay_num": 4,
    "autocast": "false", "lr": 1e-5, "save_model": "false", "device": "cpu", "threads": 1,
}  # fmt: skip
VLLM = {"max_model_len": 256, "enforce_eager": "true", "gpu_memory_utilization": 0.2}


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


def gap(engine, temperature, **settings):
    """Largest distance between the engine's log-probabilities and those of a forward over the whole text."""
    groups = engine.generate(PROMPTS, **{**SETTINGS, **settings}, temperature=temperature)
    worst = 0.0
    for prompt, group in zip(encode_prompts(engine._answers.tokenizer, PROMPTS), groups, strict=True):
        for c in group:
            with torch.no_grad():
                logits = engine.model(torch.tensor([[*prompt, *c.token_ids]])).logits[0, len(prompt) - 1 : -1]
            logps = torch.log_softmax(logits.double() / temperature, -1)
            for place, token in enumerate(c.token_ids):
                kept = logps[place, list(c.kept_ids[place])].logsumexp(0) if c.kept_ids else 0.0
                worst = max(worst, abs(float(logps[place, token] - kept) - c.logps[place]))
    return worst


def command_line(folder, steps, **settings):
    """A run of the console script; its metrics by step."""
    settings = {**RUN, "steps": steps, "output_dir": folder, **settings}
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    script = Path(sys.executable).with_name("repo-ops")
    done = subprocess.run([script, "train", *arguments], capture_output=True, text=True, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [row for row in read_metrics(folder) if row["step"]]


def test_training_in_process(tmp_path):
    """RePO: from step 2 on both prompts come round with replayed samples."""
    arguments = {f"engine_args.{name}": value for name, value in VLLM.items()}
    steps = command_line(tmp_path, 5, engine="vllm", **arguments)
    assert len(steps) == 5
    assert sum(row["replay/share_of_sequences"] for row in steps) > 0
    assert sum(row["grad_norm"] for row in steps) > 0
    # on step 5 as on step 1: the weights that vLLM samples from are the policy's
    assert all(row["sampler_gap_abs"] < 1e-3 for row in steps if "sampler_gap_abs" in row)
    assert "sampler_gap_abs" in steps[-1] or "sampler_gap_abs" in steps[-2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """vLLM's own server in another process, started as `vllm serve` starts it."""
    folder = tmp_path_factory.mktemp("server")
    model, _ = load_model("smollm2")
    arguments = {
        "model": model.name_or_path,
        "port": PORT,
        "host": "127.0.0.1",
        "dtype": "float32",
        "max-model-len": 256,
    }
    arguments |= {"logprobs-mode": "processed_logprobs", "worker-extension-cls": EXTENSION, "max-logprobs": 64}
    arguments |= {"gpu-memory-utilization": 0.2}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        )
        try:
            for _ in range(600):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield ServerSettings(url=f"http://127.0.0.1:{PORT}", retries=0)
        finally:
            process.terminate()
            process.wait(60)


def test_training_with_a_server(server, tmp_path):
    steps = command_line(tmp_path, 2, engine="vllm_server", **{"engine_args.url": server.url})
    assert len(steps) == 2
    assert all(row["sampler_gap_abs"] < 1e-3 for row in steps if "sampler_gap_abs" in row)


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


def test_the_server_stops_when_asked(server, smollm2):
    engine = VLLMServer(*smollm2, stop=(), settings=server)
    engine.sync(0)
    engine.should_stop = lambda: True
    started = time.monotonic()
    with pytest.raises(GenerationStopped):
        engine.generate(PROMPTS, **{**SETTINGS, "num_samples": 16, "max_new_tokens": 200}, temperature=1.0)
    stopped = time.monotonic() - started
    engine.should_stop = never
    engine.generate(PROMPTS, **SETTINGS, temperature=1.0)
    assert stopped < 60  # 12,800 tokens take minutes


def test_the_server_s_refusal_is_passed_on(server, smollm2):
    engine = VLLMServer(*smollm2, settings=server)
    engine.sync(0)
    engine._limits["max_model_len"] = 10**6
    with pytest.raises(EngineError, match=r"status 400: .*256"):
        engine.generate(PROMPTS, **{**SETTINGS, "max_new_tokens": 300}, temperature=1.0)


@pytest.fixture(scope="module")
def engine(smollm2):
    """The last to be made: it makes this process vLLM's, too."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    model = copy.deepcopy(smollm2[0])
    arguments = {**VLLM, "enforce_eager": True}
    return VLLMInProcess(model, smollm2[1], source=model.name_or_path, dtype="float32", **arguments)


def test_generate_before_sync_is_refused(engine):
    with pytest.raises(EngineError, match="expected sync"):
        engine.generate(PROMPTS, **SETTINGS, temperature=1.0)
    engine.sync(0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_logps_are_those_of_transformers(engine, temperature):
    assert gap(engine, temperature) < TOLERANCE


def test_the_seed_decides(engine):
    groups = engine.generate(PROMPTS, **SETTINGS, temperature=1.5)
    again, other = (engine.generate(PROMPTS, **{**SETTINGS, "seed": s}, temperature=1.5) for s in (5, 6))
    ids = [[[c.token_ids for c in group] for group in each] for each in (groups, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][1] != ids[0][3]  # equal prompts are not sampled alike
    assert len(set(ids[0][1])) > 1


def test_greedy_and_likely_tokens_are_those_of_transformers(engine, smollm2):
    ours, theirs = (
        each.generate(PROMPTS, **SETTINGS, temperature=1.0, greedy=True, top_logps=4)
        for each in (engine, HFGenerate(engine.model, smollm2[1]))
    )
    for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert (mine.token_ids, mine.text, mine.finished) == (other.token_ids, other.text, other.finished)
        assert mine.top_ids == other.top_ids
        torch.testing.assert_close(torch.tensor(mine.top_logps), torch.tensor(other.top_logps), atol=TOLERANCE, rtol=0)


def test_kept_tokens_are_those_of_transformers(engine, smollm2):
    settings = {**SETTINGS, "temperature": 1.3, "top_k": 9, "top_p": 0.9}
    assert gap(engine, 1.3, top_k=9, top_p=0.9) < TOLERANCE
    for ours in chain(*engine.generate(PROMPTS, **settings)):
        assert all(1 <= len(kept) <= 9 and token in kept for token, kept in zip(ours.token_ids, ours.kept_ids))
    ours, theirs = (each.generate(PROMPTS, **settings) for each in (engine, HFGenerate(engine.model, smollm2[1])))
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
        engine.generate(PROMPTS, **SETTINGS, temperature=1.0)
    engine.should_stop = never
    assert gap(engine, 1.0) < TOLERANCE  # nothing of the broken-off call comes back
