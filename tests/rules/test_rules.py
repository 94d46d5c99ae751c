"""What every rule promises; each test runs over the table of rules, so that none is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import oracle
from cases import (
    NORMALIZERS,
    SELECTIONS,
    SPARSITY,
    VALUES,
    calls,
    configs,
    configured_calls,
    expected,
    few,
    result,
    select_pairs,
    survivors,
    valid_of,
)
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import FUNCTIONS, keep_count, select
from crisp_attention.rules.selection import Normalizer, Pairs
from crisp_attention.traits import RULES

FORCING = [rule for rule in SELECTIONS if "keep_first" in RULES[rule].settings]
WITH_SPARSITY = [rule for rule in sorted(RULES) if "sparsity" in RULES[rule].strengths]


def test_every_rule_has_a_function_an_oracle_and_a_strategy_for_each_setting():
    assert set(FUNCTIONS) == set(RULES) == set(oracle.RULES) | set(NORMALIZERS)
    assert {name for traits in RULES.values() for name in traits.settings} == set(VALUES)
    assert FORCING == SELECTIONS


@pytest.mark.parametrize("rule", SELECTIONS)
@given(data=st.data())
def test_agrees_with_the_oracle(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    form = select(config, pairs).form
    noise = form.ranking if rule == "random" else None
    assert torch.equal(survivors(config, scores, pairs), expected(config, scores, pairs, noise))


@pytest.mark.parametrize("rule", SELECTIONS)
@few
@given(data=st.data())
def test_survivors_are_valid_and_no_query_is_left_alone(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    keep, valid = survivors(config, scores, pairs), valid_of(pairs)
    assert not (keep & ~valid).any()
    assert (keep.sum(-1) >= valid.sum(-1).clamp(max=config.min_keep)).all()


@pytest.mark.parametrize("rule", NORMALIZERS)
@few
@given(data=st.data())
def test_weights_are_a_distribution_over_the_valid_keys(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    weights, valid = result(config, scores, pairs), valid_of(pairs)
    assert (weights >= 0).all()
    assert (weights[~valid] == 0).all()
    torch.testing.assert_close(weights.sum(-1), valid.any(-1).double())


@pytest.mark.parametrize("rule", FORCING)
@few
@given(data=st.data(), keep_first=st.integers(0, 3), keep_self=st.booleans())
def test_forced_keys_survive_in_every_counted_row(rule, data, keep_first, keep_self):
    config, scores, pairs = data.draw(configured_calls(rule, keep_first=keep_first, keep_self=keep_self))
    keep, valid = survivors(config, scores, pairs), valid_of(pairs)
    for b, h, i in torch.ones(scores.shape[:3]).nonzero().tolist():
        if pairs.query_valid is not None and not pairs.query_valid[b, i]:
            continue
        reachable = valid[b].any(0).any(0).nonzero()[:, 0].tolist()
        for j in reachable[:keep_first]:
            assert keep[b, h, i, j] or not valid[b, h, i, j]
        if keep_self and pairs.shape[2] == pairs.shape[3]:
            assert keep[b, h, i, i] or not valid[b, h, i, i]


@pytest.mark.parametrize("rule", ["bottomk", "random", "topk", "window"])
@few
@given(data=st.data(), sparsity=SPARSITY, keep_first=st.integers(0, 3), keep_self=st.booleans())
def test_forced_keys_are_part_of_the_count_of_each_row(rule, data, sparsity, keep_first, keep_self):
    config = SparsityConfig(rule=rule, sparsity=sparsity, keep_first=keep_first, keep_self=keep_self)
    scores, pairs = data.draw(calls(config))
    scores = without_ties(scores)
    keep, rows = survivors(config, scores, pairs), valid_of(pairs).sum(-1)
    wanted = keep_count(rows, sparsity).maximum(rows.clamp(max=1))
    assert (keep.sum(-1) <= wanted.clamp(min=keep_first + keep_self)).all()
    assert (keep.sum(-1) >= wanted).all()


def without_ties(scores):
    return torch.randn(scores.shape, generator=torch.Generator().manual_seed(scores.numel()), dtype=scores.dtype)


@pytest.mark.parametrize("rule", ["bottomk", "random", "topk", "window"])
@few
@given(data=st.data(), sparsity=SPARSITY, min_keep=st.integers(1, 3))
def test_rows_realise_the_nearest_sparsity_without_ties(rule, data, sparsity, min_keep):
    config = SparsityConfig(sparsity=sparsity, rule=rule, min_keep=min_keep)
    scores, pairs = data.draw(calls(config))
    rows = valid_of(pairs).sum(-1)
    kept = survivors(config, without_ties(scores), pairs).sum(-1)
    assert torch.equal(kept, keep_count(rows, sparsity).maximum(rows.clamp(max=min_keep)))


@pytest.mark.parametrize("settings", [{"rule": "percentile"}, {"rule": "random", "scope": "matrix"}], ids=str)
@few
@given(data=st.data(), sparsity=SPARSITY)
def test_matrices_realise_the_nearest_sparsity_but_for_rescued_rows(settings, data, sparsity):
    config = SparsityConfig(sparsity=sparsity, **settings)
    scores, pairs = data.draw(calls(config, kinds=("self", "cross")))  # causal models refuse them
    counted = valid_of(pairs)
    if pairs.query_valid is not None:
        counted = counted & pairs.query_valid[:, None, :, None]
    keep = survivors(config, without_ties(scores), pairs) & counted
    wanted = keep_count(counted.sum((-1, -2)), sparsity)
    rescued = (keep.sum(-1) == 1).sum(-1)
    assert (keep.sum((-1, -2)) >= wanted).all()
    assert (keep.sum((-1, -2)) <= wanted + rescued).all()


STRENGTHS = [(rule, strength) for rule in SELECTIONS for strength in RULES[rule].strengths]


@pytest.mark.parametrize(("rule", "strength"), STRENGTHS)
@few
@given(data=st.data())
def test_a_stronger_setting_keeps_a_subset(rule, strength, data):
    # But for what min_keep adds to a query's groups or blocks, as their docstrings say.
    unmasked = {"kinds": ("self", "cross"), "holes": False} if rule == "block_topk" else {}
    fixed = {"min_keep": 1} if rule in ("nm", "block_topk") else {}
    weak, strong = sorted((data.draw(VALUES[strength]), data.draw(VALUES[strength])))
    if strength in ("p", "window"):
        weak, strong = strong, weak
    config = data.draw(configs(rule, **{strength: weak}, **fixed))
    scores, pairs = data.draw(calls(config, **unmasked))
    loose = survivors(config, scores, pairs)
    tight = survivors(config.replace(**{strength: strong}), scores, pairs)
    assert not (tight & ~loose).any()


@pytest.mark.parametrize("rule", WITH_SPARSITY)
@few
@given(data=st.data(), sparsity=SPARSITY)
def test_a_sparsity_in_a_tensor_gives_exactly_the_same(rule, data, sparsity):
    """What a compiled model hands over, so that a schedule's step is not read: the sorting path."""
    config, scores, pairs = data.draw(configured_calls(rule, sparsity=sparsity))
    tensor = torch.tensor(sparsity, dtype=torch.float64)
    assert torch.equal(result(config, scores, pairs, sparsity=tensor), result(config, scores, pairs))
    other = config.replace(sparsity=0.37)
    assert torch.equal(result(other, scores, pairs, sparsity=tensor), result(config, scores, pairs))


