"""Prompts from files through the real path of a run, and what is refused or left out on the way."""

import itertools
import json
import re
from pathlib import Path

import pytest
from tiny_runs import differences, reward_file, trained

from repo_ops.cli import main
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.data import DataTask, open_data, open_heldout
from repo_ops.trainer.data.prompts import Examples, PromptText
from repo_ops.trainer.data.rows import open_rows
from repo_ops.trainer.log import read_metrics
from repo_ops.trainer.loop import train
from repo_ops.trainer.models.tiny import tiny_tokenizer
from repo_ops.trainer.run import prepare

datasets = pytest.importorskip("datasets")

WORDS = ["".join(letters) for letters in itertools.permutations("abcd", 3)]  # 24 prompts that the tiny model knows
CHATML = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
RUN = {
    **{"model": "tiny", "steps": 2, "prompts_per_step": 4, "group_size": 2, "heldout_samples": 2, "max_new_tokens": 5},
    **{"stop": ["\n"], "autocast": False, "threads": 1, "save_model": False, "lr": 1e-4},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def rows(words=WORDS, **columns):
    return [
        {"prompt": f"r:{w}=", "answer": w[::-1], "level": i, **{k: v[i] for k, v in columns.items()}}
        for i, w in enumerate(words)
    ]


def write(path: Path, content) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(content).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def opened(data: str, eval_data=(), **settings) -> DataTask:
    return open_data(data, eval_data, **{"data_args": {}, "eval_data_args": {}, **settings})


def prompts_of(examples) -> list[str]:
    return [example.prompt for example in examples]


def test_a_run_on_files_from_the_console(tmp_path: Path, capsys) -> None:
    train_rows = rows(WORDS[:16])
    data = write(tmp_path / "train.jsonl", [*train_rows, train_rows[3], train_rows[3]])
    heldout = [write(tmp_path / "near.parquet", rows(WORDS[14:18])), write(tmp_path / "far.jsonl", rows(WORDS[20:23]))]
    (tmp_path / "mine.py").write_text(
        "def near(completions, *, solution, level, **columns):\n"
        "    assert 'prompt' not in columns and all(isinstance(n, int) for n in level)\n"
        "    return [len(set(a) & set(c)) / 3 for a, c in zip(solution, completions)]\n"
    )
    for path in (data, *heldout):
        table = datasets.Dataset.from_parquet(path) if path.endswith("parquet") else datasets.Dataset.from_json(path)
        renamed = table.rename_column("answer", "solution")
        renamed.to_parquet(path) if path.endswith("parquet") else renamed.to_json(path)
    words = ["train", "--output_dir", str(tmp_path / "run"), "--data", data, "--eval_data", json.dumps(heldout)]
    words += ["--answer_column", "solution", "--eval_k", "[1, 2]"]
    words += ["--rewards", json.dumps({"prefix_match": 1.0, f"{tmp_path / 'mine.py'}:near": 0.5})]
    for name, value in RUN.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    main(words)
    out = capsys.readouterr().out
    assert "data: 2 of 18 rows left out, their prompts come again" in out
    assert "data: 2 of 16 prompts left out, they are held out" in out
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"eval/pass@1", "eval/pass@2_low", "eval/near/pass@2", "eval/far/greedy_accuracy"} <= set(lines[2])
    assert [lines[0][f"eval/{name}prompts"] for name in ("", "near/", "far/")] == [7, 4, 3]
    for line in lines[1:]:
        assert line["reward/errors"] == 0
        assert 0 < line["rewards/near/mean"] <= 1
        assert line["reward/mean"] == pytest.approx(line["rewards/prefix_match/mean"] + line["rewards/near/mean"] / 2)


def test_a_run_repeats_and_reads_only_what_it_needs(tmp_path: Path, monkeypatch) -> None:
    read = []
    get = Examples.__getitem__
    monkeypatch.setattr(Examples, "__getitem__", lambda self, place: read.append(place) or get(self, place))
    data = write(tmp_path / "train.jsonl", rows())
    losses, order = [], []
    for name in ("a", "b"):
        run = prepare(TrainConfig(data=data, reward="prefix_match", output_dir=str(tmp_path / name), **RUN))
        read.clear()  # what the engine was asked about: whether the first prompts have room
        assert run.task.train.rows.cache_files  # a file that is mapped, no objects
        train(run)
        assert len(set(read)) == 8  # of 24: two steps of four, and no evaluation
        order.append(list(read))
        losses.append([line.get("loss") for line in read_metrics(tmp_path / name)])
    assert order[0] == order[1]
    assert losses[0] == losses[1]


