"""The compiled backend where something around the call is unusual: torch's defaults, in-place changes, overflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import crisp_attention as crisp
from backends.test_cpu import assert_same, made
from cases import qkv
from crisp_attention.backends import Detail, cpu, reference
from crisp_attention.backends.cpu import kernels
from crisp_attention.config import SparsityConfig
from crisp_attention.rules import Pairs, select


def of(backend, *tensors, **settings):
    """Output and gradients."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    output = crisp.attention(*inputs, sparsity=0.5, backend=backend, **settings)
    return output.detach(), *torch.autograd.grad(output.square().sum(), inputs)


def assert_equal(ours, expected):
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    tensors = qkv(dtype=torch.float32)
    expected = of("cpu", *tensors)
    compiled = len(kernels.forward.dispatcher.signatures)
    torch.set_default_dtype(dtype)
    try:
        assert_equal(of("cpu", *tensors), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(kernels.forward.dispatcher.signatures) == compiled


def test_the_default_device_changes_nothing():
    tensors = qkv(dtype=torch.float32)
    with torch.device("meta"):
        ours = of("cpu", *tensors)
    assert_equal(ours, of("cpu", *tensors))


def test_a_mask_may_be_written_to_before_the_backward_pass():
    inputs = [x.requires_grad_() for x in qkv(queries=16, dtype=torch.float32)]
    query_valid = torch.arange(16).remainder(3)[None].expand(2, 16) > 0
    query_valid = query_valid.contiguous()
    output = crisp.attention(*inputs, rule="percentile", sparsity=0.5, query_valid=query_valid, backend="cpu")
    before = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    query_valid.logical_not_()
    after = torch.autograd.grad(output.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_changes_in_place_are_served_or_noticed():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float32))
    output = crisp.attention(q, k, v, sparsity=0.5, backend="cpu")
    expected = output.detach() * 2
    output.mul_(2.0)
    assert torch.equal(output.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    moved = q * 1.0
    output = crisp.attention(moved, k, v, sparsity=0.5, backend="cpu")
    moved.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_survivors_are_kept_for_backward_passes_alone():
    call = made()
    leaves = [x.float().requires_grad_() for x in (call.query, call.key, call.value)]
    call = replace(call, query=leaves[0], key=leaves[1], value=leaves[2])
    assert cpu._Plan.of(call).stores
    with torch.no_grad():
        assert not cpu._Plan.of(call).stores
    assert not cpu._Plan.of(
        replace(call, query=leaves[0].detach(), key=leaves[1].detach(), value=leaves[2].detach())
    ).stores


@pytest.mark.parametrize("rule", ["topk", "percentile"])
@pytest.mark.parametrize("min_keep", [100, 2**62, 2**70])
def test_more_keys_than_there_are_can_be_asked_for(rule, min_keep):
    tensors = qkv(dtype=torch.float32)
    ours, expected = (of(backend, *tensors, rule=rule, min_keep=min_keep) for backend in ("cpu", "reference"))
    assert_equal(ours, expected)


@pytest.mark.parametrize(
    ("queries", "keys", "rule", "reason"),
    [
        (2, 2**16, "percentile", None),
        (2, 2**16 + 1, "topk", "there are more than 65536 keys"),
        (2**16, 2**16, "topk", None),
        (2**16, 2**16 - 1, "percentile", None),
        (2**16, 2**16, "percentile", "a head has more than 4294967295 pairs to rank"),
    ],
)
def test_what_is_too_long_is_refused(queries, keys, rule, reason):
    query, key = (torch.zeros(()).expand(1, 1, count, 1) for count in (queries, keys))
    pairs = Pairs((1, 1, queries, keys), query.device)
    call = replace(made(), query=query, key=key, value=key, pairs=pairs)
    assert cpu.refusal(replace(call, selection=select(SparsityConfig(rule=rule, sparsity=0.5), pairs))) == reason


@pytest.mark.parametrize("rule", ["topk", "percentile"])
@pytest.mark.parametrize("masked", [None, torch.ones(1, 2, 9, 9).tril(5).bool()])
def test_scores_that_all_overflow_show(rule, masked):
    q, k, v = qkv(1, 2, 9, 9, 4, dtype=torch.float32)
    q[0, 0, 3], k = -1e25, k.abs() * 1e20
    masked = masked if rule == "topk" else None
    for backend in ("reference", "cpu"):
        output = crisp.attention(q, k, v, rule=rule, sparsity=0.5, valid=masked, backend=backend)
        assert output.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("rule", ["topk", "percentile"])
@pytest.mark.parametrize("keys", [None, slice(0, 30), slice(5, 37), slice(3, 40, 2)])
@pytest.mark.parametrize("shape", [(2, 4, 37, 37), (1, 1, 37, 37), (1, 1, 1, 37), (2, 1, 37, 1), (1, 4, 1, 1)])
def test_a_bias_of_any_layout_is_added(rule, keys, shape):
    generator = torch.Generator().manual_seed(1)
    bias = torch.randint(-3, 4, shape, generator=generator).double()
    layouts = [bias, bias.expand(2, 4, 37, 37), torch.stack((bias, -bias), dim=-1)[..., 0]]
    layouts.append(bias.transpose(-1, -2).contiguous().transpose(-1, -2))
    valid = None
    if keys is not None:
        valid = torch.zeros(2, 37, dtype=torch.bool)
        valid[:, keys] = True
    expected = None
    for layout in layouts:
        call = made((2, 4, 37, 37), 8, rule, bias=layout, valid=valid)
        call = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
        output = cpu.attention(call).output
        if expected is None:
            assert_same(call)
            expected = output
        assert torch.equal(output, expected)


@pytest.mark.parametrize("hole", [(0, 0, 4, 9), (1, 1, 36, 36)])
def test_pairs_that_are_hidden_one_by_one_stay_hidden(hole):
    valid = torch.ones(2, 4, 37, 37, dtype=torch.bool)
    valid[hole] = False
    strided = torch.stack((valid, valid), dim=-1)[..., 0]
    assert_same(made((2, 4, 37, 37), 8, valid=valid))
    assert_same(made((2, 4, 37, 37), 8, valid=strided))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_changes_neither_dtype_nor_ranks(backend):
    tensors = qkv(dtype=torch.float32)
    expected = crisp.attention(*tensors, sparsity=0.5, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = crisp.attention(*tensors, sparsity=0.5, backend=backend)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_values_say_which_dtype_comes_out():
    """Rotary positions leave queries and keys in float32 where autocast has made the values bfloat16."""
    call = made((1, 2, 9, 9), 8)
    call = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.bfloat16())
    assert {backend.attention(replace(call, detail=Detail.OUTPUT)).output.dtype for backend in (reference, cpu)} == {
        torch.bfloat16
    }
