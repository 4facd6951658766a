"""Weights on their way to an engine: names, adapters, and what the comparison of both sides catches."""

import pytest
import torch
from fake_vllm import Worker
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from repo_ops.trainer.lora import add_lora, merge_lora
from repo_ops.trainer.rollout import EngineError
from repo_ops.trainer.rollout.weights import Digest, compare_weights, full_weights


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [False, True])
def test_names_are_those_of_a_checkpoint(tied, tmp_path):
    from safetensors.torch import load_file

    model = llama(tied=tied)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = dict(full_weights(model, torch.float32))
    assert sent.keys() == saved.keys()
    assert ("lm_head.weight" in sent) is not tied
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_adapters_are_merged_and_left_alone():
    model = llama(tied=False)
    add_lora(model, rank=2, alpha=6.0, targets=["q_proj", "down_proj", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = merge_lora(model, dict(model.state_dict()))
    sent = dict(full_weights(model, torch.float32))
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    # 2 layers x (q, down) + the head have changed
    assert sum(not torch.equal(sent[n], w) for n, w in llama(tied=False).state_dict().items()) == 5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_adapters_on_transposed_layers_are_merged():
    """GPT-2's layers hold their weight as [in, out]; a square one would be merged wrongly without a word."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    add_lora(model, rank=2, alpha=6.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = merge_lora(model, dict(model.state_dict()))
    sent = dict(full_weights(model, torch.float32))
    assert {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"} <= sent.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in sent)


def test_an_adapter_on_a_tied_head_is_refused():
    model = llama(tied=True)
    add_lora(model, rank=2, alpha=2.0, targets=["lm_head"])
    with pytest.raises(EngineError, match="expected no adapter on a head that is tied"):
        list(full_weights(model, torch.float32))


def test_weights_that_transformers_converts_are_refused():
    model = llama(tied=False)
    model._weight_conversions = ["stacked experts"]
    with pytest.raises(EngineError, match="named as in its checkpoint, got LlamaForCausalLM"):
        list(full_weights(model, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digest_by_hand(dtype):
    bits = {torch.float32: 0x3F800000, torch.bfloat16: 0x3F80, torch.float64: 0x3FF0000000000000}[dtype]
    # 1.0 twice, the rest 0; in any order and layout
    tensor = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)
    assert Digest.of(tensor) == Digest(6, str(dtype)[6:], 2 * bits % 2**64)
    assert Digest.of(tensor.t()) == Digest.of(tensor)
    tensor[0, 1] = 2.0
    assert Digest.of(tensor).bits != 2 * bits % 2**64


SENT = {"layer.q_proj.weight": torch.randn(4, 6), "layer.k_proj.weight": torch.randn(2, 6),
        "norm.weight": torch.randn(6), "embed.weight": torch.randn(10, 6)}  # fmt: skip
PACKED = {"qk_proj": ["q_proj", "k_proj"]}


def report(parameters):
    found = {name: Digest.of(tensor) for name, tensor in parameters.items()}
    return {"parameters": {n: [d.numel, d.dtype, d.bits] for n, d in found.items()}, "packed": PACKED}


def workers(n, qk=None):
    """What n workers that share the rows out hold: fused projections, the embedding in parts, the norm each."""
    qk = torch.cat([SENT["layer.q_proj.weight"], SENT["layer.k_proj.weight"]]) if qk is None else qk
    parts = zip(qk.chunk(n), SENT["embed.weight"].chunk(n))
    return [{"layer.qk_proj.weight": a, "embed.weight": b, "norm.weight": SENT["norm.weight"]} for a, b in parts]


@pytest.mark.parametrize("n", [1, 2])
def test_fused_and_shared_out_weights_are_compared(n):
    sent = {name: Digest.of(tensor) for name, tensor in SENT.items()}
    assert compare_weights(sent, [report(each) for each in workers(n)]) == 3

    stale = workers(n, qk=torch.randn(6, 6))
    with pytest.raises(EngineError, match=r"layer\.qk_proj\.weight differs from the policy's"):
        compare_weights(sent, [report(each) for each in stale])

    one_stale = workers(n)
    one_stale[-1]["norm.weight"] = SENT["norm.weight"] * 2  # the others are right
    with pytest.raises(EngineError, match=r"norm\.weight differs"):
        compare_weights(sent, [report(each) for each in one_stale])


def test_what_cannot_be_compared_is_left_out_unless_it_is_everything():
    sent = {name: Digest.of(tensor) for name, tensor in SENT.items()}
    empty = torch.empty(0)  # vLLM's CPU worker keeps a packed copy instead
    held = {"layer.qk_proj.weight": empty, "norm.weight": SENT["norm.weight"], "embed.weight": torch.zeros(16, 6)}
    assert compare_weights(sent, [report(held)]) == 1
    with pytest.raises(EngineError, match="none of its 1 tensors could be compared with the 4"):
        compare_weights(sent, [report({"other.weight": SENT["norm.weight"]})])
    with pytest.raises(EngineError, match="none of its 1 tensors could be compared"):
        compare_weights(sent, [report({"norm.weight": SENT["norm.weight"].bfloat16()})])


def test_the_worker_reads_and_takes_over_a_folder(tmp_path):
    from safetensors.torch import save_file

    policy, held = llama(tied=True), llama(tied=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    weights = {name: tensor.contiguous() for name, tensor in full_weights(policy, torch.float32)}
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:3]}, tmp_path / "0.safetensors")
    save_file({name: weights[name] for name in names[3:]}, tmp_path / "1.safetensors")
    worker = Worker(held.requires_grad_(False))
    read = worker.repo_ops_load_folder(str(tmp_path))
    sent = {name: Digest.of(tensor) for name, tensor in weights.items()}
    assert {name: Digest(*digest) for name, digest in read.items()} == sent
    assert compare_weights(sent, [worker.repo_ops_digests()]) == len(sent)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), held.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="does the server see the trainer's folder"):
        worker.repo_ops_load_folder(str(tmp_path / "empty"))
