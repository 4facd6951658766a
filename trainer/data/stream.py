"""The order in which a run visits its prompts, and how far it has come."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from repo_ops.trainer.tasks import Example

__all__ = ["PromptStream"]


class PromptStream:
    """Batches of different prompts without end: the pool in a new order each time round.

    Batch n is a function of (seed, n) alone, and one step takes one batch unless dynamic sampling asks for more, so
    `taken` is all that a checkpoint has to keep. What does not fill a last batch is left out of that round.

    Args:
        examples: the pool; only the examples of a batch are read, so it may lie on disk. The order of a round holds
            one integer an example.
        batch: prompts of a batch.
        seed: of the orders.
    Raises:
        ValueError: a batch larger than the pool, which would hold a prompt twice.
    """

    def __init__(self, examples: Sequence[Example], *, batch: int, seed: int) -> None:
        if not 1 <= batch <= len(examples):
            raise ValueError(
                f"prompts_per_step: expected 1 to the {len(examples)} prompts there are to train on, got {batch}; "
                "a step would hold a prompt twice"
            )
        self.examples = examples
        self.batch = batch
        self.seed = seed
        self.taken = 0
        self._round = -1
        self._order: list[int] = []

    def take(self) -> list[Example]:
        """The next batch."""
        round_, place = divmod(self.taken, len(self.examples) // self.batch)
        if round_ != self._round:
            pool = range(len(self.examples))
            self._round, self._order = round_, random.Random(f"{self.seed}/{round_}").sample(pool, len(pool))
        self.taken += 1
        return [self.examples[i] for i in self._order[place * self.batch : (place + 1) * self.batch]]

    def state_dict(self) -> dict[str, int]:
        """How many batches were taken, and of what."""
        return {"taken": self.taken, "prompts": len(self.examples), "batch": self.batch, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch that was taken last.

        Raises:
            ValueError: the state is of another pool, batch size or seed: its position would mean other prompts.
        """
        mine = self.state_dict()
        names = {"prompts": "the training prompts", "batch": "prompts_per_step", "seed": "seed"}
        for key, name in names.items():
            if state[key] != mine[key]:
                raise ValueError(
                    f"{name}: expected {state[key]} as in the checkpoint, got {mine[key]}; resume with the data and "
                    "the settings that it was saved with"
                )
        self.taken = int(state["taken"])
