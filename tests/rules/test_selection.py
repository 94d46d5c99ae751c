"""What the rules are made of: counts, ranks, places in the sequence, forced pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from cases import SPARSITY, few, survivors
from crisp_attention import ConfigurationError
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import Pairs, keep_count, select
from crisp_attention.rules.ranking import kth_best_key, kth_largest
from crisp_attention.rules.selection import forced_pairs, keep_bound

CPU = torch.device("cpu")


@given(count=st.integers(0, 400), sparsity=st.floats(0, 0.999))
def test_keep_count_is_the_nearest(count, sparsity):
    kept = int(keep_count(torch.tensor(count), sparsity))
    assert 0 <= kept <= count
    assert kept == oracle.kept_of(count, sparsity)
    on_device = torch.tensor(sparsity, dtype=torch.float64)  # as a layer holds it: float32 is another number
    assert kept == keep_bound(count, sparsity) == int(keep_count(torch.tensor(count), on_device))


@pytest.mark.parametrize(
    ("count", "sparsity", "kept"),
    [(0, 0.8, 0), (1, 0.8, 0), (1, 0.5, 1), (1, 0.0, 1), (5, 0.5, 3), (10, 0.25, 8), (4, 0.5, 2), (10, 0.8, 2)],
)
def test_keep_count_keeps_the_pair_of_a_half_way_case(count, sparsity, kept):
    assert int(keep_count(torch.tensor(count), sparsity)) == kept


@given(sparsity=SPARSITY, counts=st.lists(st.integers(0, 200), min_size=2, max_size=20))
def test_keep_count_never_falls_when_pairs_are_added_and_never_jumps(sparsity, counts):
    counts = torch.tensor(sorted(counts))
    more = keep_count(counts, sparsity).diff()
    assert (more >= 0).all()
    assert (more <= counts.diff()).all()  # so that quickselect has places enough to fill


@given(data=st.data(), sparsity=SPARSITY)
def test_both_ways_of_finding_the_kth_largest_agree_with_sorting(data, sparsity):
    size = data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    values = torch.randn(2, 3, size, generator=generator).round(decimals=data.draw(st.integers(0, 3)))
    pool = torch.rand(2, 1, size, generator=generator) < 0.6 if data.draw(st.booleans()) else None
    counts = torch.full((2, 1, 1), size) if pool is None else pool.sum(-1, keepdim=True)
    k = keep_count(counts, sparsity)
    quick = kth_largest(values, pool, k, keep_bound(size, sparsity))
    sorting = kth_largest(values, pool, k, None)
    for b in range(2):
        for h in range(3):
            row = [values[b, h, n].item() for n in range(size) if pool is None or pool[b, 0, n]]
            wanted = int(k[b, 0, 0])
            tau = sorted(row, reverse=True)[wanted - 1] if wanted else torch.inf
            assert quick[b, h].item() == sorting[b, h].item() == pytest.approx(tau)


def test_the_kth_largest_of_too_small_a_pool_is_minus_infinity():
    values, pool = torch.arange(4.0)[None], torch.tensor([[True, True, False, False]])
    for bound in (3, None):
        assert kth_largest(values, pool, torch.tensor([[3]]), bound).item() == -torch.inf
    assert kth_largest(values, pool, torch.tensor([[0]]), 0).item() == torch.inf
    assert kth_best_key(values, pool, 2).item() == 0.0
    assert kth_best_key(values, pool, 3).item() == -torch.inf
    assert kth_best_key(values, None, 9).item() == 0.0


def test_places_count_the_keys_that_some_query_may_attend_to():
    valid = torch.tensor([[False, True, True, False, True], [True, True, True, True, True]])[:, None, None, :]
    pairs = Pairs((2, 1, 5, 5), CPU, valid.expand(2, 1, 5, 5))
    assert pairs.key_position.tolist() == [[-1, 0, 1, 1, 2], [0, 1, 2, 3, 4]]
    assert torch.equal(pairs.query_position, pairs.key_position)
    assert Pairs((1, 1, 2, 5), CPU, causal=True).query_position.tolist() == [[3, 4]]
    assert Pairs((2, 1, 1, 5), CPU, valid).query_position.tolist() == [[2], [4]]


@pytest.mark.parametrize(
    "pairs",
    [Pairs((1, 1, 3, 5), CPU), Pairs((1, 1, 5, 3), CPU), Pairs((1, 1, 5, 5), CPU, cross=True)],
    ids=["fewer", "more", "as many"],
)
@pytest.mark.parametrize(
    "settings",
    [{"rule": "window"}, {"rule": "random"}, {"rule": "block_topk"}, {"rule": "nm", "keep_self": True}],
)
def test_rules_by_place_refuse_cross_attention_and_say_what_to_do(pairs, settings):
    with pytest.raises(ConfigurationError, match=r"cross-attention.*Leave such layers out \(layers=.*topk"):
        select(SparsityConfig(**settings), pairs)


def test_rules_by_score_serve_cross_attention():
    pairs = Pairs((1, 1, 5, 5), CPU, cross=True)
    scores = torch.randn(pairs.shape, generator=torch.Generator().manual_seed(0))
    for settings in ({"keep_first": 2}, {"rule": "nm"}, {"rule": "block_topk", "query_block": 1}):
        assert survivors(SparsityConfig(**settings), scores, pairs).any(-1).all()


def test_forced_pairs_are_valid_first_and_own_keys():
    valid = torch.tensor([False, True, True, False, True])[None, None, None, :].expand(1, 1, 5, 5)
    pairs = Pairs((1, 2, 5, 5), CPU, valid)
    assert forced_pairs(pairs, 0, False) is None
    assert forced_pairs(pairs, 1, False)[0, 0].nonzero().tolist() == [[i, 1] for i in range(5)]
    # Padding shares its place with the token before it, whose key is not its own.
    assert forced_pairs(pairs, 0, True)[0, 0].nonzero().tolist() == [[1, 1], [2, 2], [4, 4]]


def test_forced_pairs_never_see_the_future():
    earlier = torch.ones(4, 4, dtype=torch.bool).tril().expand(1, 1, 4, 4)
    forced = forced_pairs(Pairs((1, 1, 4, 4), CPU, earlier, causal=True), 2, True)
    assert forced[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    last = forced_pairs(Pairs((1, 1, 1, 4), CPU, earlier[..., 3:, :], causal=True), 2, True)
    assert torch.equal(last, forced[:, :, 3:])


@few
@given(sparsity=SPARSITY, forced=st.integers(0, 5))
def test_more_forced_keys_than_the_count_all_survive(sparsity, forced):
    pairs = Pairs((1, 1, 6, 6), CPU)
    scores = torch.randn(pairs.shape, generator=torch.Generator().manual_seed(forced))
    for rule in ("topk", "percentile", "bottomk"):
        keep = survivors(SparsityConfig(rule=rule, sparsity=sparsity, keep_first=forced), scores, pairs)
        assert keep[..., :forced].all()


def test_heads_that_do_not_exist_are_named():
    with pytest.raises(ConfigurationError, match=r"heads=\[0, 7\] names 7, but there are 4 query heads \(0 to 3\)"):
        select(SparsityConfig(heads=[0, 7]), Pairs((1, 4, 2, 2), CPU))
