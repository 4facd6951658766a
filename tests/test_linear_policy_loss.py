"""linear_policy_loss against float64: every scope, one sweep or two, live rows only, steps split in any way."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from truth import leaf, make_case, relative_error
from watch import Watch

from repo_ops import NumItems, Objective, Options, get_objective, linear_logps, linear_policy_loss, policy_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DIM = 24  # not a power of two
SMALL_TILES = Options(memory_budget=5 << 20)  # some 46 rows of V = 5003 beside the blocks
ALL_ROWS = Options(all_logps=True)

# name of the case -> (name, hyper-parameters): each scope, and each term with each of them.
OBJECTIVES = {
    "grpo": ("grpo", {}),
    "grpo-delta": ("grpo", {"delta": 1.5, "eps_high": 0.3}),
    "grpo-kl-entropy": ("grpo", {"beta": 0.04, "entropy_coef": 0.01}),
    "dapo": ("dapo", {}),
    "dapo-k2": ("dapo", {"beta": 0.1, "kl": "k2"}),
    "bnpo_loss_type": ("bnpo_loss_type", {}),
    "dr_grpo": ("dr_grpo", {"max_length": 16}),
    "cispo": ("cispo", {}),
    "cispo-k1-entropy": ("cispo", {"eps_high": 0.2, "beta": 0.1, "kl": "k1", "entropy_coef": 0.01}),
    "gspo": ("gspo", {}),
    "gspo-kl-entropy": ("gspo", {"eps_low": 0.1, "eps_high": 0.1, "beta": 0.04, "entropy_coef": 0.01}),
    "repo": ("repo", {}),
    "repo-kl-entropy": ("repo", {"beta": 0.04, "entropy_coef": 0.01}),
    "repo-official": ("repo", {"beta": 0.04, "row_norm": "official_code"}),
}
FEW = ["grpo-kl-entropy", "dapo", "cispo", "gspo-kl-entropy", "repo-official"]
# Relative error against float64 on the same rounded inputs: what the stored dtype and 16-bit operands cost.
GRADIENT_ERROR = {F32: 1e-5, BF16: 4e-3, F16: 1e-3, F64: 1e-12}


def run(case, objective, *, options=None, needs=(True, True, True), **kwargs):
    """(PolicyLoss, leaves by name) of the fused call for `case`."""
    name, hyper = OBJECTIVES[objective] if isinstance(objective, str) else objective
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {key: leaf(value, need) for (key, value), need in zip(tensors.items(), needs) if value is not None}
    if "ref_logps" not in kwargs:
        kwargs["ref_logps"] = case.ref_logps if hyper.get("beta") else None
    found = linear_policy_loss(
        leaves["hidden"],
        leaves["weight"],
        case.targets,
        case.advantages,
        bias=leaves.get("bias"),
        objective=get_objective(name, **hyper),
        mask=case.mask,
        old_logps=case.old_logps,
        off_policy=case.off_policy,
        options=options,
        **case.head,
        **kwargs,
    )
    return found, leaves


def compare(
    case, objective, *, options=None, error=1e-5, gradient_error=None, counts=None, off_policy_coef=1.0, **kwargs
):
    """Loss, statistics and every gradient of `case` by its float64 truth."""
    name, hyper = OBJECTIVES[objective] if isinstance(objective, str) else objective
    found, leaves = run(case, objective, options=options, off_policy_coef=off_policy_coef, **kwargs)
    loss, logps, entropy, grads = case.loss(objective=name, counts=counts, off_policy_coef=off_policy_coef, **hyper)
    assert found.loss.shape == ()
    assert found.loss.requires_grad
    assert abs(found.loss.item() - loss.item()) <= error * max(1.0, abs(loss.item()))
    computed = ~found.logps.isnan() if case.mask is None else case.mask & ~found.logps.isnan()
    torch.testing.assert_close(found.logps[computed].double(), logps[computed], rtol=1e-6, atol=error)
    if found.entropy is not None:
        torch.testing.assert_close(found.entropy[computed].double(), entropy[computed], rtol=1e-6, atol=3 * error)
    found.loss.backward()
    for key, tensor in leaves.items():
        assert tensor.grad.dtype == tensor.dtype
        bound = gradient_error or max(GRADIENT_ERROR[tensor.dtype], GRADIENT_ERROR[found.logps.dtype])
        assert relative_error(tensor.grad, grads[key]) <= bound, key
    return found, leaves


# --- values and gradients ---


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective):
    # 65 tokens in rows of 0 to 13, junk under the mask; two replayed rows
    replayed = 2 if objective.startswith(("repo", "grpo", "gspo")) else 0
    compare(make_case(5, 13, DIM, 5003, bias=True, lengths=[13, 0, 1, 12, 7], replayed=replayed), objective)


@pytest.mark.parametrize("V", [1, 127, 49152])  # one entry; below a vector register's multiple; SmolLM2's
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 13)])
@pytest.mark.parametrize("objective", FEW)
def test_vocabularies_and_sizes(objective, shape, V):
    if V == 49152 and shape != (1, 7) and objective not in ("dapo", "gspo-kl-entropy"):
        shape = (1, 3)  # the two scopes are timed at full size, the others need not be
    compare(make_case(*shape, DIM if V < 10000 else 8, V), objective)


# Qwen's and Gemma's vocabularies
@pytest.mark.parametrize("V", [151665, 262144])
def test_real_vocabularies(V):
    compare(make_case(1, 3, 8, V), "grpo-kl-entropy")


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, BF16), (F16, F16), (F64, F64), (BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (F32, F64)],
    ids=str,
)
@pytest.mark.parametrize("objective", ["grpo-kl-entropy", "gspo"])
def test_dtypes(objective, dtype, weight_dtype):
    case = make_case(3, 9, 64, 5003, dtype=dtype, weight_dtype=weight_dtype, bias=True)
    case.advantages = 8 * case.advantages  # float16 gradients of a mean would fall below its normal range
    exact = not {dtype, weight_dtype} & {BF16, F16}
    found, _ = compare(case, objective, gradient_error=None if exact else 4e-3)
    assert found.loss.dtype == found.logps.dtype == (F64 if F64 in (dtype, weight_dtype) else F32)


@pytest.mark.parametrize(
    "head",
    [
        {"temperature": 0.6},
        {"temperature": torch.tensor(1.7)},
        {"temperature": torch.tensor([0.5, 1.0, 2.0])},
        {"temperature": torch.linspace(0.5, 2, 21).reshape(3, 7)},
        {"softcap": 5.0, "logit_scale": 3.0, "temperature": 0.7},
    ],
    ids=["number", "scalar_tensor", "per_sequence", "per_token", "softcap-scale"],
)
@pytest.mark.parametrize("objective", ["grpo-kl-entropy", "gspo"])
def test_every_kind_of_head(objective, head):
    case = make_case(3, 7, DIM, 127, bias=True, lengths=[7, 3, 1], **head)
    case.advantages[1] = 0.0  # a left-out row in the middle must not shift temperatures
    compare(case, objective)


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_per_token_advantages(objective):
    case = make_case(3, 7, DIM, 127, lengths=[7, 0, 4])
    case.advantages = torch.randn(3, 7)
    case.advantages[0, 2] = case.advantages[2] = 0.0
    case.advantages[1] = float("nan")  # masked: not looked at
    compare(case, objective)


@pytest.mark.parametrize("objective", ["grpo", "cispo", "gspo", "repo"])
def test_without_old_logps_the_ratio_is_one_and_has_a_gradient(objective):
    case = make_case(3, 7, DIM, 127, lengths=[7, 2, 4])
    case.old_logps = None
    found, _ = compare(case, objective)
    assert found.metrics["ratio"].total == found.metrics["ratio"].count


@pytest.mark.parametrize("coef", [0.5, 2.0])
@pytest.mark.parametrize("row_norm", ["paper", "official_code"])
@pytest.mark.parametrize(
    "reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "const", "const-nobatch", "token-sum"]
)
def test_off_policy_coef_with_every_reduction(reduction, row_norm, coef):
    case = make_case(5, 7, DIM, 127, lengths=[7, 0, 3, 1, 6], replayed=2)
    compare(case, ("repo", {"reduction": reduction, "row_norm": row_norm, "max_length": 9}), off_policy_coef=coef)


def test_repo_is_fresh_plus_c_times_replayed():
    # by hand: on-policy ratio 1, so J_on is minus the mean advantage; the replayed row's ratio e^0.5 is clipped at 1.2
    hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(5, 4)  # logps are -log 5
    logp = -torch.tensor(5.0).log()
    old = torch.stack([torch.full((3,), logp), torch.full((3,), logp - 0.5)])
    loss = linear_policy_loss(
        hidden,
        weight,
        torch.zeros(2, 3, dtype=torch.long),
        torch.tensor([2.0, 3.0]),
        objective="repo",
        old_logps=old,
        off_policy=torch.tensor([False, True]),
        off_policy_coef=0.25,
    ).loss
    assert loss.item() == pytest.approx(-(2.0 + 0.25 * 1.2 * 3.0), abs=1e-6)


@pytest.mark.parametrize("objective", FEW)
def test_equals_policy_loss_of_linear_logps(objective):
    # the sentence of the docstring
    case = make_case(4, 6, DIM, 127, lengths=[6, 1, 0, 4], replayed=1)
    name, hyper = OBJECTIVES[objective]
    found, leaves = run(case, objective, options=ALL_ROWS)
    found.loss.backward()
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    stats = linear_logps(hidden, weight, case.targets, mask=case.mask, with_entropy=True)
    same = policy_loss(
        stats.logps,
        case.advantages,
        objective=get_objective(name, **hyper),
        mask=case.mask,
        old_logps=case.old_logps,
        ref_logps=case.ref_logps,
        entropy=stats.entropy,
        off_policy=case.off_policy,
    )
    same.loss.backward()
    torch.testing.assert_close(found.loss, same.loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.logps, stats.logps)
    assert relative_error(leaves["hidden"].grad, hidden.grad) <= 1e-6
    assert relative_error(leaves["weight"].grad, weight.grad) <= 1e-6


@pytest.mark.parametrize("objective", ["grpo-kl-entropy", "gspo-kl-entropy", "repo"])
def test_numeric_gradient(objective):
    # central differences of the loss alone along random directions, away from clips: nobody's formula is needed
    case = make_case(3, 4, 5, 11, dtype=F64, bias=True, lengths=[4, 1, 3], replayed=1)
    case.hidden = case.hidden.nan_to_num(0.0)
    found, leaves = run(case, objective)
    found.loss.backward()
    step, start = 1e-5, {key: getattr(case, key) for key in leaves}
    for _ in range(3):
        directions = {key: torch.randn_like(value) for key, value in start.items()}
        ends = []
        for sign in (1, -1):
            for key in start:
                setattr(case, key, start[key] + sign * step * directions[key])
            ends.append(run(case, objective)[0].loss.item())
        slope = sum((leaves[key].grad * directions[key]).sum().item() for key in start)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)


# --- which tensors need a gradient ---


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("objective", ["dapo", "gspo-kl-entropy"])
def test_verl_6913_every_combination_of_requires_grad(objective, needs):
    case = make_case(2, 7, DIM, 127, bias=True)
    found, leaves = run(case, objective, needs=needs)
    assert found.loss.requires_grad == any(needs)
    if any(needs):
        found.loss.backward()
    name, hyper = OBJECTIVES[objective]
    loss, *_, grads = case.loss(objective=name, **hyper)
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    for tensor, need, key in zip(leaves.values(), needs, leaves):
        assert (tensor.grad is not None) == need
        if need:
            assert relative_error(tensor.grad, grads[key]) <= 1e-5, key


@pytest.mark.parametrize("options", [None, SMALL_TILES], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_frozen_head_allocates_nothing_of_its_size(objective, options):
    case = make_case(3, 32, 256, 5003)  # D is larger than the rows of a tile, so a tile is smaller than the weight
    hidden = leaf(case.hidden)
    with Watch() as watch:
        linear_policy_loss(
            hidden, case.weight, case.targets, case.advantages, objective=objective, options=options
        ).loss.backward()
    assert hidden.grad.norm() > 0
    assert watch.largest < case.weight.numel()


def test_no_gradient_wanted_is_one_pass():
    N, V = 96, 5003
    case = make_case(3, 32, DIM, V)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Watch() as watch:
            found, _ = run(case, "grpo", options=SMALL_TILES)
        assert not found.loss.requires_grad
        assert watch.passes(N, DIM, V) == 1
    loss, *_ = case.loss(objective="grpo")
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)


# --- passes, tiles and scopes ---


@pytest.mark.parametrize(
    ("objective", "options", "trained", "passes"),
    [
        ("cispo", None, True, 3),
        ("cispo", None, False, 2),
        ("cispo", SMALL_TILES, True, 3),
        ("cispo", SMALL_TILES, False, 2),
        ("gspo", SMALL_TILES, True, 3),  # sequences of 32 fit in a tile of some 46 rows
    ],
)
def test_passes_over_the_vocabulary(objective, options, trained, passes):
    N, V = 96, 5003
    case = make_case(3, 32, DIM, V)
    hyper = {"eps_low": 0.9, "eps_high": 9.0} if objective == "gspo" else {}  # nothing is clipped
    with Watch() as watch:
        found, _ = run(case, (objective, hyper), options=options, needs=(True, trained, False))
        found.loss.backward()
    assert watch.passes(N, DIM, V) == passes


def test_a_sequence_longer_than_a_tile_takes_two_sweeps():
    N, V = 96, 5003
    case = make_case(1, 96, DIM, V)
    with Watch() as watch:
        found, _ = run(case, ("gspo", {"eps_low": 0.9, "eps_high": 9.0}), options=SMALL_TILES)
        found.loss.backward()
    assert watch.passes(N, DIM, V) == 4


class Centred(Objective):
    """Scope "batch": the policy gradient with log-probabilities centred over the micro-batch."""

    scope = "batch"

    def __call__(self, tokens):
        return -(tokens.logps - tokens.logps.mean()) * tokens.advantages


@pytest.mark.parametrize("objective", ["grpo-kl-entropy", "cispo", "gspo-kl-entropy", "repo-official"])
@pytest.mark.parametrize(
    ("B", "T", "lengths"),
    [
        (3, 32, None),  # whole sequences fill tiles unevenly
        (7, 15, [15, 0, 1, 14, 0, 15, 2]),  # ragged, with empty rows first, in the middle and between
        (2, 60, [60, 7]),  # longer than a tile: two sweeps for sequence scope
        (2, 60, [0, 60]),
    ],
)
def test_many_tiles(objective, B, T, lengths):
    compare(make_case(B, T, DIM, 5003, bias=True, lengths=lengths, replayed=1), objective, options=SMALL_TILES)


@pytest.mark.parametrize("options", [None, SMALL_TILES], ids=["one_tile", "many_tiles"])
def test_batch_scope(options):
    case = make_case(3, 32, DIM, 5003, lengths=[32, 0, 31])
    case.advantages[2] = 0.0  # must be seen all the same
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    found = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, objective=Centred(), mask=case.mask, options=options
    )
    found.loss.backward()
    leaves = case.leaves()
    logps = (leaves["hidden"] @ leaves["weight"].t()).log_softmax(-1).gather(-1, case.targets.clamp_min(0)[..., None])
    live = logps[..., 0][case.mask]
    A = case.advantages.double()[:, None].expand(3, 32)[case.mask]
    loss = (-(live - live.mean()) * A).sum() / len(live)
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert relative_error(hidden.grad, leaves["hidden"].grad) <= 1e-5
    assert relative_error(weight.grad, leaves["weight"].grad) <= 1e-5


def test_a_plain_function_is_an_objective():
    case = make_case(2, 6, DIM, 127)

    def reinforce(tokens):
        return -tokens.advantages * tokens.logps

    found = linear_policy_loss(case.hidden, case.weight, case.targets, case.advantages, objective=reinforce)
    _, logps, *_ = case.loss(objective="grpo")
    assert found.loss.item() == pytest.approx(-(case.advantages[:, None] * logps).mean().item(), abs=1e-5)


@pytest.mark.parametrize("objective", FEW)
def test_packed_equals_padded(objective):
    lengths = [6, 1, 0, 4]
    case = make_case(4, 6, DIM, 127, bias=True, lengths=lengths, replayed=2)
    name, hyper = OBJECTIVES[objective]
    padded, leaves = run(case, objective)
    padded.loss.backward()
    keep = case.mask
    hidden, weight = leaf(case.hidden[keep]), leaf(case.weight)
    packed = linear_policy_loss(
        hidden,
        weight,
        case.targets[keep],
        case.advantages,
        objective=get_objective(name, **hyper),
        bias=case.bias,
        old_logps=case.old_logps[keep],
        ref_logps=case.ref_logps[keep],
        off_policy=case.off_policy,
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0),
    )
    packed.loss.backward()
    assert torch.equal(packed.loss, padded.loss)
    assert torch.equal(packed.logps, padded.logps[keep])
    assert torch.equal(hidden.grad, leaves["hidden"].grad[keep])
    assert torch.equal(weight.grad, leaves["weight"].grad)


def test_packed_with_a_mask_inside():
    # prompts packed between completions: boundaries enclose both, the mask keeps completions
    case = make_case(1, 11, DIM, 127)
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1]).bool()
    hidden = leaf(case.hidden[0])
    common = {"old_logps": case.old_logps[0], "mask": mask, "cu_seqlens": torch.tensor([0, 5, 11])}
    A = torch.tensor([1.5, -0.5])
    found = linear_policy_loss(hidden, case.weight, case.targets[0], A, **common)
    found.loss.backward()
    h = leaf(case.hidden[0])
    rows = [torch.arange(11)[:5][mask[:5]], torch.arange(5, 11)[mask[5:]]]
    parts = [
        linear_policy_loss(
            h[r][None], case.weight, case.targets[0][r][None], A[i : i + 1], old_logps=case.old_logps[0][r][None]
        )
        for i, r in enumerate(rows)
    ]
    loss = sum(part.loss for part in parts) / 2
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert relative_error(hidden.grad, h.grad) <= 1e-6


def test_one_advantage_per_sequence_where_there_are_as_many_packed_tokens():
    # N = B = 2 with lengths 2 and 0: [B] must be read as one per sequence
    hidden, weight = torch.randn(2, 4), torch.randn(9, 4)
    common = {"targets": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 2, 2])}
    both = linear_policy_loss(hidden, weight, advantages=torch.tensor([1.0, 5.0]), **common)
    assert both.loss.item() == pytest.approx(-0.5)  # mean over two sequences, one of them empty


# --- live rows only ---


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "cispo", "gspo", "repo"])
def test_rows_with_zero_advantage_change_nothing_and_are_not_computed(objective):
    B, T, V = 6, 8, 127
    case = make_case(B, T, DIM, V, lengths=[8, 3, 0, 8, 5, 8], replayed=2)
    case.advantages[[0, 3, 4]] = 0.0
    case.advantages[3] = -0.0
    found, leaves = compare(case, objective)  # the truth computes every row
    with Watch() as watch:
        run(case, objective)
    assert sum(rows for rows, inner, columns in watch.products if (inner, columns) == (DIM, V)) == 3 + 8
    dropped = case.mask & (case.advantages == 0)[:, None]
    assert torch.equal(found.logps.isnan(), dropped)
    assert torch.equal(found.logps == 0, ~case.mask)
    live, total = found.metrics["live"]
    assert (live.item(), total.item()) == (11, 32)
    everything, other = run(case, objective, options=ALL_ROWS)
    everything.loss.backward()
    assert everything.logps.isfinite().all()
    torch.testing.assert_close(found.loss, everything.loss, rtol=1e-6, atol=1e-8)
    for key in leaves:
        assert relative_error(leaves[key].grad, other[key].grad) <= 1e-6, key


@pytest.mark.parametrize("objective", ["grpo-kl-entropy", "dapo-k2", "cispo-k1-entropy", "repo-kl-entropy"])
def test_zero_advantage_with_a_kl_or_entropy_term_is_computed(objective):
    case = make_case(3, 7, DIM, 127, replayed=1)
    case.advantages[0] = 0.0
    found, leaves = compare(case, objective)
    assert found.logps.isfinite().all()
    assert leaves["hidden"].grad[0].abs().sum() > 0


def test_all_advantages_zero():
    case = make_case(3, 7, DIM, 127)
    case.advantages = torch.zeros(3)
    with Watch() as watch:
        found, leaves = run(case, "grpo")
        found.loss.backward()
    assert watch.multiplications() == 0
    assert found.loss.item() == 0.0
    for tensor in leaves.values():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
@pytest.mark.parametrize("options", [None, SMALL_TILES], ids=["one_tile", "many_tiles"])
def test_clipped_rows_skip_the_gradient_products(objective, options):
    N, V = 96, 5003
    case = make_case(12, 8, DIM, V)
    _, logps, *_ = case.loss(objective="grpo")
    clipped = torch.arange(12) % 4 != 0  # nine of twelve sequences
    case.advantages = torch.ones(12)
    case.old_logps = (logps - torch.where(clipped, 1.0, 0.0)[:, None]).float()  # ratio e, over every bound
    with Watch() as watch:
        found, leaves = run(case, objective, options=options)
        found.loss.backward()
    assert watch.passes(N, DIM, V) <= 1 + 2 * 0.25 + 1e-9
    name, hyper = OBJECTIVES[objective]
    *_, grads = case.loss(objective=name, **hyper)
    assert relative_error(leaves["hidden"].grad, grads["hidden"]) <= 1e-5
    assert relative_error(leaves["weight"].grad, grads["weight"]) <= 1e-5
    assert (leaves["hidden"].grad[clipped] == 0).all()


def test_every_row_clipped():
    case = make_case(2, 7, DIM, 127)
    case.advantages = torch.ones(2)
    case.old_logps = case.old_logps - 5.0
    found, leaves = compare(case, "grpo")
    assert found.metrics["clip_high"] == (14.0, 14.0)
    assert torch.equal(leaves["weight"].grad, torch.zeros_like(leaves["weight"]))


def test_slime_2253_masked_rows_are_not_computed():
    case = make_case(4, 8, DIM, 127, lengths=[8, 0, 1, 3])
    with Watch() as watch:
        found, _ = run(case, "cispo")
        found.loss.backward()
    assert watch.passes(12, DIM, 127) == 3


# --- nothing, and one ---


@pytest.mark.parametrize("objective", FEW)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 5)], ids=["no_rows", "no_tokens", "all_masked"])
def test_nothing_to_compute_is_zero_with_a_graph(objective, shape):
    case = make_case(*shape, DIM, 127, bias=True)
    case.mask = torch.zeros(shape, dtype=torch.bool)
    case.hidden = torch.full_like(case.hidden, float("nan"))
    found, leaves = run(case, objective)
    assert found.loss.item() == 0.0
    found.loss.backward()
    for tensor in leaves.values():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    assert all(torch.isfinite(count) for _, count in found.metrics.values())


@pytest.mark.parametrize("objective", FEW)
def test_nothing_packed(objective):
    name, hyper = OBJECTIVES[objective]
    hidden, weight = torch.randn(0, DIM, requires_grad=True), torch.randn(127, DIM, requires_grad=True)
    found = linear_policy_loss(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0),
        objective=get_objective(name, **hyper),
        ref_logps=torch.zeros(0),
        cu_seqlens=torch.tensor([0]),
    )
    assert found.loss.item() == 0.0
    found.loss.backward()
    assert hidden.grad.shape == (0, DIM)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# --- a step in several calls ---


SPLITS = [[5], [1, 4], [2, 1, 2], [1, 1, 1, 1, 1]]
REDUCTIONS = [
    ("seq-mean-token-mean", "sequences"),
    ("seq-mean-token-sum", "sequences"),
    ("token-mean", "tokens"),
    ("const", "sequences"),
    ("const-nobatch", "sequences"),
]


def spellings(counts, what, replay):
    """Every way to say the step's counts (sequences, tokens, replayed sequences, replayed tokens)."""
    on, off = (counts[0], counts[2]) if what == "sequences" else (counts[1], counts[3])
    if replay:
        yield (on, off)
        yield (torch.tensor(on), torch.tensor(float(off)))
    else:
        yield on
        yield float(on)
        yield torch.tensor(on)
    yield NumItems(*counts)
    yield NumItems(*(torch.tensor(float(count)) for count in counts))


