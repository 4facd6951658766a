"""One learner step against formulas written out in float64 on separate rows, and what it does when nothing is live."""

import copy
import math
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import repo_ops
from repo_ops.objectives.base import Objective
from repo_ops.terms.divergence import support_ids
from repo_ops.trainer.learner import Learner, ScoredSequence, count_items

EPS = 0.2


def small_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,  # the head's gradient and the embedding's meet in one parameter
    )
    return LlamaForCausalLM(config).eval()


def batch() -> list[ScoredSequence]:
    """Two prompts, uneven lengths, dead sequences of both kinds, an empty completion, ratios in and out of the clip."""
    p, q = (1, 2, 3), (4, 5)
    on = [
        ScoredSequence(p, (6, 7, 8), 1.2),
        ScoredSequence(p, (6, 7), -0.7),
        ScoredSequence(p, (6, 9, 9, 9), 0.0),
        ScoredSequence(p, (), -0.5),
        ScoredSequence(q, (10,), 0.9),
        ScoredSequence(q, (10, 11, 12), -0.9),
    ]
    off = [
        ScoredSequence(p, (6, 7, 8), 0.8, True, (-3.2, -4.5, -2.0)),
        ScoredSequence(q, (10, 13), -0.8, True, (-3.0, -6.0)),
        ScoredSequence(q, (14, 15, 16), 0.0, True, (-1.0, -2.0, -3.0)),
    ]
    return [on[0], off[0], *on[1:4], off[1], *on[4:], off[2]]


