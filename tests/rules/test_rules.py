from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from crisp_attention.backends.reference import keep_mask
from crisp_attention.config import RULES, SparsityConfig
from crisp_attention.rules import Pairs, keep_count, select

SPARSITY = st.one_of(st.sampled_from([0.1, 0.2, 0.5, 0.8, 0.9]), st.floats(0.01, 0.99))


@st.composite
def calls(draw, square=False):
    """Scores and pairs of one attention call, some keys and queries padded."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries = draw(st.integers(1, 10))
    keys = queries if square else draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    scores = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        scores = scores.round()  # many ties
    valid = query_valid = None
    if draw(st.booleans()):
        valid = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
    if draw(st.booleans()):
        query_valid = torch.rand(batch, queries, generator=generator) < 0.8
    return scores, Pairs((batch, heads, queries, keys), scores.device, valid, query_valid)


def mask_of(config, scores, pairs, training=False):
    return keep_mask(scores, pairs, select(config, pairs, training=training).form)


@given(count=st.integers(0, 400), sparsity=st.floats(0, 0.999))
def test_keep_count_is_the_nearest(count, sparsity):
    kept = int(keep_count(torch.tensor(count), sparsity))
    assert 0 <= kept <= count
    wanted = count * (1 - sparsity)
    assert abs(kept - wanted) <= 0.5 + 1e-9
    assert kept == oracle.kept_of(count, sparsity) or abs(abs(kept - wanted) - 0.5) < 1e-9


@given(sparsity=SPARSITY, counts=st.lists(st.integers(0, 200), min_size=2, max_size=20))
def test_keep_count_never_falls_when_pairs_are_added(sparsity, counts):
    kept = keep_count(torch.tensor(sorted(counts)), sparsity)
    assert (kept.diff() >= 0).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@given(data=st.data(), sparsity=SPARSITY, min_keep=st.integers(1, 3))
def test_survivors_are_valid_and_no_query_is_left_alone(rule, data, sparsity, min_keep):
    # `random` draws by position, which queries have only where they are the keys' own tokens.
    scores, pairs = data.draw(calls(square=rule == "random"))
    keep = mask_of(SparsityConfig(sparsity=sparsity, rule=rule, min_keep=min_keep), scores, pairs)
    valid = torch.ones_like(keep) if pairs.valid is None else pairs.valid.expand_as(keep)
    assert not (keep & ~valid).any()
    assert (keep.sum(-1) >= valid.sum(-1).clamp(max=min_keep)).all()


@given(call=calls(), sparsity=SPARSITY)
def test_topk_realises_the_nearest_count_without_ties(call, sparsity):
    scores, pairs = call
    scores = scores + torch.rand(scores.shape, generator=torch.Generator().manual_seed(0), dtype=scores.dtype) * 1e-3
    keep = mask_of(SparsityConfig(sparsity=sparsity, rule="topk"), scores, pairs)
    rows = pairs.valid_per_row[..., 0].expand(scores.shape[:3])
    assert torch.equal(keep.sum(-1), keep_count(rows, sparsity).maximum(rows.clamp(max=1)))


@given(call=calls(), sparsity=SPARSITY)
def test_percentile_keeps_no_more_than_its_count_and_the_rescued_rows(call, sparsity):
    scores, pairs = call
    scores = scores + torch.rand(scores.shape, generator=torch.Generator().manual_seed(0), dtype=scores.dtype) * 1e-3
    keep = mask_of(SparsityConfig(sparsity=sparsity, rule="percentile"), scores, pairs)
    if pairs.query_valid is not None:
        keep = keep & pairs.query_valid[:, None, :, None]
    kept = keep.sum((-1, -2))
    wanted = keep_count(pairs.counted_per_head[..., 0, 0], sparsity).expand_as(kept)
    assert (kept >= wanted).all()
    assert (kept <= wanted + scores.shape[2]).all()


@pytest.mark.parametrize("rule", ["percentile", "topk"])
@given(call=calls(), low=SPARSITY, high=SPARSITY)
def test_a_higher_sparsity_keeps_a_subset(rule, call, low, high):
    scores, pairs = call
    low, high = sorted((low, high))
    loose = mask_of(SparsityConfig(sparsity=low, rule=rule), scores, pairs)
    tight = mask_of(SparsityConfig(sparsity=high, rule=rule), scores, pairs)
    assert not (tight & ~loose).any()


@pytest.mark.parametrize("rule", ["percentile", "topk"])
@given(call=calls(), sparsity=SPARSITY, seed=st.integers(0, 99))
def test_permuting_batch_heads_and_keys_permutes_the_mask(rule, call, sparsity, seed):
    scores, pairs = call
    config = SparsityConfig(sparsity=sparsity, rule=rule)
    keep = mask_of(config, scores, pairs)
    draw = torch.Generator().manual_seed(seed)
    batch, heads, _, keys = (torch.randperm(size, generator=draw) for size in scores.shape)
    permuted = Pairs(
        pairs.shape,
        pairs.device,
        None if pairs.valid is None else pairs.valid[batch][..., keys],
        None if pairs.query_valid is None else pairs.query_valid[batch],
    )
    assert torch.equal(mask_of(config, scores[batch][:, heads][..., keys], permuted), keep[batch][:, heads][..., keys])


@pytest.mark.parametrize("rule", sorted(RULES))
@given(call=calls(), sparsity=SPARSITY, pads=st.integers(1, 12))
def test_padding_changes_nothing(rule, call, sparsity, pads):
    scores, pairs = call
    batch, heads, queries, keys = pairs.shape
    if queries > keys:
        return
    config = SparsityConfig(sparsity=sparsity, rule=rule)
    # Self-attention with right padding, the operator's promise.
    square = scores[..., :queries, :queries]
    lengths = torch.arange(queries).expand(batch, queries) < torch.arange(1, batch + 1)[:, None] * queries / batch
    valid = (lengths[:, None, :, None] & lengths[:, None, None, :]).expand(batch, 1, queries, queries)
    plain = Pairs((batch, heads, queries, queries), scores.device, valid, lengths)
    bigger = torch.nn.functional.pad(square, (0, pads, 0, pads), value=5.0)
    padded = Pairs(
        tuple(bigger.shape),
        scores.device,
        torch.nn.functional.pad(valid, (0, pads, 0, pads)),
        torch.nn.functional.pad(lengths, (0, pads)),
    )
    assert torch.equal(
        mask_of(config, bigger, padded)[..., :queries, :queries], mask_of(config, square, plain)
    )  # fmt: skip


def test_random_is_uniform():
    """Each key of a row is as likely as any other to survive (z below 5 over 4,000 draws)."""
    pairs = Pairs((100, 4, 10, 10), torch.device("cpu"))
    keep = mask_of(SparsityConfig(sparsity=0.7, rule="random"), torch.zeros(pairs.shape), pairs, training=True)
    share = keep.double().mean(dim=(0, 1, 2))
    assert keep.sum(-1).unique().tolist() == [3]
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4_000) ** 0.5


def test_random_is_blind_to_scores():
    pairs = Pairs((2, 3, 8, 8), torch.device("cpu"))
    config = SparsityConfig(sparsity=0.5, rule="random", seed=4)
    draw = torch.Generator().manual_seed(0)
    first, second = (mask_of(config, torch.randn(pairs.shape, generator=draw), pairs) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, mask_of(config.replace(seed=5), torch.randn(pairs.shape), pairs))
