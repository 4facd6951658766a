"""The trained model for others to use: a folder in Hugging Face format with a model card, and a copy on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from repo_ops.trainer.config import TrainConfig, save_config
from repo_ops.trainer.failed import RunFailed
from repo_ops.trainer.models.export import export_model
from repo_ops.trainer.summary import summary_rows

if TYPE_CHECKING:
    from repo_ops.trainer.run import Run

__all__ = ["check_hub", "model_card", "publish"]

CARD = """\
---
{head}---

# {title}

{base}, trained with {method} on the task `{task}` by repo-ops {version}:
{config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} completions, \
learning rate {config.lr:g}, seed {config.seed}.

## Result

| | |
|---|---|
{result}

Rewards are those of the training task; how the model does elsewhere was not measured.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r})
```

## How it was trained

`repo-ops train --config training.yaml`, the file beside this one, repeats it. Versions: {versions}.
"""


def check_hub(repository: str | None) -> None:
    """What would make the upload at the end of a run fail is better known before it.

    Raises:
        ValueError: no such name can exist, or nobody is logged in.
    """
    if repository is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: expected organisation/name, got {repository!r}; {error}") from error
    if get_token() is None:
        raise ValueError(
            f"push_to_hub: expected a login for {repository!r}, got none; run `hf auth login` or set HF_TOKEN"
        )


def publish(run: Run, found: Mapping[str, float]) -> None:
    """Writes the model to output_dir/model, with its card, and uploads it if the settings say so; on all ranks.

    The folder appears whole or not at all; a model that was there before stays until then.

    Args:
        found: `summarize_run` of the run.
    Raises:
        RunFailed: the upload did not work; the message says how to repeat it.
    """
    config, ranks = run.config, run.learner.ranks
    if not config.save_model and config.push_to_hub is None:
        return
    folder, draft, old = (run.folder / name for name in ("model", ".model-draft", ".model-old"))
    try:
        if ranks.is_first:
            shutil.rmtree(old, ignore_errors=True)
        export_model(run.model, run.tokenizer, draft, ranks)
        if not ranks.is_first:
            return
        (draft / "README.md").write_text(model_card(run, found), encoding="utf-8")
        # without what concerns one machine alone
        own = replace(config, output_dir=TrainConfig.output_dir, resume=None, push_to_hub=None)
        save_config(own, draft / "training.yaml")
        if folder.exists():
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        if ranks.is_first:
            for left_over in (draft, old):
                shutil.rmtree(left_over, ignore_errors=True)
    if config.push_to_hub is not None:
        _upload(folder, config.push_to_hub)


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        # private: a setting of a training run is no place to publish by; the owner can, with one click
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained by repo-ops")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunFailed(
            f"push_to_hub: the upload to {repository} failed ({reason}); the model is in {folder}: "
            f"`hf upload {repository} {folder}` sends it again"
        ) from error


def model_card(run: Run, found: Mapping[str, float]) -> str:
    """README.md of the model: what it is, how it was made, what came out."""
    import yaml

    config = run.config
    is_hub_id = config.model.count("/") == 1 and not Path(config.model).expanduser().exists()
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": config.model} if is_hub_id else {}),
        "tags": ["reinforcement-learning", config.objective, "repo-ops"],
    }
    name = config.push_to_hub or run.folder.resolve().name
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        title=name.split("/")[-1],
        base=f"[{config.model}](https://huggingface.co/{config.model})" if is_hub_id else f"`{config.model}`",
        method=f"`{config.objective}`" + (f" and {config.replay} replay" if config.replay else ""),
        task=run.task.name,
        version=version("repo-ops"),
        config=config,
        result="\n".join(f"| {label} | {value} |" for label, value in summary_rows({"": found})),
        name=config.push_to_hub or "path/to/this/folder",
        versions=", ".join(f"{each} {version(each)}" for each in ("torch", "transformers")),
    )
