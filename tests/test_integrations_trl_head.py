"""`install()`: our head under TRL's real trainers, equal to TRL's own, counted, and taken out again."""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16")
from trl.trainer import utils  # noqa: E402
from trl_host import grpo, stored_qwen2, tiny_qwen2, tokenizer  # noqa: E402

from repo_ops.head import sweep  # noqa: E402
from repo_ops.integrations import trl as ours  # noqa: E402
from repo_ops.integrations.trl import install, uninstall  # noqa: E402

OWN = utils._ChunkedLogProbFunction, utils._use_triton
EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def installed():
    ours = install()
    yield ours
    with contextlib.suppress(RuntimeError):
        uninstall()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == OWN


@pytest.fixture(autouse=True)
def nothing_is_left_in_place():
    yield
    with contextlib.suppress(RuntimeError):
        uninstall()
    utils._ChunkedLogProbFunction, utils._use_triton = OWN


def scored(model, labels, **more):
    """TRL's fused forward of `model` on its labels as tokens; what is -100 counts as token 5."""
    ids = labels.masked_fill(labels == -100, 5)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True, **more)


def labels_of(vocabulary, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (3, 9), generator=generator)
    labels[0, :5], labels[1, 7:], labels[2] = -100, -100, -100  # a prompt, padding, and a row without any label
    return labels


def gradients(model, out):
    """Of a loss that weighs every log-probability and entropy differently."""
    weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
    loss = (weights * out.log_probs).sum() + (weights.flip(1) * out.entropy).sum()
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


HEADS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "softcap": {"final_logit_softcapping": 3.0},
    "scaled": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_every_output_and_gradient_is_that_of_trl(kind, bias, temperature):
    model = tiny_qwen2(**HEADS[kind])
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    utils.add_fused_lm_head(model, temperature=temperature, outputs=EVERY)
    labels = labels_of(model.config.vocab_size)
    theirs = scored(model, labels)
    their_gradients = gradients(model, theirs)
    ours = install()
    found = scored(model, labels)
    our_gradients = gradients(model, found)
    assert (ours.calls, ours.backwards, ours.rows) == (1, 1, int((labels[:, 1:] != -100).sum()))
    assert torch.equal(found.is_top1, theirs.is_top1)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(theirs, name), rtol=1e-6, atol=2e-6, msg=name)
    for g, t in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-5, atol=2e-6)


def test_is_top1_tells_the_likeliest_label(installed):
    model = tiny_qwen2()
    utils.add_fused_lm_head(model, outputs=EVERY)
    ids = torch.arange(3, 12)[None]
    best = model(input_ids=ids).logits[0, :-1].argmax(-1)
    labels = torch.cat([ids[0, :1], best]).where(torch.arange(9) % 2 == 0, ids[0])[None]
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).is_top1[0]
    assert found.tolist() == (labels[0, 1:] == best).tolist()
    assert found.any()
    assert not found.all()


def test_a_batch_without_labels_gives_zero_with_a_graph(installed):
    model = tiny_qwen2()
    utils.add_fused_lm_head(model, outputs=EVERY)
    out = scored(model, torch.full((2, 5), -100))
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_frozen_head_gets_no_gradient(installed):
    model = tiny_qwen2()
    model.lm_head.weight.requires_grad_(False)
    utils.add_fused_lm_head(model)
    scored(model, labels_of(model.config.vocab_size)).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.any()


