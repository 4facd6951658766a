"""Rollouts over the ranks that train together: each generates for its share of the prompts, all get everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from repo_ops.trainer.distributed import Ranks, whole
from repo_ops.trainer.rollout import Completion, EngineError, GenerationStopped, RolloutEngine, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OverRanks:
    """The completions that `engine` alone would give for all prompts, on every rank. All ranks call it alike.

    Args:
        engine: this rank's own.
        samples_from: the sharded model that the engine computes with, if it has none of its own. It is gathered while
            it generates: each rank holds all of it for that time (`repo_ops.trainer.distributed.whole`).
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks, *, samples_from: PreTrainedModel | None = None) -> None:
        self.engine = engine
        self.ranks = ranks
        self.samples_from = samples_from

    @property
    def should_stop(self) -> Callable[[], bool]:
        """Asked by this rank's engine; once it is true on one rank, `generate` ends on all."""
        return self.engine.should_stop

    @should_stop.setter
    def should_stop(self, ask: Callable[[], bool]) -> None:
        self.engine.should_stop = ask

    def describe(self) -> str:
        """What samples on each of the ranks."""
        return self.engine.describe()

    def check_prompts(self, prompts: Sequence[str], *, max_new_tokens: int) -> None:
        """As of the engine; every rank looks at all of them, so all raise alike."""
        self.engine.check_prompts(prompts, max_new_tokens=max_new_tokens)

    def sync(self, version: int) -> None:
        """Every rank's engine gets the policy of step `version`."""
        self.engine.sync(version)

    def generate(self, prompts: list[str], settings: SamplingSettings) -> list[list[Completion]]:
        """The completions of each prompt, in the order of the prompts.

        Raises:
            GenerationStopped: on all ranks, where `should_stop` came true on any.
            EngineError, ValueError: on all ranks, where an engine failed on any, or refused what it was asked for.
        """
        places = self.ranks.slice(range(len(prompts)))
        mine = [prompts[i] for i in places]
        settings = replace(settings, earlier=tuple(prompts[: places[0]] if places else ()))
        found: list[list[Completion]] | None = None
        failed: Exception | None = None
        with nullcontext() if self.samples_from is None else whole(self.samples_from):
            try:  # whatever happens here, the others wait for this rank
                found = self.engine.generate(mine, settings)
            except GenerationStopped:
                pass
            except (EngineError, ValueError) as error:
                failed = error
        outcomes = self.ranks.gather((found, failed))
        for _, error_of_rank in outcomes:
            if error_of_rank is not None:
                raise error_of_rank
        parts = [part for part, _ in outcomes if part is not None]
        if len(parts) < len(outcomes):
            raise GenerationStopped
        return [group for part in parts for group in part]
