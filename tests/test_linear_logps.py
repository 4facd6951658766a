"""linear_logps against float64 full logits: values, each gradient, every kind of head, rows that broke its peers."""

import itertools

import pytest
import torch
from truth import leaf, make_case, relative_error, scores, token_stats
from watch import Watch

from repo_ops import Options, linear_logps, linear_policy_loss

INF = float("inf")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# One entry; odd and below a vector register; prime; SmolLM2's.
VOCABULARIES = (1, 127, 5003, 49152)
# None, one, an odd few, and one more than 64: [B, T] of 0, 1, 7 and 65 tokens.
SHAPES = ((0, 3), (2, 0), (1, 1), (1, 7), (5, 13))
DIM = 24  # not a power of two
# Relative error of a gradient against float64 on the same rounded inputs: what its stored dtype and operands cost.
GRADIENT_ERROR = {F32: 1e-5, BF16: 4e-3, F16: 1e-3, F64: 1e-12}


def largest_logit(case):
    leaves = {name: tensor.detach() for name, tensor in case.leaves().items()}
    return max(scores(**leaves, **case.head).abs().flatten().tolist(), default=0.0)


def logps_error(logps, truth, largest_logit):
    return ((logps.double() - truth).abs().max().item() if truth.numel() else 0.0) / max(1.0, largest_logit / 8)


def compare(case, *, options=None, error=1e-5, gradient_error=None, **kwargs):
    """Values and every gradient of logps and entropy together, by the float64 truth of `case`."""
    g = torch.Generator().manual_seed(5)
    dlogps, dentropy = torch.randn(2, *case.targets.shape, generator=g, dtype=F64)
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    found = linear_logps(
        hidden,
        weight,
        case.targets,
        bias=bias,
        mask=case.mask,
        with_entropy=True,
        options=options,
        **case.head,
        **kwargs,
    )
    logps, entropy, grads = case.stats(dlogps, dentropy)
    largest = largest_logit(case)
    assert logps_error(found.logps, logps, largest) <= error
    assert logps_error(found.entropy, entropy, largest) <= 3 * error
    assert (found.logps <= 0).all()
    assert (found.entropy >= 0).all()
    (dlogps.to(found.logps) * found.logps + dentropy.to(found.logps) * found.entropy).sum().backward()
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            bound = gradient_error or max(GRADIENT_ERROR[tensor.dtype], GRADIENT_ERROR[found.logps.dtype])
            assert relative_error(tensor.grad, grads[name]) <= bound, name
    return found


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(V, shape):
    compare(make_case(*shape, DIM, V, bias=True))


# Qwen's and Gemma's vocabularies: rows that fill a block of the row arithmetic by themselves
@pytest.mark.parametrize("V", [151665, 151936, 262144])
def test_real_vocabularies(V):
    compare(make_case(1, 3, 8, V))


@pytest.mark.parametrize("V", [127, 49152])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, BF16), (F16, F16), (F64, F64), (BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (BF16, F16), (F32, F64)],
    ids=str,
)
def test_dtypes(dtype, weight_dtype, V):
    # inputs are rounded before the truth is taken, so log-probabilities stay exact whatever the inputs' dtype
    case = make_case(3, 9, 64, V, dtype=dtype, weight_dtype=weight_dtype, bias=True)
    found = compare(case, gradient_error=4e-3 if {dtype, weight_dtype} & {BF16, F16} else None)
    assert found.logps.dtype == (F64 if F64 in (dtype, weight_dtype) else F32)


@pytest.mark.parametrize("lengths", [None, [13, 0, 1, 12, 7]])
def test_promised_precision_in_bfloat16(lengths):
    # both entry points: log-probabilities to 1e-5, gradients to 3.5e-3 of float64, most of it one rounding each of
    # d logits and of the result
    case = make_case(5, 13, 64, 49152, dtype=BF16, lengths=lengths)
    compare(case, error=1e-5, gradient_error=3.5e-3)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    found = linear_policy_loss(hidden, weight, case.targets, torch.ones(5), objective="dapo", mask=case.mask)
    found.loss.backward()
    count = case.targets.numel() if case.mask is None else int(case.mask.sum())
    *_, grads = case.stats(torch.full((5, 13), -1 / count), torch.zeros(5, 13))
    assert relative_error(hidden.grad, grads["hidden"]) <= 3.5e-3
    assert relative_error(weight.grad, grads["weight"]) <= 3.5e-3


