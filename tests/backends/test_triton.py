"""The GPU backend against the reference in float64, in Triton's interpreter unless TRITON_INTERPRET=0 was set.

The interpreter starts a program in about 50 ms, so that calls are small: a few heads, a few tiles.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crisp_attention as crisp
from crisp_attention.backends import Call, Detail, Dropout, reference
from crisp_attention.config import SparsityConfig
from crisp_attention.masks import read_pairs
from crisp_attention.operator import AttentionOutput
from crisp_attention.rules import select

pytest.importorskip("triton")

from crisp_attention.backends import triton as backend
from crisp_attention.backends.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() and not tiles.INTERPRETED else "cpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning"),
]


def made(
    shape=(1, 2, 37, 37), *, rule="topk", kv_heads=1, width=16, value_width=16, dtype=torch.float32, dropout=0.0,
    exact=True, seed=0, masked=None, detail=Detail.SUMMARY, **settings,
):  # fmt: skip
    """A call. If `exact`, its scores are whole numbers times a power of two: the same in every precision, with ties."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, queries, keys = shape

    def draw(*size):
        if exact:
            return torch.randint(-2, 3, size, generator=generator).to(DEVICE, dtype)
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    q, k = draw(batch, heads, queries, width), draw(batch, kv_heads, keys, width)
    v = torch.randn(batch, kv_heads, keys, value_width, generator=generator).to(DEVICE, dtype)
    masked = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in (masked or {}).items()}
    pairs, bias = read_pairs(shape, q.device, **masked)
    selection = None
    if rule is not None:
        settings = {"sparsity": 0.8} | settings if rule != "drop_topk" else settings
        selection = select(SparsityConfig(rule=rule, **settings), pairs)
    drawn = Dropout(dropout, torch.tensor(0x1234_5678_9ABC_DEF1, device=DEVICE)) if dropout else None
    return Call(q, k, v, pairs, selection, bias, 0.25, None, None, drawn, detail)


def results(module, call, dtype):
    """Output, gradients of queries, keys and values, kept pairs and entropies, all in float64."""
    inputs = [x.to(dtype).requires_grad_() for x in (call.query, call.key, call.value)]
    call = replace(call, query=inputs[0], key=inputs[1], value=inputs[2])
    computed = module.attention(call)
    shape = computed.output.shape
    towards = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    # Rounded as the call's, so that both get the same.
    gradients = torch.autograd.grad(computed.output, inputs, towards.to(call.value.device, dtype))
    out = AttentionOutput(call.pairs, computed, None)
    return [x.detach().double() for x in (computed.output, *gradients, out.counts.kept, out.entropy)]


def assert_same(call):
    """Within a few units in the last place of the call's dtype, times the size of what is summed."""
    assert backend.refusal(call) is None
    exact, found = results(reference, call, torch.float64), results(backend, call, call.query.dtype)
    unit = torch.finfo(call.query.dtype).eps
    for name, expected, ours in zip(("output", "dq", "dk", "dv", "kept", "entropy"), exact, found, strict=True):
        assert ours.shape == expected.shape, name
        if name == "kept":
            assert torch.equal(ours, expected), name
            continue
        budget = 16 * (torch.finfo(torch.float32).eps if name == "entropy" else unit)
        size = max(1.0, expected.nan_to_num().abs().max().item())
        torch.testing.assert_close(ours, expected, atol=budget * size, rtol=0, equal_nan=True, msg=f"{name} differs")


PADDED = torch.tensor([[False] * 3 + [True] * 20 + [False] * 5 + [True] * 6 + [False] * 3])