@pytest.mark.parametrize("rule", sorted(RULES))
@few
@given(data=st.data())
def test_permuting_the_batch_permutes_the_result(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    order = data.draw(st.permutations(range(len(scores))))
    torch.testing.assert_close(
        result(config, scores[order], select_pairs(pairs, batch=order)), result(config, scores, pairs)[order]
    )


@pytest.mark.parametrize("rule", sorted(RULES))
@few
@given(data=st.data())
def test_batch_mates_change_nothing(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    which = data.draw(st.integers(0, len(scores) - 1))
    alone = result(config, scores[[which]], select_pairs(pairs, batch=[which]))
    torch.testing.assert_close(alone, result(config, scores, pairs)[[which]])


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"random"}))
@few
@given(data=st.data())
def test_permuting_the_heads_permutes_the_result(rule, data):
    config, scores, pairs = data.draw(configured_calls(rule))
    order = data.draw(st.permutations(range(scores.shape[1])))
    torch.testing.assert_close(
        result(config, scores[:, order], select_pairs(pairs, heads=order)), result(config, scores, pairs)[:, order]
    )


BLIND_TO_PLACES = [rule for rule in sorted(RULES) if not SparsityConfig(rule=rule).by_key_position]


@pytest.mark.parametrize("rule", BLIND_TO_PLACES)
@few
@given(data=st.data())
def test_permuting_the_keys_permutes_the_result_where_places_do_not_matter(rule, data):
    fixed = {"keep_first": 0, "keep_self": False} if rule in FORCING else {}
    config, scores, pairs = data.draw(configured_calls(rule, **fixed))
    order = data.draw(st.permutations(range(scores.shape[3])))
    permuted = replace(pairs, valid=None if pairs.valid is None else pairs.valid[..., order])
    torch.testing.assert_close(result(config, scores[..., order], permuted), result(config, scores, pairs)[..., order])


