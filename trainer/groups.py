"""The groups of a step: prompts, their completions and rewards, what is replayed with them, and their advantages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch

import repo_ops
from repo_ops.replay import ReplayBuffer, Sample
from repo_ops.trainer.config import TrainConfig
from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.door import sampling
from repo_ops.trainer.learner import ScoredSequence, reads_top_logps
from repo_ops.trainer.rewards import Scores, reward_metrics
from repo_ops.trainer.rollout import Completion, encode_prompts
from repo_ops.trainer.run import Run
from repo_ops.trainer.tasks import Example

__all__ = ["Collected", "Group", "collect", "draw_and_push", "group_metrics", "seed_of", "with_advantages"]


@dataclass
class Group:
    """A prompt of the step with its fresh completions, their rewards, and the replayed samples of that prompt."""

    example: Example
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    rewards: list[float]
    parts: list[dict[str, float]]
    """What each reward function gave each completion, unweighted."""
    replayed: list[Sample] = field(default_factory=list)

    @property
    def varied(self) -> bool:
        """Whether the fresh completions earned different rewards, so that there is something to learn from them."""
        return len(set(self.rewards)) > 1

    def rows(self) -> Iterator[tuple[Completion | Sample, float, bool]]:
        """(completion, reward, whether it is replayed), fresh ones first."""
        for completion, reward in zip(self.completions, self.rewards, strict=True):
            yield completion, reward, False
        for sample in self.replayed:
            yield sample, sample.reward, True


@dataclass
class Collected:
    """What was generated for a step."""

    groups: list[Group]
    """Those of the step: prompts_per_step of them."""
    generated: list[Group]
    """All of them, also those that dynamic sampling left out."""
    scores: list[Scores]
    """What the rewards gave, one for each round: each time that a batch of prompts was taken."""
    seconds: float
    """Spent in the engine."""

    @property
    def tokens(self) -> int:
        """Generated tokens that a reward was given for."""
        return sum(len(completion.token_ids) for group in self.generated for completion in group.completions)


def collect(run: Run, step: int) -> Collected:
    """The groups of a step, freshly generated and scored.

    With dynamic sampling (dynamic_sampling_max_rounds > 1) batches of prompts are taken until prompts_per_step groups
    have different rewards, or the rounds are used up; dead groups then fill the places that are left. A prompt is asked
    once in a step: a later batch, of the next time round the pool, goes without those that the step has had.
    Source: arXiv:2503.14476, section 3.2.
    """
    config, wanted = run.config, run.config.prompts_per_step
    generated: list[Group] = []
    scores: list[Scores] = []
    seconds = 0.0
    for round_ in range(config.dynamic_sampling_max_rounds):
        seen = {group.example.prompt for group in generated}
        examples = [example for example in run.prompts.take() if example.prompt not in seen]
        if not examples:
            continue
        started = time.perf_counter()
        settings = sampling(
            config,
            num_samples=config.group_size,
            max_new_tokens=run.max_new_tokens,
            seed=seed_of(config, step, round_),
            top_logps=config.divergence_top_k if reads_top_logps(run.learner.objective) else 0,
        )
        completions = run.engine.generate([example.prompt for example in examples], settings)
        seconds += time.perf_counter() - started
        rows = [(example, c) for example, group in zip(examples, completions, strict=True) for c in group]
        # once for all ranks: a reward may cost money, or answer differently when it is asked again
        scored = run.learner.ranks.from_first(partial(run.rewards.score, rows, max_new_tokens=run.max_new_tokens))
        scores.append(scored)
        generated += scored_groups(run, examples, completions, scored)
        if sum(group.varied for group in generated) >= wanted or len(generated) == len(run.task.train):
            break
    varied_first = sorted(range(len(generated)), key=lambda i: not generated[i].varied)
    groups = [generated[i] for i in sorted(varied_first[:wanted])]
    return Collected(groups, generated, scores, seconds)


def seed_of(config: TrainConfig, step: int, round_: int = 0) -> int:
    """Seed of the completions of a step. Step 0 is every evaluation's: the same random numbers before and after."""
    return config.seed * 1_000_003 + step + round_ * 2**40


def scored_groups(
    run: Run, examples: Sequence[Example], generated: Sequence[Sequence[Completion]], scores: Scores
) -> list[Group]:
    """The completions of each prompt that the reward functions gave a number."""
    place = 0
    groups = []
    prompts = encode_prompts(run.tokenizer, [example.prompt for example in examples])
    for example, prompt_ids, completions in zip(examples, prompts, generated, strict=True):
        group = Group(example, tuple(prompt_ids), [], [], [])
        for completion in completions:
            total = scores.totals[place]
            if total is not None:
                group.completions.append(completion)
                group.rewards.append(total)
                group.parts.append({n: v for n, part in scores.parts.items() if (v := part[place]) is not None})
            place += 1
        groups.append(group)
    return groups


