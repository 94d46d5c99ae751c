"""Groups, blocks and windows by hand: where they lie, and what they keep."""

from __future__ import annotations

import pytest
import torch

from cases import survivors
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import Pairs, select

CPU = torch.device("cpu")


def one_row(scores, config, valid=None):
    """Survivors of one query of a causal model with a cache."""
    scores = torch.tensor(scores).view(1, 1, 1, -1)
    valid = None if valid is None else torch.tensor(valid, dtype=torch.bool).view(1, 1, 1, -1)
    pairs = Pairs(tuple(scores.shape), CPU, valid, causal=True)
    return survivors(config, scores, pairs)[0, 0, 0].int().tolist()


def test_two_of_four():
    scores = [3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    assert one_row(scores, SparsityConfig(rule="nm")) == [1, 0, 1, 0, 1, 1, 0, 0, 1]


def test_a_sparsity_above_one_in_m_keeps_one_of_each_group():
    scores = [3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 7.0, 6.0]
    assert one_row(scores, SparsityConfig(rule="nm", sparsity=0.99)) == [1, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("valid", "kept"),
    [([0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0]), ([1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1])],
    ids=["left", "middle"],
)
def test_groups_go_by_place_in_the_sequence_and_not_in_memory(valid, kept):
    assert one_row([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], SparsityConfig(rule="nm", m=2), valid) == kept


def test_a_forced_key_takes_a_place_in_its_group():
    scores = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert one_row(scores, SparsityConfig(rule="nm", keep_first=1)) == [1, 0, 0, 1, 0, 0, 1, 1]


def test_what_min_keep_adds_are_the_best_of_the_row():
    scores = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 1.0, 0.0]
    config = SparsityConfig(rule="nm", sparsity=0.9, min_keep=3)
    assert one_row(scores, config) == [1, 1, 1, 0, 1, 0, 0, 0]


def square(scores, config, valid=None, query_valid=None):
    scores = torch.as_tensor(scores, dtype=torch.float32)[None, None]
    valid = None if valid is None else valid.expand(1, 1, *scores.shape[-2:])
    pairs = Pairs(tuple(scores.shape), CPU, valid, query_valid)
    return survivors(config, scores, pairs)[0, 0]


def test_blocks_are_ranked_by_their_mean_score():
    scores = torch.zeros(4, 4)
    scores[0, 0] = 3.0  # one high score in a block of mean 0.75
    scores[:2, 2:] = 1.0  # a block of mean 1
    scores[2:, :2] = torch.tensor([[5.0, -4.9], [0.0, 0.0]])
    keep = square(scores, SparsityConfig(rule="block_topk", sparsity=0.5, query_block=2, key_block=2))
    assert keep.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_the_mean_of_a_block_is_over_valid_scores_and_its_place_without_padding():
    valid = torch.tensor([False, True, True, True, True, True])
    scores = torch.full((6, 6), -9.0)
    scores[:, 1:3], scores[:, 3:5], scores[:, 5] = 1.0, 0.0, 2.0
    config = SparsityConfig(rule="block_topk", sparsity=0.6, query_block=2, key_block=2)
    keep = square(scores, config, valid, valid[None])
    assert keep[1:].int().tolist() == [[0, 0, 0, 0, 0, 1]] * 5
    assert keep[0].int().tolist() == [0, 0, 0, 0, 0, 1]  # padding keeps its best key


def test_padding_is_in_no_block():
    valid = torch.tensor([False, True, True, False, True])
    pairs = Pairs((1, 1, 5, 5), CPU, valid.expand(1, 1, 5, 5), valid[None])
    form = select(SparsityConfig(rule="block_topk", query_block=2, key_block=2), pairs).form
    assert form.query_block.tolist() == form.key_block.tolist() == [[-1, 0, 0, -1, 1]]


def test_equal_means_tie_whatever_the_sizes_of_their_blocks():
    """Sums of sixteen and of three equal scores, rounded to fp32, have different means."""
    config = SparsityConfig(rule="block_topk", sparsity=0.9, query_block=16, key_block=16)
    assert square(torch.full((51, 51), 0.1), config).all()


def test_autocast_does_not_reach_the_ranking_of_blocks():
    scores = torch.zeros(64, 64)
    scores[:, 32:] = 1e-4
    scores += 1.0
    config = SparsityConfig(rule="block_topk", sparsity=0.5, query_block=32, key_block=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keep = square(scores, config)
    assert keep[:, 32:].all()
    assert not keep[:, :32].any()


def test_a_pair_forced_in_one_head_does_not_move_blocks_of_another_where_it_is_invalid():
    valid = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    valid[0, 1, :, 0] = False
    scores = torch.zeros(1, 2, 4, 4)
    scores[..., 2:] = 1.0
    config = SparsityConfig(rule="block_topk", sparsity=0.5, query_block=2, key_block=2, keep_first=1)
    keep = survivors(config, scores, Pairs((1, 2, 4, 4), CPU, valid))[0]
    assert keep[0].int().tolist() == [[1, 1, 0, 0]] * 4
    assert keep[1].int().tolist() == [[0, 0, 1, 1]] * 4


def test_a_query_whose_blocks_hold_no_key_for_it_keeps_its_best():
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    scores = torch.zeros(4, 4)
    scores[0, 1], scores[:, 2:] = 0.5, 1.0
    keep = square(scores, SparsityConfig(rule="block_topk", sparsity=0.5, query_block=2, key_block=2), valid)
    assert keep.int().tolist() == [[0, 1, 0, 0], *[[0, 0, 1, 1]] * 3]


def test_a_window_of_equal_density_takes_the_earlier_of_two_equally_near_keys():
    keep = square(torch.zeros(5, 5), SparsityConfig(rule="window", sparsity=0.6))
    assert keep.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_a_fixed_window_reaches_to_both_sides_and_strides_beyond():
    keep = square(torch.zeros(6, 6), SparsityConfig(rule="window", window=1))
    assert torch.equal(keep, torch.ones(6, 6).bool().tril(1).triu(-1))
    keep = square(torch.zeros(6, 6), SparsityConfig(rule="window", window=1, stride=3))
    assert keep[0].int().tolist() == [1, 1, 0, 1, 0, 0]
    assert keep[4].int().tolist() == [0, 1, 0, 1, 1, 1]


def test_a_window_counts_tokens_and_no_padding():
    valid = torch.tensor([True, False, False, True, True])
    keep = square(torch.zeros(5, 5), SparsityConfig(rule="window", window=1), valid, valid[None])
    assert keep[0].int().tolist() == [1, 0, 0, 1, 0]
    assert keep[3].int().tolist() == [1, 0, 0, 1, 1]


def test_a_narrow_window_is_filled_up_with_the_nearest():
    keep = square(torch.zeros(5, 5), SparsityConfig(rule="window", window=0, min_keep=2))
    assert keep.int().tolist()[2] == [0, 1, 1, 0, 0]
    assert keep.int().tolist()[0] == [1, 1, 0, 0, 0]