def test_bfloat16_weight_in_slices():
    # 49152 x 192 in float32 is more than two slices of the upcast weight
    compare(make_case(1, 5, 192, 49152, dtype=BF16), gradient_error=4e-3)


HEADS = [
    {"temperature": 0.6},
    {"softcap": 30.0},
    {"logit_scale": 0.0625},  # Granite, Cohere: below 1
    {"logit_scale": -2.0},
    {"softcap": 5.0, "logit_scale": 3.0, "temperature": 0.7},  # saturated: the order of the three shows
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "-".join(h))
def test_every_kind_of_head(head, bias):
    compare(make_case(2, 7, DIM, 5003, bias=bias, **head))


@pytest.mark.parametrize("shape", [(4, 6), (4,), ()], ids=["per_token", "per_sequence", "scalar_tensor"])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_temperature_tensors(shape, softcap):
    temperature = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
    compare(make_case(4, 6, DIM, 127, temperature=temperature, softcap=softcap, lengths=[6, 1, 0, 4]))


def test_a_float32_temperature_costs_a_float64_head_no_digits():
    # 0.7 as float32 is what it is; its inverse is taken in float64
    compare(make_case(4, 6, DIM, 127, dtype=F64, temperature=torch.rand(4, 6) + 0.5), error=1e-12)


def test_packed_equals_padded():
    case = make_case(3, 5, DIM, 127, bias=True)
    head = {"bias": case.bias, "with_entropy": True}
    padded = linear_logps(case.hidden, case.weight, case.targets, **head)
    packed = linear_logps(case.hidden.reshape(15, DIM), case.weight, case.targets.reshape(15), **head)
    for a, b in zip(padded, packed):
        assert b.shape == (15,)
        assert torch.equal(a.reshape(15), b)


