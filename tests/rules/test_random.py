"""The control that draws: uniform, independent of everything but its stream and the places."""

from __future__ import annotations

import torch

from cases import survivors
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import Pairs, select

CPU = torch.device("cpu")


def masks(pairs, *, seeds, **settings):
    """Keep masks of one example over many streams, `[seeds, H, Q, K]`."""
    config = SparsityConfig(rule="random", **settings)
    return torch.cat([survivors(config.replace(seed=seed), torch.zeros(pairs.shape), pairs) for seed in range(seeds)])


def test_each_key_of_a_row_is_as_likely_as_any_other_within_a_batch():
    """z below 5 over 4,000 draws."""
    pairs = Pairs((100, 4, 10, 10), CPU)
    keep = survivors(SparsityConfig(rule="random", sparsity=0.7), torch.zeros(pairs.shape), pairs, training=True)
    share = keep.double().mean(dim=(0, 1, 2))
    assert keep.sum(-1).unique().tolist() == [3]
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4_000) ** 0.5


def test_each_pair_is_as_likely_as_any_other_over_streams():
    keep = masks(Pairs((1, 2, 6, 6), CPU), seeds=400, sparsity=0.5).double()
    assert (keep.mean(0) - 0.5).abs().max() < 5 * (0.25 / 400) ** 0.5


def test_heads_rows_and_streams_draw_independently():
    """Two rows of six agree in half of their pairs, as often as chance has it."""
    keep = masks(Pairs((1, 4, 6, 6), CPU), seeds=200, sparsity=0.5).double()
    bound = 5 * (1 / (200 * 4 * 6 * 5)) ** 0.5
    for first, second in ((keep[:, :-1], keep[:, 1:]), (keep[:, :, :-1], keep[:, :, 1:]), (keep[:-1], keep[1:])):
        assert abs((first == second).double().mean() - 0.5) < bound


def test_each_pair_alone_is_removed_with_the_probability_asked_for():
    """DropKey: the counts of rows follow the binomial law, and pairs of a row do not depend on each other."""
    pairs, sparsity = Pairs((200, 4, 8, 8), CPU), 0.3
    config = SparsityConfig(rule="random", sparsity=sparsity, scope="pair")
    keep = survivors(config, torch.zeros(pairs.shape), pairs, training=True).double()
    rows = 200 * 4 * 8
    assert (keep.mean(dim=(0, 1, 2)) - 0.7).abs().max() < 5 * (0.3 * 0.7 / rows) ** 0.5
    counts = keep.sum(-1)
    assert abs(counts.var() - 8 * 0.3 * 0.7) < 5 * 8 * 0.3 * 0.7 * (2 / rows) ** 0.5
    together = (keep[..., :-1] * keep[..., 1:]).mean()
    assert abs(together - 0.7**2) < 5 * (0.7**2 * (1 - 0.7**2) / (rows * 7)) ** 0.5


def test_each_pair_alone_leaves_no_query_without_its_keys():
    pairs = Pairs((50, 2, 6, 6), CPU)
    for min_keep in (1, 3):
        config = SparsityConfig(rule="random", sparsity=0.8, scope="pair", min_keep=min_keep)
        kept = survivors(config, torch.zeros(pairs.shape), pairs, training=True).sum(-1)
        assert kept.min() == min_keep
        assert kept.max() > min_keep


def test_each_pair_alone_at_sparsity_zero_keeps_all_and_takes_a_sparsity_on_the_device():
    pairs = Pairs((2, 2, 9, 9), CPU)
    config = SparsityConfig(rule="random", sparsity=0.37, scope="pair")
    scores = torch.zeros(pairs.shape)
    told = survivors(config, scores, pairs, sparsity=torch.tensor(0.37, dtype=torch.float64))
    assert torch.equal(told, survivors(config, scores, pairs))
    assert survivors(config, scores, pairs, sparsity=0.0).all()


def test_scores_and_the_global_stream_play_no_part():
    pairs = Pairs((2, 3, 8, 8), CPU)
    config = SparsityConfig(rule="random", sparsity=0.5, seed=4)
    state = torch.random.get_rng_state()
    first = survivors(config, torch.zeros(pairs.shape), pairs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, survivors(config, torch.arange(384.0).view(pairs.shape), pairs))
    assert not torch.equal(first, survivors(config.replace(seed=5), torch.zeros(pairs.shape), pairs))


def test_every_bit_of_a_stream_matters():
    pairs = Pairs((1, 1, 9, 9), CPU)
    config = SparsityConfig(rule="random", sparsity=0.5)
    drawn = [
        survivors(config, torch.zeros(pairs.shape), pairs, stream=torch.tensor(stream)).flatten().tolist()
        for stream in (0, *(1 << bit for bit in range(63)))
    ]
    # The two halves of a stream are folded into one: 2^b and 2^(b + 32) are alike.
    assert len({tuple(mask) for mask in drawn}) == 33


def test_examples_share_a_draw_in_evaluation_only():
    pairs = Pairs((3, 2, 8, 8), CPU)
    config = SparsityConfig(rule="random", sparsity=0.5)
    evaluation = survivors(config, torch.zeros(pairs.shape), pairs)
    training = survivors(config, torch.zeros(pairs.shape), pairs, training=True)
    assert torch.equal(evaluation[0], evaluation[1])
    assert not any(torch.equal(training[i], training[j]) for i in range(3) for j in range(i))


def test_noise_is_exact_in_fp32():
    noise = select(SparsityConfig(rule="random"), Pairs((1, 2, 50, 50), CPU)).form.ranking
    assert noise.dtype == torch.float32
    assert ((noise >= 0) & (noise < 2**24) & (noise == noise.floor())).all()
    assert abs(noise.mean() / 2**24 - 0.5) < 0.02
