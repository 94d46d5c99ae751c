"""The rules that replace the softmax: temperature, 1.5-entmax and sparsemax."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import crisp_attention as crisp
import oracle
from cases import NORMALIZERS, SPARSITY, calls, configs, expected, few, result, valid_of
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import Pairs, normalizers, select


def pairs_of(scores, valid=None):
    return Pairs(tuple(scores.shape), scores.device, valid)


def entropies(weights):
    return torch.special.entr(weights).sum(-1)


@pytest.mark.parametrize("rule", NORMALIZERS)
@few
@given(data=st.data())
def test_agrees_with_the_oracle(rule, data):
    config = data.draw(configs(rule))
    scores, pairs = data.draw(calls(config))
    settings = {name: value for name, value in config.to_dict().items() if name in ("sparsity", "entropy")}
    normalize = oracle.normalizer(rule, **settings)
    weights, valid = result(config, scores, pairs).numpy(), valid_of(pairs).numpy()
    for b in range(len(scores)):
        wanted = oracle.weights_of(scores[b].numpy(), valid[b], normalize=normalize)
        np.testing.assert_allclose(weights[b], wanted, atol=1e-6)


@few
@given(data=st.data(), sparsity=SPARSITY)
def test_temperature_has_the_entropy_of_topk(data, sparsity):
    config = SparsityConfig(rule="temperature", sparsity=sparsity)
    scores, pairs = data.draw(calls(config))
    scores = torch.randn(scores.shape, generator=torch.Generator().manual_seed(len(scores)), dtype=scores.dtype)
    keep = expected(config.replace(rule="topk"), scores, pairs)
    rival = torch.stack([torch.from_numpy(oracle.weights_of(scores[b].numpy(), keep[b])) for b in range(len(scores))])
    torch.testing.assert_close(entropies(result(config, scores, pairs)), entropies(rival), atol=1e-6, rtol=0)


def test_temperature_leaves_a_query_alone_that_is_sharp_already():
    scores = torch.tensor([[[[9.0, 0.0, 0.0], [0.2, 0.1, 0.0]]]], dtype=torch.float64)
    weights = result(SparsityConfig(rule="temperature", entropy=0.5), scores, pairs_of(scores))
    assert torch.equal(weights[0, 0, 0], scores[0, 0, 0].softmax(-1))
    assert entropies(weights[0, 0, 1]).item() == pytest.approx(0.5, abs=1e-9)


def test_temperature_has_the_gradient_of_a_softmax_where_it_leaves_a_query_alone():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    weights = result(SparsityConfig(rule="temperature", entropy=1.7), scores, pairs_of(scores))
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), scores)
    (plain,) = torch.autograd.grad((scores.softmax(-1) * upstream).sum(), scores)
    assert torch.equal(gradient, plain)


def test_temperature_stops_where_the_best_scores_tie():
    """No inverse temperature takes two equal scores below log 2; both then share the weight."""
    scores = torch.tensor([[[[1.0, 1.0, 0.5, 0.0]]]], requires_grad=True)
    weights = result(SparsityConfig(rule="temperature", entropy=0.1), scores, pairs_of(scores))
    torch.testing.assert_close(weights, torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]]))
    weights[..., 0].sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_temperature_removes_nothing():
    q, k, v = (torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    valid = (torch.arange(9) < 7)[None]
    out = crisp.attention(8 * q, k, v, rule="temperature", sparsity=0.9, valid=valid, return_details=True)
    assert (out.counts.sparsity == 0).all()
    everything = crisp.attention(8 * q, k, v, rule="temperature", sparsity=0.9, heads=[1], return_details=True)
    assert everything.keep.all()


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.6}, {"sparsity": 0.3}, {"entropy": 0.9}, {"entropy": 0.3}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_temperature_is_differentiated_through_its_solution(settings, masked):
    """The gradient is that of a beta solved for anew at each point, as finite differences see it."""
    scores = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    valid = (torch.arange(6) != 2).expand(1, 1, 3, 6) if masked else None
    form = select(SparsityConfig(rule="temperature", **settings), pairs_of(scores, valid)).form
    assert torch.autograd.gradcheck(lambda scores: form.normalize(scores, valid), scores)
    held = form.normalize(scores, valid)
    beta = (held[0, 0, 0, 0] / held[0, 0, 0, 1]).log() / (scores[0, 0, 0, 0] - scores[0, 0, 0, 1])
    (moving,) = torch.autograd.grad(form.normalize(scores, valid)[0, 0, 0, 0], scores)
    naive = torch.where(torch.ones(6).bool() if valid is None else valid[0, 0, 0], scores[0, 0, 0], -torch.inf)
    (fixed,) = torch.autograd.grad((naive * beta.detach()).softmax(-1)[0], scores)
    assert not torch.allclose(moving, fixed, atol=1e-4)


@pytest.mark.parametrize("rule", ["entmax15", "sparsemax"])
@few
@given(data=st.data())
def test_entmax_rules_equal_the_package_on_the_valid_keys(rule, data):
    entmax = pytest.importorskip("entmax")
    config = SparsityConfig(rule=rule)
    scores, pairs = data.draw(calls(config))
    weights, valid = result(config, scores, pairs), valid_of(pairs)
    for b, h, i in valid.any(-1).nonzero().tolist():
        own = valid[b, h, i]
        torch.testing.assert_close(weights[b, h, i, own], getattr(entmax, rule)(scores[b, h, i, own], dim=-1))


@pytest.mark.parametrize("rule", ["entmax15", "sparsemax"])
def test_the_support_of_entmax_is_what_survives(rule):
    q, k, v = (torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    out = crisp.attention(4 * q, k, v, rule=rule, return_details=True)
    assert torch.equal(out.keep, out.weights > 0)
    assert 0.2 < out.counts.sparsity.mean() < 0.9


def test_sparsemax_is_sparser_than_entmax15():
    scores = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    support = {
        rule: (result(SparsityConfig(rule=rule), 2 * scores, pairs_of(scores)) > 0).sum()
        for rule in ("entmax15", "sparsemax")
    }
    assert support["sparsemax"] < support["entmax15"]


@pytest.mark.parametrize("rule", NORMALIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_diverge_show_in_their_row_alone(rule, bad, masked):
    scores = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 1, 0] = bad
    scores[0, 0, :, 3] = bad if masked else 0.0
    valid = (torch.arange(4) < 3).expand(1, 1, 3, 4) if masked else None
    weights = result(SparsityConfig(rule=rule), scores, pairs_of(scores, valid))
    assert torch.isnan(weights[0, 0, 1, :3]).all()
    assert torch.isfinite(weights[0, 0, [0, 2]]).all()


@pytest.mark.parametrize("rule", NORMALIZERS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_scores_of_any_size_give_finite_weights_and_gradients(rule, scale):
    scores = (scale * torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[0, :, 2], valid[1, :, :, 4:] = False, False
    weights = result(SparsityConfig(rule=rule), scores, pairs_of(scores, valid))
    torch.testing.assert_close(weights.sum(-1), valid.any(-1).expand(2, 2, 5).float())
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[~valid.expand_as(scores)] == 0).all()


@pytest.mark.parametrize("rule", ["entmax15", "sparsemax"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(rule, monkeypatch):
    monkeypatch.setattr(normalizers, "_LOADED", {})
    monkeypatch.setitem(sys.modules, "entmax", None)
    monkeypatch.setattr(normalizers, "_LOADED", {})
    with pytest.raises(crisp.ConfigurationError, match=r"pip install 'crisp-attention\[entmax\]'"):
        select(SparsityConfig(rule=rule), Pairs((1, 1, 2, 2), torch.device("cpu")))


@pytest.mark.parametrize("rule", NORMALIZERS)
def test_sinks_belong_to_the_softmax_and_are_refused(rule):
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    with pytest.raises(crisp.ConfigurationError, match=r"attention sinks .* cannot have both"):
        crisp.attention(q, k, v, rule=rule, sinks=torch.zeros(2))
