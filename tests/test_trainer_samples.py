"""Completions that a run shows: which, how they are cut, and what parquet and report.html keep of them."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from repo_ops.replay import Sample
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.groups import Group
from repo_ops.trainer.learner import ScoredSequence
from repo_ops.trainer.log import RunLog, read_metrics
from repo_ops.trainer.report import draw_report, main, write_page
from repo_ops.trainer.rollout import Completion
from repo_ops.trainer.samples import SampleRow, read_samples, rows_of_step, sample_table, spread, write_samples
from repo_ops.trainer.tasks import Example


def row(reward: float = 0.5, *, replayed: bool = False, **more: object) -> SampleRow:
    given = {"step": 3, "group": 0, "prompt": "1+1=", "completion": "2", "advantage": 0.25, "version": 1}
    return {**given, "reward": reward, "replayed": replayed, "tokens": 1, "finished": True, "logp": -0.5, **more}


def test_rows_of_a_step_fresh_and_replayed_and_of_a_dead_group_that_was_left_out() -> None:
    def completion(text: str) -> Completion:
        return Completion((1, 2), (-0.5, -0.25), text, True)

    stored = Sample((3,), (-1.0,), 0.75, {}, 4, 1.0, False, "old")
    two = [{"right": 1.0, "short": 0.5}, {"right": 0.0}]
    alive = Group(Example("a", "A?", {}), (1,), [completion("x"), completion("y")], [1.0, 0.0], two, [stored])
    dead = Group(Example("b", "B?", {}), (1,), [completion("z")], [0.0], [{}])
    sequences = [
        ScoredSequence((1,), (1, 2), 1.5, group=0),
        ScoredSequence((1,), (1, 2), -1.5, group=0),
        ScoredSequence((1,), (3,), 0.5, off_policy=True, group=0),
    ]
    rows = rows_of_step(7, [alive, dead], sequences)
    keys = ("prompt", "completion", "reward", "advantage", "replayed", "version", "tokens", "finished", "logp")
    assert [tuple(each[key] for key in keys) for each in rows] == [
        ("A?", "x", 1.0, 1.5, False, 6, 2, True, -0.75),
        ("A?", "y", 0.0, -1.5, False, 6, 2, True, -0.75),
        ("A?", "old", 0.75, 0.5, True, 4, 1, False, -1.0),
        ("B?", "z", 0.0, 0.0, False, 6, 2, True, -0.75),
    ]
    assert (rows[0]["rewards/right"], rows[0]["rewards/short"]) == (1.0, 0.5)


def test_shown_rows_go_from_worst_to_best_and_half_are_replayed() -> None:
    fresh = [row(reward / 8) for reward in (5, 0, 8, 3, 2)]
    replayed = [row(reward / 8, replayed=True) for reward in (7, 1, 4)]
    assert [each["reward"] * 8 for each in spread(fresh + replayed, 4)] == [0, 8, 1, 7]
    assert [each["reward"] * 8 for each in spread(fresh, 3)] == [0, 3, 8]
    assert [each["reward"] * 8 for each in spread(fresh, 9)] == [0, 2, 3, 5, 8]
    assert spread([], 4) == []
    assert len(spread(fresh, 1)) == 1


@pytest.mark.parametrize("width", [70, 100])
def test_table_is_cut_to_the_terminal_at_the_right_ends(width: int) -> None:
    rows = [
        row(prompt="begin " + "字" * 200 + " end", completion="first " + "word " * 100 + "last"),
        row(prompt="[bold]p", completion="a\nb\t[red]\x1bc", replayed=True),
    ]
    out = StringIO()
    Console(file=out, width=width).print(sample_table(rows, title="t"))
    lines = out.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    long, short = [line for line in lines if line.startswith("│")]
    assert "字 end │ first word" in long
    assert "begin" not in long
    assert "last" not in long
    assert "[bold]p" in short  # no markup
    assert "a⏎b·[red]·c" in short  # one line, and no control character reaches the terminal
    assert "replay" in short
    assert "fresh" in long


def test_a_resumed_log_forgets_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrainConfig(steps=9, sample_steps=1), name="r", console=Console(file=StringIO())) as log:
        for step in range(5):
            log.step(step, {"loss": float(step)})
            log.completions(step, [row(step=step)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with RunLog(tmp_path, TrainConfig(steps=9), name="r", console=Console(file=StringIO()), resumed_at=2) as log:
        log.step(3, {"loss": 30.0})
    expected = [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    assert read_metrics(tmp_path) == log.lines == expected
    assert [each["step"] for each in read_samples(tmp_path)] == [0, 1, 2]


def test_a_silent_log_leaves_the_files_of_the_first_rank_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    out = StringIO()
    console = Console(file=out, force_terminal=True)
    config = TrainConfig(steps=2, sample_steps=1, save_completions=True)
    with RunLog(tmp_path, config, name="r", console=console, silent=True) as log:
        log.say("hello")
        log.step(1, {"loss": 1.0})
        log.completions(1, [row()])
    assert out.getvalue() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert log.lines == [{"step": 1, "loss": 1.0}]


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    with RunLog(folder, TrainConfig(steps=2), name="r", console=Console(file=StringIO())) as log:
        for step in (1, 2):
            groups = {f"groups/effective{kind}": 0.5 for kind in ("", "_on", "_off")}
            seconds = {f"time/{part}": 1.0 for part in ("generate", "learner", "rest")}
            log.step(step, {"reward/mean": 0.5, "loss": float("nan"), "memory/peak_mb": 1.0, **groups, **seconds})
    return folder


def test_page_needs_nothing_from_outside_and_escapes_what_a_model_writes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    nasty = "<script>alert(1)</script> & \"quotes\" </pre><img src='https://x.y/z'>"
    write_samples(folder, [row(prompt=nasty, completion=nasty, step=1), row(replayed=True, step=2)])
    (folder / "config.yaml").write_text("model: <b>tiny</b>\n")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "describe": "what <i>it</i> was",
                "steps": 9,
                "ended": "stopped: <u>why</u>",
                "versions": {"torch": "2.x"},
                "memory_at_rest": {"weights": 3 << 20},
            }
        )
    )
    runs = {"a <run>": folder}
    page = write_page(runs, tmp_path / "report.html", picture=draw_report(runs, tmp_path / "report.png"))
    text = page.read_text(encoding="utf-8")
    for tag in ("<script", "<b>", "<i>", "<u>", "<img src", "<run>"):
        assert tag not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34; &lt;/pre&gt;") == 2
    assert text.count("src=") == text.count('src="data:image/png;base64,') + 2  # the two in the escaped completion
    assert "href=" not in text
    assert "url(" not in text
    for words in ("2 of 9 steps; stopped: &lt;u&gt;why", "replay, 0 old", "<td class=n>3.0</td>", "<polyline", "2.x"):
        assert words in text


def test_report_command_makes_pages_of_one_run_and_of_several(tmp_path: Path, capsys) -> None:
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    main([str(one)])
    assert (one / "report.html").exists()
    main([str(one), str(two), "--output", str(tmp_path / "both" / "page.html")])
    assert "one and two" in (tmp_path / "both" / "page.html").read_text()
    assert (tmp_path / "both" / "page.png").exists()
    for wrong, sentence in (
        ([str(tmp_path)], "expected folders with metrics.jsonl"),
        ([str(one), str(two)], "several runs need --output"),
        ([str(one)] * 5, "expected at most 4 runs, got 5"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(wrong)
        assert exit_.value.code == 2
        assert sentence in capsys.readouterr().err
