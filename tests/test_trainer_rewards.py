"""Rewards: the built-in ones, several at once, functions that fail, and answers that hang the checker."""

import asyncio
import math
import os
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from repo_ops.trainer.rewards import Rewards, exact_match, load_reward, reward_metrics, score
from repo_ops.trainer.rewards.answers import MathVerify, number_match, prefix_match, soft_overlong
from repo_ops.trainer.rewards.child import ChildLost
from repo_ops.trainer.rewards.score import missing_columns
from repo_ops.trainer.rollout import Completion
from repo_ops.trainer.tasks import Example

PROMPTS = ["p"] * 3
TEXTS = ["1", "bad", "3"]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def picky(prompts, completions, **columns):
    """Fails on a whole batch that holds one bad completion, as careless functions do."""
    return [float(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "completion", "answer", "expected"),
    [
        (exact_match, " 42 ", "42", 1.0),
        (exact_match, "042", "42", 0.0),
        (exact_match, "42 apples", "42", 0.0),
        (exact_match, "", "42", 0.0),
        (number_match, "042", "42", 1.0),
        (number_match, "1,042.0", "1042", 1.0),
        (number_match, "-3", "3", 0.0),
        (number_match, "nan", "nan", 0.0),
        (number_match, "x", "x", 0.0),
        (prefix_match, "dcba", "dcba", 1.0),
        (prefix_match, "dcxa", "dcba", 0.5),
        (prefix_match, "dc", "dcba", 0.5),
        (prefix_match, "dcbaaaaa", "dcba", 0.5),
        (prefix_match, "x", "dcba", 0.0),
        (prefix_match, "", "", 1.0),
    ],
)
def test_answers_by_hand(function, completion, answer, expected):
    assert function(["p"], [completion], answer=[answer]) == [expected]


def test_weighted_sum_and_parts():
    result = score(
        {"exact": (exact_match, 1.0), "length": (length, -0.25)},
        PROMPTS,
        TEXTS,
        {"answer": ["1", "2", "4"]},
    )
    assert result.parts == {"exact": [1.0, 0.0, 0.0], "length": [1.0, 3.0, 1.0]}
    assert result.totals == [0.75, -0.75, -0.25]
    assert result.errors == {}


