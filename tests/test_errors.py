"""Bad input raises one clear error at the door that names the argument. One row a mistake and what is said of it."""

import pytest
import torch

from repo_ops import NumItems, Options, get_objective, linear_logps, linear_policy_loss, policy_loss
from repo_ops.head import triton_rows

NAN, INF = float("nan"), float("inf")
B, T, D, V = 2, 3, 4, 9
LONG = torch.long


def head(**changes):
    given = {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D), "targets": torch.ones(B, T, dtype=LONG)}
    return {**given, **changes}


def logps(**changes):
    return linear_logps(**head(**changes))


def fused(**changes):
    return linear_policy_loss(**head(**{"advantages": torch.ones(B), **changes}))


def packed(**changes):
    given = {"hidden": torch.randn(6, D), "targets": torch.ones(6, dtype=LONG), "cu_seqlens": torch.tensor([0, 2, 6])}
    return fused(**{**given, **changes})


def ready(**changes):
    return policy_loss(**{"logps": -torch.ones(B, T), "advantages": torch.ones(B), **changes})


def objective(name="grpo", **hyper):
    return get_objective(name, **hyper)


def ids(*values):
    found = torch.ones(B, T, dtype=LONG)
    found.view(-1)[: len(values)] = torch.tensor(values)
    return found


