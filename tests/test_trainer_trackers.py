"""Metrics in TensorBoard, wandb and trackio: read back from what each of them wrote."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from repo_ops.trainer import trackers
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.log import RunLog
from repo_ops.trainer.trackers import Opening, check_installed, open_trackers, tracked_names, tracker_names


def opening(folder: Path, resumed_at: int | None = None) -> Opening:
    folder.mkdir(exist_ok=True)
    return Opening(folder, "a-project", "a-run", {"lr": 0.5, "objective": "grpo"}, resumed_at)


def run_steps(name: str, run: Opening, steps: range) -> None:
    with RunLog(
        run.folder, TrainConfig(steps=9), name="r", trackers=open_trackers([name], run), resumed_at=run.resumed_at
    ) as log:
        for step in steps:
            log.step(step, {"reward/mean": step / 8, "eval/sampled_mean": 0.5, "loss": float("nan")})


def test_names_are_those_of_trl() -> None:
    found = tracked_names({"reward/mean": 1.0, "reward/std": 2.0, "kl": 3.0, "eval/pass@1": 4.0, "lr": 5.0})
    assert found == {
        "train/reward": 1.0,
        "train/reward_std": 2.0,
        "train/kl": 3.0,
        "eval/pass@1": 4.0,
        "train/learning_rate": 5.0,
    }


def test_one_name_or_several() -> None:
    assert tracker_names("tensorboard") == tracker_names(["tensorboard"]) == ["tensorboard"]
    assert tracker_names("wandb,trackio") == ["wandb", "trackio"]
    assert tracker_names([]) == []
    with pytest.raises(ValueError, match="expected names out of tensorboard, wandb, trackio, got 'tensorbord'"):
        TrainConfig(report_to="tensorbord")


def test_all_trackers_of_a_run_and_of_its_resumption_get_one_id(tmp_path: Path) -> None:
    new = opening(tmp_path)
    assert new.run_id == new.run_id == (tmp_path / "run_id").read_text()
    assert opening(tmp_path, resumed_at=3).run_id == new.run_id
    assert opening(tmp_path).run_id != new.run_id


def test_a_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "no_such_tracker", trackers.TRACKERS["wandb"])
    check_installed(["json"], option="x")
    with pytest.raises(ImportError, match="report_to: needs the package no_such_tracker; pip install no_such_tracker"):
        check_installed(["no_such_tracker"], option="report_to")


def test_tensorboard_goes_on_in_its_folder_without_the_steps_that_were_lost(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_steps("tensorboard", opening(tmp_path), range(6))
    run_steps("tensorboard", opening(tmp_path, resumed_at=3), range(4, 7))  # 4 and 5 are made again
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/reward")] == [(step, step / 8) for step in range(7)]
    assert "eval/sampled_mean" in found.Tags()["scalars"]


def records_of(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: blocks of 32 KiB, in which each piece has checksum, length and kind (LevelDB's log)."""
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:  # no room for a piece's header: padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of_wandb"))
    run_steps("wandb", opening(tmp_path / "run"), range(3))
    run_steps("wandb", opening(tmp_path / "run", resumed_at=1), range(2, 4))

    ids, steps = set(), []
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    for file in files:
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                steps.append((int(items["step"]), float(items["train/reward"])))
    assert ids == {((tmp_path / "run" / "run_id").read_text(), "a-project", "a-run")}
    assert sorted(steps) == [(0, 0.0), (1, 0.125), (2, 0.25), (2, 0.25), (3, 0.375)]


def test_trackio_keeps_everything_local(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("trackio")
    import subprocess
    import sys

    # it reads its folder when it is imported
    code = f"""
from pathlib import Path
from repo_ops.trainer.trackers import Opening, open_trackers, tracked_names
for resumed_at, steps in ((None, range(3)), (2, range(3, 5))):
    opening = Opening(Path({str(tmp_path)!r}), "a-project", "a-run", {{"lr": 0.5}}, resumed_at)
    tracker, = open_trackers(["trackio"], opening)
    for step in steps:
        tracker.log(step, tracked_names({{"reward/mean": step / 8}}))
    tracker.close(False)
from trackio.sqlite_storage import SQLiteStorage
run, = SQLiteStorage.get_runs("a-project")
assert run == "a-run-" + Path({str(tmp_path)!r}, "run_id").read_text(), run
found = [(line["step"], line["train/reward"]) for line in SQLiteStorage.get_logs("a-project", run)]
assert found == [(step, step / 8) for step in range(5)], found
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
