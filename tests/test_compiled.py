"""torch.compile(fullgraph=True) over the public functions gives what they give without it, gradients included.

Compiled with aot_eager: Dynamo, the fake kernels and AOTAutograd all take part; Inductor would only fuse what lies
around. One test goes through Inductor too.
"""

import pytest
import torch

import repo_ops.compiled.calls
from repo_ops import NumItems, Options, get_objective, linear_logps, linear_policy_loss, linear_stats
from repo_ops.metrics import summarize

B, T, D, V = 3, 5, 8, 37


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,), "low": (B, T, 2), "up": (V, 2)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def inputs():
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    return targets, mask


def agree(function, tensors, *arguments, backend="aot_eager", **kwargs):
    """Results and gradients of `function` compiled and not; they run the same code, so the bits are the same."""
    found = []
    for f in (function, compiled(function, backend)):
        values = [v for v in f(tensors, *arguments, **kwargs) if v is not None]
        floats = [v for v in values if v.requires_grad]
        total = sum((v * torch.linspace(0.5, 1.5, v.numel()).reshape(v.shape)).sum() for v in floats)
        leaves = [t for t in tensors.values() if t.requires_grad]
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if floats else []
        found.append([*(v.detach() for v in values), *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7, equal_nan=True)
    return found[1]


@pytest.mark.parametrize("support", [False, True])
def test_statistics_with_every_argument(tensors, support):
    targets, mask = inputs()
    ids = torch.stack([torch.randperm(V)[:6] for _ in range(B * T)]).reshape(B, T, 6) if support else None
    temperature = torch.rand(B, T) + 0.5

    def step(t, targets, mask, temperature, ids):
        return linear_stats(
            t["hidden"] * 1.0, t["weight"], targets, bias=t["bias"], adapter=(t["low"], t["up"]), mask=mask,
            temperature=temperature, softcap=4.0, logit_scale=0.9, support_ids=ids,
        )  # fmt: skip

    results = agree(step, tensors, targets, mask, temperature, ids)
    assert len(results) == 4 + 5  # four statistics, five gradients


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "bias", "low", "up")])
def test_logps_with_frozen_tensors(tensors, frozen):
    targets, _ = inputs()
    for name in frozen:
        tensors[name].requires_grad_(False)

    def step(t, targets):
        return linear_logps(t["hidden"], t["weight"], targets, with_entropy=True, temperature=0.7)

    agree(step, tensors, targets)


