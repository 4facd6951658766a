"""Adapters for prime-rl, SkyRL, OpenRLHF and NeMo-RL: each host's own division gives the step's loss.

None of the four installs beside this library's test requirements, so their contracts stand here as code: `division`
does what the host does with the function's result, over uneven micro-batches on uneven ranks. The loss and gradient of
the whole step come from `policy_loss` on all sequences at once.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peers import EXACT

from repo_ops import NumItems, get_objective, policy_loss
from repo_ops.integrations import nemo_rl, openrlhf, prime_rl, skyrl

F64 = torch.float64
LENGTHS = torch.tensor([6, 0, 1, 4, 7, 3])
B, T = len(LENGTHS), int(LENGTHS.max())
RANKS = [[[0], [1, 2, 3]], [[4, 5]]]  # rank -> micro-batch -> sequences
WORLD = len(RANKS)


def batch():
    g = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(B, T, generator=g, dtype=F64)
    old, sampler, ref = logps + 0.3 * torch.randn(3, B, T, generator=g, dtype=F64)
    mask = torch.arange(T)[None] < LENGTHS[:, None]
    return SimpleNamespace(
        logps=logps.requires_grad_(), old=old, sampler=sampler, ref=ref, mask=mask,
        advantages=torch.randn(B, 1, generator=g, dtype=F64).expand(B, T),
    )  # fmt: skip


def step(given, objective, **more):
    """Loss and gradient of all sequences at once."""
    loss = policy_loss(given.logps, given.advantages, objective=objective, mask=given.mask,
                       **{"old_logps": given.old, **more}).loss  # fmt: skip
    return [loss.detach(), torch.autograd.grad(loss, given.logps)[0]]


def division(given, loss_of, *, over_ranks="mean"):
    """Sum over micro-batches; then FSDP's mean over ranks, or the sum where the host undoes that."""
    total = sum(loss_of(rows) for micro_batches in RANKS for rows in micro_batches)
    total = total / WORLD if over_ranks == "mean" else total
    return [total.detach(), torch.autograd.grad(total, given.logps)[0]]


