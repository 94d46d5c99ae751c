"""Additive masks, split into what is added and what is hidden."""

from __future__ import annotations

import pytest
import torch

from crisp_attention.masks import packed, padding_from_pairs, read_pairs, split_mask

LOWEST = {"lowest": torch.finfo(torch.float32).min, "infinite": -torch.inf, "by habit": -1e4}


@pytest.mark.parametrize("mask", [torch.zeros(3, 3), torch.randn(3, 3).half(), torch.full((3, 3), -8999.0)])
def test_a_bias_that_hides_nothing_is_no_mask_and_not_copied(mask):
    bias, valid = split_mask(mask)
    assert bias is mask
    assert valid is None
    pairs, _ = read_pairs((2, 4, 3, 3), mask.device, bias=mask)
    assert pairs.valid is None
    assert pairs.query_valid is None


@pytest.mark.parametrize("lowest", LOWEST)
def test_one_hidden_pair_makes_a_mask(lowest):
    mask = torch.ones(3, 3)
    mask[:, 1] = LOWEST[lowest]
    bias, valid = split_mask(mask)
    assert bias.tolist() == [[1.0, 0.0, 1.0]] * 3
    assert valid.tolist() == [[True, False, True]] * 3
    pairs, _ = read_pairs((2, 4, 3, 3), mask.device, bias=mask)
    assert torch.equal(pairs.query_valid, padding_from_pairs(pairs.valid, 3))


def test_a_nan_hides_neither_itself_nor_what_is_hidden():
    bias, valid = split_mask(torch.tensor([torch.nan, -torch.inf, 1.0]))
    assert valid.tolist() == [True, False, True]
    assert bias[0].isnan()
    assert bias[1:].tolist() == [0.0, 1.0]


def test_nobody_looks_at_numbers_that_a_transform_follows():
    masks = torch.zeros(2, 3, 3)
    masks[1, 0, 0] = -torch.inf
    hidden = torch.func.vmap(lambda mask: split_mask(mask)[1])(masks)
    assert hidden.sum().item() == 17


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def causal_behind(prefix, text):
    """Pairs `[1, 1, Q, K]` of a causal text, padded where `text` is False, behind a prefix that all see."""
    text = torch.tensor(text)
    return torch.cat([torch.ones(4, prefix, dtype=torch.bool), CAUSAL & text], dim=1)[None, None]


def test_padding_behind_a_prefix_is_known_by_its_place():
    """A padded query of a causal text sees the text before it."""
    valid = torch.cat([causal_behind(2, [True, True, False, False]), causal_behind(2, [True] * 4)])
    assert padding_from_pairs(valid, 4).tolist() == [[True, True, False, False], [True] * 4]
    both_ways = valid.any(dim=2, keepdim=True).expand(2, 1, 4, 6)
    assert padding_from_pairs(both_ways[:1], 4).tolist() == [[True, True, False, False]]


def test_with_room_behind_the_text_padding_is_known_by_what_it_sees():
    room = torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    padded = CAUSAL & torch.tensor([False, True, True, True])  # at its left
    valid = torch.cat([padded[None, None], room], dim=3)
    assert padding_from_pairs(valid, 4).tolist() == [[False, True, True, True]]
    assert padding_from_pairs(valid[:, :, 3:], 1).tolist() == [[True]]


def blocks(*sizes, window=None):
    """Pairs `[1, 1, N, N]` of texts packed in a row, seen through a window on either side."""
    valid = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    place = torch.arange(len(valid))
    return (valid if window is None else valid & ((place[:, None] - place).abs() <= window))[None, None]


@pytest.mark.parametrize("window", [None, 3, 1])
def test_packed_texts_are_found_through_a_sliding_window_too(window):
    assert packed(blocks(12, 12, window=window))
    assert not packed(blocks(24, window=window))
    # One example is enough.
    assert packed(torch.cat([blocks(24, window=window), blocks(10, 14, window=window)]))


def test_padding_makes_no_text_of_its_own():
    text = torch.arange(12) < 7
    assert not packed((text[:, None] & text)[None, None])
    assert not packed(text.expand(1, 1, 12, 12))
    # Behind and before.
    assert not packed(text.flip(0).expand(2, 1, 12, 12) & blocks(12, window=2))