@pytest.mark.parametrize("rule", sorted(RULES))
@few
@given(data=st.data(), seed=st.integers(0, 9999))
def test_padding_changes_nothing_wherever_it_stands(rule, data, seed):
    fixed = {"count_padding": False} if "count_padding" in RULES[rule].settings else {}
    config = data.draw(configs(rule, **fixed))
    scores, pairs = data.draw(calls(config, kinds=("self", "causal")))
    batch, heads, tokens, _ = pairs.shape
    length = tokens + data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(seed)
    bigger = 1e4 * torch.randn(batch, heads, length, length, generator=generator, dtype=scores.dtype)
    valid = torch.zeros(batch, pairs.valid.shape[1] if pairs.valid is not None else 1, length, length).bool()
    query_valid = torch.zeros(batch, length).bool()
    places = [torch.randperm(length, generator=generator)[:tokens].sort().values for _ in range(batch)]
    for b, place in enumerate(places):
        square = (slice(None), place[:, None], place)
        bigger[b][square] = scores[b]
        valid[b][square] = True if pairs.valid is None else pairs.valid[b]
        query_valid[b][place] = True if pairs.query_valid is None else pairs.query_valid[b]
    padded = Pairs(tuple(bigger.shape), scores.device, valid, query_valid, pairs.causal)
    plain, among_pads = result(config, scores, pairs), result(config, bigger, padded)
    for b, place in enumerate(places):
        torch.testing.assert_close(among_pads[b][:, place[:, None], place], plain[b])


@pytest.mark.parametrize("rule", [rule for rule in sorted(RULES) if RULES[rule].per_row])
@few
@given(data=st.data())
def test_rows_alone_decide_like_rows_together_in_a_causal_model(rule, data):
    """No look at the future, and the same with a cache of earlier keys."""
    fixed = {"count_padding": False} if "count_padding" in RULES[rule].settings else {}
    config = data.draw(
        configs(rule, **fixed, **({"scope": data.draw(st.sampled_from(["pair", "row"]))} if rule == "random" else {}))
    )
    scores, pairs = data.draw(calls(config, kinds=("causal",), holes=False))
    valid = valid_of(pairs)
    step = data.draw(st.integers(0, scores.shape[2] - 1))
    assume(bool(valid[:, :, step, step].all()))  # padding, which stands at no place, is not generated
    whole = result(config, scores, pairs)
    last = Pairs(
        (*scores.shape[:2], 1, step + 1), scores.device, valid[:, :, step : step + 1, : step + 1], None, causal=True
    )
    alone = result(config, scores[:, :, step : step + 1, : step + 1], last)
    torch.testing.assert_close(alone, whole[:, :, step : step + 1, : step + 1])


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("score", [0.0, 1e4, -1e4, 1e-30])
def test_equal_scores_are_treated_equally(rule, score):
    """Ties all survive; a rule that goes by places or noise removes as many as ever."""
    config = SparsityConfig(rule=rule)
    pairs = Pairs((2, 2, 6, 6), torch.device("cpu"))
    decided = result(config, torch.full(pairs.shape, score), pairs)
    if rule in ("random", "window"):
        assert (decided.sum(-1) == 1).all()
    elif rule in NORMALIZERS:
        torch.testing.assert_close(decided, torch.full(pairs.shape, 1 / 6))
    else:
        assert decided.all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 5), (2, 1, 5, 5), (1, 1, 3, 3)])
def test_settings_larger_than_the_sequence_are_served(rule, shape):
    large = {"min_keep": 50, "keep_first": 50, "m": 64, "window": 50, "query_block": 64, "key_block": 64, "drop": 50}
    settings = {name: value for name, value in large.items() if name in RULES[rule].settings}
    config = SparsityConfig(rule=rule, **settings)
    pairs = Pairs(shape, torch.device("cpu"), causal=shape[2] != shape[3])
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    decided = result(config, scores, pairs)
    if isinstance(select(config, pairs).form, Normalizer):
        torch.testing.assert_close(decided.sum(-1), torch.ones(shape[:3]))
    else:
        assert decided.all()  # min_keep says so


@pytest.mark.parametrize("rule", SELECTIONS)
def test_one_key_is_kept_at_any_strength(rule):
    pairs = Pairs((1, 1, 1, 1), torch.device("cpu"))
    assert survivors(SparsityConfig(rule=rule), torch.zeros(pairs.shape), pairs).all()