@pytest.mark.parametrize("row_norm", ["paper", "official_code"])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(("reduction", "what"), REDUCTIONS)
def test_trl_5890_liger_1082_micro_batches_add_up_to_the_step(reduction, what, replay, row_norm):
    # uneven lengths with an empty row; one micro-batch holds only replayed rows, one only the empty row
    lengths = [7, 0, 3, 1, 6]
    case = make_case(5, 7, DIM, 127, lengths=lengths)
    case.off_policy = torch.tensor([False, False, True, False, True]) if replay else None
    kinds = case.off_policy.tolist() if replay else [False] * 5
    counts = (
        sum(not k for k in kinds),
        sum(n for n, k in zip(lengths, kinds) if not k),
        sum(kinds),
        sum(n for n, k in zip(lengths, kinds) if k),
    )
    settings_ = ("repo", {"reduction": reduction, "row_norm": row_norm, "max_length": 8, "eps_high": 0.3})
    loss, _, _, grads = case.loss(objective="repo", off_policy_coef=0.5, **settings_[1])
    for sizes, num_items in itertools.product(SPLITS, spellings(counts, what, replay)):
        hidden, weight = leaf(case.hidden), leaf(case.weight)
        total, start = 0.0, 0
        for size in sizes:
            rows = slice(start, start + size)
            part = linear_policy_loss(
                hidden[rows],
                weight,
                case.targets[rows],
                case.advantages[rows],
                objective=get_objective(settings_[0], **settings_[1]),
                mask=case.mask[rows],
                old_logps=case.old_logps[rows],
                off_policy=None if case.off_policy is None else case.off_policy[rows],
                off_policy_coef=0.5,
                num_items=num_items,
            )
            part.loss.backward()
            total, start = total + part.loss.item(), start + size
        assert total == pytest.approx(loss.item(), abs=1e-6), (sizes, num_items)
        assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5, (sizes, num_items)
        assert relative_error(weight.grad, grads["weight"]) <= 1e-5, (sizes, num_items)


