"""How good the policy is on prompts that are never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repo_ops.trainer.rewards import RewardFunction, score
from repo_ops.trainer.rollout import RolloutEngine
from repo_ops.trainer.tasks import Example

# two-sided 95 % of the normal distribution
Z95 = 1.959964


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    reward: RewardFunction,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    ks: Sequence[int] = (1,),
    success: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Mean reward, greedy and sampled, and pass@k with a 95 % interval, over the examples.

    Args:
        engine: samples from the policy as it is now.
        examples: held-out prompts; without any the result is {}.
        num_samples: sampled completions of a prompt; 0 evaluates greedily only.
        temperature: of the samples.
        ks: pass@k for these k <= num_samples.
        success: least reward that counts as solved.
        seed: of the samples. The same seed before and after training compares like with like.
    Returns:
        prompts                            number of examples
        greedy_mean, greedy_accuracy       mean reward, and share solved, of the most probable completion
        sampled_mean, finished             mean reward, and share that ended by themselves, of the samples
        pass@k, pass@k_low, pass@k_high    for each k: chance that one of k samples solves a prompt, 95 % interval
        unscored                           completions that the reward left out (None); they count nowhere else
        A mean over nothing (everything left out) is nan.
    Raises:
        ValueError: a k outside 1 .. num_samples.
    """
    for k in ks if num_samples else ():
        if not 1 <= k <= num_samples:
            raise ValueError(
                f"ks: expected numbers from 1 to num_samples = {num_samples}, got {k}; sample more or drop it"
            )
    if not examples:
        return {}
    sampling = {"max_new_tokens": max_new_tokens, "seed": seed}
    greedy, _ = _rewards(engine, examples, reward, num_samples=1, temperature=1.0, greedy=True, **sampling)
    scored = [value for values in greedy for value in values if value is not None]
    result = {
        "prompts": float(len(examples)),
        "greedy_mean": _mean(scored),
        "greedy_accuracy": _mean([float(value >= success) for value in scored]),
        "unscored": float(len(examples) - len(scored)),
    }
    if not num_samples:
        return result
    sampled, finished = _rewards(
        engine, examples, reward, num_samples=num_samples, temperature=temperature, greedy=False, **sampling
    )
    groups = [[value for value in values if value is not None] for values in sampled]
    result["sampled_mean"] = _mean([value for group in groups for value in group])
    result["finished"] = finished
    result["unscored"] += float(len(examples) * num_samples - sum(map(len, groups)))
    for k in ks:
        estimates = [pass_at_k(len(g), sum(v >= success for v in g), k) for g in groups if len(g) >= k]
        result[f"pass@{k}"] = _mean(estimates)
        result[f"pass@{k}_low"], result[f"pass@{k}_high"] = interval(_mean(estimates), len(estimates))
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
    stays inside [0, 1] and does not shrink to nothing when all values are equal, which a normal interval does.
    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    if n == 0:
        return math.nan, math.nan
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _rewards(
    engine: RolloutEngine,
    examples: Sequence[Example],
    reward: RewardFunction,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    seed: int,
) -> tuple[list[list[float | None]], float]:
    """Rewards of every example's completions, and the share of completions that ended by themselves."""
    groups = engine.generate(
        [example.prompt for example in examples],
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        greedy=greedy,
        seed=seed,
    )
    rows = [(example, completion) for example, group in zip(examples, groups, strict=True) for completion in group]
    names = list(examples[0].columns)
    totals = score(
        {"reward": (reward, 1.0)},
        [example.prompt for example, _ in rows],
        [completion.text for _, completion in rows],
        {name: [example.columns[name] for example, _ in rows] for name in names},
    ).totals
    finished = _mean([float(completion.finished) for _, completion in rows])
    return [totals[i : i + num_samples] for i in range(0, len(totals), num_samples)], finished


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