def test_verl_6068_a_part_of_a_sequence_has_its_own_targets():
    # nothing is shifted inside: where a sequence is cut over ranks, each part gives what the whole gives there
    hidden, weight, targets = torch.randn(2, 7, 5), torch.randn(11, 5), torch.randint(0, 11, (2, 7))
    parts = [linear_logps(hidden[:, part], weight, targets[:, part]).logps for part in (slice(3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), linear_logps(hidden, weight, targets).logps, rtol=0, atol=1e-6)


def test_ragged_mask_hides_junk():
    # masked positions hold NaN hidden states and target -100: they must not be looked at
    case = make_case(5, 13, DIM, 5003, bias=True, lengths=[13, 0, 1, 12, 7])
    found = compare(case)
    assert (found.logps[~case.mask] == 0).all()
    assert (found.entropy[~case.mask] == 0).all()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_dtypes(mask_dtype):
    case = make_case(2, 4, DIM, 127, lengths=[4, 2])
    a = linear_logps(case.hidden, case.weight, case.targets, mask=case.mask.to(mask_dtype)).logps
    b = linear_logps(case.hidden, case.weight, case.targets, mask=case.mask).logps
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 3)], ids=["no_rows", "no_tokens", "all_masked"])
def test_nothing_to_compute_keeps_the_graph(shape):
    hidden, weight = torch.randn(*shape, DIM, requires_grad=True), torch.randn(127, DIM, requires_grad=True)
    bias = torch.randn(127, requires_grad=True)
    found = linear_logps(
        hidden, weight, torch.zeros(shape, dtype=torch.long), bias=bias, mask=torch.zeros(shape), with_entropy=True
    )
    assert found.logps.shape == found.entropy.shape == shape
    (found.logps.sum() + found.entropy.sum()).backward()
    for tensor in (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


# Many chunks: 5 MiB holds 46 rows of V = 5003 beside the blocks; 65 and 96 rows make 2 and 3 chunks, uneven and even.
@pytest.mark.parametrize("T", [13, 32])
@pytest.mark.parametrize("lengths", [None, [13, 0, 1, 12, 7]])
def test_many_tiles(T, lengths):
    case = make_case(5 if T == 13 else 3, T, DIM, 5003, bias=True, lengths=lengths if T == 13 else None)
    compare(case, options=Options(memory_budget=5 << 20))


def test_one_tile_and_many_agree():
    case = make_case(3, 32, DIM, 5003)
    results = []
    for budget in (5 << 20, 1 << 30):
        hidden, weight = leaf(case.hidden), leaf(case.weight)
        with Watch() as watch:
            found = linear_logps(hidden, weight, case.targets, options=Options(memory_budget=budget))
        found.logps.sum().backward()
        results.append((found.logps.detach(), hidden.grad, weight.grad, max(rows for rows, *_ in watch.products)))
    (many, dh_many, dw_many, chunk), (one, dh, dw, whole) = results
    assert chunk < whole == 96
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)
    assert relative_error(dh_many, dh.double()) <= 1e-6
    assert relative_error(dw_many, dw.double()) <= 1e-6


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_requires_grad(needs):
    case = make_case(2, 5, DIM, 127, bias=True)
    tensors = [leaf(t, need) for t, need in zip((case.hidden, case.weight, case.bias), needs)]
    logps = linear_logps(tensors[0], tensors[1], case.targets, bias=tensors[2]).logps
    assert logps.requires_grad == any(needs)
    if any(needs):
        logps.sum().backward()
    *_, grads = case.stats(torch.ones(2, 5), torch.zeros(2, 5))
    for tensor, need, name in zip(tensors, needs, ("hidden", "weight", "bias")):
        assert (tensor.grad is not None) == need
        if need:
            assert relative_error(tensor.grad, grads[name]) <= 1e-5, name


# TRL #6625: the entropy's gradient was missing in silence
@pytest.mark.parametrize(
    ("use_logps", "use_entropy", "with_entropy"),
    [(True, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_trl_6625_gradient_of_each_output_alone(use_logps, use_entropy, with_entropy):
    case = make_case(2, 7, DIM, 5003, softcap=9.0)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    found = linear_logps(hidden, weight, case.targets, with_entropy=with_entropy, **case.head)
    terms = [(found.logps, 0.7)] * use_logps + [(found.entropy, 0.3)] * use_entropy
    sum(factor * output.sum() for output, factor in terms).backward()
    *_, grads = case.stats(torch.full((2, 7), 0.7 * use_logps), torch.full((2, 7), 0.3 * use_entropy))
    assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5
    assert relative_error(weight.grad, grads["weight"]) <= 1e-5


def test_numeric_gradient():
    # finite differences in float64 need no other implementation
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, generator=g, dtype=F64, requires_grad=True) for n in (3, 6))
    bias = torch.randn(6, generator=g, dtype=F64, requires_grad=True)
    targets = torch.tensor([0, 5, 2])

    def op(hidden, weight, bias):
        found = linear_logps(
            hidden, weight, targets, bias=bias, temperature=0.7, softcap=3.0, logit_scale=2.0, with_entropy=True
        )
        return found.logps, found.entropy

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


def test_no_gradient_wanted_is_one_pass_that_saves_nothing():
    N, V = 128, 5003
    case = make_case(1, N, DIM, V)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Watch() as watch:
            found = linear_logps(hidden, weight, case.targets, options=Options(memory_budget=5 << 20))
        assert not found.logps.requires_grad
        assert watch.passes(N, DIM, V) == 1
        assert watch.largest < N * V
        assert watch.live <= 4 * N * found.logps.element_size()


def test_training_is_four_passes_and_three_with_a_frozen_head():
    N, V = 128, 5003
    case = make_case(1, N, DIM, V)
    for trained, passes in ((True, 4), (False, 3)):
        with Watch() as watch:
            linear_logps(leaf(case.hidden), leaf(case.weight, trained), case.targets).logps.sum().backward()
        assert watch.passes(N, DIM, V) == passes


def test_rows_whose_gradient_arrives_as_zero_skip_the_gradient_products():
    N, V = 64, 5003
    case = make_case(1, N, DIM, V)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    dlogps = torch.randn(1, N) * (torch.arange(N) % 4 == 0)
    logps = linear_logps(hidden, weight, case.targets).logps
    with Watch() as watch:
        logps.backward(dlogps)
    assert watch.passes(N, DIM, V) <= 1 + 2 * 0.25
    *_, grads = case.stats(dlogps, torch.zeros(1, N))
    assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5
    assert relative_error(weight.grad, grads["weight"]) <= 1e-5


def test_backward_twice_with_a_retained_graph():
    case = make_case(1, 7, DIM, 127)
    hidden = leaf(case.hidden)
    logps = linear_logps(hidden, case.weight, case.targets).logps
    first = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logps.sum(), hidden)[0])


