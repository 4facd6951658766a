"""Earlier completions of the prompts of a generation: drawn first, and only then the new ones are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import repo_ops
from repo_ops.integrations.trl.rows import Row
from repo_ops.replay import ReplayBuffer, Sample

__all__ = ["Record", "Replay", "prompt_key"]


@dataclass(frozen=True)
class Record:
    """A fresh completion as every rank needs to know it."""

    prompt: str
    """Key of the prompt."""
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Of the policy that sampled it."""
    finished: bool

    def sample(self, reward: float, *, version: int, temperature: float) -> Sample | None:
        """What the buffer keeps; None where a token or the whole completion could not be scored."""
        if not self.token_ids or math.isnan(reward) or not all(map(math.isfinite, self.logps)):
            return None
        return Sample(self.token_ids, self.logps, reward, {}, version, temperature, self.finished)


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """The buffer's name of a prompt: its tokens, so that a replayed completion follows the very prompt it answered."""
    return json.dumps(list(prompt_ids), separators=(",", ":"))


class Replay:
    """The buffer, and the replayed rows of a generation with their advantages.

    All ranks are given the same records and hold the same buffer, whose draws depend on nothing else; each takes the
    rows of the prompts whose first completion is its own. So it is enough that one rank saves it.
    """

    def __init__(self, buffer: ReplayBuffer, temperature: float, estimator: Mapping[str, Any]) -> None:
        self.buffer = buffer
        self.temperature = temperature
        self.estimator = estimator
        self.not_stored = 0
        """Completions that could not be stored, so far."""

    def rows(
        self, records: Sequence[Record], rewards: Sequence[float], *, version: int
    ) -> tuple[dict[str, list[Row]], list[float]]:
        """Replayed rows of each prompt (old_logps its own, group left open), and advantages of the fresh ones.

        The advantages are for mode "mixed" and for estimators of ours; in mode "split" with TRL's own estimator they
        are TRL's.
        """
        prompts = list(dict.fromkeys(record.prompt for record in records))
        drawn = {prompt: self.buffer.draw(prompt, version=version) for prompt in prompts}
        for prompt in prompts:
            mine = [
                (record, reward) for record, reward in zip(records, rewards, strict=True) if record.prompt == prompt
            ]
            samples = [r.sample(reward, version=version, temperature=self.temperature) for r, reward in mine]
            self.buffer.push(prompt, [sample for sample in samples if sample is not None])
            self.not_stored += samples.count(None)
        replayed = [(prompt, sample) for prompt in prompts for sample in drawn[prompt]]
        place = {prompt: i for i, prompt in enumerate(prompts)}
        advantages = repo_ops.group_advantages(
            torch.tensor([*rewards, *(sample.reward for _, sample in replayed)], dtype=torch.float32),
            torch.tensor([place[p] for p in (*(r.prompt for r in records), *(p for p, _ in replayed))]),
            off_policy=torch.tensor([*[False] * len(records), *[True] * len(replayed)]),
            lengths=torch.tensor([*(len(r.token_ids) for r in records), *(len(s.token_ids) for _, s in replayed)]),
            **self.estimator,
        ).tolist()
        rows: dict[str, list[Row]] = {prompt: [] for prompt in prompts}
        for (prompt, sample), advantage in zip(replayed, advantages[len(records) :], strict=True):
            ids = tuple(json.loads(prompt))
            logps = sample.logps
            rows[prompt].append(
                Row(ids, sample.token_ids, advantage, off_policy=True, old_logps=logps, sampler_logps=logps)
            )
        return rows, advantages[: len(records)]


def with_group(rows: Sequence[Row], group: int) -> list[Row]:
    """The rows as members of that group."""
    return [replace(row, group=group) for row in rows]