def test_a_resumed_run_meets_the_same_prompts_and_the_same_noise(tmp_path: Path) -> None:
    """Dynamic sampling makes the position depend on the rewards; these are random, in a process of their own."""
    source = "import random\ndef reward(prompts, completions, **_):\n    alive = random.random() < 0.5\n"
    source += "    return [random.random() * alive for _ in prompts]\n"
    settings = {
        **{"data": write(tmp_path / "train.jsonl", rows()), "reward": reward_file(tmp_path, source)},
        **{"task": "products", "train_size": None, "heldout_size": 0, "dynamic_sampling_max_rounds": 3},
    }
    whole = trained(tmp_path / "whole", steps=3, **settings)
    trained(tmp_path / "a", steps=2, save_steps=2, **settings)
    resumed = trained(tmp_path / "a", steps=3, resume="auto", **settings)
    assert differences(resumed, whole) == []
    rounds = [line["groups/rounds"] for line in whole["metrics"][1:]]
    assert whole["prompts"]["taken"] == sum(rounds) > 3


def test_rows_are_split_at_random_and_never_shared(tmp_path: Path) -> None:
    data = write(tmp_path / "all.parquet", rows())
    found = [opened(data, train_size=10, heldout_size=6, seed=seed).task(tiny_tokenizer()) for seed in (0, 0, 1)]
    split = [(prompts_of(task.train), prompts_of(task.heldout)) for task in found]
    assert split[0] == split[1] != split[2]
    for train_prompts, heldout in split:
        assert (len(train_prompts), len(heldout), len({*train_prompts, *heldout})) == (10, 6, 16)
    assert len(opened(data).task(tiny_tokenizer()).train) == 24
    few = opened(data, [data], heldout_size=4)
    assert [len(few.train), *(len(each) for each in few.heldout.values())] == [20, 4]
    assert len(opened(data, [data], heldout_size=0).train) == 24
    with pytest.raises(ValueError, match=r"^heldout_size: expected at least one prompt to evaluate"):
        open_heldout([data], eval_data_args={}, heldout_size=0)


def test_folders_and_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(rows())
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(tmp_path / "dict")
    (tmp_path / "files").mkdir()
    for part in range(2):
        write(tmp_path / "files" / f"part-{part}.jsonl", rows()[12 * part : 12 * part + 12])
    for source in ("saved", "dict", "files", "files/*.jsonl"):
        assert open_rows(str(tmp_path / source), {})["prompt"] == table["prompt"]
    assert len(open_rows(str(tmp_path / "dict"), {"split": "test"})) == 5
    assert len(open_rows(str(tmp_path / "files/*.jsonl"), {"split": "train[:3]"})) == 3


def test_too_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", [*rows(), {"prompt": "r:abcdabcdabcd=", "answer": "", "level": 0}])
    task = opened(data, max_prompt_tokens=6).task(tiny_tokenizer())
    assert task.notes == ("data: 1 of 25 prompts left out, longer than 6 tokens",)
    assert prompts_of(task.train) == [f"r:{w}=" for w in WORDS]
    with pytest.raises(ValueError, match=r"^max_prompt_tokens: expected at least one prompt of data to fit, got 5"):
        opened(data, max_prompt_tokens=5).task(tiny_tokenizer())


def messages(word: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "go"}, {"role": "user", "content": word, "name": None}]


def test_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    content = [{"prompt": messages(w), "answer": w} for w in ("abc", "bcd", "abc")]
    tokenizer = tiny_tokenizer()
    for name in ("chat.jsonl", "chat.parquet"):
        source = opened(write(tmp_path / name, content))
        assert source.notes == ["data: 1 of 3 rows left out, their prompts come again"]
        with pytest.raises(ValueError, match=r"^prompt_column: expected a tokenizer with a chat template"):
            opened(str(tmp_path / name)).task(tiny_tokenizer())
        tokenizer.chat_template = CHATML
        assert prompts_of(source.task(tokenizer).train) == ["system: go\nuser: abc\na:", "system: go\nuser: bcd\na:"]
    plain = write(tmp_path / "plain.jsonl", rows(["abc"]))
    assert prompts_of(opened(plain, chat=True).task(tokenizer).train) == ["user: r:abc=\na:"]


