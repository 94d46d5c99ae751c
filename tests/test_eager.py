"""What keeps the numbers of tensors from being read."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import crisp_attention as crisp
from crisp_attention import eager

GRAPH = "the call is part of a compiled graph"
TRANSFORM = "the call is part of a transform"


def seen(surround):
    """What `obstacle` says of a tensor within something that takes a function of tensors."""
    found = []

    def function(x):
        found.append(eager.obstacle(x))
        return x * 1

    surround(function)
    return found


def test_nothing_keeps_plain_tensors_from_being_read():
    x = torch.ones(2, requires_grad=True)
    assert eager.obstacle(x, torch.nn.Parameter(x), x.detach()) is None
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert eager.obstacle(x) is None


def test_transforms_are_seen():
    x = torch.ones(2)
    assert seen(lambda f: torch.func.vmap(f)(x)) == [TRANSFORM]
    assert seen(lambda f: torch.func.grad(lambda y: f(y).sum())(x)) == [TRANSFORM]
    assert seen(lambda f: make_fx(f)(x)) == [TRANSFORM]
    with FakeTensorMode():
        assert seen(lambda f: f(torch.ones(2))) == [TRANSFORM]
    with forward_ad.dual_level():
        assert seen(lambda f: f(forward_ad.make_dual(x, x))) == [TRANSFORM]
    assert seen(lambda f: f(x)) == [None]


def test_graphs_are_seen():
    x = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert seen(lambda f: torch.jit.trace(f, x, check_trace=False)) == [GRAPH]
    compiled = torch.compile(lambda y: y + (eager.obstacle(y) == GRAPH), backend="eager", fullgraph=True)
    assert compiled(x).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("settings", [{"rule": "topk"}, {"rule": "topk", "min_keep": 2, "keep_first": 1}], ids=str)
def test_a_traced_call_serves_other_lengths(settings):
    """How many keys survive follows the length, and is not built into the graph."""

    def attend(q, k, v):
        return crisp.attention(q, k, v, sparsity=0.5, **settings)

    def made(length):
        return torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(length)).unbind()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is old, and fixes what Python decides
        traced = torch.jit.trace(attend, made(12), check_trace=False)
    for length in (6, 12, 24, 41):
        torch.testing.assert_close(traced(*made(length)), attend(*made(length)))
