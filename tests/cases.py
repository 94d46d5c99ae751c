"""Random attention calls and random settings of every rule, as hypothesis strategies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st

import oracle
from crisp_attention.backends.reference import keep_mask
from crisp_attention.config import APPLY, SCOPES, SparsityConfig
from crisp_attention.masks import hides_future, padding_from_pairs
from crisp_attention.rules import Pairs, select
from crisp_attention.rules.selection import Normalizer
from crisp_attention.schedule import KINDS
from crisp_attention.traits import RULES

SPARSITY = st.one_of(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.75, 0.8, 0.9]), st.floats(0.01, 0.99))

# For properties that hold by construction of the rules: many rules, few examples each.
few = settings(max_examples=20)

# A strategy for each setting that some rule reads: a new setting without one fails the tests.
VALUES = {
    "count_padding": st.booleans(),
    "drop": st.integers(1, 4),
    "entropy": st.floats(0.05, 2.0),
    "gradient": st.sampled_from(["selected", "straight_through"]),
    "keep_first": st.integers(0, 2),
    "keep_self": st.booleans(),
    "key_block": st.integers(1, 4),
    "m": st.integers(2, 5),
    "min_keep": st.integers(1, 3),
    "p": st.floats(0.05, 0.98),
    "query_block": st.integers(1, 4),
    "scope": st.sampled_from(SCOPES),
    "seed": st.integers(0, 2**32 - 1),
    "sparsity": SPARSITY,
    "stride": st.integers(2, 4),
    "window": st.integers(0, 4),
}

NORMALIZERS = ["entmax15", "sparsemax", "temperature"]
SELECTIONS = sorted(set(RULES) - set(NORMALIZERS))


def qkv(batch=2, heads=3, queries=7, keys=7, width=8, dtype=torch.float64, seed=0, kv_heads=None):
    """Queries, keys and values of one attention call."""
    draw = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    return tuple(
        torch.randn(batch, count, length, width, generator=draw, dtype=torch.float64).to(dtype)
        for count, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )


@st.composite
def settings_of(draw, rule, **fixed):
    """Settings of one rule for one call, each given or left to its default."""
    traits = RULES[rule]
    chosen = {"rule": rule, **fixed}
    if traits.strengths and not set(traits.strengths) & set(fixed):
        strength = draw(st.sampled_from(traits.strengths))
        chosen[strength] = draw(VALUES[strength])
    for name in sorted(set(traits.settings) - set(traits.strengths) - set(chosen)):
        if draw(st.booleans()) and (name != "stride" or "window" in chosen):
            chosen[name] = draw(VALUES[name])
    if chosen.get("scope") == "pair":  # which counts nothing
        chosen.pop("count_padding", None)
    return chosen


@st.composite
def model_settings(draw):
    """Settings of any rule for a whole model, as a file holds them."""
    chosen = draw(settings_of(draw(st.sampled_from(sorted(RULES)))))
    chosen["apply"] = draw(st.sampled_from(APPLY))
    if draw(st.booleans()):
        chosen["heads"] = draw(st.lists(st.integers(0, 11), min_size=1, unique=True))
    by_sparsity = "sparsity" in chosen
    if by_sparsity and draw(st.booleans()):
        chosen["layer_sparsity"] = [chosen.pop("sparsity"), *draw(st.lists(SPARSITY, max_size=3)), 0.0]
    elif draw(st.booleans()):
        chosen["layers"] = draw(st.lists(st.integers(-6, 5), min_size=1))
    if by_sparsity and draw(st.booleans()):
        chosen["schedule"] = {"kind": draw(st.sampled_from(sorted(KINDS)))}
    return chosen


@st.composite
def configs(draw, rule, **fixed):
    return SparsityConfig(**draw(settings_of(rule, **fixed)))


@st.composite
def masks(draw, batch, heads, queries, keys, generator, *, causal=False, holes=True):
    """Valid pairs `[B, 1 | H, Q, K]` and padding of queries: none, padding anywhere, or holes."""
    kind = draw(st.sampled_from(["none", "padding", *(["holes", "holes per head"] if holes else [])]))
    valid = query_valid = None
    if kind == "padding":
        there = torch.rand(batch, keys, generator=generator) < 0.7  # left, right and in the middle
        valid = there[:, None, None, :].expand(batch, 1, queries, keys)
    elif kind != "none":
        rows = heads if kind == "holes per head" else 1
        valid = torch.rand(batch, rows, queries, keys, generator=generator) < 0.7
    if valid is not None and queries == keys:
        query_valid = padding_from_pairs(valid, queries)
    elif queries != keys and draw(st.booleans()):
        query_valid = torch.rand(batch, queries, generator=generator) < 0.8
    if causal:
        earlier = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        valid = earlier.expand(batch, 1, queries, keys) if valid is None else valid & earlier
    elif kind.startswith("holes") and queries == keys:
        assume(not hides_future(valid))  # which rules over several rows refuse
    return valid, query_valid


@st.composite
def calls(draw, config, kinds=("self", "causal", "cached", "cross"), holes=True):
    """Scores and pairs of one attention call that a configuration can serve."""
    kind = draw(st.sampled_from([kind for kind in kinds if kind != "cross" or not config.by_position]))
    batch, heads, keys = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    queries = draw({"cross": st.integers(1, 9), "cached": st.integers(1, keys)}.get(kind, st.just(keys)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    causal = kind in ("causal", "cached")
    valid, query_valid = draw(masks(batch, heads, queries, keys, generator, causal=causal, holes=holes))
    scores = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        scores = scores.round()  # many ties
    pairs = Pairs((batch, heads, queries, keys), scores.device, valid, query_valid, causal, kind == "cross")
    return scores, pairs


@st.composite
def configured_calls(draw, rule, **fixed):
    """A configuration of a rule with scores and pairs that it can serve."""
    config = draw(configs(rule, **fixed))
    scores, pairs = draw(calls(config))
    return config, scores, pairs


def valid_of(pairs):
    """Valid pairs `[B, H, Q, K]`."""
    return torch.ones(pairs.shape, dtype=torch.bool) if pairs.valid is None else pairs.valid.expand(pairs.shape)


def survivors(config, scores, pairs, **how):
    """The keep mask `[B, H, Q, K]` of a rule that selects."""
    return keep_mask(scores, pairs, select(config, pairs, **how).form).expand(scores.shape)


def result(config, scores, pairs, **how):
    """What a rule decides: the keep mask, or the weights where it replaces the softmax."""
    form = select(config, pairs, **how).form
    if isinstance(form, Normalizer):
        return form.normalize(scores, pairs.valid)
    return keep_mask(scores, pairs, form).expand(scores.shape)


def expected(config, scores, pairs, noise=None):
    """The oracle's keep mask `[B, H, Q, K]`."""
    settings = {
        name: getattr(config, name)
        for name in (*config.traits.settings, "heads")
        if name != "seed" and getattr(config, name) is not None
    }
    valid = valid_of(pairs).numpy()
    queries = np.ones(scores.shape[0:3:2], dtype=bool) if pairs.query_valid is None else pairs.query_valid.numpy()
    ranked = scores if noise is None else noise
    return torch.from_numpy(
        np.stack(
            [
                oracle.survivors(config.rule, ranked[b].double().numpy(), valid[b], queries[b], **settings)
                for b in range(len(scores))
            ]
        )
    )


def select_pairs(pairs, batch=None, heads=None):
    """The same pairs with examples and heads picked or reordered."""
    valid, query_valid = pairs.valid, pairs.query_valid
    shape = list(pairs.shape)
    if batch is not None:
        shape[0] = len(batch)
        valid = None if valid is None else valid[batch]
        query_valid = None if query_valid is None else query_valid[batch]
    if heads is not None:
        shape[1] = len(heads)
        valid = valid if valid is None or valid.shape[1] == 1 else valid[:, heads]
    return replace(pairs, shape=tuple(shape), valid=valid, query_valid=query_valid)
