"""Edits of a prompt's group of completions before its advantages are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Rollout = TypeVar("Rollout")


@dataclass(frozen=True)
class EditedGroup(Generic[Rollout]):
    """A group after `repo_rephrase`."""

    rollouts: list[Rollout]
    rewards: list[float]
    replaced: int | None
    """Index that now holds the rephrased completion; None if the group was left as it is."""
    fail_rate: float
    """Share of the original rollouts with a reward under delta."""


def repo_rephrase(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    rephrased: Rollout | None,
    rephrased_reward: float | None,
    *,
    rho: float,
    delta: float,
) -> EditedGroup[Rollout]:
    """The group with its worst rollout replaced by a rephrased solution, if the policy mostly fails on the prompt.

    A rollout fails when its reward is under `delta`. If the share that fails is at least `rho`, and the rephrased
    completion itself does not fail, it takes the place of the rollout of lowest reward (the first of equals). Otherwise
    the group is returned as it was. Both log-probabilities of the injected row are taken under the original prompt, so
    that its ratio starts at 1; then it is plain GRPO.

    Args:
        rollouts: the G completions of one prompt, of any type.
        rewards: G finite rewards.
        rephrased: the policy's own rewording of an external solution; None where there is none.
        rephrased_reward: its reward from the same verifier; None where there is none.
        rho: share in (0, 1]. The paper's value is not known here; 1.0 waits until all fail.
        delta: reward under which a rollout fails; 0.5 suits rewards of 0 and 1.
    Raises:
        ValueError: lengths disagree, a reward is not finite, or rho is out of range.
    Source: arXiv:2602.10819. The choice of one rollout, the tie rule and the check of the rephrased reward are our
        reading of it.
    """
    if not rollouts or len(rollouts) != len(rewards):
        raise ValueError(f"rewards: expected {len(rollouts)} >= 1, one a rollout, got {len(rewards)}")
    if not 0 < rho <= 1:
        raise ValueError(f"rho: expected within (0, 1], got {rho}")
    if not math.isfinite(delta):
        raise ValueError(f"delta: expected a finite reward, got {delta}")
    if (rephrased is None) != (rephrased_reward is None):
        raise ValueError("rephrased_reward: expected a reward exactly where there is a rephrased completion")
    scored = [*rewards, *([] if rephrased_reward is None else [rephrased_reward])]
    if not all(math.isfinite(reward) for reward in scored):
        raise ValueError(f"rewards: expected finite numbers, got {scored}; leave out rollouts that could not be scored")

    fail_rate = sum(reward < delta for reward in rewards) / len(rewards)
    edited, edited_rewards = list(rollouts), [float(reward) for reward in rewards]
    if rephrased is None or rephrased_reward is None or rephrased_reward < delta or fail_rate < rho:
        return EditedGroup(edited, edited_rewards, None, fail_rate)
    worst = min(range(len(rewards)), key=rewards.__getitem__)
    edited[worst], edited_rewards[worst] = rephrased, float(rephrased_reward)
    return EditedGroup(edited, edited_rewards, worst, fail_rate)
