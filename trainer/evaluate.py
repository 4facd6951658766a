"""How good the policy is on prompts that are never trained on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from repo_ops.trainer.distributed import Ranks
from repo_ops.trainer.rewards import Rewards
from repo_ops.trainer.rollout import RolloutEngine, SamplingSettings
from repo_ops.trainer.tasks import Example

__all__ = ["bootstrap", "evaluate", "interval", "pass_at_k"]

# two-sided 95 % of the normal distribution
Z95 = 1.959964


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    rewards: Rewards,
    sampling: SamplingSettings,
    *,
    ks: Sequence[int] = (1,),
    success: float = 1.0,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Mean reward, greedy and sampled, and pass@k, with 95 % intervals, over the examples.

    Args:
        engine: samples from the policy as it is now.
        examples: held-out prompts; without any the result is {}. Where their `source` differs, everything is also
            reported for each source by itself, under "<source>/".
        rewards: means are of the weighted sum; whether a completion is right, the first function alone decides.
        sampling: of the samples; no samples evaluate greedily only. The same seed before and after training compares
            like with like. The greedy completion knows no temperature, top_k or top_p.
        ks: pass@k for these k <= num_samples.
        success: least value of the first reward that counts as solved.
        ranks: those that call this together; the reward is asked on the first.
    Returns:
        prompts                            number of examples
        greedy_mean                        mean reward of the most probable completion
        greedy_accuracy, _low, _high       share of them that is right, Wilson's interval
        sampled_mean, _low, _high          mean reward of the samples, bootstrap over prompts
        finished                           share of the samples that ended by themselves
        pass@k, pass@k_low, pass@k_high    for each k: chance that one of k samples is right (unbiased), Wilson's
        unscored                           completions that a reward left out (None); they count nowhere else
        A mean over nothing (everything left out) is nan.
    Raises:
        ValueError: a k outside 1 .. num_samples.
    """
    for k in ks if sampling.num_samples else ():
        if not 1 <= k <= sampling.num_samples:
            raise ValueError(
                f"ks: expected numbers from 1 to num_samples = {sampling.num_samples}, got {k}; sample more or drop it"
            )
    if not examples:
        return {}
    asked = partial(_outcomes, engine, examples, rewards, ranks or Ranks())
    alone = replace(sampling, num_samples=1, greedy=True, temperature=1.0, top_k=0, top_p=1.0)
    greedy = [group[0] for group in asked(alone)]
    sampled = asked(sampling) if sampling.num_samples else []

    def summary(chosen: Sequence[int]) -> dict[str, float]:
        return _summary([greedy[i] for i in chosen], [sampled[i] for i in chosen if sampled], ks, success)

    result = summary(range(len(examples)))
    sources = list(dict.fromkeys(example.source for example in examples))
    for source in sources if len(sources) > 1 else ():
        part = summary([i for i, example in enumerate(examples) if example.source == source])
        result |= {f"{source}/{name}": value for name, value in part.items()}
    return result


def pass_at_k(n: int, solved: int, k: int) -> float:
    """Unbiased chance that at least one of k samples solves a problem, from n samples of which `solved` did.

    Equals 1 - C(n - solved, k) / C(n, k). Source: arXiv:2107.03374, equation 1.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= solved <= n.
    """
    if not 1 <= k <= n or not 0 <= solved <= n:
        raise ValueError(f"pass_at_k: expected 1 <= k <= n and 0 <= solved <= n, got n={n}, solved={solved}, k={k}")
    return 1.0 - math.comb(n - solved, k) / math.comb(n, k)


def interval(mean: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for a mean of n independent values in [0, 1]; (nan, nan) for n = 0.

    Values between 0 and 1 vary less than a coin of the same mean, so for them the interval is on the wide side. It
    stays inside [0, 1] and does not shrink to nothing when all values are equal, as a normal or a bootstrap interval
    does. It tells how the result would vary with other prompts.
    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    if n == 0:
        return math.nan, math.nan
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(groups: Sequence[Sequence[float]], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over all values, from means over groups drawn with replacement; (nan, nan) for none.

    Groups are drawn whole, because the samples of one prompt are not independent. For rewards of any range.
    Source: B. Efron, Annals of Statistics 7 (1979), 1-26; percentiles of the resampled means.
    """
    sums = [(math.fsum(group), len(group)) for group in groups if group]
    if not sums:
        return math.nan, math.nan
    rng = random.Random(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.choices(sums, k=len(sums))
        means.append(math.fsum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return means[int(0.025 * resamples)], means[math.ceil(0.975 * resamples) - 1]


# what one completion came to: the weighted reward (None: left out), the first reward, whether it ended by itself
_Outcome = tuple["float | None", "float | None", bool]


def _outcomes(
    engine: RolloutEngine, examples: Sequence[Example], rewards: Rewards, ranks: Ranks, sampling: SamplingSettings
) -> list[list[_Outcome]]:
    """For every example what its completions came to."""
    groups = engine.generate([example.prompt for example in examples], sampling)
    rows = [(example, completion) for example, group in zip(examples, groups, strict=True) for completion in group]
    scores = ranks.from_first(lambda: rewards.score(rows, max_new_tokens=sampling.max_new_tokens))
    deciding = next(iter(scores.parts.values()))
    finished = [completion.finished for _, completion in rows]
    flat = list(zip(scores.totals, deciding, finished))
    return [flat[i : i + sampling.num_samples] for i in range(0, len(flat), sampling.num_samples)]


def _summary(
    greedy: Sequence[_Outcome], sampled: Sequence[Sequence[_Outcome]], ks: Sequence[int], success: float
) -> dict[str, float]:
    scored = [(total, first) for total, first, _ in greedy if total is not None and first is not None]
    result = {
        "prompts": float(len(greedy)),
        "greedy_mean": _mean([total for total, _ in scored]),
        **_with_interval("greedy_accuracy", [float(first >= success) for _, first in scored]),
        "unscored": float(len(greedy) - len(scored)),
    }
    if not sampled:
        return result
    totals = [[total for total, _, _ in group if total is not None] for group in sampled]
    right = [
        [first >= success for total, first, _ in group if total is not None and first is not None] for group in sampled
    ]
    result["sampled_mean"] = _mean([total for group in totals for total in group])
    result["sampled_mean_low"], result["sampled_mean_high"] = bootstrap(totals)
    result["finished"] = _mean([float(finished) for group in sampled for _, _, finished in group])
    result["unscored"] += float(sum(map(len, sampled)) - sum(map(len, totals)))
    for k in ks:
        result |= _with_interval(f"pass@{k}", [pass_at_k(len(g), sum(g), k) for g in right if len(g) >= k])
    return result


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = interval(_mean(values), len(values))
    return {name: _mean(values), f"{name}_low": low, f"{name}_high": high}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
