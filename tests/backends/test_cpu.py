"""The compiled backend against the reference in float64, over whatever a call may be."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import crisp_attention as crisp
from cases import masks, settings_of
from crisp_attention.backends import Call, Detail, Dropout, cpu, reference
from crisp_attention.backends.cpu import kernels
from crisp_attention.backends.cpu.threshold import level_of, memory_of_levels
from crisp_attention.backends.cpu.writer import PANEL, WIDTHS
from crisp_attention.config import SparsityConfig
from crisp_attention.masks import hides_future, read_pairs
from crisp_attention.operator import AttentionOutput
from crisp_attention.rules import Threshold, select

RULES = ["bottomk", "drop_topk", "percentile", "random", "topk", "window"]


@st.composite
def calls(draw, rule):
    """A call in float64 whose scores are exact in float32, so that both see the same ties, and its settings.

    Queries and keys are small whole numbers and the scale is a power of two.
    """
    settings = draw(settings_of(rule))
    settings.pop("gradient", None)
    config = SparsityConfig(**settings)
    batch, groups, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, keys = groups * kv_heads, draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 40])))
    causal = config.per_row and draw(st.booleans())
    queries = keys if config.by_position and not causal else draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    depth, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    spread = draw(st.sampled_from([2, 5, 100]))

    def whole(*shape):
        return torch.randint(-spread, spread + 1, shape, generator=generator).double()

    q, k = whole(batch, heads, queries, depth), whole(batch, kv_heads, keys, depth)
    v = torch.randn(batch, kv_heads, keys, width, generator=generator, dtype=torch.float64)
    valid, query_valid = draw(masks(batch, heads, queries, keys, generator))
    bias = None
    if draw(st.booleans()):
        bias = torch.randint(-3, 4, (heads, queries, keys), generator=generator).double()
    pairs, bias = read_pairs(
        (batch, heads, queries, keys), q.device, valid=valid, query_valid=query_valid, bias=bias, causal=causal
    )
    assume(config.per_row or pairs.valid is None or queries != keys or not hides_future(pairs.valid))
    if draw(st.booleans()):
        config = config.replace(heads=[draw(st.integers(0, heads - 1))])
    dropout = Dropout(draw(st.sampled_from([0.1, 0.5])), torch.tensor(draw(st.integers(0, 2**62 - 1))))
    selection = select(config, pairs, training=draw(st.booleans()))
    assume(isinstance(selection.form, Threshold))
    return Call(
        q, k, v, pairs, selection, bias, 2.0 ** draw(st.integers(-6, 0)), None, None,
        draw(st.sampled_from([None, dropout])), Detail.SUMMARY,
    )  # fmt: skip


def results(backend, call, dtype):
    """Output, gradients of queries, keys and values, kept pairs and entropies."""
    inputs = [x.to(dtype).requires_grad_() for x in (call.query, call.key, call.value)]
    bias = None if call.bias is None else call.bias.to(dtype)
    call = replace(call, query=inputs[0], key=inputs[1], value=inputs[2], bias=bias)
    computed = backend.attention(call)
    shape = computed.output.shape
    towards = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)
    gradients = torch.autograd.grad(computed.output, inputs, towards)
    out = AttentionOutput(call.pairs, computed, None)
    return computed.output.detach(), *gradients, out.counts.kept, out.entropy


def assert_same(call):
    assert cpu.refusal(replace(call, query=call.query.float())) is None
    exact, ours = results(reference, call, torch.float64), results(cpu, call, torch.float32)
    names = ("output", "dq", "dk", "dv", "kept", "entropy")
    for name, expected, found in zip(names, exact, ours, strict=True):
        assert found.shape == expected.shape, name
        if name == "kept":
            assert torch.equal(found, expected), name
            continue
        # Gradients are differences of numbers as large as the inputs.
        scale = max(1.0, *(x.nan_to_num().abs().max().item() for x in (expected, call.query, call.key)))
        torch.testing.assert_close(
            found.double(), expected, atol=1e-5 * scale, rtol=2e-5, equal_nan=True, msg=f"{name} differs"
        )


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_agrees_with_the_reference_for_any_call(rule, data):
    assert_same(data.draw(calls(rule)))


def made(shape=(2, 4, 40, 40), width=32, rule="topk", sparsity=0.8, dropout=None, spread=5, **masked):
    """A call with exact scores."""
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(3)
    q, k = (
        torch.randint(-spread, spread + 1, (batch, heads, n, width), generator=generator).double()
        for n in (queries, keys)
    )
    v = torch.randn(batch, heads, keys, width, generator=generator, dtype=torch.float64)
    pairs, bias = read_pairs(shape, q.device, **masked)
    selection = select(SparsityConfig(rule=rule, sparsity=sparsity), pairs)
    return Call(q, k, v, pairs, selection, bias, 0.125, None, None, dropout, Detail.SUMMARY)


@pytest.mark.parametrize("width", sorted({1, 7, *WIDTHS, *(width - 3 for width in WIDTHS)}))
@pytest.mark.parametrize("rule", ["topk", "percentile"])
def test_serves_every_head_width(width, rule):
    assert_same(made((1, 2, 20, 20), width, rule, dropout=Dropout(0.2, torch.tensor(5))))


@pytest.mark.parametrize("rule", ["topk", "percentile"])
@pytest.mark.parametrize("length", [255, 256, 300])
def test_serves_long_sequences(rule, length):
    assert_same(made((1, 1, length, length), 16, rule, spread=40))


@pytest.mark.parametrize("rule", ["topk", "percentile", "bottomk"])
def test_ties_all_survive_however_many_there_are(rule):
    """More survivors than anyone could foresee: the room for them is made."""
    call = made((2, 2, 64, 64), rule=rule, spread=1)
    kept = results(cpu, call, torch.float32)[4]
    assert (kept > 64 * 13 + 64 // 8 + 32).any()
    assert_same(call)
    flat = replace(call, query=torch.zeros_like(call.query))
    assert results(cpu, flat, torch.float32)[4].unique().tolist() == [64 * 64]
    assert_same(flat)


def test_queries_without_a_valid_key_give_zeros():
    valid = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    valid[0, :, 4] = False
    valid[1] = False
    call = made((2, 3, 9, 9), valid=valid, query_valid=torch.ones(2, 9, dtype=torch.bool))
    output, dq, *_ = results(cpu, call, torch.float32)
    assert (output[0, :, 4] == 0).all()
    assert (output[1] == 0).all()
    assert (dq[1] == 0).all()
    assert_same(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_in_float32(dtype):
    call = made((1, 2, 30, 30))
    half = results(cpu, call, dtype)
    full = results(cpu, call, torch.float32)
    assert half[0].dtype == half[1].dtype == dtype
    assert torch.equal(half[4], full[4])
    torch.testing.assert_close(half[0].float(), full[0], atol=2e-2, rtol=2e-2)


def test_nan_shows():
    call = made((1, 1, 8, 8))
    query = call.query.clone()
    query[0, 0, 3] = torch.nan
    output = results(cpu, replace(call, query=query), torch.float32)[0]
    assert output[0, 0, 3].isnan().all()
    assert not output[0, 0, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


def test_any_strides_are_read_and_inputs_left_alone():
    call = made((2, 3, 12, 12), 8)
    whole = results(cpu, call, torch.float32)
    strided = torch.stack((call.query, call.query), dim=-1)[..., 0]
    broadcast = call.value[:, :1].expand_as(call.value)
    assert strided.stride(-1) != 1
    others_first = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    for changed in (replace(call, query=strided), replace(call, query=others_first)):
        before = changed.query.clone()
        for mine, expected in zip(results(cpu, changed, torch.float32), whole, strict=True):
            torch.testing.assert_close(mine, expected, equal_nan=True)
        assert torch.equal(changed.query, before)
    assert_same(replace(call, value=broadcast))


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_gradients_of_what_lies_transposed_in_memory(which):
    call = made((2, 3, 12, 12), 8)
    tensor = getattr(call, which).float()
    transposed = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert transposed.stride(-1) != 1
    for mine, expected in zip(
        results(cpu, replace(call, **{which: transposed}), torch.float32),
        results(cpu, call, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, equal_nan=True)


@pytest.mark.parametrize("rule", ["topk", "percentile"])
def test_threads_change_nothing(rule):
    call = made((3, 4, 33, 33), 32, rule, dropout=Dropout(0.3, torch.tensor(1)))
    before = torch.get_num_threads()
    try:
        by_threads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_threads.append(results(cpu, call, torch.float32))
    finally:
        torch.set_num_threads(before)
    for others in by_threads[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(by_threads[0], others, strict=True))


def _in_child(queue):
    torch.set_num_threads(2)
    queue.put(results(cpu, made((2, 2, 12, 12)), torch.float32)[0].sum().item())


def test_a_forked_child_computes_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = results(cpu, made((2, 2, 12, 12)), torch.float32)[0].sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == here
        child.join()
    finally:
        torch.set_num_threads(before)


def test_gradients_reach_twice_but_not_their_own():
    call = made((1, 1, 6, 6), 4)
    inputs = [x.float().requires_grad_() for x in (call.query, call.key, call.value)]
    output = cpu.attention(replace(call, query=inputs[0], key=inputs[1], value=inputs[2])).output.sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(output, inputs), strict=True))
    output = crisp.attention(*inputs, sparsity=0.5, backend="cpu").sum()
    with pytest.raises(crisp.ConfigurationError, match=r"second derivatives.*backend='reference'"):
        torch.autograd.grad(output, inputs[:1], create_graph=True)


def test_a_bias_that_learns_is_served_where_nobody_wants_its_gradient():
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    call = made((1, 2, 6, 6), 4)
    call = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float(), bias=bias)
    assert cpu.refusal(call) == "the bias wants a gradient"
    with torch.no_grad():
        assert cpu.refusal(call) is None
        exact, ours = (module.attention(call).output for module in (reference, cpu))
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_a_kernel_is_compiled_once_however_masks_and_tensors_lie_in_memory():
    by_key = torch.ones(2, 40, dtype=torch.bool).index_fill(1, torch.tensor([3]), False)
    by_pair = ((torch.arange(40) - torch.arange(40)[:, None]).abs() < 30)[None, None]
    assert_same(made())
    compiled = len(kernels.forward.dispatcher.signatures), len(kernels.backward.dispatcher.signatures)
    for masked in (
        {"valid": by_key},
        {"valid": by_pair},
        {"valid": by_pair.expand(2, 4, 40, 40).contiguous(), "query_valid": by_key},
        {"bias": torch.eye(40, dtype=torch.float64)},
        {"bias": torch.eye(40, dtype=torch.float64).expand(2, 4, 40, 40).contiguous()},
    ):
        for rule in ("percentile", "random"):
            assert_same(made(rule=rule, **masked))
    call = made()
    assert_same(replace(call, query=call.query.transpose(1, 2).contiguous().transpose(1, 2)))
    assert (len(kernels.forward.dispatcher.signatures), len(kernels.backward.dispatcher.signatures)) == compiled


VALUES = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1.0, math.inf, 1e-45, -1e-45, 3e38, math.nan]),
    st.integers(-3, 3).map(float),
)


@given(values=st.lists(VALUES, min_size=1, max_size=70), k=st.integers(0, 75), repeat=st.integers(1, 3))
@example(values=[1e18, 3e38], k=1, repeat=1)
@example(values=[math.inf, -math.inf], k=2, repeat=1)
def test_the_level_tells_the_k_best_from_the_rest(values, k, repeat):
    values = values * repeat
    padded = -(-len(values) // PANEL) * PANEL
    array = np.full(padded, -np.inf, np.float32)
    array[: len(values)] = values
    level = level_of(array, 0, padded, k, memory_of_levels())
    survivors = ~(array < level) & (array != -np.inf)
    if k == 0:
        assert survivors.sum() == np.isnan(array).sum() + (array == np.inf).sum()
        return
    ordered = np.sort(np.where(np.isnan(array), np.inf, array))[::-1]
    expected = ~(array < ordered[min(k, padded) - 1]) & (array != -np.inf)
    assert np.array_equal(survivors, expected)


@pytest.mark.parametrize("kind", ["normal", "uniform", "exponential", "two clusters", "outlier", "few values"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_the_level_is_found_in_any_distribution(kind, share):
    draw = np.random.default_rng(0)
    size = 64 * PANEL
    array = {
        "normal": draw.normal(size=size),
        "uniform": draw.random(size),
        "exponential": draw.exponential(size=size) ** 3,
        "two clusters": draw.normal(size=size) * 1e-4 + draw.integers(0, 2, size) * 1e4,
        "outlier": np.concatenate((draw.normal(size=size - 1), [1e20])),
        "few values": draw.integers(0, 3, size),
    }[kind].astype(np.float32)
    k = max(1, int(share * size))
    survivors = ~(array < level_of(array, 0, size, k, memory_of_levels()))
    assert np.array_equal(survivors, array >= np.sort(array)[::-1][k - 1])