@pytest.mark.parametrize("template_writes_it", [True, False])
def test_a_chat_has_as_many_first_tokens_as_its_template_says(template_writes_it: bool) -> None:
    """A template that writes the beginning-of-sequence token, and a tokenizer that adds it once more, make two."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "z"  # one of its symbols
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="z $A", special_tokens=[("z", bos)])
    assert tokenizer("ab").input_ids[0] == bos
    tokenizer.chat_template = ("{{ bos_token }}" if template_writes_it else "") + CHATML
    text = PromptText(tokenizer)
    if template_writes_it:
        assert tokenizer(text(messages("abc"))).input_ids.count(bos) == 1
        assert tokenizer(text(messages("abc"))).input_ids == tokenizer.apply_chat_template(
            messages("abc"), add_generation_prompt=True, return_dict=False
        )
        assert text("abc") == "abc"
    else:
        with pytest.raises(ValueError, match=r"^prompt_column: expected a tokenizer that adds to a chat nothing but"):
            text(messages("abc"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "{tmp}/nowhere.jsonl"}, "data: expected a file, got .*nowhere.jsonl', which is not there"),
        ({"data": "{tmp}/empty"}, r"data: expected a .jsonl or .parquet file, .*empty' \("),
        ({"data": "{tmp}/broken.jsonl"}, r"data: expected a .jsonl or .parquet file, .*broken.jsonl' \("),
        ({"data_args": {"split": "tset"}}, "data: expected a .jsonl or .parquet file, .*"),
        ({"prompt_column": "promt"}, r"prompt_column: expected a column of .*, got 'promt'; did you mean 'prompt'\?"),
        ({"prompt_column": "question"}, "prompt_column: expected .* got 'question'; say which with --prompt_column"),
        ({"answer_column": "awnser"}, r"answer_column: expected .* got 'awnser'; did you mean 'answer'\?"),
        (
            {"prompt_column": "level"},
            "prompt_column: expected text or chat messages .* in row 0 of 'level', got 0",
        ),
        ({"train_size": 20, "heldout_size": 5}, r"train_size, heldout_size: expected at most 24 rows .* got 20 \+ 5"),
        (
            {"heldout_size": 24},
            "heldout_size: expected fewer than the 24 different prompts of .*, got 24; none would be",
        ),
        (
            {"eval_data": "{tmp}/train.jsonl"},
            "data: expected prompts that are not held out, got .*train.jsonl, all of whose prompts are in eval_data .*",
        ),
        ({"reward": "{tmp}/mine.py:f"}, r"reward f: expected the data to have a column 'levle', .* mean 'level'\?"),
        ({"prompts_per_step": 25}, "prompts_per_step: expected 1 to the 24 prompts there are to train on, got 25"),
    ],
)
def test_a_mistake_in_the_data_ends_in_one_sentence(tmp_path: Path, capsys, settings, message) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n{{{\n')
    (tmp_path / "mine.py").write_text("def f(completions, levle):\n    return []\n")
    write(tmp_path / "train.jsonl", rows())
    words = ["train", "--output_dir", str(tmp_path / "run")]
    given = {"data": "{tmp}/train.jsonl", "reward": "exact_match", **RUN, **settings}
    for name, value in given.items():
        words += [f"--{name}", (value if isinstance(value, str) else json.dumps(value)).replace("{tmp}", str(tmp_path))]
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.match(f"repo-ops train: {message}", error)


def test_columns_that_the_trainer_fills_in_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows(completions=["x"] * 24))
    with pytest.raises(ValueError, match=r"^data: expected other columns than \['completions'\], which the trainer"):
        opened(data)


def test_held_out_data_may_lack_the_answers(tmp_path: Path) -> None:
    """What has no answer is refused by a reward that needs one, and is no obstacle to another."""
    data = write(tmp_path / "train.jsonl", rows())
    bare = write(tmp_path / "heldout.jsonl", [{"prompt": "r:abcd=", "level": 0}])
    found = opened(data, [bare])
    assert found.columns == ["level"]
    task = found.task(tiny_tokenizer())
    assert task.heldout[0].columns == {"level": 0}
    assert set(task.train[0].columns) == {"answer", "level"}