def test_micro_batches_with_kl_entropy_and_two_denominators():
    # RePO's KL is a token mean while its loss is a mean of sequence means: only NumItems can say both
    lengths = [7, 2, 3, 1]
    case = make_case(4, 7, DIM, 127, lengths=lengths, replayed=2)
    hyper = {"beta": 0.1, "entropy_coef": 0.02}
    loss, _, _, grads = case.loss(objective="repo", **hyper)
    num_items = NumItems.of(torch.tensor(lengths[:1]), torch.tensor([False])) + NumItems.of(
        torch.tensor(lengths[1:]), case.off_policy[1:]
    )
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = linear_policy_loss(
            hidden[rows],
            weight,
            case.targets[rows],
            case.advantages[rows],
            objective=get_objective("repo", **hyper),
            mask=case.mask[rows],
            old_logps=case.old_logps[rows],
            ref_logps=case.ref_logps[rows],
            off_policy=case.off_policy[rows],
            num_items=num_items,
        )
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(loss.item(), abs=1e-6)
    assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5
    assert relative_error(weight.grad, grads["weight"]) <= 1e-5


# --- backward ---


def test_backward_scales_by_the_incoming_gradient():
    case = make_case(2, 5, DIM, 127)
    once, leaves = run(case, "dapo")
    once.loss.backward()
    scaled, others = run(case, "dapo")
    (scaled.loss * 3.0 - scaled.loss).backward()
    for key in leaves:
        torch.testing.assert_close(others[key].grad, 2 * leaves[key].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scale", "bias"), [(65536.0, False), (1024.0, True), (65536.0, True)])
def test_float16_under_a_gradient_scaler(scale, bias):
    # torch.amp.GradScaler starts at 65536, above float16's largest; a mean over 4096 tokens is below its smallest
    case = make_case(1, 4096, 16, 31, dtype=F16, spread=0.3, bias=bias)
    case.old_logps = None
    found, leaves = run(case, "cispo")
    (found.loss * scale).backward()
    *_, grads = case.loss(objective="cispo")
    for key, tensor in leaves.items():
        assert relative_error(tensor.grad.double() / scale, grads[key]) <= 1e-3, key


def test_gradients_accumulate_over_calls():
    case = make_case(2, 5, DIM, 127)
    found, leaves = run(case, "dapo")
    found.loss.backward()
    first = leaves["weight"].grad.clone()
    linear_policy_loss(
        leaves["hidden"], leaves["weight"], case.targets, case.advantages, objective="dapo", old_logps=case.old_logps
    ).loss.backward()
    torch.testing.assert_close(leaves["weight"].grad, 2 * first, rtol=1e-6, atol=0)


def test_a_tied_embedding_gets_both_gradients():
    case = make_case(1, 6, DIM, 127)
    weight, ids = leaf(case.weight), torch.randint(0, 127, (1, 6))
    linear_policy_loss(weight[ids].tanh(), weight, case.targets, case.advantages).loss.backward()
    w = case.weight.double().requires_grad_()
    logps = (w[ids].tanh() @ w.t()).log_softmax(-1).gather(-1, case.targets[..., None])
    (-case.advantages.double() * logps.mean()).sum().backward()
    assert relative_error(weight.grad, w.grad) <= 1e-5


def test_outputs_are_detached_but_for_the_loss():
    case = make_case(2, 5, DIM, 127)
    found, _ = run(case, "grpo-kl-entropy")
    assert not found.logps.requires_grad
    assert not found.entropy.requires_grad
    assert not any(t.requires_grad for stat in found.metrics.values() for t in stat)


def test_same_bits_on_every_run():
    case = make_case(5, 13, DIM, 5003, bias=True, lengths=[13, 0, 1, 12, 7], replayed=1)
    runs = []
    for _ in range(2):
        found, leaves = run(case, "repo-kl-entropy", options=SMALL_TILES)
        found.loss.backward()
        runs.append([found.loss.detach(), found.logps, found.entropy, *(t.grad for t in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)])
def test_autocast_can_be_told_to_change_nothing(dtype, weight_dtype):
    # autocast rewrites matrix products: float32 gradients would come out in bfloat16
    case = make_case(1, 3, 128, 49152, dtype=dtype, weight_dtype=weight_dtype)  # two slices where it is upcast
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            found, leaves = run(case, "dapo", options=Options(operand_dtype=F32))
        found.loss.backward()
        results.append([found.loss.detach(), *(t.grad for t in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_activation_checkpointing_around_the_loss():
    case = make_case(2, 5, DIM, 127)
    found, leaves = run(case, "dapo")
    found.loss.backward()
    hidden = leaf(case.hidden)

    def loss(hidden):
        return linear_policy_loss(
            hidden, case.weight, case.targets, case.advantages, objective="dapo", old_logps=case.old_logps
        ).loss

    checkpoint(loss, hidden, use_reentrant=False).backward()
    assert torch.equal(hidden.grad, leaves["hidden"].grad)


# --- overflow ---


def test_p12_an_overflowing_ratio_behind_a_clip_is_harmless():
    case = make_case(2, 4, DIM, 127)
    case.advantages = torch.tensor([1.0, 0.7])
    case.old_logps[0, 1] = -200.0  # ratio e^{~195} with A > 0: clipped
    compare(case, "grpo")


def test_p12_an_overflowing_kl_of_a_replayed_row_is_harmless():
    # replayed rows have no KL, so their reference may be anything: here 0, some 300 nats above
    case = make_case(2, 4, DIM, 127, replayed=1, spread=80.0)
    case.ref_logps[1] = 0.0
    found, leaves = run(case, "repo-kl-entropy")
    assert (found.logps[1] < -89).any()
    found.loss.backward()
    assert found.loss.isfinite()
    assert all(t.grad.isfinite().all() for t in leaves.values())


# --- properties ---


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(5)), objective=st.sampled_from(FEW))
def test_the_order_of_sequences_does_not_matter(order, objective):
    case = make_case(5, 7, DIM, 127, lengths=[7, 0, 3, 1, 6], replayed=2)
    straight, leaves = run(case, objective)
    straight.loss.backward()
    order = torch.tensor(order)
    for name in ("hidden", "targets", "advantages", "mask", "old_logps", "ref_logps", "off_policy"):
        setattr(case, name, getattr(case, name)[order])
    shuffled, others = run(case, objective)
    shuffled.loss.backward()
    torch.testing.assert_close(shuffled.loss, straight.loss, rtol=1e-5, atol=1e-7)
    assert relative_error(others["hidden"].grad, leaves["hidden"].grad[order]) <= 1e-5
    assert relative_error(others["weight"].grad, leaves["weight"].grad) <= 1e-5


@settings(max_examples=15, deadline=None)
@given(width=st.integers(7, 20), left=st.integers(0, 5), objective=st.sampled_from(FEW))
def test_padding_does_not_matter(width, left, objective):
    case = make_case(3, 7, DIM, 127, lengths=[7, 3, 1], replayed=1)
    tight, leaves = run(case, objective)
    tight.loss.backward()

    def pad(tensor, fill):
        wide = torch.full((3, left + width, *tensor.shape[2:]), fill, dtype=tensor.dtype)
        wide[:, left : left + 7] = tensor
        return wide

    for name, fill in {"hidden": 9.9, "targets": 0, "mask": False, "old_logps": -1.0, "ref_logps": -1.0}.items():
        setattr(case, name, pad(getattr(case, name), fill))
    wide, others = run(case, objective)
    wide.loss.backward()
    assert torch.equal(wide.loss, tight.loss)
    assert torch.equal(others["weight"].grad, leaves["weight"].grad)
    assert torch.equal(others["hidden"].grad[:, left : left + 7], leaves["hidden"].grad)


@settings(max_examples=15, deadline=None)
@given(factor=st.floats(1e-3, 1e3), objective=st.sampled_from(["grpo", "dapo", "cispo", "gspo", "repo"]))
def test_scaling_advantages_scales_loss_and_gradient(factor, objective):
    case = make_case(3, 5, DIM, 127, replayed=1)
    one, leaves = run(case, objective)
    one.loss.backward()
    case.advantages = case.advantages * factor
    scaled, others = run(case, objective)
    scaled.loss.backward()
    torch.testing.assert_close(scaled.loss, factor * one.loss, rtol=1e-5, atol=1e-6 * factor)
    assert relative_error(others["weight"].grad, factor * leaves["weight"].grad) <= 1e-5


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_log_probabilities_of_one_update_are_the_old_ones_of_the_next(name):
    # NaN where a token was skipped; the next update on the same advantages skips it as well
    hidden, weight, targets = torch.randn(4, 6, DIM), torch.randn(101, DIM), torch.randint(101, (4, 6))
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0])
    first = linear_policy_loss(hidden, weight, targets, advantages, objective=name)
    assert first.logps[1].isnan().all()
    moved = (hidden + 0.1 * torch.randn_like(hidden)).requires_grad_()
    whole = linear_logps(hidden, weight, targets).logps
    losses = [
        linear_policy_loss(moved, weight, targets, advantages, objective=name, old_logps=old).loss
        for old in (first.logps, whole)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    with pytest.raises(ValueError, match=r"old_logps: expected finite .* Options\(all_logps=True\)"):
        linear_policy_loss(moved, weight, targets, advantages + 1, objective=name, old_logps=first.logps)
