"""Shared-prefix rows: the layout by hand, and equality with separate rows on real architectures."""

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import repo_ops
from repo_ops.trainer.backbone import Backbone
from repo_ops.trainer.rows import MicroBatch, deal, longest_row, pack_rows

VOCABULARY = 53
# two heads that share one key-value head, more layers than one: a wrong mask or position shows in the second layer
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that log-probs depend on what is attended to
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True))


def gemma2(window: int = 64) -> PreTrainedModel:
    # softcaps in attention and head; transformers runs it with eager attention, whose mask is added to the scores
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=window))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


# one prompt with every kind of overlap (equal, prefix of another, shared start, none), one prompt of a single token
PROMPTS = [(5, 6, 7, 8, 9)] * 6 + [(11,)] * 2
COMPLETIONS = [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2), (1, 2, 9, 9, 9, 9), (30,), (31, 32, 33), (1, 2, 3), (40, 41)]


def separate_logps(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    row = torch.tensor([prompt + completion])
    logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def coefficients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(len(completion), generator=generator) for completion in COMPLETIONS]


@pytest.mark.parametrize("make", [llama, qwen3, gemma2, gpt2, cohere])
# 1000: one micro-batch with padding; 22: two micro-batches; 9: the first prompt's row is split, its prompt repeated
@pytest.mark.parametrize("max_tokens", [1000, 22, 9])
def test_logps_and_all_gradients_equal_separate_rows(make, max_tokens: int) -> None:
    model = make().eval()
    weights = coefficients()
    expected = []
    for prompt, completion, weight in zip(PROMPTS, COMPLETIONS, weights, strict=True):
        logps = separate_logps(model, prompt, completion)
        (logps * weight).sum().backward()
        expected.append(logps.detach())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    backbone = Backbone(model)
    batches = pack_rows(PROMPTS, COMPLETIONS, max_tokens=max_tokens)
    for batch in batches:
        hidden = backbone.hidden(batch)
        logps = repo_ops.linear_logps(hidden, targets=batch.targets, **backbone.head.arguments(hidden)).logps
        weight = torch.cat([weights[i] for i in batch.sequences])
        torch.testing.assert_close(logps, torch.cat([expected[i] for i in batch.sequences]), rtol=0, atol=1e-5)
        (logps * weight).sum().backward()
    assert sorted(i for batch in batches for i in batch.sequences) == list(range(len(COMPLETIONS)))
    for name, parameter in model.named_parameters():
        scale = max(1.0, gradients[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5 * scale, msg=name)


def test_layout_of_one_row_by_hand() -> None:
    prompt = (5, 6, 7)
    completions = [(1, 2, 3), (1, 9), (1, 2, 3), (4,), (8, 2)]
    (batch,) = pack_rows([prompt] * 5, completions, max_tokens=100)
    # sorted: 1 2 3 | 1 2 3 | 1 9 | 4 | 8 2; the last token of each is predicted only, so 1, 2 and 8 take places
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.subtree_end.tolist() == [[6, 6, 6, 5, 5, 6]]
    assert batch.sequences == (0, 2, 1, 3, 4)
    assert batch.targets.tolist() == [1, 2, 3, 1, 2, 3, 1, 9, 4, 8, 2]
    assert batch.gather.tolist() == [2, 3, 4, 2, 3, 4, 2, 3, 2, 2, 5]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 9, 11]
    assert batch.tokens == 6
    seen = [[int(x) for x in row] for row in batch.attention_mask()[0, 0]]
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # the 8 sees the prompt, not the other completion
    ]


def path_of(batch: MicroBatch, row: int, place: int) -> list[int]:
    """Tokens that a place sees, in order."""
    seen = batch.attention_mask()[row, 0, place].nonzero()[:, 0]
    return batch.input_ids[row, seen].tolist()


@pytest.mark.parametrize("max_tokens", [1, 7, 16, 40, 1000])
def test_every_target_is_predicted_from_its_own_prompt_and_prefix(max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts, completions = [], []
    for _ in range(40):  # few symbols and lengths, so that prefixes are shared often
        prompts.append((7,) * int(torch.randint(1, 4, (1,), generator=generator)))
        length = int(torch.randint(1, 6, (1,), generator=generator))
        completions.append(tuple(torch.randint(0, 2, (length,), generator=generator).tolist()))
    batches = pack_rows(prompts, completions, max_tokens=max_tokens)
    for batch in batches:
        length = batch.input_ids.shape[1]
        for s, sequence in enumerate(batch.sequences):
            start, end = batch.cu_seqlens[s : s + 2].tolist()
            assert tuple(batch.targets[start:end].tolist()) == completions[sequence]
            for t, place in enumerate(batch.gather[start:end].tolist()):
                row, column = divmod(place, length)
                assert path_of(batch, row, column) == [*prompts[sequence], *completions[sequence][:t]]
                assert batch.position_ids[row, column] == len(prompts[sequence]) + t - 1
        longest = max(len(prompts[i]) + len(completions[i]) - 1 for i in batch.sequences)
        assert batch.input_ids.numel() <= max(max_tokens, longest)
    assert sorted(i for batch in batches for i in batch.sequences) == list(range(40))


def test_padding_sees_itself_only_and_is_seen_by_nobody() -> None:
    (batch,) = pack_rows([(1, 2, 3), (4,)], [(5,), (6,)], max_tokens=100, pad_id=9)
    assert batch.input_ids.tolist() == [[4, 9, 9], [1, 2, 3]]
    assert batch.attention_mask()[0, 0].tolist() == torch.eye(3, dtype=torch.bool).tolist()


def test_an_empty_completion_takes_no_place() -> None:
    (batch,) = pack_rows([(1, 2), (1, 2)], [(), (5,)], max_tokens=100)
    assert batch.sequences == (1,)
    assert pack_rows([(1, 2)], [()], max_tokens=100) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "max_tokens", "message"),
    [
        ([(1,)], [(2,), (3,)], 10, "completions: expected one per prompt, 1, got 2"),
        ([(1,), ()], [(2,), (3,)], 10, r"prompts\[1\]: expected at least one token, got none"),
        ([(1,)], [(2,)], 0, "max_tokens: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_named(prompts, completions, max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_rows(prompts, completions, max_tokens=max_tokens)


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))


