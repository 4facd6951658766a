"""The engine behind HTTP, with a server on localhost: what it samples, what it is sent, and every way it can fail."""

import copy
import fcntl
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import sampled
import torch
from fake_vllm import FakeVLLM, Worker
from tiny_runs import TINY, no_pictures  # noqa: F401 - a fixture that takes effect by being here

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.models import TinyModel, load_model
from repo_ops.trainer.rollout import EngineError, GenerationStopped, SamplingSettings, encode_prompts
from repo_ops.trainer.rollout.hf import stop_token_ids
from repo_ops.trainer.rollout.load import ServerSettings
from repo_ops.trainer.rollout.vllm_local import VLLMInProcess
from repo_ops.trainer.rollout.vllm_server import VLLMServer
from repo_ops.trainer.run import prepare

PROMPTS = ["r:abc=", "sort", "c:abcdefgh=", "r:abc="]
SETTINGS = SamplingSettings(num_samples=3, max_new_tokens=7, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, tokenizer = load_model(
        "tiny", tiny=TinyModel(warm_start_steps=0), cache_dir=tmp_path_factory.mktemp("models")
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
    return model, tokenizer


@pytest.fixture
def server(tiny):
    """One that holds other weights than the policy until it is sent them."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    with FakeVLLM(model, tiny[1]) as server:
        yield server


@pytest.fixture
def engine(tiny, server, tmp_path):
    engine = VLLMServer(copy.deepcopy(tiny[0]), tiny[1], settings=settings(server, tmp_path))
    engine.sync(0)
    return engine


def settings(server, folder, **changes):
    values = {"url": server.url, "timeout": 20.0, "retries": 0, "weights_dir": str(folder)}
    return ServerSettings(**{**values, **changes})


def gap(engine, groups, temperature):
    return sampled.gap(engine.model, engine.tokenizer, PROMPTS, groups, temperature)


def test_completions_are_the_policy_s_and_follow_the_seed(engine, server, tiny):
    groups = engine.generate(PROMPTS, SETTINGS)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert gap(engine, groups, 0.7) < 1e-5
    assert engine.generate(PROMPTS, SETTINGS) == groups
    assert engine.generate(PROMPTS, replace(SETTINGS, seed=6)) != groups
    sent = [body for path, body in server.requests if path == "/v1/completions"][: len(PROMPTS)]
    assert sorted(body["prompt"] for body in sent) == sorted(encode_prompts(tiny[1], PROMPTS))
    assert len({body["seed"] for body in sent}) == 4  # equal prompts are not sampled alike
    assert engine.generate([], SETTINGS) == []


def test_a_completion_ends_as_with_transformers(tiny, server, tmp_path):
    stop = ("a", "b", "7")
    engine = VLLMServer(tiny[0], tiny[1], stop, settings=settings(server, tmp_path))
    engine.sync(0)
    stops = set(stop_token_ids(tiny[0], tiny[1], stop).tolist())
    completions = list(
        chain.from_iterable(engine.generate(PROMPTS, replace(SETTINGS, num_samples=16, temperature=2.0)))
    )
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert c.finished == (c.token_ids[-1] in stops)
        assert not stops & set(c.token_ids[:-1])
        assert not set(c.text) & set(stop)


def test_greedy_top_logps_and_kept_tokens(engine):
    greedy = engine.generate(PROMPTS, replace(SETTINGS, temperature=1.0, greedy=True))
    assert all(len(set(group)) == 1 and len(group) == 3 for group in greedy)
    assert gap(engine, greedy, 1.0) < 1e-5

    flat = replace(SETTINGS, temperature=2.0)
    likely = engine.generate(PROMPTS, replace(flat, top_logps=4))
    for c in (c for group in likely for c in group):
        for token, logp, ids, logps in zip(c.token_ids, c.logps, c.top_ids, c.top_logps, strict=True):
            assert len(ids) == len(set(ids)) == 4
            assert list(logps[:3]) == sorted(logps[:3], reverse=True)
            assert logps[ids.index(token)] == pytest.approx(logp, abs=1e-6)

    truncated = engine.generate(PROMPTS, replace(flat, top_k=5, top_p=0.9))
    assert gap(engine, truncated, 2.0) < 1e-4
    sizes = {len(kept) for group in truncated for c in group for kept in c.kept_ids}
    assert max(sizes) <= 5
    assert len(sizes) > 1  # top_p bites, too


def test_new_weights_are_what_it_samples_from(engine, server, tmp_path):
    with torch.no_grad():
        engine.model.model.layers[0].mlp.up_proj.weight.add_(0.3)
    assert gap(engine, engine.generate(PROMPTS, SETTINGS), 0.7) > 1e-2
    engine.sync(1)
    assert gap(engine, engine.generate(PROMPTS, SETTINGS), 0.7) < 1e-5
    assert engine.version == 1
    assert list(tmp_path.iterdir()) == []  # no copy of the weights is left behind
    calls = [body["method"] if path == "/collective_rpc" else path for path, body in server.requests]
    # the cache is forgotten after the weights came, before anything is sampled
    assert calls[-8:-5] == ["repo_ops_load_folder", "/reset_prefix_cache", "repo_ops_digests"]
    assert calls[-1] == "repo_ops_held"


def test_generate_before_sync_is_refused(tiny, server, tmp_path):
    with pytest.raises(EngineError, match="expected sync"):
        VLLMServer(*tiny, settings=settings(server, tmp_path)).generate(PROMPTS, SETTINGS)


def corrupt(name, kind):
    """A fault of the worker: what it says of its parameter `name` comes from other weights."""

    def fault(handler, body, answer):
        found = answer()
        if body["method"] == kind:
            digests = found["results"][0]["parameters"] if kind == "repo_ops_digests" else found["results"][0]
            numel, dtype, bits = digests[name]
            digests[name] = (numel, dtype, bits + 1)
        handler.send(found)

    return fault


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("repo_ops_digests", r"model\.norm\.weight differs from the policy's after the weights were sent"),
        ("repo_ops_load_folder", r"read other weights than were sent, model\.norm\.weight for one"),
    ],
)
def test_other_weights_on_the_server_end_the_run(engine, server, tmp_path, kind, sentence):
    server.faults["/collective_rpc"] = corrupt("model.norm.weight", kind)
    with pytest.raises(EngineError, match=sentence):
        engine.sync(1)
    assert engine.version == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "fault", "sentence"),
    [
        ("/v1/completions", lambda h, b, a: h.hang_up(), "the server is gone"),
        ("/v1/completions", lambda h, b, a: h.send(b'{"choices": ['), "expected JSON, got"),
        ("/v1/completions", lambda h, b, a: h.send([]), "expected completions with token ids"),
        ("/v1/completions", lambda h, b, a: h.send({"choices": a()["choices"][1:]}), "expected 3 completions .* got 2"),
        (
            "/v1/completions",
            lambda h, b, a: h.send({"choices": [{**c, "token_ids": [4] * 9} for c in a()["choices"]]}),
            "log-probabilities of another length",
        ),
        (
            "/v1/completions",
            lambda h, b, a: h.send(
                {"choices": [{"index": i, "token_ids": [], "logprobs": {"token_logprobs": [], "top_logprobs": []}}
                             for i in range(3)]}
            ),
            "got 0 tokens without one; vLLM cut or aborted",
        ),
        (
            "/v1/completions",
            lambda h, b, a: h.send({"error": {"message": "max_tokens is too large"}}, 400),
            "status 400: max_tokens is too large",
        ),
        ("/v1/completions", lambda h, b, a: h.send({"detail": "overloaded"}, 503), "status 503: overloaded"),
        ("/v1/completions", lambda h, b, a: h.stall(3.0), "no answer within 1 s"),
        ("/reset_prefix_cache", lambda h, b, a: h.send({"success": False}), "did not reset its prefix cache"),
        ("/collective_rpc", lambda h, b, a: h.send(b"", 500), "status 500: no reason given"),
        ("/collective_rpc", lambda h, b, a: h.send({"results": ["None"]}), "expected digests of the weights, got None"),
        ("/collective_rpc", lambda h, b, a: h.stall(3.0), "no answer within 1 s"),
    ],
)  # fmt: skip
def test_what_the_server_does_wrong_is_a_sentence(engine, server, path, fault, sentence):
    server.faults[path] = fault
    if "within 1 s" in sentence:
        engine.settings = ServerSettings(**{**vars(engine.settings), "timeout": 1.0, "sync_timeout": 1.0})
    call = partial(engine.generate, PROMPTS, SETTINGS) if path == "/v1/completions" else partial(engine.sync, 1)
    with pytest.raises(EngineError, match=sentence):
        call()


def test_a_server_that_is_not_there(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=r"the server is gone \(.*refused.*\); see its log, and start it again"):
        VLLMServer(*tiny, settings=ServerSettings(url=url, retries=0, weights_dir=str(tmp_path)))


def test_a_broken_connection_and_a_busy_server_are_tried_again(engine, server, monkeypatch):
    waits = []
    expected = engine.generate(PROMPTS[:1], SETTINGS)
    # the client's own event: others in this process wait, too (a progress bar's monitor does)
    monkeypatch.setattr(engine._client._closing, "wait", lambda seconds: waits.append(seconds))
    answers = iter([lambda h: h.hang_up(), lambda h: h.send({}, 503)])
    server.faults["/v1/completions"] = lambda h, b, a: next(answers, lambda h: h.send(a()))(h)
    engine._client.retries = 2
    assert engine._client.ask("/v1/completions", engine_body(server), timeout=20.0)["choices"]
    assert waits == [1.0, 2.0]
    server.faults.clear()
    assert engine.generate(PROMPTS[:1], SETTINGS) == expected


def engine_body(server):
    return next(body for path, body in server.requests if path == "/v1/completions")


@pytest.mark.parametrize("reason", ["stop", "failure"])
def test_the_rest_is_broken_off(engine, server, reason):
    """After a stop, or one request's failure, nobody waits for the requests that are still under way."""
    hung_up, under_way = threading.Semaphore(0), []
    others = 4 if reason == "stop" else 3

    def slow(handler, body, answer):
        if reason == "failure" and body["seed"] == first_seed:
            while len(under_way) < others:
                time.sleep(0.01)
            return handler.send({"detail": "no"}, 400)
        under_way.append(body)
        handler.connection.settimeout(60)
        assert handler.connection.recv(1) == b""  # the client's end closes
        return hung_up.release()

    engine.generate(PROMPTS, SETTINGS)
    first_seed = engine_body(server)["seed"]
    server.faults["/v1/completions"] = slow
    engine.should_stop = lambda: reason == "stop" and len(under_way) == others
    with pytest.raises(GenerationStopped if reason == "stop" else EngineError):
        engine.generate(PROMPTS, SETTINGS)
    for _ in range(others):  # long before the time-out of the request
        assert hung_up.acquire(timeout=15)


@pytest.mark.parametrize(
    ("worker", "sentence"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "expected logprobs_mode processed_logprobs, got raw_logprobs.*vllm serve"),
        ({"max_logprobs": 5}, "expected vLLM to report 21 likely tokens .* got 5; start it with --max-logprobs 21"),
    ],
)
def test_a_server_with_other_settings(tiny, worker, sentence, tmp_path):
    def sample(server):
        engine = VLLMServer(*tiny, settings=settings(server, tmp_path))
        engine.sync(0)
        engine.generate(PROMPTS, replace(SETTINGS, top_k=5))

    with (
        FakeVLLM(copy.deepcopy(tiny[0]), tiny[1], **worker) as server,
        pytest.raises((EngineError, ValueError), match=sentence),
    ):
        sample(server)


def test_a_server_without_the_extension_is_told_how_to_start(tiny, server, tmp_path):
    server.faults["/collective_rpc"] = lambda h, b, a: h.send({"detail": "Not Found"}, 404)
    with pytest.raises(EngineError, match=r"status 404: Not Found.*VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"):
        VLLMServer(*tiny, settings=settings(server, tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"top_p": 0.9}, "^top_p: expected 1.0, or a top_k beside it"),
        ({"greedy": True}, "^temperature: expected 1.0"),
        ({"num_samples": 0}, "^num_samples: expected"),
    ],
)
def test_what_cannot_be_exact_is_refused(engine, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine.generate(PROMPTS, replace(SETTINGS, **change))


def test_a_prompt_without_room_is_found_before_the_first_step(engine, server, tmp_path):
    sentence = r"at most 14 tokens beside max_new_tokens = 50, got one of 15.*max_model_len = 64.*--max_prompt_tokens"
    engine.check_prompts(["r:abcdefghijkl"], max_new_tokens=50)
    with pytest.raises(EngineError, match=sentence):
        engine.check_prompts(["r:a=", "r:abcdefghijklm"], max_new_tokens=50)
    with pytest.raises(EngineError, match=sentence):
        engine.generate(["r:abcdefghijklm"], replace(SETTINGS, max_new_tokens=50))
    settings = {**TINY, "output_dir": str(tmp_path), "engine": "vllm_server", "max_new_tokens": 63}
    with pytest.raises(EngineError, match="at most 1 tokens beside max_new_tokens = 63"):
        prepare(TrainConfig(**settings, engine_args={"url": server.url, "retries": 0}))


@pytest.mark.parametrize("reason", ["started again", "another run"])
def test_weights_of_others_are_noticed(engine, server, tiny, tmp_path, reason):
    """Nothing else would tell: the server answers, with the log-probabilities of what it holds."""
    assert engine.generate(PROMPTS, SETTINGS)
    if reason == "started again":
        server.worker = Worker(server.model)
    else:
        VLLMServer(*tiny, settings=settings(server, tmp_path)).sync(3)
    with pytest.raises(EngineError, match="no longer holds the weights that it was sent after step 0; it was started"):
        engine.generate(PROMPTS, SETTINGS)
    engine.sync(1)
    assert engine.generate(PROMPTS, SETTINGS)


def test_weights_of_a_killed_run_are_removed(tiny, server, tmp_path):
    for name in ("killed", "alive"):
        (tmp_path / f"repo-ops-weights-{name}").mkdir()
        (tmp_path / f"repo-ops-weights-{name}" / "00000.safetensors").touch()
    (tmp_path / "repo-ops-weights-killed" / "lock").touch()
    with (tmp_path / "repo-ops-weights-alive" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        VLLMServer(*tiny, settings=settings(server, tmp_path))
        assert [folder.name for folder in tmp_path.iterdir()] == ["repo-ops-weights-alive"]


def test_a_server_with_a_key(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM(copy.deepcopy(tiny[0]), tiny[1], token="open sesame") as server:
        with pytest.raises(EngineError, match=r"status 401: Unauthorized; set VLLM_API_KEY to the server's key"):
            VLLMServer(*tiny, settings=settings(server, tmp_path))
        monkeypatch.setenv("VLLM_API_KEY", "open sesame")
        engine = VLLMServer(*tiny, settings=settings(server, tmp_path))
        engine.sync(0)
        assert gap(engine, engine.generate(PROMPTS, SETTINGS), 0.7) < 1e-5


def test_what_samples_is_said(engine, server):
    where = f"at {server.url}, in float32, max_model_len 64"
    assert engine.describe() == f"vLLM 0.32.0 {where}"
    server.faults["/version"] = lambda h, b, a: h.send({"detail": "Not Found"}, 404)
    assert engine.describe() == f"vLLM of unknown version {where}"


def test_an_engine_in_process_that_is_not_in_the_process(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING: expected 0 with engine vllm"):
        VLLMInProcess(*tiny, source="nowhere", dtype="float32")


def test_a_folder_that_cannot_be_written(engine):
    engine.settings = ServerSettings(url=engine.settings.url)
    object.__setattr__(engine.settings, "weights_dir", "/proc")
    with pytest.raises(EngineError, match=r"could not be written to /proc .*; set --engine_args\.weights_dir"):
        engine.sync(1)


def test_training_with_a_server(tiny, tmp_path):
    """Two steps of the real loop; the server follows the policy, so both sides' log-probabilities agree."""
    model, tokenizer = load_model("tiny")
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    with FakeVLLM(model, tokenizer) as server:
        where = {"output_dir": str(tmp_path / "run"), "engine_args": {"url": server.url, "retries": 0}}
        config = TrainConfig(
            **{**TINY, "steps": 2, "lr": 1e-2, "reward": "prefix_match", "engine": "vllm_server", **where}
        )
        run = prepare(config)
        train(run)
    sampler = f"completions from vLLM 0.32.0 at {server.url}, in float32, max_model_len 64"
    assert f"{sampler}; the learner computes its layers in float32" in run.notes
    steps = [row for row in read_metrics(tmp_path / "run") if row["step"]]
    assert len(steps) == 2
    assert all(row["grad_norm"] > 0 for row in steps)  # the weights moved, and moved on the server
    assert all(row["sampler_gap_abs"] < 1e-4 for row in steps)


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc"])
def test_a_run_whose_server_dies_keeps_what_it_learned(tmp_path, path):
    """In generation of step 2, or when it should take over the weights of step 1; then another server goes on."""
    common = {**TINY, "output_dir": str(tmp_path / "run"), "engine": "vllm_server", "steps": 2, "heldout_size": 0}
    model, tokenizer = load_model("tiny")

    def run(server, **settings):
        arguments = {"url": server.url, "retries": 0}
        train(prepare(TrainConfig(**{**common, "engine_args": arguments, **settings})))

    def dies(handler, body, answer):
        steps = sum(p == "/v1/completions" for p, _ in server.requests) / common["prompts_per_step"]
        sends = path == "/collective_rpc" and body["method"] == "repo_ops_load_folder"
        if (path == "/v1/completions" and steps > 1) or (sends and steps == 1):
            return handler.hang_up()
        return handler.send(answer())

    with FakeVLLM(copy.deepcopy(model), tokenizer) as server:
        server.faults[path] = dies
        with pytest.raises(EngineError, match=r"the server is gone .*Step 1 is saved in .*checkpoints; --resume auto"):
            run(server)
    with FakeVLLM(model, tokenizer) as server:
        run(server, resume="auto")
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["step"]] == [1, 2]
