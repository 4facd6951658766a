"""Predicted memory and operations against what a model really keeps and computes; the plan of a dry run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from repo_ops.cli import main
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.footprint import (
    Parameters,
    Workload,
    activation_bytes,
    cache_bytes,
    flops_of_step,
    memory_at_rest,
)
from repo_ops.trainer.recompute import recompute_layers
from repo_ops.trainer.rows import pack_rows

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
WORK = Workload.of(CONFIG, [5, 5], 4)


def test_sizes_by_hand() -> None:
    assert (WORK.row, WORK.rows, WORK.completions) == (5 + 3 * 4, 2, 6)
    with_replay = Workload.of(replace(CONFIG, replay="recency", replay_num=5), [5, 3], 4)
    assert (with_replay.row, with_replay.rows, with_replay.completions) == (5 + 8 * 4, 1, 16)
    assert with_replay.mean_prompt == 4
    tight = Workload.of(replace(CONFIG, micro_batch_tokens=6), [5, 5], 4)
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
    found = activation_bytes(config, SHAPE, CPU, WORK) - mask.numel()
    if recompute:
        whole = activation_bytes(replace(config, recompute_layers=False), SHAPE, CPU, WORK) - mask.numel()
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
    assert cache_bytes(CONFIG, SHAPE, WORK) == 2 * 3 * (2 * 12) * 4 * 6 * 9  # K and V, layers, width, bytes ...


def test_operations_of_a_learner_step_are_those_that_torch_counts() -> None:
    model = LlamaForCausalLM(SHAPE).eval()
    work = Workload.of(replace(CONFIG, group_size=2), [40, 40], 12)
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
        "~activations of a micro-batch",
        "FLOP a step (generation ",
        "  steps: 50",
    ):
        assert words_of_plan in out
    main(["train", "--model", "tiny", "--task", "reverse", "--lora_rank", "2", "--dry_run"])
    trained = capsys.readouterr().out.partition("of them trained")[0].split()[-1]
    assert 0 < float(trained.removesuffix("k")) < 20


def test_a_mistake_in_a_dry_run_ends_in_one_sentence(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--model", "tiny", "--task", "revers", "--dry-run"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("repo-ops train: task: expected one of ")