@pytest.mark.parametrize("make", [lambda: gemma2(window=8), mistral], ids=["gemma2", "mistral"])
def test_a_sequence_beyond_the_attention_window_is_refused(make) -> None:
    backbone = Backbone(make())
    (fits,) = pack_rows([(1, 2, 3, 4)], [(5, 6, 7, 8, 9)], max_tokens=100)  # 8 tokens are read
    assert backbone.hidden(fits).shape == (5, 32)
    (long,) = pack_rows([(1, 2, 3, 4)], [(5, 6, 7, 8, 9, 1)], max_tokens=100)
    with pytest.raises(ValueError, match=r"model: expected prompt .* attention window of 8 tokens, got 9"):
        backbone.hidden(long)


def test_a_window_is_measured_along_a_sequence_not_along_its_row() -> None:
    model = gemma2(window=8).eval()
    backbone = Backbone(model)
    completions = [(5, 6, 7), (8, 9, 10), (11, 12, 13), (14, 15, 16)]
    (batch,) = pack_rows([(1, 2, 3, 4)] * 4, completions, max_tokens=100)
    assert batch.input_ids.shape == (1, 12)
    hidden = backbone.hidden(batch)
    logps = repo_ops.linear_logps(hidden, targets=batch.targets, **backbone.head.arguments(hidden)).logps
    expected = torch.cat([separate_logps(model, (1, 2, 3, 4), completions[i]) for i in batch.sequences])
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize("make", [bloom, mamba])
def test_positions_of_its_own_and_recurrence_are_refused(make) -> None:
    with pytest.raises(ValueError, match="model: expected attention layers that take a mask and positions"):
        Backbone(make())


def test_attention_that_ignores_the_mask_is_refused() -> None:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="model: expected attention 'sdpa' or 'eager', got 'flash_attention_2'"):
        Backbone(model)


def test_logits_that_the_head_does_not_reproduce_are_refused() -> None:
    model = llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.5 * head(hidden)  # a scaling that no key of the config tells
    with pytest.raises(ValueError, match="packed and separate rows of LlamaForCausalLM differ"):
        Backbone(model)


def test_ranks_are_dealt_every_sequence_once_and_about_equal_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    prompts, completions = [], []
    for prompt in range(9):
        for _ in range(6):
            prompts.append((prompt,) * (3 + prompt))
            completions.append((1,) * int(torch.randint(1, 30, (1,), generator=generator)))
    for parts in (1, 2, 3, 4):
        dealt = deal(prompts, completions, parts)
        assert sorted(i for part in dealt for i in part) == list(range(len(prompts)))
        tokens = [sum(len(completions[i]) for i in part) for part in dealt]
        assert max(tokens) < 1.3 * min(tokens)
        for prompt in set(prompts):  # none is computed on two ranks: a prompt's group is smaller than an even share
            assert sum(any(prompts[i] == prompt for i in part) for part in dealt) == 1


def test_one_prompt_is_cut_where_ranks_would_be_idle() -> None:
    dealt = deal([(1, 2)] * 8, [(5, i) * 4 for i in range(8)], 4)
    assert sorted(map(len, dealt)) == [2, 2, 2, 2]
    assert deal([(1, 2)], [(3,)], 3) == [[0], [], []]
    assert deal([], [], 2) == [[], []]


@pytest.mark.parametrize("prompt", [1, 30, 100, 2000])
@pytest.mark.parametrize("completion", [1, 24, 512])
@pytest.mark.parametrize("pairs_per_token", [50.0, 3000.0, 24000.0])
def test_the_longest_row_is_the_cheapest(prompt: int, completion: int, pairs_per_token: float) -> None:
    def cost_of_each(count: int) -> float:
        length = prompt + count * completion
        return length * (length + pairs_per_token) / count

    chosen = max(1, int((longest_row(prompt, pairs_per_token) - prompt) / completion))
    best = min(range(1, 20000), key=cost_of_each)
    assert chosen in (best, best - 1)  # a row ends before it is too long


def test_long_completions_get_rows_of_their_own() -> None:
    prompts, short, long = [(1, 2, 3)] * 4, [(i, 5) for i in range(4)], [(i, *[5] * 100) for i in range(4)]

    def rows(completions, **limit):
        batches = pack_rows(prompts, completions, max_tokens=10_000, **limit)
        assert sorted(i for batch in batches for i in batch.sequences) == [0, 1, 2, 3]
        return sum(len(batch.input_ids) for batch in batches)

    assert rows(short) == rows(long) == rows(short, pairs_per_token=300.0) == 1
    assert rows(long, pairs_per_token=300.0) == 4
    assert rows(long, pairs_per_token=300.0 * 250) == 1


def test_a_pair_of_tokens_is_cheap_beside_the_layers_of_a_wide_model() -> None:
    model = llama()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    width = model.config.num_attention_heads * model.config.head_dim
    found = Backbone(model).pairs_per_token
    assert found == pytest.approx(layer / (2 * width), rel=0.02)  # the last norm counts too
