"""Held-out evaluation against numbers worked by hand."""

import itertools
import json
import math
from pathlib import Path

import pytest
from fake_vllm import FakeVLLM

from repo_ops.cli import main
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.evaluate import bootstrap, evaluate, interval, pass_at_k
from repo_ops.trainer.loop import held_out
from repo_ops.trainer.models import load_model
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import Completion, SamplingSettings
from repo_ops.trainer.run import prepare
from repo_ops.trainer.tasks import Example


class Scripted:
    """An engine that says what it was told to, so that every number can be worked out by hand."""

    def __init__(self, sampled: dict[str, list[str]], greedy: dict[str, str]) -> None:
        self.sampled = sampled
        self.greedy = greedy
        self.calls = []

    def generate(self, prompts, settings):
        self.calls.append(settings)
        num_samples, greedy = settings.num_samples, settings.greedy
        texts = [[self.greedy[p]] * num_samples if greedy else self.sampled[p][:num_samples] for p in prompts]
        return [[Completion((1,), (-0.1,), text, finished=text != "?") for text in group] for group in texts]

    def sync(self, version):
        raise AssertionError("evaluation does not move the policy")


EXAMPLES = [Example("a", "A", {"answer": "1"}), Example("b", "B", {"answer": "2"})]


def right(prompts, completions, *, answer):
    """Half a point for a letter; None for a question mark."""
    return [
        None if c == "?" else 1.0 if c == a else 0.5 if c.isalpha() else 0.0
        for c, a in zip(completions, answer, strict=True)
    ]


RIGHT = Rewards({"right": (right, 1.0)})


def sampling(num_samples, *, temperature=1.0, seed=0):
    return SamplingSettings(num_samples=num_samples, max_new_tokens=3, temperature=temperature, seed=seed)


def test_by_hand():
    engine = Scripted({"A": ["1", "1", "0", "x"], "B": ["0", "0", "?", "0"]}, {"A": "1", "B": "x"})
    result = evaluate(engine, EXAMPLES, RIGHT, sampling(4, temperature=0.7, seed=9), ks=(1, 2))
    # A: 2 of 4 solved; B: 0 of 3 that have a reward
    low_1, high_1 = interval(0.25, 2)
    low_2, high_2 = interval(5 / 12, 2)
    low_g, high_g = interval(0.5, 2)
    assert result == pytest.approx(
        {
            "prompts": 2,
            "greedy_mean": 0.75,
            "greedy_accuracy": 0.5,
            "greedy_accuracy_low": low_g,
            "greedy_accuracy_high": high_g,
            "sampled_mean": 2.5 / 7,
            "sampled_mean_low": 0.0,  # both prompts drawn as B, whose samples all have 0
            "sampled_mean_high": 2.5 / 4,  # both drawn as A
            "finished": 7 / 8,
            "unscored": 1,
            "pass@1": (2 / 4 + 0) / 2,
            "pass@1_low": low_1,
            "pass@1_high": high_1,
            "pass@2": (5 / 6 + 0) / 2,  # of the 6 pairs of A one has no right answer
            "pass@2_low": low_2,
            "pass@2_high": high_2,
        }
    )
    assert [call.greedy for call in engine.calls] == [True, False]
    assert engine.calls[1] == sampling(4, temperature=0.7, seed=9)


def test_success_may_be_less_than_one():
    engine = Scripted({"A": ["x", "0"], "B": ["2", "2"]}, {"A": "x", "B": "0"})
    result = evaluate(engine, EXAMPLES, RIGHT, sampling(2), success=0.5)
    assert result["greedy_accuracy"] == 0.5
    assert result["pass@1"] == 0.75


def test_greedy_only():
    engine = Scripted({}, {"A": "1", "B": "?"})
    result = evaluate(engine, EXAMPLES, RIGHT, sampling(0))
    low, high = interval(1.0, 1)
    assert result == {
        "prompts": 2,
        "greedy_mean": 1.0,
        "greedy_accuracy": 1.0,
        "greedy_accuracy_low": low,
        "greedy_accuracy_high": high,
        "unscored": 1,
    }


def test_means_are_weighted_and_the_first_reward_decides_what_is_solved():
    engine = Scripted({"A": ["1", "x"], "B": ["2", "0"]}, {"A": "1", "B": "0"})
    rewards = Rewards({"right": (right, 2.0), "length": (lambda prompts, completions, **_: [3.0] * len(prompts), -1.0)})
    result = evaluate(engine, EXAMPLES, rewards, sampling(2), ks=(1, 2))
    assert result["greedy_mean"] == (2 - 3 + 0 - 3) / 2
    assert result["sampled_mean"] == ((2 - 3) + (1 - 3) + (2 - 3) + (0 - 3)) / 4
    assert (result["greedy_accuracy"], result["pass@1"], result["pass@2"]) == (0.5, 0.5, 1.0)


def test_several_data_sets_are_also_reported_by_themselves():
    engine = Scripted({"A": ["1", "1"], "B": ["0", "0"]}, {"A": "1", "B": "0"})
    examples = [Example("a", "A", {"answer": "1"}, "easy"), Example("b", "B", {"answer": "2", "level": 3}, "hard")]
    result = evaluate(engine, examples, RIGHT, sampling(2))
    assert [result[name] for name in ("pass@1", "easy/pass@1", "hard/pass@1")] == [0.5, 1.0, 0.0]
    assert [result[name] for name in ("prompts", "easy/prompts", "hard/prompts")] == [2, 1, 1]
    assert len(engine.calls) == 2  # greedy and sampled, for all of them at once


