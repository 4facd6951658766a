"""Tasks: right answers, splits without twins, honest solved examples, balance, clear refusals."""

import math
import re
from collections import Counter

import pytest

from repo_ops.trainer.tasks import Example, Problem, load_task, task_names
from repo_ops.trainer.tasks.problems import ARITHMETIC_TASKS, SYMBOL_TASKS, chain_sum, reverse, sort

# count_bits has 31 problems
SIZES = {"train_size": 18, "heldout_size": 10}


def question(example: Example) -> str:
    return example.prompt.rsplit("\n", 1)[-1]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def solve(name: str, text: str) -> str:
    """The answer, found here by other means than the task's."""
    if name in SYMBOL_TASKS:
        letters = text[2:-1]
        return {"reverse": letters[::-1], "sort": "".join(sorted(letters)), "copy": letters}[name]
    if name == "letter_counting":
        letter, words = re.fullmatch(r'"(.)" in "(.*)" =', text).groups()
        return str(sum(c.lower() == letter for c in words))
    if name == "chain_sum":
        return str(eval(text.removesuffix("=")))
    n = numbers(text)
    value = {"products": math.prod, "lcm": lambda n: math.lcm(*n), "gcd": lambda n: math.gcd(*n)}
    return str(value[name](n)) if name in value else str(bin(n[0]).count("1"))


@pytest.mark.parametrize("name", task_names())
def test_answers_and_solved_examples_are_right(name):
    task = load_task(name, **SIZES)
    for example in task.train + task.heldout:
        *solved, asked = example.prompt.split("\n")
        assert solve(name, asked) == example.columns["answer"]
        for line in solved:
            text, answer = line.rsplit(" ", 1)
            assert solve(name, text) == answer
    assert len(solved) == (0 if name in SYMBOL_TASKS else 2)


@pytest.mark.parametrize("name", task_names())
def test_no_problem_is_asked_twice_or_given_away(name):
    task = load_task(name, **SIZES)
    keys = [example.key for example in task.train + task.heldout]
    assert len(keys) == len(set(keys)) == 28
    heldout = {question(example) for example in task.heldout}
    for example in task.train + task.heldout:
        solved = example.prompt.split("\n")[:-1]
        shown = {line.rsplit(" ", 1)[0] for line in solved}
        assert not shown & heldout
        assert question(example) not in shown
        assert len(shown) == len(solved)


@pytest.mark.parametrize("name", ["products", "lcm", "gcd"])
def test_swapped_numbers_are_twins(name):
    task = load_task(name, **SIZES)
    heldout = {tuple(sorted(numbers(question(example)))) for example in task.heldout}
    for example in task.train + task.heldout:
        shown = [tuple(sorted(numbers(line.split("=")[0]))) for line in example.prompt.split("\n")]
        assert not heldout & set(shown[:-1])
        if example in task.train:
            assert shown[-1] not in heldout


def test_twins_by_hand():
    keys = {p.question: p.key for p, _ in zip(chain_sum(0), range(3000))}
    assert keys["3 + 4 ="] == keys["4 + 3 ="]
    assert keys["3 - 4 ="] != keys["4 - 3 ="]
    assert keys["3 + 4 ="] != keys["3 - 4 ="]
    keys = {p.question: p.key for p, _ in zip(reverse(0, max_length=3, letters=3), range(500))}
    assert keys["r:abc="] == keys["r:cba="] != keys["r:acb="]
    keys = {p.question: p.key for p, _ in zip(sort(0, max_length=3, letters=3), range(500))}
    assert keys["s:abc="] == keys["s:cab="] != keys["s:aab="]


@pytest.mark.parametrize("name", task_names())
def test_the_seed_decides(name):
    assert load_task(name, **SIZES, seed=3) == load_task(name, **SIZES, seed=3)
    assert load_task(name, **SIZES, seed=3).heldout != load_task(name, **SIZES, seed=4).heldout


def test_products_to_the_last_problem():
    task = load_task("products", train_size=32, heldout_size=21)
    assert len(task.train) + len(task.heldout) == 53  # of 55; two are left for solved examples of nobody in particular
    with pytest.raises(ValueError, match=r"^train_size, heldout_size: expected at most 55 problems .* got 40 \+ 16"):
        load_task("products", train_size=40, heldout_size=16)
    # one prompt to train on, and nothing but unused problems to show it
    assert len(load_task("products", train_size=1, heldout_size=52).train) == 1
    with pytest.raises(ValueError, match="solved examples need 2"):
        load_task("products", train_size=1, heldout_size=54)


def test_answers_are_balanced_where_one_would_win():
    task = load_task("gcd", train_size=48, heldout_size=24)
    for examples in (task.train, task.heldout):
        counts = Counter(example.columns["answer"] for example in examples)
        # left alone the share of 1 is 0.6; always giving one answer must not pay
        assert max(counts.values()) <= 0.2 * len(examples)


def test_options_reach_the_task():
    task = load_task("products", train_size=40, heldout_size=20, digits=2)
    assert max(max(numbers(question(example))) for example in task.train) > 9
    task = load_task("chain_sum", train_size=40, heldout_size=20, terms=3)
    assert all(len(numbers(question(example))) == 3 for example in task.train)
    task = load_task("reverse", train_size=40, heldout_size=20, min_length=6, max_length=6, letters=26)
    assert all(len(example.columns["answer"]) == 6 for example in task.train)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "prodcts"}, r"^task: expected one of .*products.*, got 'prodcts'"),
        ({"train_size": 0}, r"^train_size, heldout_size: expected at least 1"),
        ({"heldout_size": -1}, r"^train_size, heldout_size: expected at least 1"),
        ({"digit": 2}, r"^task_args.digit: expected an option of task 'products': digits, terms"),
        ({"digits": 0}, r"^task_args of 'products': max_digits"),
        ({"name": "reverse", "min_length": 5}, r"^task_args: expected 1 <= min_length"),
        ({"name": "copy", "letters": 27}, r"^task_args.letters: expected 1 to 26"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        load_task(**{"name": "products", **SIZES, **call})


def test_the_task_s_reward_is_exact_match():
    task = load_task("products", **SIZES)
    answer = task.train[0].columns["answer"]
    assert task.reward(["p"] * 3, [f" {answer}", answer + "1", ""], answer=[answer] * 3) == [1.0, 0.0, 0.0]
    assert task.stop == ("\n",)


def test_a_balanced_task_keeps_all_problems_it_needs():
    """count_bits has 31 problems, and only one whose answer is 5."""
    task = load_task("count_bits", train_size=20, heldout_size=11)
    assert sorted(int(e.key) for e in task.train + task.heldout) == list(range(1, 32))
    assert set(ARITHMETIC_TASKS) | set(SYMBOL_TASKS) == set(task_names())
    assert Problem("q", "a", "k") == Problem("q", "a", "k")