@pytest.mark.parametrize("rule", ["topk", "percentile", None])
@pytest.mark.parametrize("exact", [True, False], ids=["ties", "normal"])
def test_agrees_with_the_reference(rule, exact):
    assert_same(made(rule=rule, exact=exact))


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "topk"},
        {"rule": "percentile"},
        {"rule": "percentile", "count_padding": True},
        {"rule": "percentile", "min_keep": 3},
        {"rule": "bottomk"},
        {"rule": "drop_topk", "drop": 2},
        {"rule": "window"},
        {"rule": "random"},
        {"rule": "random", "scope": "matrix"},
        {"rule": "topk", "keep_first": 1, "keep_self": True, "heads": [1]},
        {"rule": "block_topk", "query_block": 4, "key_block": 8},
        {"rule": "block_topk", "query_block": 4, "key_block": 8, "heads": [0]},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_serves_rules_under_padding_with_dropout(settings):
    assert_same(made(masked={"valid": PADDED}, dropout=0.2, **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["topk", "percentile", "block_topk"])
def test_serves_half_precision(rule, dtype):
    assert_same(made((1, 2, 70, 70), rule=rule, dtype=dtype, width=32, value_width=64, dropout=0.1))


def test_serves_grouped_queries_causally_with_a_cache_and_a_bias():
    bias = torch.randint(-1, 2, (1, 4, 20, 41), generator=torch.Generator().manual_seed(5)).float()
    assert_same(made((1, 4, 20, 41), kv_heads=2, masked={"bias": bias, "causal": True}, dropout=0.3))


@pytest.mark.parametrize("rule", ["topk", None])
def test_a_module_that_calls_itself_causal_may_see_more_than_the_past(rule):
    """Prefix masks, or a decoder made to look both ways: what is valid, the mask alone says."""
    prefix = torch.ones(70, 70, dtype=torch.bool).tril()
    prefix[:50, :50] = True
    for valid in (torch.ones(1, 1, 70, 70, dtype=torch.bool), prefix[None, None]):
        call = made((1, 2, 70, 70), rule=rule, masked={"valid": valid})
        assert_same(replace(call, pairs=replace(call.pairs, causal=True)))


def test_heads_may_see_different_keys():
    valid = torch.ones(2, 2, 37, 37, dtype=torch.bool).tril()
    valid[0, 1], valid[1, 0, :, 20:] = True, False
    assert_same(made((2, 2, 37, 37), masked={"valid": valid}))


def test_serves_a_head_that_one_program_sees_whole_and_a_row_that_it_does_not_hold():
    valid = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])
    assert_same(made((2, 2, 9, 9), rule="percentile", sparsity=0.5, masked={"valid": valid}))
    split = tiles.plan(torch.float32, 37)
    assert split.held == 0
    assert tiles.plan(torch.float16, 70).held == 2
    assert_same(made((1, 1, 3, 140), sparsity=0.97, exact=False))


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("rule", ["topk", "percentile"])
def test_serves_a_sparsity_that_nobody_may_read(rule, sparsity):
    call = made((1, 1, 33, 33), rule=rule)
    selection = select(
        SparsityConfig(rule=rule, sparsity=0.5), call.pairs,
        sparsity=torch.tensor(sparsity, dtype=torch.float64, device=DEVICE),
    )  # fmt: skip
    assert_same(replace(call, selection=selection))


def test_queries_without_a_valid_key_give_zeros_and_zero_gradients():
    valid = torch.rand(1, 1, 37, 37, generator=torch.Generator().manual_seed(2)) < 0.5
    valid[..., 5:9, :] = False
    call = made((1, 1, 37, 37), masked={"valid": valid})
    assert_same(call)
    q = call.query.requires_grad_()
    output = backend.attention(call).output
    output.sum().backward()
    assert not output[..., 5:9, :].any()
    assert not q.grad[..., 5:9, :].any()
    assert q.grad.any()


@pytest.mark.parametrize("rule", ["topk", "percentile"])
def test_scores_that_are_no_numbers_show_in_their_row_alone(rule):
    call = made(rule=rule)
    call.query[0, 0, 3] = math.nan
    found, exact = (module.attention(call).output for module in (backend, reference))
    assert torch.equal(found.isnan(), exact.isnan())
    assert found[0, 0, 3].isnan().all()
    assert not found[0, 1].isnan().any()


def test_second_derivatives_are_refused():
    call = made((1, 1, 4, 4))
    inputs = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    output = backend.attention(call).output.sum()
    assert all(x.any() for x in torch.autograd.grad(output, inputs, retain_graph=True))
    with pytest.raises(crisp.ConfigurationError, match=r"second derivatives.*'triton'.*backend='reference'"):
        torch.autograd.grad(output, inputs, create_graph=True)