def test_bootstrap_draws_whole_prompts():
    groups = [[0.0] * 50, [1.0] * 50] * 10  # 20 prompts that are all right or all wrong: not 1000 independent samples
    low, high = bootstrap(groups)
    # a binomial of 20 halves: 5.77 and 14.2 of 20 are its 2.5 and 97.5 percentiles
    assert low == pytest.approx(0.28, abs=0.05)
    assert high == pytest.approx(0.72, abs=0.05)
    assert bootstrap([[-2.0, -2.0]]) == (-2.0, -2.0)
    assert all(math.isnan(x) for x in bootstrap([[], []]))


def test_nothing_scored_is_nan_and_no_examples_is_empty():
    engine = Scripted({"A": ["?"], "B": ["?"]}, {"A": "?", "B": "?"})
    result = evaluate(engine, EXAMPLES, RIGHT, sampling(1))
    assert result["unscored"] == 4
    for name in ("greedy_mean", "sampled_mean", "pass@1", "pass@1_low"):
        assert math.isnan(result[name])
    assert evaluate(engine, [], RIGHT, sampling(1)) == {}


def test_the_command_gives_the_numbers_of_a_run_that_begins(tmp_path: Path, capsys) -> None:
    same = {"model": "tiny", "task": "reverse", "heldout_size": 5, "train_size": 8, "seed": 3, "threads": 1}
    same |= {"autocast": False, "eval_k": [1, 2, 4]}
    run = prepare(TrainConfig(**same, heldout_samples=4, output_dir=str(tmp_path)))
    words = [word for name, value in {**same, "samples": 4}.items() for word in (f"--{name}", value)]
    words += ["--output", str(tmp_path / "o.json")]
    main(["evaluate", *(word if isinstance(word, str) else json.dumps(word) for word in words)])
    numbers = json.loads((tmp_path / "o.json").read_text())["numbers"]
    assert {f"eval/{name}": value for name, value in numbers.items()} == held_out(run)
    assert "pass@4" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["hf", "vllm_server"])
def test_samples_are_drawn_as_in_training_and_the_greedy_completion_is_not(tmp_path, engine):
    """Among one token there is no choice: every sample is the greedy completion. With all of them they differ."""
    same = {"model": "tiny", "task": "reverse", "heldout_size": 5, "train_size": 8, "seed": 3, "threads": 1}
    same |= {"autocast": False, "max_new_tokens": 4}
    numbers = {}
    model, tokenizer = load_model("tiny", seed=3)
    with FakeVLLM(model, tokenizer) as server:
        for top_k in (0, 1):
            own = {"engine": engine, "engine_args": {"url": server.url} if engine != "hf" else {}}
            own |= {"output_dir": str(tmp_path / str(top_k)), "heldout_samples": 4, "reward": "prefix_match"}
            run = prepare(TrainConfig(**same, **own, top_k=top_k))
            run.engine.sync(0)
            numbers[top_k] = held_out(run)
    assert numbers[1]["eval/sampled_mean"] == numbers[1]["eval/greedy_mean"] == numbers[0]["eval/greedy_mean"]
    assert numbers[0]["eval/sampled_mean"] != numbers[0]["eval/greedy_mean"]
    if engine == "hf":
        words = [word for name, value in {**same, "samples": 4, "top_k": 1}.items() for word in (f"--{name}", value)]
        words += ["--reward", "prefix_match", "--output", str(tmp_path / "o.json")]
        main(["evaluate", *(word if isinstance(word, str) else json.dumps(word) for word in words)])
        found = json.loads((tmp_path / "o.json").read_text())["numbers"]
        assert {f"eval/{name}": value for name, value in found.items()} == numbers[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "data, task: expected one of the two, got None and None"),
        (["--task", "copy", "--data", "x.jsonl"], "data, task: expected one of the two, got 'x.jsonl' and 'copy'"),
        (["--task", "copy", "--top_p", "0.9"], "top_k, top_p: expected 0 and 1, or a top_k up to 512, got 0 and 0.9"),
        (["--task", "copy", "--chat", "true"], "chat: expected nothing without data"),
        (["--task", "copy", "--samples", "2", "--eval_k", "[3]"], "eval_k: expected numbers from 1 to"),
        (["--task", "copy", "--samples", "0", "--eval_k", "[1]"], "eval_k: expected none without samples"),
        (["--data", "x.jsonl", "--reward", "exact_match", "--train_size", "3"], "train_size: expected none with data"),
        (["--data", "x.jsonl", "--reward", "exact_match"], "data: expected a file, got 'x.jsonl', which is not there"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(capsys, arguments, sentence) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *arguments])
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=r"^ks: expected numbers from 1 to num_samples = 4"):
        evaluate(Scripted({}, {}), EXAMPLES, RIGHT, sampling(4), ks=(1, k))


@pytest.mark.parametrize(("n", "solved", "k"), [(4, 2, 1), (5, 1, 3), (6, 6, 2), (6, 0, 2), (7, 5, 3), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_solution(n, solved, k):
    subsets = list(itertools.combinations([True] * solved + [False] * (n - solved), k))
    assert pass_at_k(n, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "solved", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_the_impossible(n, solved, k):
    with pytest.raises(ValueError, match=r"^pass_at_k: expected"):
        pass_at_k(n, solved, k)


def test_interval():
    # 8 of 10: the textbook example of Wilson's interval
    assert interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval(1.0, 20)
    assert high == 1.0
    assert 0.8 < low < 0.9  # not a point, though all values are equal
    assert interval(0.0, 20) == pytest.approx((0.0, 1 - low))
    assert all(math.isnan(x) for x in interval(math.nan, 0))
