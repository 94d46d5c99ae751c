"""Gradients of the operator: selected, straight-through, and of the rules that replace the softmax."""

from __future__ import annotations

import math

import pytest
import torch

import crisp_attention as crisp
from cases import SELECTIONS, qkv
from crisp_attention.traits import RULES


@pytest.mark.parametrize("extra", [{}, {"heads": [1]}, {"softcap": 2.0}], ids=lambda extra: "".join(extra))
@pytest.mark.parametrize("rule", sorted(RULES))
def test_gradcheck(rule, extra):
    q, k, v = (tensor.requires_grad_() for tensor in qkv(batch=1, heads=2, queries=5, keys=5, width=3))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    valid = torch.ones(1, 5, dtype=torch.bool)
    valid[0, -1] = False
    strength = {"sparsity": 0.5} if "sparsity" in RULES[rule].strengths else {}
    selecting = {"min_keep": 2} if "min_keep" in RULES[rule].settings else {}

    def function(*inputs):
        return crisp.attention(
            *inputs[:3], bias=inputs[3], rule=rule, valid=valid, **strength, **selecting, **extra
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


def test_gradcheck_with_sinks():
    q, k, v = (tensor.requires_grad_() for tensor in qkv(batch=1, heads=2, queries=4, keys=4, width=3))
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, True, False, True]])

    def function(q, k, v, sinks):
        return crisp.attention(q, k, v, sparsity=0.5, min_keep=2, sinks=sinks, valid=valid)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks))


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize("heads", [None, [1]])
def test_straight_through_gradients_reach_the_scores_as_if_dense(rule, heads):
    """The closed form of a softmax's gradient, at the weights of dense attention: p * (g - p.g)."""
    q, k, v = qkv(batch=1, heads=2, queries=6, keys=6)
    bias = torch.zeros(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    valid = (torch.arange(6) < 5)[None]
    settings = {"rule": rule, "bias": bias, "valid": valid, "heads": heads}
    out = crisp.attention(q, k, v, gradient="straight_through", return_details=True, **settings)
    plain = crisp.attention(q, k, v, return_details=True, **settings)
    assert torch.equal(out.output, plain.output)
    assert torch.equal(out.keep, plain.keep)
    upstream = torch.randn(out.output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out.output * upstream).sum(), bias)
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    dense = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    g = upstream @ v.transpose(-1, -2)
    torch.testing.assert_close(gradient, dense * (g - (dense * g).sum(-1, keepdim=True)))
    if not plain.keep[0, 1, :5, :5].all():
        (selected,) = torch.autograd.grad((plain.output * upstream).sum(), bias)
        assert (selected[~plain.keep] == 0).all()
        assert not torch.allclose(selected[:, 1], gradient[:, 1])


def test_straight_through_gradients_reach_a_head_of_one_survivor():
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    for gradient, reached in (("selected", False), ("straight_through", True)):
        q.grad = None
        crisp.attention(q, k, v, sparsity=0.99, gradient=gradient).square().sum().backward()
        assert bool(q.grad.abs().max() > 1e-9) is reached


def test_straight_through_values_come_from_the_survivors():
    """The values' gradient is that of the weights used, not of dense ones."""
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    grads = [
        torch.autograd.grad(crisp.attention(q, k, v, sparsity=0.6, gradient=gradient).sum(), v)[0]
        for gradient in ("selected", "straight_through")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_fully_masked_rows_give_zeros_and_finite_gradients(rule):
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    valid = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    valid[0, :, 2] = False
    valid[1] = False
    out = crisp.attention(q, k, v, rule=rule, valid=valid)
    assert (out[0, :, 2] == 0).all()
    assert (out[1] == 0).all()
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[1] == 0).all()
    assert (q.grad[0, :, 2] == 0).all()
