"""Predicted memory and operations against what a model really keeps and computes; the plan of a dry run."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from repo_ops.cli import main
from repo_ops.trainer.config import TrainConfig, parse_config
from repo_ops.trainer.dry_run import _memory
from repo_ops.trainer.footprint import (
    Parameters,
    Peak,
    Workload,
    activation_bytes,
    cache_bytes,
    flops_of_step,
    head_bytes,
    memory_at_rest,
    parts_at_peak,
)
from repo_ops.trainer.recompute import recompute_layers
from repo_ops.trainer.rollout.hf import cache_argument
from repo_ops.trainer.rows import pack_rows
from repo_ops.trainer.run import prepare

SHAPE = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
CPU = torch.device("cpu")
CONFIG = TrainConfig(prompts_per_step=2, train_size=2, group_size=3, autocast=False, micro_batch_tokens=64)
WORK = Workload(CONFIG, [5, 5], 4)


def test_sizes_by_hand() -> None:
    assert (WORK.row, WORK.rows, WORK.completions) == (5 + 3 * 4, 2, 6)
    with_replay = Workload(replace(CONFIG, replay="recency", replay_num=5), [5, 3], 4)
    assert (with_replay.row, with_replay.rows, with_replay.completions) == (5 + 8 * 4, 1, 16)
    tight = Workload(replace(CONFIG, micro_batch_tokens=6), [5, 5], 4)
    assert (tight.row, tight.rows) == (9, 1)  # one sequence is never cut


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_keeps(autocast: bool, recompute: bool) -> None:
    model = LlamaForCausalLM(SHAPE).eval()
    if recompute:
        recompute_layers(model)
    (batch,) = pack_rows([[1] * 5] * 3 + [[2] * 5] * 3, [[3 + i] * 4 for i in range(6)], max_tokens=64)
    assert tuple(batch.input_ids.shape) == (2, 14)  # the last token of a completion takes no place
    rows = {"input_ids": torch.zeros(2, 17, dtype=torch.int64), "position_ids": torch.arange(17).expand(2, 17)}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
        model.get_decoder()(**rows, attention_mask=mask, use_cache=False)
    kept = sum(storage.nbytes() for storage in saved.values())
    config = replace(CONFIG, autocast=autocast, recompute_layers=recompute)
    found = activation_bytes(replace(WORK, config=config), SHAPE, CPU) - mask.numel()
    if recompute:
        not_again = replace(WORK, config=replace(config, recompute_layers=False))
        whole = activation_bytes(not_again, SHAPE, CPU) - mask.numel()
        assert kept < found < kept + whole / 2
        assert found == kept + (whole - kept) // SHAPE.num_hidden_layers
    else:
        assert found == kept


def test_at_rest_and_cache_by_hand() -> None:
    model = LlamaForCausalLM(SHAPE)
    model.model.embed_tokens.requires_grad_(False)
    parameters = Parameters.of(model)
    layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80 + 2 * 48
    assert parameters == Parameters(
        total=3 * layer + 48 + 2 * 97 * 48, trained=3 * layer + 48 + 97 * 48, head=97 * 48, backbone=3 * layer + 48
    )
    names = ("weights", "gradients", "AdamW's averages", "reference model")
    numbers = (4 * parameters.total, 4 * parameters.trained, 8 * parameters.trained, 4 * parameters.total)
    assert memory_at_rest(model, reference=True) == dict(zip(names, numbers))
    assert cache_bytes(WORK, SHAPE, CPU) == 2 * 3 * (2 * 12) * 4 * 6 * 9  # K and V, layers, width, bytes ...


def test_what_each_rank_holds_by_hand() -> None:
    config = replace(CONFIG, replicas=2, autocast=True)
    work = Workload(config, [5, 3], 4, ranks=4, heldout=[7, 6, 7])
    assert (work.shards, work.rows) == (2, 1)  # two copies of the model; each rank has a prompt at most
    assert work.sampled == 1 * 8 * (7 + 4)  # a held-out prompt and its 8 samples are more than 1 * 3 * (5 + 4)
    assert Workload(config, [5, 3], 4, ranks=4).sampled == 1 * 3 * (5 + 4)
    assert cache_bytes(replace(work, config=replace(config, autocast=False)), SHAPE, CPU) == 2 * 3 * (2 * 12) * 4 * 88
    layer, rest, head = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80 + 2 * 48, 48 + 2 * 97 * 48, 97 * 48
    peak = parts_at_peak(work, SHAPE, CPU)
    # layers in bfloat16, the rest in float32, and autocast's copy of the head
    assert peak.generating["gathered model"] == 2 * 3 * layer + 4 * rest + 2 * head
    # the rest and its gradient; two layers; one's gradient as it is computed and as it is added up
    gathered = 2 * 4 * rest + 2 * 2 * layer + (2 + 4) * layer
    assert peak.learning["gathered layers, embeddings and head"] == gathered
    alone = parts_at_peak(Workload(replace(config, replicas=1), [5, 3], 4), SHAPE, CPU)
    assert alone.generating["weights in bfloat16"] == 2 * (3 * (layer - 2 * 48) + head)  # norms are not cast
    assert parts_at_peak(replace(work, config=replace(config, engine="vllm_server")), SHAPE, CPU).generating == {}
    adapted = replace(config, replicas=1, lora_rank=2)
    frozen = parts_at_peak(Workload(adapted, [5, 3], 4), SHAPE, CPU).generating["weights in bfloat16"]
    assert frozen == 2 * 3 * 2 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80))  # autocast keeps trained ones alone


def test_a_head_that_rounds_its_operands_holds_copies() -> None:
    plain = replace(WORK, config=replace(CONFIG, autocast=True))
    rounds = replace(WORK, config=replace(CONFIG, autocast=True, head_autocast=True))
    states = WORK.rows * WORK.row
    assert head_bytes(rounds, SHAPE, CPU) - head_bytes(plain, SHAPE, CPU) == 2 * 48 * (97 + states)


class Copies(TorchDispatchMode):
    """Storages of bfloat16 copies, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
            self.found.append(weakref.ref(out))
        return out