# what a head, whichever function it is given to, must refuse
HEAD = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"hidden": None}, TypeError, "hidden: expected a tensor, got NoneType"),
    ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ({"hidden": torch.ones(B, T, D, dtype=LONG)}, TypeError, "hidden: expected a floating dtype, got torch.int64"),
    ({"hidden": torch.randn(B, T + 1, D)}, ValueError, r"hidden: expected shape \[2, 3, 4\].*got \[2, 4, 4\]; .*shift"),
    ({"hidden": torch.randn(B, D)}, ValueError, r"hidden: expected shape \[2, 3, 4\].*got \[2, 4\]"),
    ({"weight": [1.0]}, TypeError, "weight: expected a tensor, got list"),
    ({"weight": torch.ones(V, D, dtype=torch.int8)}, TypeError, "weight: expected a floating dtype, got torch.int8"),
    ({"weight": torch.randn(D, V)}, ValueError, r"weight: expected shape \[V, 4\].*got \[4, 9\].*transpose"),
    ({"weight": torch.randn(D)}, ValueError, r"weight: expected shape \[V, D\].*got \[4\]"),
    ({"weight": torch.randn(0, D)}, ValueError, r"weight: expected shape \[V, D\].*got \[0, 4\]"),
    ({"weight": torch.empty(V, D, device="meta")}, ValueError, "weight: expected device cpu.*got meta"),
    ({"hidden": torch.empty(B, T, D, device="meta")}, ValueError, "hidden: expected device cpu.*got meta"),
    ({"bias": torch.empty(V, device="meta")}, ValueError, "bias: expected device cpu.*got meta"),
    ({"bias": torch.randn(V - 1)}, ValueError, r"bias: expected shape \[9\].*got \[8\]"),
    ({"bias": torch.randn(1, V)}, ValueError, r"bias: expected shape \[9\].*got \[1, 9\]"),
    ({"bias": [0.0] * V}, TypeError, "bias: expected a tensor.*got list"),
    ({"bias": torch.ones(V, dtype=LONG)}, TypeError, "bias: expected a floating dtype, got torch.int64"),
    ({"targets": [[1] * T] * B}, TypeError, "targets: expected a tensor, got list"),
    ({"targets": torch.ones(B, T)}, TypeError, "targets: expected int64 token ids, got torch.float32"),
    ({"targets": torch.ones(B, T, 1, dtype=LONG)}, ValueError, r"targets: expected shape \[B, T\].*got \[2, 3, 1\]"),
    ({"targets": torch.tensor(1)}, ValueError, r"targets: expected shape \[B, T\].*got \[\]"),
    ({"targets": ids(V)}, ValueError, "targets: expected ids from 0 to 8 where mask is 1"),
    ({"targets": ids(-1)}, ValueError, "targets: expected ids from 0 to 8 where mask is 1"),
    ({"targets": ids(-100)}, ValueError, r"targets: .*mask positions that predict nothing \(padding, -100\)"),
    (
        {"targets": ids(1, -100), "mask": torch.ones(B, T)},
        ValueError,
        r"targets: .*mask positions that predict nothing \(padding, -100\)",
    ),
    ({"mask": torch.ones(B, T + 1)}, ValueError, r"mask: expected shape \[2, 3\] like targets, got \[2, 4\]"),
    ({"mask": torch.ones(B, T, device="meta")}, ValueError, "mask: expected device cpu like targets, got meta; move"),
    ({"mask": torch.ones(B)}, ValueError, r"mask: expected shape \[2, 3\] like targets, got \[2\]"),
    ({"mask": [[1] * T] * B}, TypeError, "mask: expected a tensor of shape.*got list"),
    (
        {"temperature": torch.ones(B + 1)},
        ValueError,
        r"temperature: .*\[2, 3\] like targets \(or \[2\], one per sequence\)",
    ),
    ({"support_ids": [[[1]]]}, TypeError, "support_ids: expected int64 token ids, -1 for padding, got list"),
    ({"support_ids": torch.ones(B, T, 2, dtype=LONG, device="meta")}, ValueError, "support_ids: expected device cpu"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature: expected a finite number > 0, got -1"),
    ({"temperature": NAN}, ValueError, "temperature: expected a finite number > 0, got nan"),
    ({"temperature": INF}, ValueError, "temperature: expected a finite number > 0, got inf"),
    ({"temperature": None}, TypeError, "temperature: expected"),
    ({"temperature": "0.7"}, TypeError, "temperature: expected"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature: expected finite numbers > 0"),
    ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected finite numbers > 0"),
    ({"temperature": torch.full((B, T), NAN)}, ValueError, "temperature: expected finite numbers > 0"),
    ({"temperature": torch.ones(B, T, dtype=LONG)}, TypeError, "temperature: expected a floating dtype"),
    ({"temperature": torch.ones(T)}, ValueError, r"temperature: expected shape \[2, 3\].*got \[3\]"),
    ({"temperature": torch.ones(B, 1)}, ValueError, r"temperature: expected shape \[2, 3\].*got \[2, 1\]"),
    (
        {"temperature": torch.ones(B, T, requires_grad=True)},
        ValueError,
        "temperature: expected constants.*detach",
    ),
    ({"tp_group": "tp"}, TypeError, r"tp_group: expected a process group, got str; .*mesh.get_group\(\)"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0 or None, got 0.0"),
    ({"softcap": -30.0}, ValueError, "softcap: expected a finite number > 0 or None, got -30.0"),
    ({"softcap": NAN}, ValueError, "softcap: expected a finite number > 0 or None, got nan"),
    ({"softcap": INF}, ValueError, "softcap: expected a finite number > 0 or None, got inf"),
    ({"softcap": "30"}, TypeError, "softcap: expected"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number other than 0, got 0.0"),
    ({"logit_scale": NAN}, ValueError, "logit_scale: expected a finite number other than 0, got nan"),
    ({"logit_scale": "2"}, TypeError, "logit_scale: expected"),
    ({"logit_scale": torch.ones(2)}, TypeError, "logit_scale: expected"),
    ({"options": "triton"}, TypeError, "options: expected"),
    ({"options": {"backend": "torch"}}, TypeError, "options: expected"),
]

# what both losses must refuse
LOSS = [
    ({"advantages": [1.0, 1.0]}, TypeError, "advantages: expected a tensor.*got list"),
    ({"advantages": 1.0}, TypeError, "advantages: expected a tensor.*got float"),
    ({"advantages": torch.ones(B, dtype=LONG)}, TypeError, "advantages: expected a floating dtype, got torch.int64"),
    ({"advantages": torch.ones(3)}, ValueError, r"advantages: expected shape \[2\].*or \[2, 3\].*got \[3\]"),
    ({"advantages": torch.ones(B, 1)}, ValueError, r"advantages: expected shape \[2\].*or \[2, 3\].*got \[2, 1\]"),
    ({"advantages": torch.tensor([1.0, NAN])}, ValueError, "advantages: expected finite numbers"),
    ({"advantages": torch.tensor([1.0, -INF])}, ValueError, "advantages: expected finite numbers"),
    ({"advantages": torch.ones(B, requires_grad=True)}, ValueError, "advantages: expected constants.*detach"),
    ({"objective": "grop"}, ValueError, "objective: expected one of .*got 'grop'; did you mean 'grpo'"),
    ({"objective": "nothing_like_it"}, ValueError, "objective: expected one of .*got 'nothing_like_it'"),
    ({"objective": None}, TypeError, "objective: expected a name, an Objective or a function"),
    ({"objective": type("Mine", (), {})}, TypeError, "objective: expected .*make an instance"),
    (
        {"objective": lambda tokens: tokens.logps.sum()},
        ValueError,
        r"objective: expected a per-token loss of shape \[6\]",
    ),
    ({"objective": lambda tokens: 0.0}, TypeError, "objective: expected per-token losses"),
    ({"old_logps": torch.zeros(B, T - 1)}, ValueError, r"old_logps: expected shape \[2, 3\].*got \[2, 2\]; drop"),
    ({"old_logps": torch.zeros(B, T, dtype=LONG)}, TypeError, "old_logps: expected a floating dtype"),
    (
        {"old_logps": torch.full((B, T), NAN)},
        ValueError,
        "old_logps: expected finite numbers where a token is comp",
    ),
    ({"old_logps": torch.full((B, T), -INF)}, ValueError, "old_logps: expected finite"),
    ({"ref_logps": torch.full((B, T), -INF)}, ValueError, "ref_logps: expected finite"),
    ({"mask": torch.full((B, T), 0.5)}, ValueError, "mask: expected"),
    ({"old_logps": [0.0]}, TypeError, "old_logps: expected a tensor"),
    ({"ref_logps": torch.zeros(B)}, ValueError, r"ref_logps: expected shape \[2, 3\].*got \[2\]"),
    (
        {"ref_logps": torch.full((B, T), NAN)},
        ValueError,
        "ref_logps: expected finite numbers where a token is comp",
    ),
    ({"sampler_logps": torch.zeros(T)}, ValueError, r"sampler_logps: expected shape \[2, 3\].*got \[3\]"),
    ({"mask": torch.ones(B, T + 1)}, ValueError, r"mask: expected shape \[2, 3\].*got \[2, 4\]"),
    ({"off_policy": torch.tensor([True, False])}, ValueError, "old_logps: expected the log-probabilities stored"),
    ({"off_policy": torch.ones(3).bool()}, ValueError, r"off_policy: expected shape \[2\].*got \[3\]"),
    ({"off_policy": torch.tensor([0, 1])}, TypeError, "off_policy: expected bool.*got torch.int64"),
    ({"off_policy": [True, False]}, TypeError, "off_policy: expected a tensor.*got list"),
    ({"off_policy_coef": -1.0}, ValueError, "off_policy_coef: expected a finite number > 0, got -1.0"),
    ({"off_policy_coef": NAN}, ValueError, "off_policy_coef: expected a finite number > 0, got nan"),
    ({"off_policy_coef": "1"}, TypeError, "off_policy_coef: expected"),
    ({"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, "cu_seqlens: expected packed .*drop cu_seqlens"),
    (
        {"num_items": 5, "objective": "dapo"},
        ValueError,
        "num_items: expected at least the 6 tokens of this call",
    ),
    ({"old_logps": torch.zeros(B, T, device="meta")}, ValueError, "old_logps: expected device cpu.*got meta; move"),
    ({"extras": [1]}, TypeError, "extras: expected a mapping of name to tensor, got list"),
    ({"num_items": -1}, ValueError, "num_items: expected finite counts >= 0, got -1"),
    ({"num_items": NAN}, ValueError, "num_items: expected finite counts >= 0, got nan"),
    ({"num_items": INF}, ValueError, "num_items: expected finite counts >= 0, got inf"),
    ({"num_items": (4, 4)}, ValueError, r"num_items: expected one number, got \(4, 4\)"),
    ({"num_items": [4]}, TypeError, "num_items: expected a number, a pair .* or NumItems, got list"),
    ({"num_items": "4"}, TypeError, "num_items: expected a number, a pair .* or NumItems, got str"),
    ({"num_items": torch.ones(2)}, TypeError, "num_items: expected a number, a pair .* or NumItems"),
    ({"num_items": NumItems(-1, 4)}, ValueError, "num_items: expected finite counts >= 0"),
    (
        {"num_items": 4, "off_policy": torch.tensor([True, False]), "old_logps": torch.zeros(B, T)},
        ValueError,
        r"num_items: expected a pair \(on_policy, off_policy\)",
    ),
    (
        {"num_items": NumItems(2, 4), "off_policy": torch.tensor([True, False]), "old_logps": torch.zeros(B, T)},
        ValueError,
        "num_items: expected the counts of replayed rows too",
    ),
    (
        {"objective": objective(beta=0.1)},
        ValueError,
        "ref_logps: expected a tensor, which this objective reads, got None",
    ),
    (
        {"objective": objective("repo", beta=0.1), "num_items": 4, "ref_logps": torch.zeros(B, T)},
        ValueError,
        "num_items: the KL is averaged by 'token-mean', .*NumItems",
    ),
]

PACKED = [
    ({"cu_seqlens": None}, ValueError, r"cu_seqlens: expected the boundaries \[B \+ 1\].*got None"),
    ({"cu_seqlens": [0, 2, 6]}, ValueError, r"cu_seqlens: expected integer boundaries.*0 to 6, got \[0, 2, 6\]"),
    ({"cu_seqlens": torch.tensor([0.0, 2.0, 6.0])}, ValueError, "cu_seqlens: expected integer boundaries"),
    ({"cu_seqlens": torch.tensor([[0, 2, 6]])}, ValueError, "cu_seqlens: expected integer boundaries"),
    ({"cu_seqlens": torch.tensor([], dtype=LONG)}, ValueError, "cu_seqlens: expected integer boundaries"),
    ({"cu_seqlens": torch.tensor([0, 2, 5])}, ValueError, "cu_seqlens: expected ascending boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([1, 2, 6])}, ValueError, "cu_seqlens: expected ascending boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens: expected ascending boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 2, 4, 6])}, ValueError, r"advantages: expected shape \[3\].*got \[2\]"),
    ({"hidden": torch.randn(B, T, D)}, ValueError, r"hidden: expected shape \[6, 4\].*got \[2, 3, 4\]"),
]

READY = [
    ({"logps": [-1.0]}, TypeError, "logps: expected a tensor, got list"),
    ({"logps": torch.zeros(B, T, dtype=LONG)}, TypeError, "logps: expected a floating dtype"),
    ({"logps": torch.full((B, T), NAN)}, ValueError, "logps: expected numbers where mask is 1, got NaN"),
    ({"logps": -torch.ones(B, T, 1)}, ValueError, r"logps: expected shape \[B, T\].*got \[2, 3, 1\]"),
    ({"entropy": torch.ones(B)}, ValueError, r"entropy: expected shape \[2, 3\].*got \[2\]"),
    ({"objective": objective(entropy_coef=0.1)}, ValueError, "entropy: expected a tensor, which this objective reads"),
]

HYPER = [
    (("grpo", {"eps_hihg": 0.1}), ValueError, "eps_hihg: objective 'grpo' has .*did you mean 'eps_high'"),
    (("grpo", {"epsilon": 0.1}), ValueError, "epsilon: objective 'grpo' has"),
    (("gspo", {"temperature": 3.0}), ValueError, "temperature: objective 'gspo' has"),
    (("grpo", {"eps_low": -0.1}), ValueError, "eps_low: expected a width >= 0"),
    (("grpo", {"eps_low": 1.1}), ValueError, "eps_low: expected a width <= 1"),
    (("grpo", {"eps_high": NAN}), ValueError, "eps_high: expected a width >= 0"),
    (("grpo", {"eps_high": INF}), ValueError, "eps_high: expected a width >= 0"),
    (("grpo", {"eps_high": "0.2"}), TypeError, "eps_high: expected"),
    (("grpo", {"delta": 1.1}), ValueError, "delta: expected at least 1 \\+ eps_high = 1.2, got 1.1"),
    (("cispo", {"eps_low": 1.5}), ValueError, "eps_low: expected a width <= 1"),
    (("gspo", {"eps_high": -1e-4}), ValueError, "eps_high: expected a width >= 0"),
    (("grpo", {"beta": -0.1}), ValueError, "beta: expected a finite number >= 0, got -0.1"),
    (("grpo", {"beta": NAN}), ValueError, "beta: expected a finite number >= 0, got nan"),
    (("grpo", {"beta": "0.1"}), TypeError, "beta: expected"),
    (("grpo", {"entropy_coef": INF}), ValueError, "entropy_coef: expected a finite number >= 0, got inf"),
    (("grpo", {"kl": "k4"}), ValueError, "kl: expected one of k1, k2, k3.*got 'k4'"),
    (("grpo", {"reduction": "mean"}), ValueError, "reduction: expected one of .*got 'mean'"),
    (("grpo", {"kl_reduction": "mean"}), ValueError, "kl_reduction: expected one of .*got 'mean'"),
    (("grpo", {"reduction": "const"}), ValueError, "max_length: expected the generation budget .*got None"),
    (("dr_grpo", {}), ValueError, "max_length: expected the generation budget .*got None"),
    (("grpo", {"max_length": 0}), ValueError, "max_length: expected tokens > 0, got 0"),
    (("grpo", {"max_length": INF}), ValueError, "max_length: expected"),
    (("repo", {"row_norm": "github"}), ValueError, "row_norm: expected one of paper, official_code, got 'github'"),
    ((3, {}), TypeError, "objective: expected"),
]

OPTIONS = [
    ({"backend": "cuda"}, ValueError, "options.backend: expected 'auto', 'torch' or 'triton', got 'cuda'"),
    ({"memory_budget": 1000}, ValueError, "options.memory_budget: expected bytes, at least 1048576.*got 1000"),
    ({"memory_budget": -1}, ValueError, "options.memory_budget: expected bytes.*got -1"),
    ({"memory_budget": "1GiB"}, TypeError, "options.memory_budget: expected"),
    ({"memory_budget": 1e9}, TypeError, "options.memory_budget: expected"),
    ({"logits_dtype": "bf16"}, ValueError, "options.logits_dtype: expected a floating dtype or None, got bf16"),
    ({"operand_dtype": torch.float64}, ValueError, "options.operand_dtype: expected .*got torch.float64"),
    (
        {"logits_dtype": torch.int8},
        ValueError,
        "options.logits_dtype: expected a floating dtype or None, got torch.int8",
    ),
    ({"all_logps": "yes"}, TypeError, "options.all_logps: expected"),
]


def rows(table):
    return [pytest.param(*row[:3], marks=row[3:], id=f"{i}-{row[2][:40]}") for i, row in enumerate(table)]


def check_message(error):
    """One sentence for a person: not Python's own, and short enough to read."""
    text = str(error.value)
    assert "not supported between" not in text
    assert len(text) < 900


@pytest.mark.parametrize(("changes", "error", "message"), rows(HEAD))
@pytest.mark.parametrize("function", [logps, fused])
def test_head(function, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**changes)
    check_message(caught)


@pytest.mark.parametrize(("changes", "error", "message"), rows(LOSS))
@pytest.mark.parametrize("function", [fused, ready])
def test_loss(function, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**changes)
    check_message(caught)


@pytest.mark.parametrize(("changes", "error", "message"), rows(PACKED))
def test_packed(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        packed(**changes)
    check_message(caught)


@pytest.mark.parametrize(("changes", "error", "message"), rows(READY))
def test_ready_logps(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        ready(**changes)
    check_message(caught)


@pytest.mark.parametrize(("call", "error", "message"), rows(HYPER))
def test_hyper_parameters(call, error, message):
    with pytest.raises(error, match=message) as caught:
        get_objective(call[0], **call[1])
    check_message(caught)


@pytest.mark.parametrize(("changes", "error", "message"), rows(OPTIONS))
def test_options(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        Options(**changes)
    check_message(caught)


def test_the_calls_are_right_without_a_mistake():
    assert logps().logps.shape == (B, T)
    for found in (fused(), packed(), ready()):
        assert found.loss.item() == pytest.approx(-1.0)


def test_a_masked_position_is_not_looked_at():
    # what is refused under mask 1 is welcome under mask 0
    mask = torch.ones(B, T).index_fill(1, torch.tensor([2]), 0)
    junk = torch.where(mask.bool(), -1.0, NAN)
    targets = torch.where(mask.bool(), 1, -100)
    found = fused(
        mask=mask,
        targets=targets,
        hidden=torch.where(mask.bool()[..., None], torch.randn(B, T, D), NAN),
        temperature=torch.where(mask.bool(), 1.0, 0.0),
        advantages=torch.where(mask.bool(), 1.0, NAN),
        old_logps=junk,
        ref_logps=junk,
        sampler_logps=junk,
    )
    assert found.loss.isfinite()


def test_second_backward():
    hidden = torch.randn(B, T, D, requires_grad=True)
    loss = fused(hidden=hidden).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="linear_policy_loss: backward was called a second time"):
        loss.backward()


def test_a_budget_that_does_not_hold_one_row_names_what_would():
    with pytest.raises(ValueError, match=r"options.memory_budget: expected at least \d+ bytes.*got 1048576"):
        logps(weight=torch.randn(300000, D), options=Options(memory_budget=1 << 20))


@pytest.mark.parametrize(
    ("interpreted", "changes", "message"),
    [
        (False, {}, r"options.backend: 'triton' cannot run here.*TRITON_INTERPRET=1"),
        (True, {"hidden": torch.randn(B, T, D).double()}, r"options.backend: 'triton' cannot run here.*float64"),
        pytest.param(True, {"logits_dtype": torch.float64}, r"options.*float64"),
    ],
)
def test_triton_says_why_it_cannot_run(monkeypatch, interpreted, changes, message):
    pytest.importorskip("triton")  # torch's CPU builds bring none, and that is said first
    monkeypatch.setattr(triton_rows, "interpreted", lambda: interpreted)
    options = Options(backend="triton", logits_dtype=changes.get("logits_dtype"))
    with pytest.raises(ValueError, match=message):
        logps(options=options, **{k: v for k, v in changes.items() if k != "logits_dtype"})


def test_hyper_parameters_are_not_arguments_of_the_loss():
    with pytest.raises(TypeError, match="eps_low"):
        fused(eps_low=0.1)


def test_an_objective_that_reads_whole_sequences_must_say_so():
    # as a token-scope objective it would be shown slices of sequences and average over what a tile happens to hold
    from repo_ops import Objective

    class Forgetful(Objective):
        def __call__(self, tokens):
            return -tokens.spread(tokens.sequence_mean(tokens.logps)) * tokens.advantages

    with pytest.raises(TypeError, match="scope"):
        fused(objective=Forgetful(), hidden=torch.randn(B, T, D, requires_grad=True))