@pytest.mark.parametrize("what", ["logps", "support", "loss"])
def test_a_second_derivative_is_refused(what):
    # a gradient penalty would be without effect, and say nothing: the gradient has no graph
    hidden, weight, targets = torch.randn(2, 3, 8, requires_grad=True), torch.randn(17, 8), torch.ones(2, 3).long()
    if what == "loss":
        value = linear_policy_loss(hidden, weight, targets, torch.ones(2)).loss
    else:
        ids = torch.arange(4).expand(2, 3, 4) if what == "support" else None
        value = linear_logps(hidden, weight, targets, support_ids=ids).logps.sum()
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    assert grad.norm() > 0
    with pytest.raises(RuntimeError, match="expected one differentiation of a fused head, got a second one"):
        (value.detach() + grad.square().sum()).backward()


def test_changing_the_weight_between_forward_and_backward_is_refused():
    # an optimizer step in between would recompute other logits and give a wrong gradient in silence
    case = make_case(1, 7, DIM, 127)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    logps = linear_logps(hidden, weight, case.targets).logps
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_same_bits_on_every_run():
    case = make_case(5, 13, DIM, 5003, bias=True)
    runs = []
    for _ in range(2):
        tensors = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
        found = linear_logps(
            *tensors[:2], case.targets, bias=tensors[2], with_entropy=True, options=Options(memory_budget=5 << 20)
        )
        (found.logps.sum() + found.entropy.sum()).backward()
        runs.append([*found, *(t.grad for t in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_inputs_that_are_not_contiguous(dtype):
    case = make_case(4, 6, DIM, 127, dtype=dtype)
    hidden = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)  # strides of [T, B, D]
    wide = torch.zeros(4, 12, dtype=torch.long)
    wide[:, ::2] = case.targets
    weight = case.weight.t().contiguous().t()  # stored [D, V]
    case.hidden, case.weight, case.targets = hidden, weight, wide[:, ::2]
    assert not any(t.is_contiguous() for t in (hidden, weight, wide[:, ::2]))
    compare(case)


def test_hidden_repeated_by_expand():
    case = make_case(1, 5, DIM, 127)
    case.hidden = case.hidden[:, :1].expand(1, 5, DIM)
    one = leaf(case.hidden[:, :1])
    linear_logps(one.expand(1, 5, DIM), case.weight, case.targets).logps.sum().backward()  # rows of stride 0
    *_, grads = case.stats(torch.ones(1, 5), torch.zeros(1, 5))
    assert relative_error(one.grad, grads["hidden"].sum(1, keepdim=True)) <= 1e-5


def test_int32_targets():
    case = make_case(2, 3, DIM, 127)
    case.targets = case.targets.int()
    compare(case)


# Rows that broke its peers; each name says whose.


# verl #2656: zero-padded columns of an unaligned vocabulary added exp(0) each, and log-probabilities reached +123
@pytest.mark.parametrize("V", [7, 50257, 129920, 151669])
def test_verl_2656_unaligned_vocabulary_with_all_logits_far_below_zero(V):
    case = make_case(1, 4, 8, V, bias=True)
    case.bias = case.bias - 200.0
    compare(case, gradient_error=2e-5)  # logits around 200 are rounded to 1.5e-5


# SkyRL #2141 and verl's epilogue: a running maximum that starts at 0
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_skyrl_2141_shifted_logits(shift):
    case = make_case(2, 7, DIM, 5003, bias=True)
    case.bias = case.bias + shift
    compare(case, gradient_error=2e-5)  # logits around 200 are rounded to 1.5e-5


# flash-attention #1930: NaN where most logits are -inf, a masked vocabulary
@pytest.mark.parametrize("kept", [1, 2, 100])
def test_flash_attention_1930_masked_vocabulary(kept):
    case = make_case(1, 6, DIM, 5003, bias=True)
    allowed = torch.linspace(0, 5002, kept).long()
    case.bias = torch.full((5003,), -INF).index_fill(0, allowed, 0.0)
    case.targets = allowed[torch.arange(6)[None] % kept]
    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    found = linear_logps(hidden, weight, case.targets, bias=bias, with_entropy=True)
    (found.logps.sum() + found.entropy.sum()).backward()
    h, w = (t.detach().double().requires_grad_() for t in (case.hidden, case.weight[allowed]))
    logps, entropy = token_stats(h, w, torch.arange(6)[None] % kept)
    (logps.sum() + entropy.sum()).backward()
    torch.testing.assert_close(found.logps.double(), logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad[allowed].double(), w.grad, rtol=1e-5, atol=1e-5)
    assert weight.grad.isfinite().all()
    assert weight.grad.norm() <= w.grad.norm() * 1.001 + 1e-6  # nothing for the entries that are masked out
    assert bias.grad.isfinite().all()


def test_a_target_that_the_bias_forbids_is_minus_infinity_with_a_finite_gradient():
    case = make_case(1, 2, DIM, 9, bias=True)
    case.bias[3], case.targets = -INF, torch.tensor([[3, 4]])
    hidden = leaf(case.hidden)
    logps = linear_logps(hidden, case.weight, case.targets, bias=case.bias).logps
    assert logps[0, 0] == -INF
    assert logps[0, 1].isfinite()
    logps.sum().backward()
    assert hidden.grad.isfinite().all()


# old fla #1231: p rounded to bfloat16 before the 1 is taken off; the target's gradient is exactly 0 from p = 0.998 on
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fla_1231_target_column_of_confident_rows(p, dtype):
    hidden, weight, targets, bias = confident(p, dtype)
    leaves = [leaf(hidden), leaf(weight)]
    linear_logps(*leaves, targets, bias=bias).logps.sum().backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    token_stats(h, w, targets, bias=bias)[0].sum().backward()
    assert relative_error(leaves[0].grad, h.grad) <= (4e-3 if dtype == BF16 else 1e-5)
    assert relative_error(leaves[1].grad[7], w.grad[7]) <= (4e-3 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("miss", [1e-3, 1e-5, 1e-7, 1e-9])
def test_gradients_of_rows_that_are_almost_certain(miss):
    # 1 - p as a difference of sums loses digits from 1e-3 on and is 0 below 1e-7; the sum over the others keeps them
    hidden, weight, targets, bias = confident(1 - miss, F32)
    leaves = [leaf(hidden), leaf(weight)]
    found = linear_logps(*leaves, targets, bias=bias).logps
    found.sum().backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logps = token_stats(h, w, targets, bias=bias)[0]
    logps.sum().backward()
    assert relative_error(found, logps) <= 1e-5
    assert relative_error(leaves[0].grad, h.grad) <= 1e-5
    assert relative_error(leaves[1].grad, w.grad) <= 1e-5


def confident(p, dtype, V=1000):
    """Rows whose target 7 has about probability p: a bias makes the gap, small logits the rest."""
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 8, 16, generator=g).to(dtype)
    weight = (torch.randn(V, 16, generator=g) * 0.01).to(dtype)
    bias = torch.zeros(V).index_fill(0, torch.tensor([7]), torch.tensor(p * (V - 1) / (1 - p)).log().item())
    return hidden, weight, torch.full((1, 8), 7), bias


# TRL #7077: backward fails where hidden is bfloat16 and the head float32; autocast rewrites matrix products besides
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("around_backward", [False, True])
def test_trl_7077_autocast_can_be_told_to_change_nothing(dtype, weight_dtype, around_backward):
    case = make_case(1, 5, 128, 49152, dtype=dtype, weight_dtype=weight_dtype)  # two slices where the weight is upcast
    results = []
    for autocast in (False, True):
        hidden, weight = leaf(case.hidden), leaf(case.weight)
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            logps = linear_logps(hidden, weight, case.targets, options=Options(operand_dtype=F32)).logps
            if around_backward:
                logps.sum().backward()
        if not around_backward:
            logps.sum().backward()
        results.append((logps.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_support_ids_listed_twice_are_refused():
    # a token would count twice in the normaliser
    case = make_case(1, 4, DIM, 127)
    with pytest.raises(ValueError, match="support_ids: expected each id once a row"):
        linear_logps(case.hidden, case.weight, case.targets, support_ids=torch.tensor([3, 5, 5, 7]).expand(1, 4, 4))


# Liger #1294 crashes at 65536 rows; the row count must only cost time
def test_liger_1294_more_than_65536_rows():
    N = 65537
    hidden, weight = torch.randn(N, 4), torch.randn(11, 4)
    targets = torch.randint(0, 11, (N,))
    logps = linear_logps(hidden, weight, targets, options=Options(memory_budget=8 << 20)).logps
    torch.testing.assert_close(logps.double(), token_stats(hidden, weight, targets)[0], rtol=0, atol=1e-5)


# logits stored in 16 bits are an option with a known price, and must not overflow
@pytest.mark.parametrize("logits_dtype", [BF16, F16])
@pytest.mark.parametrize("V", [127, 49152, 151665])
def test_sixteen_bit_logits(logits_dtype, V):
    case = make_case(1, 5, 16, V, dtype=logits_dtype)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    found = linear_logps(hidden, weight, case.targets, options=Options(logits_dtype=logits_dtype))
    found.logps.sum().backward()
    logps, _, grads = case.stats(torch.ones(1, 5), torch.zeros(1, 5))
    rounding = {BF16: 2**-9, F16: 2**-12}[logits_dtype]
    largest = 8 + largest_logit(case)
    assert (found.logps - logps).abs().max() <= 2 * rounding * largest
    assert relative_error(hidden.grad, grads["hidden"]) <= 4 * rounding * largest
    assert relative_error(weight.grad, grads["weight"]) <= 4 * rounding * largest


@pytest.mark.parametrize("logits_dtype", [BF16, F16])
def test_sixteen_bit_logits_of_a_flat_row(logits_dtype):
    # sum(exp(z - max)) is V for a flat row, above float16's 65504 from there on
    V = 70000
    hidden, weight = torch.zeros(1, 2, 4, dtype=logits_dtype), torch.ones(V, 4, dtype=logits_dtype)
    weight[5] = 3.0
    hidden, weight = leaf(hidden), leaf(weight)
    logps = linear_logps(hidden, weight, torch.full((1, 2), 5), options=Options(logits_dtype=logits_dtype)).logps
    logps.sum().backward()
    # d logp / d hidden = w_target - mean(w) = 2 (1 - 1 / V)
    torch.testing.assert_close(hidden.grad.float(), torch.full((1, 2, 4), 2.0), rtol=5e-3, atol=0)
