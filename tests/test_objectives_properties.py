"""What must not matter, for every objective: the order of sequences, padding, micro-batches, the advantages' unit."""

import itertools
import math

import objective_cases as cases
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from repo_ops import NumItems, policy_loss

FEW = settings(max_examples=4, deadline=None)
MODIFIED = {
    "replayed rows": ("repo", {"beta": 0.1}),
    "official row norm": ("repo", {"row_norm": "official_code", "entropy_coef": 0.02}),
    "two counts": ("dapo", {"beta": 0.1, "kl_reduction": "seq-mean-token-mean", "entropy_coef": 0.02}),
    "sampler": ("gspo", {"sampler_weight": "geometric_truncate", "sampler_max": 1.2, "off_policy_mask": 0.0}),
    "constant": ("grpo", {"reduction": "const-nobatch", "max_length": 16, "sampler_weight": "token_mask"}),
}
SETTINGS = [*((name, name, {}) for name in cases.NAMES), *((key, *value) for key, value in MODIFIED.items())]
PER_TOKEN = ("logps", "old_logps", "ref_logps", "sampler_logps", "entropy")


def every(holds=lambda name, objective: True):
    """Every name, and the combinations above, for which the property is to hold."""
    chosen = [pytest.param(n, hyper, id=key) for key, n, hyper in SETTINGS if holds(n, cases.make(n, **hyper))]
    return pytest.mark.parametrize(("name", "hyper"), chosen)


def drawn(name, objective, seed, lengths):
    """Packed columns of a random batch, [N, ...] by name, with its advantages and replay marks per sequence."""
    batch = cases.suited(name, cases.batch(seed, lengths=lengths), objective)
    t = batch.tokens
    first = (t.lengths.cumsum(0) - t.lengths).clamp_max(max(len(t.logps) - 1, 0))
    columns = {n: getattr(t, n) for n in PER_TOKEN} | dict(t.extras)
    return columns, t.advantages[first], batch.off_policy


def graded(objective, columns, advantages, off_policy, *, mask=None, lengths=None, **more):
    """Loss and d loss / d logps, d loss / d entropy, from columns that are packed or padded."""
    leaves = {n: columns[n].clone().requires_grad_() for n in ("logps", "entropy")}
    reads = {n: columns[n] for n in ("old_logps", "ref_logps", "sampler_logps")}
    reads["extras"] = {n: columns[n] for n in columns if n not in PER_TOKEN and n in objective.reads}
    if lengths is not None:
        more["cu_seqlens"] = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    loss = policy_loss(
        leaves["logps"], advantages, objective=objective, entropy=leaves["entropy"], mask=mask,
        off_policy=off_policy, **reads, **more,
    ).loss  # fmt: skip
    found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values()))]


def same(got, want, rtol=1e-10):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-12 * max(1.0, float(w.abs().max())) if w.numel() else 0)


def rows_of(lengths):
    """Each sequence's packed rows."""
    ends = [0, *itertools.accumulate(lengths)]
    return [torch.arange(a, b) for a, b in itertools.pairwise(ends)]


LENGTHS = st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(any)
SEED = st.integers(0, 10_000)


# batch scope too: what is taken over the batch must not depend on the order; Clip-Cov draws its tokens by place
@every(lambda name, objective: name != "clip_cov")
@FEW
@given(lengths=LENGTHS, seed=SEED, data=st.data())
def test_the_order_of_sequences_does_not_matter(name, hyper, lengths, seed, data):
    objective = cases.make(name, **hyper)
    columns, advantages, off_policy = drawn(name, objective, seed, lengths)
    want = graded(objective, columns, advantages, off_policy, lengths=lengths)
    order = data.draw(st.permutations(range(len(lengths))))
    rows = torch.cat([rows_of(lengths)[i] for i in order])
    moved = {n: x[rows] for n, x in columns.items()}
    got = graded(objective, moved, advantages[order], off_policy[order], lengths=[lengths[i] for i in order])
    same(got, [want[0], *(g[rows] for g in want[1:])])


