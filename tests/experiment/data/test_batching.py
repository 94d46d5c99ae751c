from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crisp_attention.experiment.data.batching import EncodedTexts, LengthGroupedBatches, RankBatches, by_length
from crisp_attention.experiment.data.dataset import Split
from small_models import sentence_rows

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300).map(np.array)
BATCHES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def split_of(rows, pairs=None):
    texts, names = zip(*rows, strict=True)
    return Split(texts, pairs, np.array([("negative", "positive").index(name) for name in names]))


# Texts to token ids


def test_a_row_is_its_text_alone_unpadded_with_its_label(tokenizer):
    rows = sentence_rows(20)
    encoded = EncodedTexts(split_of(rows), tokenizer, max_length=128)
    assert len(encoded) == 20
    for number, (text, label) in enumerate(rows):
        expected = tokenizer(text)
        row = encoded[number]
        assert row.pop("labels") == int(label == "positive")
        assert row == dict(expected)
        assert encoded.lengths[number] == len(expected["input_ids"])
        assert all(row["attention_mask"])


def test_texts_are_cut_at_max_length_with_their_end_marker(tokenizer):
    encoded = EncodedTexts(split_of([("good film " * 30, "positive"), ("bad film", "negative")]), tokenizer, 10)
    assert encoded.lengths.tolist() == [10, 4]
    assert encoded[0]["input_ids"][-1] == tokenizer.sep_token_id


def test_pairs_are_told_apart_by_token_type(tokenizer):
    encoded = EncodedTexts(split_of([("good film", "positive")], ("the plot was dull",)), tokenizer, 128)
    row = encoded[0]
    assert row["input_ids"] == tokenizer("good film", "the plot was dull")["input_ids"]
    assert row["token_type_ids"] == [0] * 4 + [1] * 5


def test_a_long_pair_is_cut_at_max_length(tokenizer):
    encoded = EncodedTexts(split_of([("good film " * 30, "positive")], ("the plot was dull",)), tokenizer, 16)
    assert encoded.lengths.tolist() == [16]


def test_labels_are_plain_integers_that_a_collator_can_stack(tokenizer):
    from transformers import DataCollatorWithPadding

    encoded = EncodedTexts(split_of(sentence_rows(6)), tokenizer, 128)
    assert type(encoded[0]["labels"]) is int
    batch = DataCollatorWithPadding(tokenizer)([encoded[row] for row in range(6)])
    assert batch["labels"].tolist() == encoded.labels.tolist()
    assert batch["attention_mask"].sum(1).tolist() == encoded.lengths.tolist()


# Batches for training


@given(lengths=LENGTHS, batch_size=BATCHES, seed=SEEDS, epoch=st.integers(0, 9), chunk=st.integers(1, 50))
def test_each_row_is_in_one_batch_of_the_right_size(lengths, batch_size, seed, epoch, chunk):
    batches = LengthGroupedBatches(lengths, batch_size, seed, chunk)
    batches.set_epoch(epoch)
    found = list(batches)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    assert len(found) == len(batches)
    sizes = sorted(len(batch) for batch in found)
    assert set(sizes[1:]) <= {batch_size}
    assert 1 <= sizes[0] <= batch_size
    assert all(type(row) is int for batch in found for row in batch)


@given(lengths=LENGTHS, batch_size=BATCHES, seed=SEEDS, epoch=st.integers(0, 9))
def test_the_order_is_a_pure_function_of_seed_and_epoch(lengths, batch_size, seed, epoch):
    first, second = (LengthGroupedBatches(lengths, batch_size, seed) for _ in range(2))
    list(second)
    for batches in (first, second):
        batches.set_epoch(epoch)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    order = list(first)
    assert np.array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[1])
    np.random.seed(1)  # noqa: NPY002
    assert list(second) == order
    assert list(first) == order


def sets(batches):
    return {frozenset(batch) for batch in batches}


