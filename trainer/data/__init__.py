"""Prompts from files and hub data sets, and the order in which a run visits its prompts."""

from __future__ import annotations

from repo_ops.trainer.data.load import DataTask, open_data, open_heldout
from repo_ops.trainer.data.stream import PromptStream

__all__ = ["DataTask", "PromptStream", "open_data", "open_heldout"]