def test_under_autocast_the_products_are_bfloat16_and_sums_are_not():
    model = tiny_qwen2()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    labels = labels_of(model.config.vocab_size)
    exact = gradients(model, scored(model, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = gradients(model, scored(model, labels))
        install()
        ours = gradients(model, scored(model, labels))
    # the layers below the head are bfloat16 on both sides; ours may not add to that error
    for name, g, t, e in zip(dict(model.named_parameters()), ours, theirs, exact, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() <= 1.5 * (t - e).norm() + 1e-3 * e.norm(), name


def test_under_autocast_gradients_leave_the_head_in_float32(installed, monkeypatch):
    model, found = tiny_qwen2(), []
    utils.add_fused_lm_head(model, outputs=("log_probs",))
    sum_up = sweep.gradients

    def watch(head, plan, stats, dlogps, dentropy, grads):
        sum_up(head, plan, stats, dlogps, dentropy, grads)
        found.extend(grad.dtype for grad in grads.finish()[:2])

    monkeypatch.setattr(sweep, "gradients", watch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored(model, labels_of(model.config.vocab_size)).loss.backward()
    assert found == [torch.float32, torch.float32]  # not rounded to the products' dtype on the way


def test_deepspeed_gathers_the_head_for_forward_and_backward(installed, monkeypatch):
    model = tiny_qwen2()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    labels = labels_of(model.config.vocab_size)
    expected = gradients(model, scored(model, labels))
    weight, whole = model.lm_head.weight, model.lm_head.weight.data
    entered = []

    @contextlib.contextmanager
    def gather(*parameters):  # ZeRO-3: outside this context the weight is empty
        assert parameters[0] is weight
        weight.data = whole
        entered.append(True)
        yield
        weight.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    weight.data = torch.empty(0)
    found = gradients(model, scored(model, labels))
    assert len(entered) == 2
    for g, e in zip(found, expected, strict=True):
        assert torch.equal(g, e)


# --- real trainers


def parameters_after(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_trains_to_the_same_parameters(tmp_path, beta):
    # not Adam, which would make of a gradient that is 0 but for rounding (a key's bias) a step of full size
    settings = {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "beta": beta, "temperature": 0.8}
    before = {n: p.detach().clone() for n, p in tiny_qwen2().named_parameters()}
    theirs = parameters_after(grpo(tmp_path / "theirs", **settings))
    installed = install()
    ours = parameters_after(grpo(tmp_path / "ours", **settings))
    assert installed.calls >= 3
    assert installed.backwards == 3
    moved = max((before[n] - p).abs().max().item() for n, p in theirs.items())
    assert moved > 5e-3
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-6, msg=name)


def one_step_of(name, folder):
    """A trainer of each kind, tiny, on a dataset made here."""
    from datasets import Dataset

    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    prompts, good, bad = ["1+1=", "2+2=", "3+3=", "4+4="], ["2", "4", "6", "8"], ["5", "1", "3", "9"]
    rows = {
        "SFT": {"prompt": prompts, "completion": good},
        "DPO": {"prompt": prompts, "chosen": good, "rejected": bad},
        "KTO": {"prompt": prompts, "completion": good, "label": [True, False, True, False]},
        "RLOO": {"prompt": prompts},
    }[name]
    if name == "RLOO":
        common |= {"num_generations": 2, "max_completion_length": 4}
    rewards = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if name == "RLOO" else {}
    return getattr(trl, f"{name}Trainer")(
        model=stored_qwen2(folder / "model"),
        args=getattr(trl, f"{name}Config")(**common),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        **rewards,
    )


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "RLOO"])
def test_every_trainer_that_uses_the_head_calls_ours(tmp_path, name):
    theirs = parameters_after(one_step_of(name, tmp_path / "theirs"))
    installed = install()
    ours = parameters_after(one_step_of(name, tmp_path / "ours"))
    assert installed.calls > 0
    assert installed.rows > 0
    assert installed.backwards > 0
    for parameter, value in theirs.items():
        torch.testing.assert_close(ours[parameter], value, rtol=0, atol=1e-6, msg=parameter)


def test_trl_itself_refuses_an_adapter_on_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        grpo(tmp_path, peft_config=config)


def test_lora_below_the_head_trains(tmp_path, installed):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = grpo(tmp_path, peft_config=config, max_steps=2, learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert installed.backwards == 2
    assert any((p != before[n]).any() for n, p in trainer.model.named_parameters() if n in before)


# --- in and out


def test_install_and_uninstall_restore_exactly():
    ours = install()
    assert utils._ChunkedLogProbFunction is ours
    uninstall()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == OWN
    with pytest.raises(RuntimeError, match="not in place"):
        uninstall()


def test_a_second_install_says_so_and_changes_nothing(installed):
    with pytest.warns(UserWarning, match="in place already"):
        assert install() is installed


def test_somebody_elses_patch_is_refused_and_left_alone(monkeypatch):
    other = types.SimpleNamespace(__module__="other.library", __qualname__="Head")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    with pytest.raises(RuntimeError, match=r"got other\.library\.Head"):
        install()
    assert utils._ChunkedLogProbFunction is other


def test_a_patch_put_over_ours_is_not_undone(installed, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", object())
    for call in (install, uninstall):
        with pytest.raises(RuntimeError, match="replaced our head since"):
            call()
    monkeypatch.undo()


def test_another_signature_is_refused(monkeypatch):
    def forward(ctx, hidden, weight, labels):
        raise AssertionError

    monkeypatch.setattr(OWN[0], "forward", staticmethod(forward))
    with pytest.raises(RuntimeError, match="got hidden, weight, labels; pip install"):
        install()


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0.dev0", "0.20"])
def test_another_version_is_refused_with_the_range(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=r">=1\.16,<1\.17, got " + version.replace(".", r"\.")):
        install()


@pytest.mark.parametrize("name", ["install", "RePOConfig", "RePOTrainer"])
def test_without_trl_one_sentence_says_what_to_install(monkeypatch, name):
    for absent in ("trl", "accelerate"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16,<1\.17'"):
        getattr(ours, name)()


def test_unsloth_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    with pytest.raises(RuntimeError, match="Unsloth"):
        install()
    monkeypatch.undo()
    monkeypatch.setattr(trl, "GRPOTrainer", type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {}))
    with pytest.raises(RuntimeError, match="Unsloth"):
        install()


def test_an_output_we_do_not_know_is_refused(installed):
    model = tiny_qwen2()
    utils.add_fused_lm_head(model, outputs=("log_probs", "varentropy"))
    with pytest.raises(ValueError, match="varentropy"):
        scored(model, labels_of(model.config.vocab_size))


@pytest.mark.slow
def test_fsdp2_gradients_are_those_of_one_process_or_the_wrapping_is_refused():
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tests)}
    worker = tests / "worker_trl_fsdp2.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith(("root", "tail", "own"))]
    assert len(lines) == 4
    for wrapping, tied, outcome in lines:
        if wrapping == "own":
            assert outcome.startswith("refused: lm_head: expected a head that FSDP2 gathers in the model's own unit")
        else:
            assert float(outcome) < 1e-5, (wrapping, tied)
