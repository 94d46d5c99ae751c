"""Additive masks, split into what is added and what is hidden."""

from __future__ import annotations

import pytest
import torch

from crisp_attention.masks import padding_from_pairs, read_pairs, split_mask

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