OBJECTIVES = {
    "grpo": {},
    "gspo": {"entropy_coef": 0.01},
    "dapo": {"beta": 0.1},
    "clip_cov": {},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss_with_its_metrics(tensors, name):
    targets, mask = inputs()
    objective = get_objective(name, **OBJECTIVES[name])
    advantages, old, ref = torch.tensor([1.0, 0.0, -2.0]), -torch.rand(B, T) * 5, -torch.rand(B, T) * 5
    seen = []

    def step(t, targets, advantages, mask, old, ref):
        out = linear_policy_loss(
            t["hidden"] * 1.0, t["weight"], targets, advantages, objective=objective, bias=t["bias"], mask=mask,
            old_logps=old, ref_logps=ref if objective.beta else None, num_items=NumItems(7, 40),
        )  # fmt: skip
        return [out.loss * 2, out.logps, out.entropy, *(part for stat in out.metrics.values() for part in stat)]

    def metrics(t, *arguments):
        seen.append(summarize(linear_policy_loss(
            t["hidden"], t["weight"], targets, advantages, objective=objective, mask=mask, old_logps=old,
            ref_logps=ref if objective.beta else None,
        ).metrics))  # fmt: skip

    agree(step, tensors, targets, advantages, mask, old, ref)
    metrics(tensors)
    assert seen[0]


def test_replay_over_packed_rows_and_a_support(tensors):
    targets = torch.randint(0, V, (15,))
    cu_seqlens, off_policy = torch.tensor([0, 5, 9, 15]), torch.tensor([False, True, False])
    ids = torch.stack([torch.randperm(V)[:6] for _ in range(15)])
    advantages, old = torch.tensor([1.0, 0.5, -2.0]), -torch.rand(15)

    def step(t, targets, advantages, old, cu_seqlens, off_policy, ids):
        out = linear_policy_loss(
            t["hidden"].reshape(15, D), t["weight"], targets, advantages, objective="repo", old_logps=old,
            off_policy=off_policy, off_policy_coef=0.5, cu_seqlens=cu_seqlens, support_ids=ids, num_items=(3, 2),
        )  # fmt: skip
        return [out.loss, out.logps]

    agree(step, tensors, targets, advantages, old, cu_seqlens, off_policy, ids)
    agree(lambda *arguments: step(*arguments, None), tensors, targets, advantages, old, cu_seqlens, off_policy)


def test_through_inductor_and_without_grad(tensors):
    targets, mask = inputs()
    advantages = torch.tensor([1.0, 0.0, -2.0])

    def step(t, targets, advantages, mask):
        out = linear_policy_loss(torch.tanh(t["hidden"]), t["weight"], targets, advantages, mask=mask)
        return [out.loss, out.logps]

    agree(step, tensors, targets, advantages, mask, backend="inductor")
    with torch.no_grad():
        loss, _ = compiled(step)(tensors, targets, advantages, mask)
    torch.testing.assert_close(loss, step(tensors, targets, advantages, mask)[0].detach())


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("loss", [False, True])
def test_autocast_rounds_operands_in_a_graph_too(tensors, where, loss):
    targets, mask = inputs()
    advantages = torch.tensor([1.0, 0.0, -2.0])

    def step(t, targets, advantages, mask):
        if loss:
            out = linear_policy_loss(t["hidden"], t["weight"], targets, advantages, mask=mask)
            return [out.loss, out.logps]
        return [linear_logps(t["hidden"], t["weight"], targets, mask=mask).logps]

    def inside(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(*arguments)

    found = []
    for f in (inside, compiled(inside if where == "inside" else step)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
            values = f(tensors, targets, advantages, mask)
        grads = torch.autograd.grad(values[0].sum(), [tensors["hidden"], tensors["weight"]])
        found.append([*(v.detach() for v in values), *grads])
    for eager, traced in zip(*found, strict=True):
        assert traced.dtype == torch.float32
        torch.testing.assert_close(traced, eager, rtol=0, atol=0, equal_nan=True)
    exact = linear_logps(tensors["hidden"], tensors["weight"], targets, mask=mask).logps
    assert 1e-4 < (found[0][-3] - exact).abs().nan_to_num().max() < 0.1


def test_gradient_scaler_in_float16_loses_nothing():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(s, dtype=torch.float16, requires_grad=True) for s in ((1, 4, D), (V, D)))
    targets, advantages = torch.randint(0, V, (1, 4)), torch.tensor([1e-7])

    def step(hidden):
        return linear_policy_loss(hidden, weight, targets, advantages, num_items=1).loss * 2.0**16

    grads = [torch.autograd.grad(f(hidden), [hidden, weight]) for f in (step, compiled(step))]
    for ours, theirs in zip(*grads):
        assert ours.count_nonzero() > 0.9 * ours.numel()
        assert torch.equal(ours, theirs)


def test_what_a_graph_cannot_hold_is_refused(tensors):
    targets, _ = inputs()

    def step(t):
        options = Options(accumulate_weight_grad=True)
        return linear_policy_loss(t["hidden"], t["weight"], targets, torch.ones(B), options=options).loss

    with pytest.raises(Exception, match=r"accumulate_weight_grad: expected False under torch\.compile"):
        compiled(step)(tensors)


@pytest.mark.parametrize("support", [False, True])
def test_float16_with_a_frozen_head_through_inductor(support):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4, D).half().requires_grad_(), torch.randn(V, D).half()
    targets, advantages = torch.randint(0, V, (1, 4)), torch.ones(1)
    ids = torch.stack([torch.randperm(V)[:6] for _ in range(4)])[None] if support else None

    def step(t, targets):
        out = linear_policy_loss(t["hidden"] * 1.0, weight, targets, advantages, support_ids=ids)
        return [out.loss * 2.0, out.logps]

    results = agree(step, {"hidden": hidden}, targets, backend="inductor")
    assert results[-1].dtype == torch.float16


def steps_with(tensors, changing, make):
    """Losses of steps of one compiled function in which the argument `changing` is make(0), make(1), ...; and places
    that these steps took in the table of calls."""
    targets, mask = inputs()
    old, off_policy = -torch.rand(B, T) * 5, torch.tensor([False, True, False])

    def step(t, **kwargs):
        return linear_policy_loss(
            t["hidden"], t["weight"], targets, torch.tensor([1.0, 0.5, -2.0]), mask=mask, old_logps=old,
            off_policy=off_policy, **kwargs,
        ).loss  # fmt: skip

    found, before = compiled(step, "eager"), len(repo_ops.compiled.calls._CALLS)
    losses = []
    for i in range(10):  # more than the 8 recompilations after which torch gives up
        kwargs = {changing: make(i)}
        with torch.no_grad():
            losses.append((found(tensors, **kwargs), step(tensors, **kwargs)))
    return losses, len(repo_ops.compiled.calls._CALLS) - before


@pytest.mark.parametrize(
    ("changing", "make", "values"),
    [
        ("objective", lambda i: get_objective("dapo", beta=0.0, eps_low=0.05), 1),
        ("objective", lambda i: get_objective("gspo", eps_low=0.1 * (1 + i % 3)), 3),
        ("temperature", lambda i: 1.0 - 0.05 * i, 10),
        ("num_items", lambda i: (20 + i, 3.5 + i), 10),
        ("num_items", lambda i: NumItems(4 + i, 30 + i, 1, 2 + i), 10),
        ("off_policy_coef", lambda i: 0.1 * (i + 1), 10),
    ],
)
def test_what_is_new_in_each_step_is_neither_forgotten_nor_kept(tensors, changing, make, values):
    losses, places = steps_with(tensors, changing, make)
    for ours, theirs in losses:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert len({loss.item() for loss, _ in losses}) == values
    assert places <= (values if changing == "objective" else 1)


def test_closures_over_other_values_are_other_objectives(tensors):
    def scaled(factor):
        return lambda tokens: -factor * tokens.advantages * tokens.logps

    objectives = [scaled(1.0), scaled(3.0)]
    losses, places = steps_with(tensors, "objective", lambda i: objectives[i % 2])
    for ours, theirs in losses:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert places == 2


def test_objectives_of_equal_settings_and_other_state_are_kept_apart():
    class WithState(get_objective("grpo").__class__):
        def __init__(self, factor):
            super().__init__()
            object.__setattr__(self, "factor", factor)

    one, two = WithState(1.0), WithState(2.0)
    assert one == two  # as dataclasses
    by_value = repo_ops.compiled.calls._by_value
    assert by_value(one) != by_value(two)
    assert by_value(get_objective("grpo")) == by_value(get_objective("grpo"))
