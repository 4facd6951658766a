"""reduce: the weight of each sequence by hand, counts that add up, spellings of num_items that leave nothing open."""

import math

import pytest
import torch

from repo_ops import NumItems
from repo_ops.reduce import REDUCTIONS, counts_tokens, resolve_num_items, sequence_weights

LENGTHS = torch.tensor([4, 0, 1])
OFF = torch.tensor([False, False, True])

# weight of one token of each sequence; 3 sequences, 5 tokens, max_length 8. An empty sequence counts as a sequence.
BY_HAND = {
    "token-mean": [1 / 5, 1 / 5, 1 / 5],
    "seq-mean-token-mean": [1 / 12, 1 / 3, 1 / 3],
    "seq-mean-token-sum": [1 / 3, 1 / 3, 1 / 3],
    "const": [1 / 24, 1 / 24, 1 / 24],
    "const-nobatch": [1 / 8, 1 / 8, 1 / 8],
    "token-sum": [1.0, 1.0, 1.0],
}
# fresh: 2 sequences, 4 tokens; replayed, times 0.5: 1 sequence, 1 token
BY_HAND_PAPER = {
    "token-mean": [1 / 4, 1 / 4, 0.5],
    "seq-mean-token-mean": [1 / 8, 1 / 2, 0.5],
    "seq-mean-token-sum": [1 / 2, 1 / 2, 0.5],
    "const": [1 / 16, 1 / 16, 0.5 / 8],
    "const-nobatch": [1 / 8, 1 / 8, 0.5 / 8],
    "token-sum": [1.0, 1.0, 0.5],
}
# means over sequences divide both kinds by all 3; token means stay apart
BY_HAND_OFFICIAL = {
    **BY_HAND_PAPER,
    "seq-mean-token-mean": [1 / 12, 1 / 3, 0.5 / 3],
    "seq-mean-token-sum": [1 / 3, 1 / 3, 0.5 / 3],
    "const": [1 / 24, 1 / 24, 0.5 / 24],
}


def test_every_reduction_is_worked_by_hand():
    assert set(REDUCTIONS) == set(BY_HAND) == set(BY_HAND_PAPER) == set(BY_HAND_OFFICIAL)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights(reduction):
    found = sequence_weights(reduction, LENGTHS, NumItems.of(LENGTHS), max_length=8)
    assert found.tolist() == pytest.approx(BY_HAND[reduction])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("row_norm", "by_hand"), [("paper", BY_HAND_PAPER), ("official_code", BY_HAND_OFFICIAL)])
def test_weights_with_replayed_sequences(reduction, row_norm, by_hand):
    found = sequence_weights(
        reduction,
        LENGTHS,
        NumItems.of(LENGTHS, OFF),
        off_policy=OFF,
        off_policy_coef=0.5,
        row_norm=row_norm,
        max_length=8,
    )
    assert found.tolist() == pytest.approx(by_hand[reduction])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("off_policy", [None, torch.zeros(3, dtype=torch.bool)])
def test_an_empty_step_divides_by_one(reduction, off_policy):
    lengths = torch.zeros(3, dtype=torch.int64)
    found = sequence_weights(reduction, lengths, NumItems.of(lengths, off_policy), off_policy=off_policy, max_length=8)
    assert found.isfinite().all()


def test_counts():
    assert [float(n) for n in vars(NumItems.of(LENGTHS)).values()] == [3, 5, 0, 0]
    assert [float(n) for n in vars(NumItems.of(LENGTHS, OFF)).values()] == [2, 4, 1, 1]


def test_counts_of_a_split_add_up_to_the_whole():
    parts = [NumItems.of(LENGTHS[:1], OFF[:1]), NumItems.of(LENGTHS[1:], OFF[1:])]
    whole = NumItems.of(LENGTHS, OFF)
    for name in vars(whole):
        assert float(getattr(parts[0] + parts[1], name)) == float(getattr(whole, name))


def test_which_reductions_divide_by_tokens():
    assert [name for name in REDUCTIONS if counts_tokens(name)] == ["token-mean", "token-sum"]


@pytest.mark.parametrize("spelling", [6, 6.0, torch.tensor(6), torch.tensor(6.0)], ids=repr)
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_a_number_is_tokens_or_sequences_as_the_reduction_divides(reduction, spelling):
    found = resolve_num_items(spelling, LENGTHS, None, reduction)
    tokens, sequences = float(found.tokens), float(found.sequences)
    assert (tokens, math.isnan(sequences)) == (6, True) if reduction == "token-mean" else (math.isnan(tokens), 6)
    weights = sequence_weights(reduction, LENGTHS, found)
    assert weights.isfinite().all()


@pytest.mark.parametrize("spelling", [(6, 2), (torch.tensor(6), torch.tensor(2.0))], ids=repr)
def test_a_pair_is_fresh_and_replayed(spelling):
    found = resolve_num_items(spelling, LENGTHS, OFF, "token-mean")
    assert (float(found.tokens), float(found.off_policy_tokens)) == (6, 2)
    found = resolve_num_items(spelling, LENGTHS, OFF, "const")
    assert (float(found.sequences), float(found.off_policy_sequences)) == (6, 2)


def test_counts_above_the_integers_of_float16_are_exact():
    lengths = torch.full((4096,), 8191)
    found = sequence_weights("token-mean", lengths, NumItems.of(lengths))
    assert found[0].item() == pytest.approx(1 / (4096 * 8191), rel=1e-6)
