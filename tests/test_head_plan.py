"""The plan: chunks that cover every row once, sequences left whole, and no more rows than the budget holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_ops import Options, linear_logps
from repo_ops.head.inputs import HeadInputs, Wanted
from repo_ops.head.plan import Plan, make_plan


def plan(rows):
    return Plan(rows, torch.float32, torch.float32, "torch")


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 50), num_rows=st.integers(0, 500))
def test_chunks_cover_every_row_once_in_even_parts(rows, num_rows):
    chunks = list(plan(rows).chunks(num_rows))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(num_rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert max(sizes, default=0) <= rows
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert len(chunks) == -(-num_rows // rows)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 20), lengths=st.lists(st.integers(0, 20), max_size=12))
def test_sequence_chunks_keep_sequences_whole(rows, lengths):
    chunks = plan(rows).sequence_chunks(lengths)
    if max(lengths, default=0) > rows:
        assert chunks is None
        return
    seen_rows, seen_lengths = [], []
    for chunk, sequences in chunks:
        assert chunk.stop - chunk.start == sum(lengths[sequences]) <= rows
        seen_rows += range(chunk.start, chunk.stop)
        seen_lengths += lengths[sequences]
    assert seen_rows == list(range(sum(lengths)))
    # every sequence with a token is in exactly one chunk, in order
    assert [n for n in seen_lengths if n] == [n for n in lengths if n]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([4], [(0, 4)]),
        ([2, 2, 1], [(0, 4), (4, 5)]),
        ([3, 2, 2], [(0, 3), (3, 7)]),
        ([0, 4, 0, 4], [(0, 4), (4, 8)]),
        ([5], None),
    ],
)
def test_sequence_chunks_by_hand(lengths, expected):
    found = plan(4).sequence_chunks(lengths)
    assert (found and [(chunk.start, chunk.stop) for chunk, _ in found]) == (expected if expected != [] else [])


def test_the_smallest_budget_that_is_named_is_enough():
    # the error says how many bytes would do, and they do
    hidden, weight, targets = torch.randn(3, 4), torch.randn(300000, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"at least (\d+) bytes") as caught:
        linear_logps(hidden, weight, targets, options=Options(memory_budget=1 << 20))
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert linear_logps(hidden, weight, targets, options=Options(memory_budget=enough)).logps.shape == (3,)
    with pytest.raises(ValueError, match="at least"):
        linear_logps(hidden, weight, targets, options=Options(memory_budget=enough - 1))


@pytest.mark.parametrize("vocab_size", [127, 49152, 151936, 151937])
def test_rows_of_a_large_tile_do_not_begin_at_the_same_set_of_the_cache(vocab_size):
    head = HeadInputs(torch.zeros(3, 2), torch.zeros(vocab_size, 2), None, torch.zeros(3, dtype=int), None, 1.0)
    tile = make_plan(head, Options(), Wanted()).new_tile(head)
    assert tile.shape == (3, vocab_size)
    assert tile.stride(0) * 4 % 4096 == (320 if vocab_size > 127 else vocab_size * 4)