@every()
@FEW
@given(
    lengths=LENGTHS, seed=SEED, left=st.integers(0, 3), right=st.integers(0, 4), junk=st.sampled_from([math.nan, 1e9])
)
def test_padding_does_not_matter(name, hyper, lengths, seed, left, right, junk):
    objective = cases.make(name, **hyper)
    columns, advantages, off_policy = drawn(name, objective, seed, lengths)
    want = graded(objective, columns, advantages, off_policy, lengths=lengths)
    width = left + max(lengths) + right
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, left : left + length] = True
    padded = {n: x.new_full((*mask.shape, *x.shape[1:]), junk) for n, x in columns.items()}
    for n, x in columns.items():
        padded[n][mask] = x
    loss, *gradients = graded(objective, padded, advantages, off_policy, mask=mask)
    same([loss, *(g[mask] for g in gradients)], want)
    assert not any(g[~mask].any() for g in gradients)


@every(lambda name, objective: objective.reach != "batch")  # a statistic over a micro-batch is its own
@FEW
@given(lengths=LENGTHS, seed=SEED, cuts=st.lists(st.integers(0, 6), max_size=3))
def test_micro_batches_do_not_matter(name, hyper, lengths, seed, cuts):
    objective = cases.make(name, **hyper)
    columns, advantages, off_policy = drawn(name, objective, seed, lengths)
    want = graded(objective, columns, advantages, off_policy, lengths=lengths)
    ends = sorted({0, len(lengths), *(min(cut, len(lengths)) for cut in cuts)})
    rows, parts, counts = rows_of(lengths), [], None
    for a, b in itertools.pairwise(ends):  # the step's counts are the sum of its micro-batches' counts
        own = NumItems.of(torch.tensor(lengths[a:b]), off_policy[a:b])
        counts = own if counts is None else counts + own
    for a, b in itertools.pairwise(ends):
        live = torch.cat(rows[a:b])
        part = {n: x[live] for n, x in columns.items()}
        parts.append(graded(objective, part, advantages[a:b], off_policy[a:b], lengths=lengths[a:b], num_items=counts))
    same([sum(p[0] for p in parts), *(torch.cat(g) for g in list(zip(*parts))[1:])], want)


# loss and gradient have a term that does not read A: they are a + c b at c A, and a is not 0
DRIFT_TERM = {"rep_asymre", "rep_opmd", "dppo_prime_rl", "ipo", "deepseek_v32", "kl_cov"}
# kimi and spo regress on A, red_weight has it in an exponent, Clip-Cov chooses tokens by their covariance with it
NOT_LINEAR = {"kimi", "spo", "red_weight", "clip_cov"}


@every(lambda name, objective: name not in NOT_LINEAR)
@FEW
@given(lengths=LENGTHS, seed=SEED, factor=st.floats(0.01, 100))
def test_the_unit_of_advantages_scales_the_loss(name, hyper, lengths, seed, factor):
    assume(name != "kl_cov" or sum(map(bool, lengths)) > 1)  # one sequence's covariances with A are rounding errors
    objective = cases.make(name, **hyper)
    columns, advantages, off_policy = drawn(name, objective, seed, lengths)
    once, twice, scaled = (
        graded(objective, columns, scale * advantages, off_policy, lengths=lengths) for scale in (1.0, 2.0, factor)
    )
    size = max(1.0, factor) * max(float(x.abs().max()) for x in twice)
    for s, t, o in zip(scaled, twice, once):
        torch.testing.assert_close(s - o, (factor - 1) * (t - o), rtol=0, atol=1e-12 * size)
        if name not in DRIFT_TERM and not objective.beta and not objective.entropy_coef:
            torch.testing.assert_close(s, factor * o, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("name", sorted(NOT_LINEAR | DRIFT_TERM))
def test_the_exceptions_are_exceptions(name):
    objective = cases.make(name)
    lengths = [5, 4, 3, 6]
    columns, advantages, off_policy = drawn(name, objective, 0, lengths)
    one, two = (graded(objective, columns, scale * advantages, off_policy, lengths=lengths) for scale in (1.0, 8.0))
    assert (two[1] - 8 * one[1]).abs().max() > 1e-6