@settings(max_examples=6)
@given(data=st.data())
def test_agrees_for_any_call(data):
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    keys = data.draw(st.integers(1, 40))
    causal = data.draw(st.booleans())
    queries = data.draw(st.integers(1, keys))
    rule = data.draw(st.sampled_from(["topk"] if causal else ["topk", "percentile"]))
    seed = data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    masked = {"causal": causal}
    if data.draw(st.booleans()):
        masked["valid"] = torch.rand(1, keys, generator=generator) < 0.7
    if data.draw(st.booleans()):
        masked["bias"] = torch.randint(-2, 3, (queries, keys), generator=generator).float()
    assert_same(
        made(
            (1, heads[0], queries, keys), rule=rule, kv_heads=heads[1], seed=seed, masked=masked,
            sparsity=data.draw(st.floats(0.05, 0.95)), dropout=data.draw(st.sampled_from([0.0, 0.4])),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.zeros(1, 2, 37, 24), "key": torch.zeros(1, 1, 37, 24)}, "16, 32, 64 or 128 wide"),
        ({"query": torch.zeros(1, 2, 37, 16, dtype=torch.float64)}, "float16, bfloat16 and float32"),
        ({"detail": Detail.WEIGHTS}, "stores no weights"),
        ({"softcap": 2.0}, "soft-cap"),
        ({"sinks": torch.zeros(1, 2, 1, 1)}, "sinks"),
        ({"bias": torch.zeros(1, 1, 37, 37, requires_grad=True)}, "gradient for a bias"),
    ],
)
def test_says_what_it_cannot_serve(change, reason):
    assert reason in backend.refusal(replace(made(), **change))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rule": "nm", "sparsity": 0.5}, "neither a threshold nor a choice of blocks"),
        ({"gradient": "straight_through"}, "straight-through"),
        ({"rule": "block_topk", "keep_first": 1}, "without forced pairs"),
        ({"rule": "block_topk", "min_keep": 2}, "min_keep=1"),
        ({"rule": "block_topk", "masked": {"bias": torch.zeros(37, 37)}}, "without a bias"),
        ({"rule": "block_topk", "query_block": 1, "masked": {"causal": True}}, "the same for all queries"),
    ],
)
def test_says_which_rules_it_cannot_serve(arguments, reason):
    assert reason in backend.refusal(made(**arguments))


@pytest.mark.parametrize("which", ["bias", "valid"])
def test_a_mask_that_is_written_to_before_the_backward_pass_is_noticed(which):
    valid = torch.arange(9, device=DEVICE).expand(1, 1, 9, 9) < 8
    masks = {"bias": torch.zeros(9, 9, device=DEVICE), "valid": valid.contiguous()}
    call = made((1, 1, 9, 9))
    pairs, _ = read_pairs((1, 1, 9, 9), call.query.device, valid=masks["valid"])
    call = replace(call, pairs=pairs, bias=masks["bias"].view(1, 1, 9, 9), query=call.query.requires_grad_())
    output = backend.attention(call).output
    masks[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_transforms_are_refused():
    call = made((1, 1, 9, 9))
    q, k, v = call.query, call.key, call.value.expand(1, 1, 9, 16)
    with pytest.raises(crisp.ConfigurationError, match="the call is part of a transform"):
        torch.func.grad(lambda q: crisp.attention(q, k, v, sparsity=0.5, backend="triton").sum())(q)


def test_the_processor_never_gets_it_unless_it_is_asked_for(monkeypatch):
    call = made()
    assert crisp.backends.choose("auto", replace(call, query=call.query.cpu())).name != "triton" or DEVICE == "cuda"
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(crisp.ConfigurationError, match=r"backend='triton' cannot serve this call: .*'cpu' instead of"):
        crisp.attention(q, q, q, sparsity=0.5, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels_of_a_call_compile_to_one_instruction_for_products(capability, tmp_path):
    """The interpreter forgives much that the compiler does not; no GPU is needed to compile for one."""
    here = Path(__file__).parent
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
    }
    command = [sys.executable, "-m", "absent_gpu", capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for products in json.loads(done.stdout):
        assert set(products) >= {"_forward_kernel", "_key_gradient_kernel", "_query_gradient_kernel", "_search_kernel"}
        # One instruction for all: scores are alike to the last bit.
        assert len({tuple(found) for found in products.values()}) == 1, products
        assert all(len(found) == 1 for found in products.values()), products