def test_what_a_rank_holds_while_it_generates_is_what_was_planned() -> None:
    model = LlamaForCausalLM(SHAPE).eval()
    peak = parts_at_peak(replace(WORK, config=replace(CONFIG, autocast=True)), SHAPE, CPU).generating
    cache = DynamicCache(config=SHAPE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Copies() as copies:
        model(input_ids=torch.ones(6, 9, dtype=torch.int64), use_cache=True, **{cache_argument(model): cache})
        alive = [copy for each in copies.found if (copy := each()) is not None]
        assert sum(copy.nbytes for copy in alive) == peak["weights in bfloat16"]
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == peak["keys and values"]


def test_operations_of_a_learner_step_are_those_that_torch_counts() -> None:
    model = LlamaForCausalLM(SHAPE).eval()
    work = Workload(replace(CONFIG, group_size=2), [40, 40], 12)
    ids = torch.zeros(4, 52, dtype=torch.int64)  # two prompts, two completions each, as separate rows
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        (hidden[:, 40:] @ model.lm_head.weight.T).sum().backward()
    found = flops_of_step(Parameters.of(model), SHAPE, work)
    shared = 2 * 40 * 3 * 2 * Parameters.of(model).backbone  # what sharing the prompts saves, attention aside
    predicted = found["learner, layers"] + found["learner, head"] + shared
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    from transformers import PreTrainedModel

    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", never)
    words = ["train", "--model", "tiny", "--task", "reverse", "--objective", "repo", "--replay", "variance"]
    folder = tmp_path / "run"
    main([*words, "--beta", "0.1", "--steps", "50", "--eval_steps", "20", "--output_dir", str(folder), "--dry-run"])
    out = capsys.readouterr().out
    assert not folder.exists()
    for words_of_plan in (
        "tiny: 77.5k parameters, 77.5k of them trained, in float32; layers compute in bfloat16",
        "8 prompts x 8 fresh + up to 8 replayed completions of at most 8 tokens",
        "50 steps, 4 evaluations",
        "reference model",
        "while learning ~",
        "activations of a micro-batch",
        "while generating ~",
        "keys and values",
        "FLOP a step (generation ",
        "  steps: 50",
        "  reward: null",
    ):
        assert words_of_plan in out
    main(["train", "--model", "tiny", "--task", "reverse", "--lora_rank", "2", "--dry_run"])
    trained = capsys.readouterr().out.partition("of them trained")[0].split()[-1]
    assert 0 < float(trained.removesuffix("k")) < 20


def test_settings_of_a_replay_that_is_switched_off_are_named(tmp_path: Path, capsys) -> None:
    words = ["--model", "tiny", "--task", "reverse", "--replay_num", "4", "--off_policy_coef", "0.5"]
    main(["train", *words, "--dry-run"])
    assert "not used     replay_num, off_policy_coef: nothing is replayed" in capsys.readouterr().out
    config = parse_config([*words, "--output_dir", str(tmp_path), "--device", "cpu"])
    assert "nothing is replayed: replay_num, off_policy_coef play no part" in prepare(config).notes
    assert replace(config, replay="random").idle == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"replicas": "2"}, ["gathered layers, embeddings and head", "gathered model", "keys and values"]),
        ({"engine": "vllm_server"}, ["while generating nothing: the server has its own"]),
        ({"engine": "hf", "cpu_offload": "true"}, ["at rest 0.3: weights 0.1"]),  # on a CPU it is the same memory
    ],
)
def test_a_dry_run_of_several_ranks(capsys, monkeypatch, settings, expected) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    main(["train", "--model", "tiny", "--task", "reverse", "--device", "cpu", *words, "--dry-run"])
    out = capsys.readouterr().out
    assert "memory, MiB on each of 4 ranks" in out
    assert all(words_of_plan in out for words_of_plan in expected)
    assert ("gathered model" in out) is ("engine" not in settings or settings["engine"] == "hf")
    monkeypatch.setenv("RANK", "1")
    main(["train", "--model", "tiny", "--task", "reverse", "--device", "cpu", *words, "--dry-run"])
    assert capsys.readouterr().out == ""


def test_offloaded_state_is_on_the_cpu_and_not_in_the_peak() -> None:
    def lines(peak: Peak, **settings: Any) -> list[str]:
        work = replace(WORK, ranks=2, config=replace(CONFIG, **settings))
        return [text for _, text in _memory(work, torch.device("cuda"), rest, peak)]

    rest, peak = {"weights": 300 << 20, "gradients": 300 << 20}, Peak({"head": 7 << 20}, {"keys and values": 5 << 20})
    offloaded = lines(peak, cpu_offload=True)
    assert offloaded[0] == "at rest on the CPU 600: weights 300, gradients 300"
    assert offloaded[-1] == "~7.0 at the peak on cuda, without the runtime itself"
    assert lines(peak)[-1] == "~607 at the peak, without the runtime itself"
    said = lines(Peak(peak.learning, {}), engine="vllm", engine_args={"gpu_memory_utilization": 0.5})[2]
    assert said.startswith("and all the time what vLLM takes: 0.5 of a GPU's memory")


def test_a_mistake_in_a_dry_run_ends_in_one_sentence(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--model", "tiny", "--task", "revers", "--dry-run"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("repo-ops train: task: expected one of ")