def same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def modules(monkeypatch, name, **members):
    """A stand-in of the host's module `name`, its packages included."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


# --- prime-rl: a sum a sequence; the trainer divides by the tokens of the step and undoes FSDP's mean


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@pytest.fixture
def prime(monkeypatch):
    modules(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)


def prime_inputs(given, row, *, weights=None, ref=False):
    # a packed row holds the prompt too: two tokens that do not count, ahead
    def take(x):
        return torch.cat([x.new_zeros(2), x[row, : LENGTHS[row]]])

    return SimpleNamespace(
        trainer_logprobs=take(given.logps), inference_logprobs=take(given.old), advantages=take(given.advantages),
        ref_logprobs=take(given.ref) if ref else None, loss_mask=take(given.mask),
        loss_weights=None if weights is None else take(weights),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hyper"),
    [("cispo", {"eps_high": 1.0}), ("gspo", {"eps_high": 0.1}), ("dppo_prime_rl", {}), ("dapo", {"beta": 0.1})],
)
def test_prime_rl_divides_by_the_tokens_of_the_step(prime, name, hyper):
    given, ref = batch(), bool(hyper.get("beta"))

    def loss_of(rows):
        outputs = [prime_rl.loss(prime_inputs(given, row, ref=ref), objective=name, **hyper) for row in rows]
        for found in outputs:
            assert all(value.shape == () and not value.requires_grad for value in found.metrics.values())
        return sum(found.loss for found in outputs) / LENGTHS.sum()

    objective = get_objective(name, reduction="token-mean", **hyper)
    same(division(given, loss_of, over_ranks="sum"), step(given, objective, ref_logps=given.ref if ref else None))


def test_prime_rl_weighs_tokens(prime):
    given, weights = batch(), torch.rand(B, T, dtype=F64)
    got = division(
        given,
        lambda rows: sum(prime_rl.loss(prime_inputs(given, r, weights=weights), objective="cispo").loss for r in rows),
        over_ranks="sum",
    )
    ratio = (given.logps - given.old).detach().exp().clamp(max=5.0)
    want = torch.where(given.mask, -weights * ratio * given.advantages * given.logps, 0.0).sum()
    same(got, [want.detach(), torch.autograd.grad(want, given.logps)[0]])
    with pytest.raises(ValueError, match="loss_weights: expected None with beta > 0"):
        prime_rl.loss(prime_inputs(given, 0, weights=weights, ref=True), objective="grpo", beta=0.1)


def test_prime_rl_hands_reference_log_probabilities_to_a_loss_that_reads_them(prime):
    given = batch()
    got = division(
        given, lambda rows: sum(prime_rl.loss(prime_inputs(given, r, ref=True), objective="spo").loss for r in rows),
        over_ranks="sum",
    )  # fmt: skip
    same(got, step(given, get_objective("spo", reduction="token-sum"), ref_logps=given.ref))


def test_prime_rl_averages_over_tokens_whatever_the_objective_would_do(prime):
    given, total = batch(), LENGTHS.sum()
    got = division(
        given, lambda rows: sum(prime_rl.loss(prime_inputs(given, r), objective="dr_grpo").loss for r in rows) / total,
        over_ranks="sum",
    )  # fmt: skip
    same(got, step(given, get_objective("dr_grpo", reduction="token-mean")))
    with pytest.raises(ValueError, match="reduction: expected none, got 'const'; prime-rl divides"):
        prime_rl.loss(prime_inputs(given, 0), objective="dr_grpo", reduction="const", max_length=8)


def test_without_prime_rl_one_sentence_says_so():
    with pytest.raises(ImportError, match="prime-rl is needed"):
        prime_rl.loss(prime_inputs(batch(), 0))


# --- SkyRL: a sum; the reduction is a factor of the advantages already


@pytest.mark.parametrize(("name", "by"), [("dapo", "token"), ("gspo", "sequence"), ("cispo", "token")])
def test_skyrl_divides_in_the_advantages(name, by):
    given = batch()
    objective = get_objective(name)
    loss = skyrl.skyrl_loss(objective)
    lengths = LENGTHS.to(F64)
    per_sequence = 1 / (B * lengths.clamp_min(1)) if by == "sequence" else 1 / lengths.sum().expand(B)
    scaled = given.advantages * per_sequence[:, None]

    def loss_of(rows):
        found, metrics = loss(given.logps[rows], given.old[rows], scaled[rows], object(),
                              loss_mask=given.mask[rows].to(F64), rollout_logprobs=given.sampler[rows])  # fmt: skip
        assert isinstance(metrics["clip_ratio"], float)
        return found

    reduction = {"token": "token-mean", "sequence": "seq-mean-token-mean"}[by]
    same(division(given, loss_of, over_ranks="sum"), step(given, get_objective(name, reduction=reduction)))


@pytest.mark.parametrize("name", ["dppo_prime_rl", "ipo", "kimi", "rep_opmd", "rep_asymre", "red_weight", "clip_cov"])
def test_skyrl_is_given_no_loss_that_its_factor_in_the_advantages_does_not_reach(name):
    with pytest.raises(
        ValueError, match=r"objective: expected a loss proportional to the advantages, got that of [a-z]"
    ):
        skyrl.skyrl_loss(get_objective(name))


@pytest.mark.parametrize("as_config", [dict, lambda **given: SimpleNamespace(**given)])
def test_skyrls_own_corrections_are_refused_not_ignored(as_config):
    given, loss = batch(), skyrl.skyrl_loss(get_objective("dapo"))
    off = dict.fromkeys(skyrl.CORRECTIONS)

    def call(**on):
        config = SimpleNamespace(off_policy_correction=as_config(**{**off, **on}), eps_clip_low=0.2)
        return loss(given.logps, given.old, given.advantages, config, given.mask, rollout_logprobs=given.sampler)

    assert call()[0].isfinite()
    for name, value in {"tis_ratio_type": "token", "sequence_mask_metric": "product"}.items():
        with pytest.raises(ValueError, match=f"off_policy_correction.{name}: expected None, got '{value}'"):
            call(**{name: value})
    with pytest.raises(ValueError, match=r"outlier_token_is_threshold_high: expected None, got 100\.0"):
        call(outlier_token_is_threshold_high=100.0)


def test_skyrl_hands_the_samplers_log_probabilities_to_objectives_that_read_them():
    given, objective = batch(), get_objective("grpo_tis", reduction="token-sum")
    found, _ = skyrl.skyrl_loss(objective)(
        given.logps, given.old, given.advantages, None, given.mask, rollout_logprobs=given.sampler
    )
    torch.testing.assert_close(found.detach(), step(given, objective, sampler_logps=given.sampler)[0], **EXACT)
    with pytest.raises(ValueError, match="beta = entropy_coef = 0"):
        skyrl.skyrl_loss(get_objective("grpo", beta=0.1))
    with pytest.raises(ValueError, match="objective: reads topk"):
        skyrl.skyrl_loss(get_objective("dppo_topk"))
    for adapter in (skyrl.skyrl_loss, openrlhf.PolicyLoss):
        with pytest.raises(TypeError, match="objective: expected an objective, got 'gspo'; get_objective"):
            adapter("gspo")


# --- OpenRLHF: the loss divides by the counts of the global batch, times dp_size


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "luspo", "grpo_tis"])
def test_openrlhf_gives_counts_of_the_global_batch(name):
    given, objective = batch(), get_objective(name)
    module = openrlhf.PolicyLoss(objective)
    samples = "sampler_logps" in objective.reads

    def loss_of(rows):
        found = module(
            given.logps[rows], given.old[rows], given.advantages[rows], action_mask=given.mask[rows],
            rollout_log_probs=given.sampler[rows] if samples else None, dp_size=WORLD,
            batch_num_tokens=LENGTHS.sum(), global_batch_size=B,
        )  # fmt: skip
        loss, clip_ratio, ppo_kl, vllm_kl = found
        assert clip_ratio.shape == ppo_kl.shape == ()
        assert (vllm_kl is None) is not samples
        return loss

    same(division(given, loss_of), step(given, objective, sampler_logps=given.sampler if samples else None))


def test_openrlhf_without_counts_divides_by_its_own_and_asks_for_them_over_ranks():
    given, module = batch(), openrlhf.PolicyLoss(get_objective("dapo"))
    found = module(given.logps, given.old, given.advantages, given.mask)
    torch.testing.assert_close(found.loss.detach(), step(given, get_objective("dapo"))[0], **EXACT)
    torch.testing.assert_close(found.ppo_kl, (given.old - given.logps).detach()[given.mask].mean())
    with pytest.raises(ValueError, match="batch_num_tokens: expected the global batch's count"):
        module(given.logps, given.old, given.advantages, given.mask, dp_size=2)
    with pytest.raises(ValueError, match="global_batch_size: expected"):
        openrlhf.PolicyLoss(get_objective("gspo"))(given.logps, given.old, given.advantages, given.mask, dp_size=2)


# --- NeMo-RL: the loss divides by global_valid_toks or global_valid_seqs; shares add up over micro-batches and ranks


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


INTERFACES = "nemo_rl.algorithms.loss.interfaces"
MEMBERS = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}


@pytest.fixture
def nemo(monkeypatch):
    modules(monkeypatch, INTERFACES, **MEMBERS)


def nemo_data(given, rows, sample_mask):
    def shifted(x):  # NeMo-RL's batches hold an entry for the first token as well
        return torch.cat([torch.full_like(x[rows, :1], 7), x[rows]], 1)

    names = {"token_mask": given.mask.long(), "advantages": given.advantages, "prev_logprobs": given.old,
             "generation_logprobs": given.sampler, "reference_policy_logprobs": given.ref}  # fmt: skip
    return {**{key: shifted(x) for key, x in names.items()}, "sample_mask": sample_mask[rows]}


@pytest.mark.parametrize(
    ("name", "hyper"), [("dapo", {}), ("gspo", {}), ("grpo", {"beta": 0.1}), ("grpo_tis", {}), ("luspo", {})]
)
def test_nemo_rl_gives_valid_counts_of_the_step(nemo, name, hyper):
    given, objective = batch(), get_objective(name, **hyper)
    loss_fn = nemo_rl.NemoRLLoss(objective)
    tokens = objective.reduction == "token-mean"
    assert loss_fn.loss_type is (LossType.TOKEN_LEVEL if tokens else LossType.SEQUENCE_LEVEL)
    assert loss_fn.input_type is LossInputType.LOGPROB
    sample_mask = torch.tensor([1, 1, 1, 1, 0, 1])  # an invalid sample
    given.mask = given.mask & sample_mask.bool()[:, None]
    valid = {"global_valid_seqs": sample_mask.sum(), "global_valid_toks": given.mask.sum()}
    shares = []

    def loss_of(rows):
        data = nemo_data(given, rows, sample_mask)
        found, metrics = loss_fn(data, **valid, next_token_logprobs=given.logps[rows])
        shares.append(metrics)
        return found

    got = division(given, loss_of, over_ranks="sum")
    kept = sample_mask.bool()
    reads = {
        n: x[kept] for n, x in (("ref_logps", given.ref), ("sampler_logps", given.sampler)) if n in objective.reads
    }
    loss = policy_loss(given.logps[kept], given.advantages[kept], objective=objective, mask=given.mask[kept],
                       old_logps=given.old[kept], **reads).loss  # fmt: skip
    same(got, [loss.detach(), torch.autograd.grad(loss, given.logps)[0]])
    assert sum(share["loss"] for share in shares) == pytest.approx(loss.item(), rel=1e-5)
    ratio = (given.logps - given.old).detach().exp()[given.mask].mean()
    assert sum(share["ratio"] for share in shares) == pytest.approx(float(ratio), rel=1e-5)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_nemo_rl_may_divide_at_the_end_of_the_step(nemo, name):
    # its split-step trainers pass counts of 1 and divide each metric later by what the loss says of it
    given, one, rows = batch(), torch.tensor(1), [0, 2, 3, 4, 5]
    data = nemo_data(given, rows, torch.ones(B, dtype=torch.int64))
    loss_fn = nemo_rl.NemoRLLoss(get_objective(name))
    said = loss_fn.metric_normalizations  # taken when the step begins
    counts = {MetricNormalizer.TOKENS: LENGTHS.sum(), MetricNormalizer.SEQUENCES: len(rows), MetricNormalizer.NONE: 1}
    call = {"global_valid_seqs": one, "global_valid_toks": one, "next_token_logprobs": given.logps[rows]}
    later = {key: value / float(counts[said[key]]) for key, value in loss_fn(data, **call)[1].items()}
    valid = {"global_valid_seqs": torch.tensor(len(rows)), "global_valid_toks": LENGTHS.sum()}
    assert later == pytest.approx(loss_fn(data, **{**call, **valid})[1], rel=1e-5)
    assert later["num_valid_samples"] == len(rows)


def test_nemo_rls_stand_ins_of_filtered_tokens_do_not_count(nemo):
    given, rows = batch(), list(range(B))
    keep = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.7
    data = {**nemo_data(given, rows, torch.ones(B, dtype=torch.int64)), "curr_logprobs_keep_mask": keep.long()}
    valid = {"global_valid_seqs": torch.tensor(B), "global_valid_toks": given.mask.sum()}
    stand_ins = torch.where(keep, given.logps, 0.0)
    loss = nemo_rl.NemoRLLoss(get_objective("gspo"))(data, **valid, next_token_logprobs=stand_ins)[0]
    given.mask = given.mask & keep
    want = policy_loss(given.logps, given.advantages, objective="gspo", mask=given.mask, old_logps=given.old,
                       num_items=NumItems(torch.tensor(B), torch.tensor(1)))  # fmt: skip
    torch.testing.assert_close(loss, want.loss, **EXACT)


def test_nemo_rl_before_it_asked_what_metrics_are_divided_by(monkeypatch):
    modules(monkeypatch, INTERFACES, LossType=LossType, LossInputType=LossInputType)
    given, rows = batch(), list(range(B))
    loss_fn = nemo_rl.NemoRLLoss(get_objective("dapo"))
    valid = {"global_valid_seqs": torch.tensor(B), "global_valid_toks": given.mask.sum()}
    assert loss_fn(nemo_data(given, rows, torch.ones(B)), **valid, next_token_logprobs=given.logps)[0].isfinite()
    assert loss_fn.metric_normalizations == {}


def test_what_nemo_rl_does_not_hold_is_refused(nemo, monkeypatch):
    with pytest.raises(ValueError, match="objective: reads entropy"):
        nemo_rl.NemoRLLoss(get_objective("grpo", entropy_coef=0.1))
    monkeypatch.setitem(sys.modules, INTERFACES, None)
    with pytest.raises(ImportError, match="nemo_rl is needed"):
        nemo_rl.NemoRLLoss(get_objective("dapo"))