def test_none_leaves_a_sample_out():
    result = score({"sure": (lambda p, c, **_: [1.0, None, 0.0], 1.0), "length": (length, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [2.0, None, 1.0]


def test_an_exception_costs_only_its_sample():
    result = score({"picky": (picky, 1.0), "length": (length, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [2.0, None, 4.0]
    assert list(result.errors) == ["picky"]
    assert len(result.errors["picky"]) == 1
    # what and where
    assert re.fullmatch(
        r"ValueError: could not convert string to float: 'bad' \(test_trainer_rewards.py:\d+\)",
        result.errors["picky"][0],
    )


def test_what_fails_is_shown_once_and_counted_always(caplog):
    rewards = Rewards({"picky": (picky, 1.0), "length": (length, 1.0)})
    rows = [(Example("k", "p", {}), Completion((1,), (0.0,), text, True)) for text in ("1", "bad", "3", "bad")]
    found = [rewards.score(rows, max_new_tokens=4) for _ in range(2)]
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("reward picky: 2 of 4 samples left out: ValueError: could not convert")
    metrics = reward_metrics(found)
    assert metrics == {
        "rewards/picky/mean": 2.0,
        "rewards/picky/std": 1.0,
        "rewards/length/mean": 2.0,  # of 1, 3, 1, 3: a function's own values, also where another one failed
        "rewards/length/std": 1.0,
        "reward/errors": 4.0,
        "reward/timeouts": 0.0,
    }


def test_columns_follow_the_samples_when_a_batch_fails():
    def needs_own_column(prompts, completions, *, wanted, **_):
        return [float(text) if text == want else 1 / 0 for text, want in zip(completions, wanted)]

    result = score({"f": (needs_own_column, 1.0)}, PROMPTS, ["1", "2", "3"], {"wanted": ["1", "x", "3"]})
    assert result.totals == [1.0, None, 3.0]


def test_an_interrupt_is_not_swallowed():
    def interrupted(prompts, completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"f": (interrupted, 1.0)}, PROMPTS, TEXTS, {})


@pytest.mark.parametrize("values", [np.array([1, 0, 2]), torch.tensor([1.0, 0.0, 2.0]), (True, False, 2)])
def test_any_sequence_of_numbers_will_do(values):
    result = score({"f": (lambda p, c, **_: values, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [1.0, 0.0, 2.0]
    assert all(type(total) is float for total in result.totals)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 1 completions, expected one each"),
        (None, "returned NoneType, expected a list of numbers or None"),
        (0.5, "returned float, expected a list of numbers or None"),
        ("yes", "returned str, expected a list of numbers or None"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict, expected a list of numbers or None"),
        (torch.tensor(1.0), "returned float, expected a list of numbers or None"),
    ],
)
def test_what_is_no_list_of_rewards_is_counted(values, message):
    result = score({"f": (lambda p, c, **_: values, 1.0), "length": (length, 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [None] * 3
    assert result.errors == {"f": [message] * 3}


@pytest.mark.parametrize("value", ["2x", "2", math.nan, math.inf, [1.0]])
def test_what_is_no_reward_costs_only_its_sample(value):
    result = score({"f": (lambda p, c, **_: [1.0, value, 3.0], 1.0)}, PROMPTS, TEXTS, {})
    assert result.totals == [1.0, None, 3.0]
    assert result.errors == {"f": [f"returned {value!r}, expected a finite number or None"]}


def test_async_functions_wait_together():
    """Each waits until the other has begun: one after the other they would never end."""
    begun = {"a": None, "b": None}

    def waits_for(mine, other):
        async def reward(prompts, completions, **columns):
            begun[mine] = asyncio.get_running_loop().create_future() if begun[mine] is None else begun[mine]
            begun[other] = asyncio.get_running_loop().create_future() if begun[other] is None else begun[other]
            begun[mine].set_result(None)
            await asyncio.wait_for(begun[other], 60)
            return [1.0] * len(completions)

        return reward

    rewards = {"a": (waits_for("a", "b"), 1.0), "b": (waits_for("b", "a"), 2.0)}
    result = score(rewards, PROMPTS, TEXTS, {})
    assert result.totals == [3.0] * 3
    assert not result.errors


def test_an_async_function_is_scored_inside_a_running_loop_and_fails_by_the_sample():
    async def fails_on_one(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [float(text) for text in completions]

    async def notebook():
        return score({"f": (fails_on_one, 1.0)}, PROMPTS, TEXTS, {})

    result = asyncio.run(notebook())
    assert result.totals == [1.0, None, 3.0]
    assert "could not convert" in result.errors["f"][0]


def test_functions_get_what_they_have_parameters_for():
    seen = {}

    def positional(p, c, level):
        seen["positional"] = (p, c, level)
        return [0.0] * 3

    def by_keyword(completions, *, level, **others):
        seen["by_keyword"] = (completions, level, sorted(others))
        return [0.0] * 3

    columns = {"answer": ["1"] * 3, "level": [4, 5, 6]}
    score({"positional": (positional, 1.0), "by_keyword": (by_keyword, 1.0)}, PROMPTS, TEXTS, columns)
    assert seen["positional"] == (PROMPTS, TEXTS, [4, 5, 6])
    assert seen["by_keyword"] == (TEXTS, [4, 5, 6], ["answer", "prompts"])


def test_a_column_may_be_called_like_a_parameter_that_is_given_by_position():
    def longer(question, text, *, answer):
        return [float(t.endswith(a)) for _, t, a in zip(question, text, answer, strict=True)]

    columns = {"question": ["1+1", "1+2"], "answer": ["2", "3"]}
    found = score({"longer": (longer, 1.0)}, ["q: 1+1", "q: 1+2"], ["is 2", "is 4"], columns)
    assert (found.totals, found.errors) == ([1.0, 0.0], {})


def test_a_missing_column_is_refused_at_the_door():
    rewards = Rewards({"exact_match": (exact_match, 1.0)})
    rewards.check(["answer", "more"])
    with pytest.raises(
        ValueError,
        match=r"^reward exact_match: expected the data to have a column 'answer', got .*--answer_column answr$",
    ):
        rewards.check(["answr", "question"])
    with pytest.raises(ValueError, match=r"column 'level', got \['levle'\]; did you mean 'levle'\?"):
        Rewards({"f": (lambda prompts, completions, level: [], 1.0)}).check(["levle"])
    Rewards({"f": (lambda completions, num_tokens, finished, max_new_tokens: [], 1.0)}).check([])
    with pytest.raises(ValueError, match=r"^answer: expected 3 values, one a completion, got 2"):
        score({"exact": (exact_match, 1.0)}, PROMPTS, TEXTS, {"answer": ["1", "2"]})
    with pytest.raises(ValueError, match=r"^rewards: expected at least one function"):
        score({}, PROMPTS, TEXTS, {})


def test_soft_overlong_by_hand():
    # of 100 tokens the last 20 are the margin
    lengths = [0, 80, 85, 90, 100, 120]
    found = soft_overlong([""] * 6, [""] * 6, num_tokens=lengths, max_new_tokens=[100] * 6)
    assert found == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert all(type(value) is float for value in found)


def in_child(tmp_path, body, *, seconds=60.0):
    """A function of that body in a process of its own."""
    (tmp_path / "mine.py").write_text(body)
    return load_reward(f"{tmp_path / 'mine.py'}:reward", timeout=seconds)


def test_a_function_in_its_own_process(tmp_path, capfd):
    reward = in_child(
        tmp_path,
        "import asyncio, os\n"
        "async def reward(prompts, completions, *, answer):\n"
        "    await asyncio.sleep(0)\n"
        "    print('from', os.getpid())\n"
        "    return [float(c) - a for c, a in zip(completions, answer)]\n",
    )
    assert missing_columns(reward, []) == ["answer"]
    columns = {"answer": [1, 1, 1], "unread": [object()] * 3}  # what it does not ask for is not sent
    result = score({"f": (reward, 2.0)}, PROMPTS, TEXTS, columns)
    assert result.totals == [0.0, None, 4.0]
    assert "ValueError: could not convert string to float: 'bad' (mine.py:5)" in result.errors["f"]
    printed = set(capfd.readouterr().out.split()) - {"from"}
    assert printed == {str(reward._process.pid)}
    assert str(os.getpid()) not in printed
    reward.close()


def test_a_process_of_its_own_draws_from_the_run_s_seed(tmp_path):
    body = (
        "import random\ndef reward(prompts, completions, **columns):\n    return [random.random() for _ in prompts]\n"
    )
    found = []
    for seed in (1, 1, 2):
        random.seed(seed)
        reward = in_child(tmp_path, body)
        found.append([score({"f": (reward, 1.0)}, PROMPTS, TEXTS, {}).totals for _ in range(2)])
        reward.close()
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_an_answer_to_an_interrupted_call_is_not_taken_for_the_next(tmp_path):
    body = "def reward(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    reward = in_child(tmp_path, body)
    reward.begin(["p"], ["long"])  # and then something stopped the caller
    assert reward(["p"], ["x"]) == [1.0]
    reward.close()


@pytest.mark.parametrize("hang", ["9 ** 9 ** 9", "re.match(r'(x+x+)+y', 'x' * 60)", "time.sleep(999)"])
def test_a_hang_costs_its_batch_the_deadline_and_nothing_else(tmp_path, hang):
    body = "import re, time\n"
    body += f"def reward(prompts, completions, **columns):\n    if 'hang' in completions:\n        {hang}\n"
    body += "    return [1.0] * len(completions)\n"
    reward = in_child(tmp_path, body)
    reward.seconds = 0.5
    result = score({"f": (reward, 1.0), "length": (length, 1.0)}, PROMPTS, ["1", "hang", "3"], {})
    assert result.totals == [None] * 3
    assert (result.timeouts, result.errors) == (3, {})
    reward.seconds = 60.0  # a busy machine is no hang
    again = score({"f": (reward, 1.0)}, PROMPTS, TEXTS, {})
    assert (again.totals, again.timeouts) == ([1.0] * 3, 0)
    reward.close()


def test_a_process_that_dies_is_an_error_and_comes_back(tmp_path):
    body = (
        "import os\ndef reward(prompts, completions, **columns):\n    if 'die' in completions:\n        os._exit(7)\n"
    )
    reward = in_child(tmp_path, body + "    return [1.0] * len(completions)\n")
    result = score({"f": (reward, 1.0)}, PROMPTS, ["1", "die", "3"], {})
    assert result.totals == [None] * 3
    assert result.errors == {"f": ["its process ended with status 7"] * 3}
    assert score({"f": (reward, 1.0)}, PROMPTS, TEXTS, {}).totals == [1.0] * 3
    reward.close()


def test_no_process_outlives_its_caller(tmp_path):
    """One that hangs does not see that its caller is gone."""
    (tmp_path / "mine.py").write_text("def reward(prompts, completions):\n    9 ** 9 ** 9\n")
    code = "import sys, time; from repo_ops.trainer.rewards.child import Child\n"
    code += f"f = Child(r'{tmp_path / 'mine.py'}:reward', 99.0); f.begin(['p'], ['c'])\n"
    code += "print(f._process.pid, flush=True); sys.exit()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_functions_in_processes_work_at_the_same_time(tmp_path):
    """Each waits for the other's file: one after the other they would pass the deadline."""
    rewards = {}
    for mine, other in ("ab", "ba"):
        (tmp_path / f"{mine}.py").write_text(
            "import pathlib, time\n"
            f"def reward(prompts, completions, **columns):\n    pathlib.Path(r'{tmp_path}/{mine}').touch()\n"
            f"    while not pathlib.Path(r'{tmp_path}/{other}').exists():\n        time.sleep(0.01)\n"
            "    return [1.0] * len(completions)\n"
        )
        rewards[mine] = (load_reward(f"{tmp_path / mine}.py:reward", timeout=60.0), 1.0)
    assert score(rewards, PROMPTS, TEXTS, {}).totals == [2.0] * 3
    for function, _ in rewards.values():
        function.close()


def test_functions_by_name(tmp_path):
    assert load_reward("exact_match") is exact_match
    assert load_reward("repo_ops.trainer.rewards.answers:prefix_match") is prefix_match
    file = tmp_path / "mine.py"
    file.write_text("def half(prompts, completions, **columns):\n    return [0.5] * len(completions)\n")
    assert load_reward(f"{file}:half")([], ["a", "b"]) == [0.5, 0.5]
    rewards = Rewards.load({"exact_match": 1.0, f"{file}:half": 0.5})
    assert {name: weight for name, (_, weight) in rewards.functions.items()} == {"exact_match": 1.0, "half": 0.5}
    twice = Rewards.load({f"{file}:half": 1.0, f"{tmp_path}/../{tmp_path.name}/mine.py:half": 1.0})
    assert all(name.endswith("mine.py:half") for name in twice.functions)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactmatch", r"^reward: expected one of exact_match, .*, got 'exactmatch'"),
        ("no_such_module_here:f", r"^reward: expected an importable module .*no_such_module_here.*path/to/file.py"),
        ("no/such/file.py:f", r"^reward: expected a Python file, got 'no/such/file.py'"),
        ("math:no_such_function", r"^reward: expected a function 'no_such_function' in math, found None"),
        ("math:pi", r"^reward: expected a function 'pi' in math, found 3.14"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_unknown_functions_are_named(name, message, timeout):
    with pytest.raises(ValueError, match=message):
        load_reward(name, timeout=timeout)


def test_a_file_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: ZeroDivisionError: division by zero \(broken.py:1\)"):
        load_reward(f"{tmp_path / 'broken.py'}:f", timeout=60.0)


@pytest.mark.slow
def test_math_verify_compares_and_survives_what_hangs():
    """One test, since a child that imports sympy takes seconds to start; a hang costs a second child."""
    reward = load_reward("math_verify")
    assert isinstance(reward, MathVerify)
    reward.child.seconds = 60.0  # a busy machine is no hang
    texts = ["0.5", "so it is $\\frac{2}{4}$", "2", "no idea"]
    assert reward(["p"] * 4, texts, answer=["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]

    reward.child.seconds = 1.0
    start = time.monotonic()
    result = score({"math": (reward, 1.0)}, ["p"], ["$9^{9^{9^{9}}}$"], {"answer": ["2"]})
    assert (result.totals, result.timeouts) == ([None], 1)
    # left to itself the expression takes for ever; the slack is for a busy machine
    assert 1.0 <= time.monotonic() - start < 20.0

    reward.child.seconds = 60.0
    result = score({"math": (reward, 1.0)}, ["p"] * 2, ["4", "4"], {"answer": ["2+2", "hello"]})
    assert result.totals == [1.0, None]
    assert "answer: expected a mathematical expression, got 'hello'" in result.errors["math"][0]
    reward.close()


def test_math_verify_is_asked_once_about_each_completion(monkeypatch):
    """Also where one runs out of time and another has an answer that cannot be read: no deadline is spent twice."""
    reward = MathVerify()
    asked = []

    def result():
        what = asked[-1]
        if what == "hangs":
            raise ChildLost("no answer within 5 s", timed_out=True)
        if what == "dies":
            raise ChildLost("its process ended with status -9", timed_out=False)
        return what == "right", what != "unreadable"

    monkeypatch.setattr(reward.child, "begin", lambda answer, completion: asked.append(completion))
    monkeypatch.setattr(reward.child, "result", result)
    texts = ["right", "hangs", "unreadable", "dies", "wrong"]
    found = score({"math": (reward, 1.0)}, ["p"] * 5, texts, {"answer": ["1"] * 5})
    assert asked == texts
    assert (found.totals, found.timeouts) == ([1.0, None, None, None, 0.0], 1)
    unreadable, died = found.errors["math"]
    assert unreadable.startswith("answer: expected a mathematical expression, got '1'")
    assert died == "its process ended with status -9"


def test_an_exception_in_the_place_of_a_number_costs_that_sample():
    """What asyncio.gather(..., return_exceptions=True) gives."""
    asked = []

    def reward(prompts, completions, **columns):
        asked.append(len(completions))
        return [1.0, TimeoutError("judge too slow"), None][: len(completions)]

    found = score({"f": (reward, 1.0)}, PROMPTS, TEXTS, {})
    assert (found.totals, found.errors, asked) == ([1.0, None, None], {"f": ["TimeoutError: judge too slow"]}, [3])


def test_math_verify_refuses_a_deadline_of_nothing():
    with pytest.raises(ValueError, match=r"^seconds: expected > 0, got 0"):
        MathVerify(seconds=0)
