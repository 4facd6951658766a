"""The exported model: a folder that loads elsewhere, with a card, and a copy on the hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import TINY, arguments, no_pictures, prepared  # noqa: F401

from repo_ops.cli import main
from repo_ops.trainer.config import parse_config
from repo_ops.trainer.loop import train
from repo_ops.trainer.models import load_model

SHORT: dict[str, Any] = {"steps": 1, "heldout_size": 0, "save_model": True}


def test_the_folder_loads_and_its_card_says_how_it_was_made(tmp_path: Path) -> None:
    run = prepared(tmp_path, **SHORT)
    found = train(run)
    model, _ = load_model(str(tmp_path / "model"))
    for (name, mine), theirs in zip(run.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    _, head, text = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "1 steps of 4 prompts x 4 completions, learning rate 0.001, seed 0" in text
    assert f"| train reward, first 5 steps | {found['reward, first steps']:.3f} |" in text
    assert str(tmp_path) not in (tmp_path / "model" / "training.yaml").read_text()  # no path of this machine
    settings = parse_config(["--config", str(tmp_path / "model" / "training.yaml")])
    assert (settings.steps, settings.lr, settings.replay) == (1, TINY["lr"], TINY["replay"])
    assert not list(tmp_path.glob(".model*"))


class Hub:
    """What the trainer asks of huggingface_hub.HfApi."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.calls = []

    def create_repo(self, repo_id: str, **keywords: Any) -> None:
        self.calls.append((repo_id, keywords))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.problem is not None:
            raise self.problem
        self.calls.append((repo_id, {"files": sorted(path.name for path in Path(folder_path).iterdir())}))


@pytest.fixture
def _logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")


@pytest.mark.usefixtures("_logged_in")
def test_the_hub_gets_the_folder_in_a_private_repository(tmp_path: Path, monkeypatch) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    main(arguments(tmp_path, **SHORT, push_to_hub="someone/reverser"))
    (made, how), (filled, content) = hub.calls
    assert made == filled == "someone/reverser"
    assert how == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(content["files"])
    assert "from_pretrained('someone/reverser')" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.usefixtures("_logged_in")
def test_an_upload_that_fails_keeps_the_model_and_says_how_to_send_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(OSError("connection refused")))
    with pytest.raises(SystemExit) as end:
        main(arguments(tmp_path, **SHORT, push_to_hub="someone/reverser"))
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "push_to_hub: the upload to someone/reverser failed (connection refused); the model is in" in error
    assert f"`hf upload someone/reverser {tmp_path / 'model'}`" in error
    assert load_model(str(tmp_path / "model"))