@pytest.mark.parametrize("count", [40, 200, 5000])
def test_another_epoch_or_seed_gives_other_batches_in_another_order(count):
    lengths = np.random.default_rng(0).integers(5, 60, size=count)
    batches = LengthGroupedBatches(lengths, 8, seed=3)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    third = list(LengthGroupedBatches(lengths, 8, seed=4))
    for other in (second, third):
        assert other != first
        assert len(sets(other) & sets(first)) < len(first) / 2


def test_seed_and_epoch_are_not_interchangeable():
    lengths = np.arange(64)
    orders = []
    for seed, epoch in ((0, 1), (1, 0)):
        batches = LengthGroupedBatches(lengths, 8, seed)
        batches.set_epoch(epoch)
        orders.append(list(batches))
    assert orders[0] != orders[1]


def padding(batches, lengths):
    return sum(lengths[batch].max() * len(batch) for batch in batches) / lengths.sum() - 1


@pytest.mark.parametrize(("count", "less"), [(500, 2), (5000, 5)])
def test_little_is_padding(count, less):
    lengths = np.random.default_rng(0).geometric(1 / 12, size=count) + 3
    shuffled = np.random.default_rng(1).permutation(count)
    unsorted = [shuffled[start : start + 32] for start in range(0, count, 32)]
    grouped = list(LengthGroupedBatches(lengths, 32, seed=0))
    assert padding(grouped, lengths) < padding(unsorted, lengths) / less


def test_no_epoch_runs_from_short_texts_to_long_ones():
    lengths = np.arange(3200)
    means = np.array([lengths[batch].mean() for batch in LengthGroupedBatches(lengths, 32, seed=0)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_which_batch_is_short_is_left_to_chance():
    lengths = np.random.default_rng(0).integers(5, 60, size=101)
    places = set()
    for seed in range(20):
        sizes = [len(batch) for batch in LengthGroupedBatches(lengths, 10, seed)]
        places.add(sizes.index(1))
    assert len(places) > 4


def test_every_length_meets_every_part_of_the_epoch():
    """Long and short texts alike: none is always trained on last."""
    lengths = np.arange(200)
    early = np.zeros(200)
    for seed in range(200):
        batches = list(LengthGroupedBatches(lengths, 10, seed))
        early[np.concatenate(batches[: len(batches) // 2])] += 1
    assert early.min() > 60
    assert early.max() < 140


# Batches for evaluation


@given(lengths=LENGTHS, batch_size=BATCHES)
def test_evaluation_takes_each_row_once_longest_first(lengths, batch_size):
    batches = list(by_length(lengths, batch_size))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert (np.diff(lengths[rows]) <= 0).all()
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 1 <= len(batches[-1]) <= batch_size


def test_rows_of_equal_length_keep_their_order():
    assert [list(batch) for batch in by_length(np.array([3, 5, 3, 5, 3]), 2)] == [[1, 3], [0, 2], [4]]


# Parts of batches for processes that train together


@given(lengths=LENGTHS, size=st.integers(1, 5), rows=st.integers(1, 8), seed=SEEDS)
def test_parts_of_all_ranks_are_the_batch(lengths, size, rows, seed):
    order = LengthGroupedBatches(lengths, rows * size, seed)
    ranks = [RankBatches(LengthGroupedBatches(lengths, rows * size, seed), rank, size) for rank in range(size)]
    for step, (batch, *parts) in enumerate(zip(order, *ranks, strict=True)):
        counts = [rank.rows(step)[0] for rank in ranks]
        assert [row for count, part in zip(counts, parts, strict=True) for row in part[:count]] == batch
        assert {rank.rows(step)[1] for rank in ranks} == {len(batch)}
        assert counts == sorted(counts)
        assert counts[-1] - counts[0] <= 1
        assert all(len(part) == max(count, 1) for count, part in zip(counts, parts, strict=True))


def test_rows_of_a_step_are_those_of_its_epoch():
    lengths = np.arange(1, 42)
    ranks = RankBatches(LengthGroupedBatches(lengths, 8, seed=3), 1, 2)
    for epoch in range(4):
        ranks.set_epoch(epoch)
        counts = [ranks.rows(epoch * len(ranks) + place)[0] for place in range(len(ranks))]
        assert counts == [len(part) for part in ranks]
