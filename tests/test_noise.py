"""The hash behind random masks and dropout, and dropout itself."""

from __future__ import annotations

import pytest
import torch

import crisp_attention as crisp
from crisp_attention import noise
from crisp_attention.backends import Dropout, draw_dropout

CPU = torch.device("cpu")


def mixed(value):
    """The docstring of `noise.mix` in Python's integers."""
    for _ in range(2):
        value = ((value ^ value >> 16) * 0x45D9F3B) % 2**32
    return value ^ value >> 16


def signed(value):
    return value - 2**32 if value >= 2**31 else value


def test_the_hash_is_that_of_the_docstring_on_32_bits():
    values = [0, 1, 2, 12_345, 2**16, 2**31, 2**32 - 1]
    states = torch.tensor([signed(value) for value in values], dtype=torch.int32)
    assert noise.mix(states).tolist() == [signed(mixed(value)) for value in values]
    assert noise.level(states).tolist() == [value >> 8 for value in values]
    assert noise.mix(torch.arange(2**16, dtype=torch.int32)).unique().numel() == 2**16


def test_a_stream_uses_all_of_its_bits():
    streams = torch.tensor([0, 1, 2**31, 2**33, 2**40, 2**62 - 1])
    assert noise.fold(streams).unique().numel() == len(streams)
    assert noise.fold(streams).tolist() == [signed(mixed((value ^ value >> 32) % 2**32)) for value in streams.tolist()]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_of_every_matrix_row_and_column(p):
    survivors = Dropout(p, torch.tensor(7)).survivors((8, 4, 64, 64)).double()
    deviation = (p * (1 - p)) ** 0.5
    for dims, count in (
        ((0, 1, 2, 3), 8 * 4 * 64 * 64),
        ((2, 3), 64 * 64),
        ((0, 1, 3), 8 * 4 * 64),
        ((0, 1, 2), 8 * 4 * 64),
    ):
        assert ((survivors.mean(dims) - (1 - p)).abs() < 5 * deviation / count**0.5).all()


def test_dropout_of_other_seeds_heads_and_examples_is_other_dropout():
    first, second = (Dropout(0.5, torch.tensor(seed)).survivors((2, 2, 32, 32)) for seed in (1, 2))
    matrices = torch.cat((first, second)).flatten(2).flatten(0, 1).double()
    agreement = (matrices[:, None] == matrices[None]).double().mean(-1)
    off_diagonal = agreement[~torch.eye(len(matrices), dtype=torch.bool)]
    assert ((off_diagonal - 0.5).abs() < 5 * 0.5 / 1024**0.5).all()


def test_dropout_follows_the_global_stream_and_takes_one_draw_whatever_the_size():
    after = []
    for size in (4, 40):
        torch.manual_seed(0)
        q = torch.randn(1, 1, size, 8, generator=torch.Generator().manual_seed(1))
        crisp.attention(q, q, q, sparsity=0.5, dropout_p=0.5, training=True)
        after.append(torch.rand(()))
    assert after[0] == after[1]
    torch.manual_seed(0)
    assert torch.rand(()) != after[0]
    assert draw_dropout(0.0, CPU) is None


def test_weights_that_remain_are_scaled():
    q = torch.randn(2, 2, 16, 8)
    out = crisp.attention(q, q, q, sparsity=0.5, dropout_p=0.25, training=True, return_details=True)
    remain = out.weights != 0
    torch.testing.assert_close(out.weights[remain], (out.probabilities / 0.75)[remain])
    assert remain.sum() < out.keep.sum()