def draw_and_push(
    buffer: ReplayBuffer | None, groups: Sequence[Group], *, version: int, temperature: float, ranks: Ranks
) -> None:
    """Draw earlier samples of every prompt of the step, and only then store the new ones; each on its home rank."""
    if buffer is None:
        return
    home = [ranks.keeps(group.example.prompt) for group in groups]
    prompts = [group.example.prompt for group in groups]
    drawn = [buffer.draw(prompt, version=version) if own else [] for prompt, own in zip(prompts, home)]
    for group, *parts in zip(groups, *ranks.gather(drawn)):
        group.replayed = [sample for part in parts for sample in part]
    for group, own in zip(groups, home):
        if not own:
            continue
        samples = [
            Sample(c.token_ids, c.logps, reward, parts, version, temperature, c.finished, c.text)
            for c, reward, parts in zip(group.completions, group.rewards, group.parts, strict=True)
            if c.token_ids  # an empty completion has no token to learn from
        ]
        buffer.push(group.example.prompt, samples)


def with_advantages(config: TrainConfig, groups: Sequence[Group]) -> list[ScoredSequence]:
    """Every fresh and replayed completion of the step with its advantage over its group."""
    rows = [(i, group.prompt_ids, *row) for i, group in enumerate(groups) for row in group.rows()]
    if not rows:
        return []
    advantages = repo_ops.group_advantages(
        torch.tensor([reward for _, _, _, reward, _ in rows]),
        torch.tensor([i for i, *_ in rows]),
        off_policy=torch.tensor([replayed for *_, replayed in rows]),
        lengths=torch.tensor([len(completion.token_ids) for _, _, completion, _, _ in rows]),
        **config.advantages,
    )
    sequences = [
        ScoredSequence(
            prompt_ids, completion.token_ids, advantage, replayed, completion.logps, i, **_others(completion)
        )
        for (i, prompt_ids, completion, _, replayed), advantage in zip(rows, advantages.tolist(), strict=True)
    ]
    return _without_dead(sequences) if config.drop_dead_groups else sequences


def _without_dead(sequences: Sequence[ScoredSequence]) -> list[ScoredSequence]:
    """The sequences of groups with a non-zero advantage; a group's fresh and replayed part are judged apart."""
    alive = {(s.group, s.off_policy) for s in sequences if s.advantage != 0}
    return [s for s in sequences if (s.group, s.off_policy) in alive]


def _others(completion: Completion | Sample) -> dict[str, tuple[Any, ...]]:
    """What the sampler said of other tokens at each place, as fields of a ScoredSequence; {} of a stored sample."""
    names = () if isinstance(completion, Sample) else ("top_ids", "top_logps", "kept_ids")
    return {name: getattr(completion, name) for name in names}


def group_metrics(collected: Collected, sequences: Sequence[ScoredSequence]) -> dict[str, float]:
    """What the step's completions were like, and for which share of its prompts anything can be learned.

    reward/*, completions/* and frac_reward_zero_std are over all that was generated, so that dynamic sampling does not
    flatter them. groups/effective_on and _off: prompts of the step whose fresh, whose replayed completions hold a
    non-zero advantage; groups/effective: either of them.
    """
    generated, groups = collected.generated, collected.groups
    completions = [completion for group in generated for completion in group.completions]
    rewards = [reward for group in generated for reward in group.rewards]
    on = {s.group for s in sequences if not s.off_policy and s.advantage != 0}
    off = {s.group for s in sequences if s.off_policy and s.advantage != 0}
    return {
        "reward/mean": fmean(rewards or [0.0]),
        "reward/std": pstdev(rewards or [0.0]),
        "reward/scored": float(len(rewards)),
        **reward_metrics(collected.scores),
        "frac_reward_zero_std": fmean(not group.varied for group in generated),
        "groups/effective_on": len(on) / len(groups),
        "groups/effective_off": len(off) / len(groups),
        "groups/effective": len(on | off) / len(groups),
        "groups/rounds": float(len(collected.scores)),
        "groups/discarded": float(len(generated) - len(groups)),
        "completions/mean_length": fmean([len(c.token_ids) for c in completions] or [0.0]),
        "completions/clipped_ratio": fmean([not c.finished for c in completions] or [0.0]),
        "replay/share_of_sequences": sum(s.off_policy for s in sequences) / max(1, len(sequences)),
    }