def separate_logps(model, sequence: ScoredSequence, temperature: float) -> torch.Tensor:
    row = torch.tensor([sequence.prompt_ids + sequence.token_ids])
    logits = model(input_ids=row).logits[0, len(sequence.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(sequence.token_ids)[:, None])[:, 0]


def repo_loss(
    model, sequences, *, coef: float, row_norm: str, temperature: float, beta: float = 0.0, reference=None
) -> torch.Tensor:
    """RePO's J_on + c J_off as objectives.md S1 states it, with the k3 KL averaged over on-policy tokens."""
    parts = {False: [], True: []}
    kl, on_tokens = [], sum(len(s.token_ids) for s in sequences if not s.off_policy)
    for s in sequences:
        if not s.token_ids:
            parts[s.off_policy].append(torch.zeros((), dtype=torch.float64))
            continue
        logps = separate_logps(model, s, temperature)
        old = torch.tensor(s.logps, dtype=torch.float64) if s.off_policy else logps.detach()
        ratio = (logps - old).exp()
        per_token = -torch.minimum(ratio * s.advantage, ratio.clamp(1 - EPS, 1 + EPS) * s.advantage)
        parts[s.off_policy].append(per_token.mean())
        if beta and not s.off_policy:
            x = separate_logps(reference, s, temperature).detach() - logps
            kl.append((x.exp() - x - 1).sum())
    on, off = torch.stack(parts[False]), torch.stack(parts[True])
    if row_norm == "paper":
        loss = on.mean() + coef * off.mean()
    else:
        loss = (on.sum() + coef * off.sum()) / len(sequences)
    return loss + beta * sum(kl) / on_tokens if beta else loss


def run_backward(learner: Learner, sequences: list[ScoredSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    learner.backbone.model.zero_grad()
    live = [s for s in sequences if learner.is_live(s)]
    loss, _ = learner.backward(live, learner.pack(live), count_items(sequences))
    return float(loss), {n: p.grad.clone() for n, p in learner.backbone.model.named_parameters()}


# 1000: one micro-batch; 6: fresh and replayed rows of a prompt in one, prompts apart; 4: even one prompt in several
@pytest.mark.parametrize("max_tokens", [1000, 6, 4])
@pytest.mark.parametrize("row_norm", ["paper", "official_code"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_of_a_mixed_batch_equal_the_formula(max_tokens: int, row_norm: str, beta: float) -> None:
    model, sequences = small_model(), batch()
    objective = repo_ops.get_objective("repo", row_norm=row_norm, beta=beta)
    learner = Learner(model, objective, off_policy_coef=0.7, temperature=0.8, max_tokens=max_tokens)
    if beta:  # the reference is the model at the start: move on from it, or the KL and its gradient are 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    truth = copy.deepcopy(model).double()
    reference = copy.deepcopy(learner.reference.model).double() if learner.reference else None
    expected = repo_loss(truth, sequences, coef=0.7, row_norm=row_norm, temperature=0.8, beta=beta, reference=reference)
    expected.backward()
    loss, gradients = run_backward(learner, sequences)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


class LargeTensors(TorchDispatchMode):
    """Counts the operations that hand over a new tensor of one size."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.made = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor) and a.layout == torch.strided}
        out = func(*args, **(kwargs or {}))
        dense = isinstance(out, torch.Tensor) and out.layout == torch.strided
        if dense and out.shape == self.shape and out.data_ptr() not in given:
            self.made.add((str(func), out.data_ptr()))
        return out


@pytest.mark.parametrize("max_tokens", [1000, 4])
def test_a_tied_head_has_one_gradient_of_its_size_in_a_step(max_tokens: int) -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo"), max_tokens=max_tokens)
    sequences = [s for s in batch() if learner.is_live(s)]
    batches = learner.pack(sequences)
    with LargeTensors((37, 32)) as large:  # fresh and replayed parts, and the embedding's rows, go into the same memory
        learner.backward(sequences, batches, count_items(batch()))
    assert len({where for _, where in large.made}) == 1, large.made
    assert learner.backbone.head.weight.grad.layout == torch.strided


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "repo"])
def test_micro_batches_do_not_change_the_parameters(name: str) -> None:
    hyper = {"max_length": 4} if name == "dr_grpo" else {}
    after = []
    for max_tokens in (1000, 4):
        # float64: Adam divides by the gradient's size, so it would blow float32 rounding up to the size of a step
        learner = Learner(small_model().double(), repo_ops.get_objective(name, **hyper), max_tokens=max_tokens)
        for _ in range(3):
            metrics = learner.step(batch(), lr=1e-3)
        assert metrics["learner/skipped"] == 0
        after.append(copy.deepcopy(learner.backbone.model.state_dict()))
    assert metrics["learner/micro_batches"] > 1
    start = small_model().double().state_dict()
    for key, value in after[0].items():
        assert not torch.equal(value, start[key])
        torch.testing.assert_close(after[1][key], value, rtol=0, atol=1e-6, msg=key)


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_formula() -> None:
    model, sequences = small_model(), [replace(s, advantage=100 * s.advantage) for s in batch()]
    learner = Learner(
        model, repo_ops.get_objective("repo"), betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.5, max_tokens=6
    )
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-3, betas=(0.8, 0.9), weight_decay=0.1)
    loss = repo_loss(plain, sequences, coef=1.0, row_norm="paper", temperature=1.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    metrics = learner.step(sequences, lr=2e-3)
    assert norm > 1  # the clip is active
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["lr"] == 2e-3
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        # where a gradient is rounding noise, Adam's first step still has the size of lr: compare where it is not
        clear = want.grad.abs() > 1e-6
        torch.testing.assert_close(got[clear], want[clear], rtol=0, atol=1e-5, msg=name)


def test_only_live_sequences_are_computed_and_the_last_token_is_not() -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo"))
    metrics = learner.step(batch(), lr=0.0)
    assert metrics["learner/sequences"] == 6  # of 9: two have advantage 0, one has no token
    # prompt 1 2 3, then 6 7 for its four; prompt 4 5, then 10, and 11 (12 is predicted only; so is 13)
    assert metrics["learner/tokens"] == 5 + 4
    assert metrics["learner/tokens_of_separate_rows"] == sum(len(s.prompt_ids) + len(s.token_ids) for s in batch())


def test_with_a_kl_term_every_fresh_sequence_is_live_and_no_dead_replayed_one() -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo", beta=0.1))
    assert [learner.is_live(s) for s in batch()] == [
        bool(s.token_ids) and (not s.off_policy or s.advantage != 0) for s in batch()
    ]


def test_metrics_of_replayed_tokens_by_hand() -> None:
    model = small_model()
    learner = Learner(model, repo_ops.get_objective("repo"))
    metrics = learner.step(batch(), lr=0.0)
    live = [s for s in batch() if s.off_policy and s.advantage != 0]
    ratio, clipped = [], []
    for s in live:
        found = (separate_logps(model, s, 1.0).detach() - torch.tensor(s.logps)).exp().tolist()
        ratio += found
        clipped += [(r > 1 + EPS) if s.advantage > 0 else (r < 1 - EPS) for r in found]
    assert metrics["off_policy/ess"] == pytest.approx(
        sum(ratio) ** 2 / len(ratio) / sum(r * r for r in ratio), rel=1e-4
    )
    assert metrics["off_policy/ratio_max"] == pytest.approx(max(ratio), rel=1e-4)
    shares = metrics["off_policy/clip_low"] + metrics["off_policy/clip_high"]
    assert shares == pytest.approx(sum(clipped) / len(clipped), abs=1e-6)


@pytest.mark.parametrize("sequences", [[], [replace(s, advantage=0.0) for s in batch()], [batch()[4]]])
def test_nothing_live_leaves_parameters_and_optimizer_alone(sequences: list[ScoredSequence]) -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo"), weight_decay=0.1)
    learner.step(batch(), lr=1e-3)  # AdamW now has a momentum that would move the parameters
    before = copy.deepcopy(learner.backbone.model.state_dict())
    metrics = learner.step(sequences, lr=1e-3)
    assert metrics["learner/skipped"] == 1
    assert metrics["learner/nonfinite"] == 0
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert all(torch.equal(value, before[key]) for key, value in learner.backbone.model.state_dict().items())


def test_a_loss_that_is_not_finite_is_counted_and_not_stepped_on() -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo"))
    before = copy.deepcopy(learner.backbone.model.state_dict())
    # the ratio overflows to infinity, and with A < 0 nothing clips it
    bad = ScoredSequence((1, 2), (3,), -1.0, True, (-1000.0,))
    metrics = learner.step([*batch(), bad], lr=1e-3)
    assert metrics["learner/nonfinite"] == metrics["learner/skipped"] == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert all(torch.equal(value, before[key]) for key, value in learner.backbone.model.state_dict().items())
    assert learner.step(batch(), lr=1e-3)["learner/skipped"] == 0  # and the next step is clean again


def test_replayed_sequences_must_bring_their_log_probabilities() -> None:
    learner = Learner(small_model(), repo_ops.get_objective("repo"))
    with pytest.raises(ValueError, match="logps: expected one for each of the 2 tokens of a replayed sequence, got 0"):
        learner.step([ScoredSequence((1,), (2, 3), 1.0, True)], lr=1e-3)


def test_autocast_computes_layers_in_bfloat16_and_keeps_float32_weights_and_gradients() -> None:
    exact = run_backward(Learner(small_model(), repo_ops.get_objective("repo")), batch())
    rough_learner = Learner(small_model(), repo_ops.get_objective("repo"), autocast=torch.bfloat16)
    rough = run_backward(rough_learner, batch())
    # bfloat16 has 8 bits: layers differ by about 1 %, which shows that it was used, and no more than that
    assert 1e-7 < abs(rough[0] - exact[0]) < 0.05
    for name, gradient in rough[1].items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[1][name]).norm() < 0.1 * exact[1][name].norm(), name


@pytest.mark.parametrize("objective", ["repo", "dppo_topk"])
def test_the_heads_operands_may_be_bfloat16(objective) -> None:
    model = small_model()
    rounded = copy.deepcopy(model)
    sequences = batch() if objective == "repo" else [with_top_logps(model, s, 1.0) for s in batch() if not s.off_policy]
    kind = {} if objective == "repo" else {"behaviour": "sampler_logps", "delta_low": 1e-3, "delta_high": 1e-3}
    learners = [
        Learner(each, repo_ops.get_objective(objective, **kind), head_dtype=dtype)
        for each, dtype in ((model, torch.float32), (rounded, torch.bfloat16))
    ]
    (loss, exact), (rough_loss, rough) = (run_backward(learner, sequences) for learner in learners)
    assert 0 < abs(rough_loss - loss) < 0.01
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        assert 1e-5 < (gradient - exact[name]).norm() / exact[name].norm() < 0.02, name
    if objective == "dppo_topk":  # both sides of the divergence are of one head
        module = sys.modules["repo_ops.trainer.learner"]
        with mock.patch.object(module, "logit_offsets", wraps=module.logit_offsets) as offsets:
            metrics = learners[1].step(sequences, lr=0.0)
        assert {call.kwargs["operand_dtype"] for call in offsets.call_args_list} == {torch.bfloat16}
        assert 0 < metrics["sampler_gap_abs"] < 0.02  # the sampler's was float32


class Judged(Objective):
    requires = ("a_judge",)


def test_objectives_that_the_loop_cannot_serve_are_refused_and_the_others_are_served() -> None:
    with pytest.raises(ValueError, match=r"objective: .* which also reads a_judge"):
        Learner(small_model(), Judged())
    spo = Learner(small_model(), repo_ops.get_objective("spo"))  # reads reference log-probs without a KL term
    assert spo.reference is not None


def test_statistics_over_the_batch_need_the_whole_step_in_one_micro_batch() -> None:
    objective = repo_ops.get_objective("grpo", top_entropy_quantile=0.5)
    fresh = [s for s in batch() if not s.off_policy]
    with pytest.raises(ValueError, match="max_tokens: expected room for the whole step in one micro-batch, got 4"):
        Learner(small_model(), objective, max_tokens=4).step(fresh, lr=1e-3)
    metrics = Learner(small_model(), objective).step(fresh, lr=1e-3)
    assert metrics["learner/sequences"] == 5  # dead ones take part in the quantile


def test_a_sampler_that_drifts_from_the_learner_shows() -> None:
    model = small_model()
    learner = Learner(model, repo_ops.get_objective("grpo"))
    sequences = []
    for s in [s for s in batch() if s.token_ids and not s.off_policy]:
        exact = separate_logps(model, s, 1.0).tolist()
        sequences.append(replace(s, logps=tuple(logp - 0.25 for logp in exact)))
    metrics = learner.step(sequences, lr=0.0)
    assert metrics["sampler_gap_abs"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["sampler_ratio"] == pytest.approx(math.exp(0.25), abs=1e-5)


def with_top_logps(model, sequence: ScoredSequence, sampler_temperature: float) -> ScoredSequence:
    """The sequence as an engine would report it that samples from `model` at this temperature, with K = 3."""
    row = torch.tensor([sequence.prompt_ids + sequence.token_ids])
    logits = model(input_ids=row).logits[0, len(sequence.prompt_ids) - 1 : -1].detach()
    logps, targets = (logits / sampler_temperature).log_softmax(-1), torch.tensor(sequence.token_ids)
    ids = support_ids(logps.topk(3).indices, targets)
    return replace(
        sequence,
        logps=tuple(logps.gather(-1, targets[:, None])[:, 0].tolist()),
        top_ids=tuple(map(tuple, ids.tolist())),
        top_logps=tuple(map(tuple, logps.gather(-1, ids).tolist())),
    )


def test_dppo_topk_masks_where_the_sampler_was_another_policy() -> None:
    model = small_model()
    fresh = [s for s in batch() if s.token_ids and not s.off_policy and s.advantage]
    objective = repo_ops.get_objective("dppo_topk", behaviour="sampler_logps", delta_low=1e-3, delta_high=1e-3)
    learner = Learner(model, objective, temperature=0.8, max_tokens=6)  # several micro-batches
    same = learner.step([with_top_logps(model, s, 0.8) for s in fresh], lr=0.0)
    assert same["divergence"] == pytest.approx(0, abs=1e-6)
    assert same["mask_low"] == same["mask_high"] == 0
    assert same["grad_norm"] > 0

    sequences = [with_top_logps(model, s, 0.4) for s in fresh]
    other = learner.step(sequences, lr=0.0)
    divergences, masked = [], 0
    for s in sequences:
        row = torch.tensor([s.prompt_ids + s.token_ids])
        current = (model(input_ids=row).logits[0, len(s.prompt_ids) - 1 : -1].detach() / 0.8).softmax(-1)
        for p, ids, then, sampled, logp in zip(current, s.top_ids, s.top_logps, s.token_ids, s.logps, strict=True):
            q = torch.tensor(then).exp()
            far = float((p[list(ids)] - q).abs().sum() + (p[list(ids)].sum() - q.sum()).abs()) / 2
            divergences.append(far)
            masked += far > 1e-3 and (math.log(p[sampled]) - logp) * s.advantage > 0
    assert masked > 0
    assert other["divergence"] == pytest.approx(sum(divergences) / len(divergences), abs=1e-5)
    assert other["mask_low"] + other["mask_high"] == pytest.approx(masked / len(divergences), abs=1e-6)


def test_dppo_topk_needs_what_the_sampler_reports() -> None:
    learner = Learner(small_model(), repo_ops.get_objective("dppo_topk"))
    with pytest.raises(ValueError, match="top_ids, top_logps: expected one row for each of the 2 tokens, got 0 and 0"):
        learner.step([ScoredSequence((1,), (2, 3), 1.0)], lr=1e-3)
