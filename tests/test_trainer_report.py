"""What a finished run shows: the numbers of its table, by hand, and its picture."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.log import RunLog, read_metrics
from repo_ops.trainer.report import draw_report
from repo_ops.trainer.summary import show_run, summarize_run, summary_rows, summary_table


def line(step: int, reward: float, **more: float) -> dict[str, float]:
    return {
        "reward/mean": reward,
        "groups/effective": 0.5,
        "groups/effective_on": 0.25,
        "groups/effective_off": 0.5,
        "completions/mean_length": 3.0,
        "time/generate": 2.0,
        "time/learner": 1.0,
        "time/rest": 0.5,
        "tokens_per_second": 10.0,
        "memory/peak_mb": 100.0 + step,
        **more,
    }


def write_run(folder: Path, console: Console | None = None, replayed_after: int = 5) -> Path:
    folder.mkdir()
    with RunLog(folder, TrainConfig(steps=7), name="a run", console=console) as log:
        log.step(0, {"eval/sampled_mean": 0.25, "eval/greedy_mean": 0.5})
        for step in range(1, 8):
            log.step(step, line(step, 0.1 * step, **({"off_policy/ess": 0.9} if step > replayed_after else {})))
    return folder


def test_lines_are_flushed_as_they_come_and_read_back(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrainConfig(steps=2), name="a run", console=Console(file=StringIO())) as log:
        log.step(0, {"eval/sampled_mean": 0.5})
        log.step(1, {"reward/mean": 0.25, "loss": float("nan"), "grad_norm": float("inf")})
        # strict JSON has no NaN, and other readers of the file stop at one
        first, second = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first == {"step": 0, "eval/sampled_mean": 0.5}
    assert second == {"step": 1, "reward/mean": 0.25, "loss": None, "grad_norm": None}
    assert read_metrics(tmp_path) == [first, second]


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    out = StringIO()
    with RunLog(tmp_path, TrainConfig(steps=5, log_steps=2), name="a run", console=Console(file=out)) as log:
        for step in range(1, 6):
            log.step(step, line(step, 0.5))
    assert out.getvalue().splitlines() == [
        f"a run  step   {step}/5  reward 0.500  effective groups 50%  10 tok/s" for step in (2, 4, 5)
    ]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = StringIO()
    with RunLog(
        tmp_path, TrainConfig(steps=2), name="a run", console=Console(file=out, force_terminal=True, width=160)
    ) as log:
        log.step(1, line(1, 0.5))
        log.step(2, line(2, 0.75))
    assert "2/2" in out.getvalue()
    assert "reward 0.750" in out.getvalue()


def test_summary_by_hand(tmp_path: Path) -> None:
    lines = read_metrics(write_run(tmp_path / "run"))
    lines.append({"step": 8, "eval/sampled_mean": 0.75, "eval/greedy_mean": 1.0})
    found = summarize_run(lines)
    assert found["reward, first steps"] == pytest.approx(0.3)  # .1 .2 .3 .4 .5
    assert found["reward, last steps"] == pytest.approx(0.5)  # .3 .4 .5 .6 .7
    assert (found["eval/sampled_mean before"], found["eval/sampled_mean after"]) == (0.25, 0.75)
    assert (found["time/generate"], found["time/learner"], found["time/rest"]) == (14.0, 7.0, 3.5)
    assert (found["groups/effective"], found["groups/effective_on"]) == (0.5, 0.25)
    assert found["memory/peak_mb"] == 107.0
    assert found["off_policy/ess"] == pytest.approx(0.9)  # the mean over steps that replayed something
    console = Console(file=StringIO(), width=100)
    console.print(summary_table({"one": found, "two": summarize_run(lines[:3])}, title="t", caption="c"))
    rows = [row for row in console.file.getvalue().splitlines() if "effective sample size" in row]  # type: ignore[attr-defined]
    assert "0.900" in rows[0]
    assert "-" in rows[0].replace("0.900", "")  # the second run has none


def test_a_run_without_evaluation_or_replay_has_a_table_too() -> None:
    found = summarize_run([{"step": 1, **line(1, 0.5), "groups/effective_off": 0.0}])
    assert not any("eval" in name or "ess" in name or "effective_" in name for name in found)


def test_a_run_without_replay_or_evaluation_has_a_picture_too(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrainConfig(steps=1), name="a run", console=Console(file=StringIO())) as log:
        log.step(1, line(1, 0.5))
    assert draw_report({"a run": tmp_path}, tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(("effective", "says"), [(0.0, True), (0.25, False)])
def test_a_run_that_learned_nothing_says_so(tmp_path: Path, effective: float, says: bool) -> None:
    out = StringIO()
    found = summarize_run([{"step": 1, **line(1, 0.5), "groups/effective": effective}])
    show_run(found, folder=tmp_path, console=Console(file=out, width=200))
    assert ("nothing was learned" in out.getvalue()) == says


@pytest.mark.parametrize(("names", "replayed_after"), [(["one"], 5), (["one", "two"], 5), (["one without replay"], 7)])
def test_picture(tmp_path: Path, names: list[str], replayed_after: int) -> None:
    from matplotlib.image import imread

    runs = {name: write_run(tmp_path / name, replayed_after=replayed_after) for name in names}
    picture = draw_report(runs, tmp_path / "report.png", title="both")
    pixels = imread(picture)
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1500
    assert pixels.std() > 0.05  # something is drawn


def test_too_many_runs_for_colours_that_stay_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs: expected 1 to 4, got 5"):
        draw_report({str(i): tmp_path for i in range(5)}, tmp_path / "report.png")


def test_what_was_not_measured_at_an_end_is_left_out_of_the_summary() -> None:
    """A reward that failed on every held-out prompt gives None; a resumed run may be told to evaluate more."""
    first = {"step": 0, "eval/greedy_mean": None, "eval/sampled_mean": 0.5}
    last = {"step": 2, "eval/greedy_mean": 0.75, "eval/sampled_mean": 0.5, "eval/pass@4": 1.0}
    found = summarize_run([first, last])
    assert found == {
        "eval/sampled_mean before": 0.5,
        "eval/greedy_mean after": 0.75,
        "eval/sampled_mean after": 0.5,
        "eval/pass@4 after": 1.0,
    }
    assert [row[1] for row in summary_rows({"": found})] == ["0.500", "0.500", "0.750"]
