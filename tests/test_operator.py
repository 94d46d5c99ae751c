from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import crisp_attention as crisp
import oracle

SPARSITIES = st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.75, 0.8, 0.9, 0.99])


def qkv(batch=2, heads=3, queries=7, keys=7, width=8, dtype=torch.float64, seed=0, kv_heads=None):
    draw = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    return tuple(
        torch.randn(batch, count, length, width, generator=draw, dtype=torch.float64).to(dtype)
        for count, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )


@pytest.mark.parametrize("rule", ["percentile", "topk"])
@given(
    sparsity=SPARSITIES,
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    min_keep=st.integers(1, 3),
    biased=st.booleans(),
    count_padding=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_agrees_with_the_oracle(rule, sparsity, queries, keys, min_keep, biased, count_padding, seed):
    q, k, v = qkv(queries=queries, keys=keys, seed=seed)
    draw = np.random.default_rng(seed)
    valid = draw.random((2, 1, queries, keys)) < 0.7
    query_valid = draw.random((2, queries)) < 0.8
    bias = draw.normal(size=(1, 3, queries, keys)) if biased else None
    out = crisp.attention(
        q,
        k,
        v,
        sparsity=sparsity,
        rule=rule,
        valid=torch.from_numpy(valid),
        query_valid=torch.from_numpy(query_valid),
        bias=None if bias is None else torch.from_numpy(bias),
        min_keep=min_keep,
        count_padding=count_padding,
        return_details=True,
    )
    for b in range(2):
        for h in range(3):
            scores = oracle.scores_of(
                q[b, h].numpy(), k[b, h].numpy(), None if bias is None else bias[0, h], 1 / math.sqrt(8)
            )
            if rule == "percentile":
                mask = oracle.percentile_mask(scores, valid[b, 0], query_valid[b], sparsity, min_keep, count_padding)
            else:
                mask = oracle.topk_mask(scores, valid[b, 0], sparsity, min_keep, count_padding)
            np.testing.assert_array_equal(out.keep[b, h].numpy(), mask)
            expected = oracle.attend(scores, mask, v[b, h].numpy())
            np.testing.assert_allclose(out.output[b, h].numpy(), expected, atol=1e-12)
            counted = valid[b, 0] & query_valid[b][:, None]
            assert out.counts.valid[b, h] == counted.sum()
            assert out.counts.kept[b, h] == (mask & counted).sum()


@pytest.mark.parametrize("rule", ["percentile", "topk", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sparsity_zero_is_dense_attention(rule, dtype):
    q, k, v = qkv(dtype=dtype)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    out = crisp.attention(q, k, v, sparsity=0.0, rule=rule, valid=valid)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=valid[:, None, None, :])
    assert out.dtype == dtype
    budget = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), dense, atol=budget, rtol=budget)


def test_causal_equals_an_explicit_mask():
    q, k, v = qkv(queries=4, keys=7)
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3)
    a = crisp.attention(q, k, v, sparsity=0.5, rule="topk", causal=True)
    b = crisp.attention(q, k, v, sparsity=0.5, rule="topk", valid=mask[None, None])
    torch.testing.assert_close(a, b)


def test_random_draws_by_position_or_refuses():
    """A causal query draws alike with a cache or without; cross-attention has no positions to draw by."""
    q, k, v = qkv(queries=7, keys=7)
    whole = crisp.attention(q, k, v, sparsity=0.5, rule="random", causal=True)
    last = crisp.attention(q[:, :, 4:], k, v, sparsity=0.5, rule="random", causal=True)
    torch.testing.assert_close(last, whole[:, :, 4:])
    with pytest.raises(crisp.ConfigurationError, match="4 queries over 7 keys"):
        crisp.attention(q[:, :, :4], k, v, sparsity=0.5, rule="random")


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_may_mark_invalid_pairs_by_infinity_or_the_lowest_value(lowest):
    q, k, v = qkv(dtype=torch.float32)
    bias = torch.zeros(7, 7).masked_fill(torch.arange(7) > 3, lowest)
    a = crisp.attention(q, k, v, sparsity=0.5, bias=bias)
    b = crisp.attention(q, k, v, sparsity=0.5, valid=(torch.arange(7) < 4).expand(2, 7))
    torch.testing.assert_close(a, b)


def test_a_bias_of_nan_shows():
    q, k, v = qkv()
    bias = torch.zeros(7, 7, dtype=torch.float64)
    bias[2, 3] = torch.nan
    assert torch.isnan(crisp.attention(q, k, v, sparsity=0.5, bias=bias)[:, :, 2]).all()


def test_autocast_does_not_reach_the_selection():
    q, k, v = qkv(batch=4, heads=8, queries=40, keys=40, width=32, dtype=torch.float32)
    plain = crisp.attention(q, k, v, sparsity=0.8, rule="percentile", return_details=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = crisp.attention(q, k, v, sparsity=0.8, rule="percentile", return_details=True)
    assert torch.equal(plain.keep, cast.keep)


def test_grouped_query_attention_equals_repeated_heads():
    q, k, v = qkv(heads=6, kv_heads=2)
    grouped = crisp.attention(q, k, v, sparsity=0.5, rule="percentile")
    repeated = crisp.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), sparsity=0.5, rule="percentile")
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("rule", ["percentile", "topk", "random"])
def test_gradcheck(rule):
    q, k, v = (tensor.requires_grad_() for tensor in qkv(batch=1, heads=2, queries=5, keys=5, width=3))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    valid = torch.ones(1, 5, dtype=torch.bool)
    valid[0, -1] = False

    def function(*inputs):
        return crisp.attention(*inputs[:3], bias=inputs[3], sparsity=0.5, rule=rule, valid=valid, min_keep=2)

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


@pytest.mark.parametrize("rule", ["percentile", "topk", "random"])
def test_fully_masked_rows_give_zeros_and_finite_gradients(rule):
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    valid = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    valid[0, :, 2] = False
    valid[1] = False
    out = crisp.attention(q, k, v, sparsity=0.5, rule=rule, valid=valid)
    assert (out[0, :, 2] == 0).all()
    assert (out[1] == 0).all()
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[1] == 0).all()
    assert (q.grad[0, :, 2] == 0).all()


def test_bias_of_minus_infinity_marks_invalid_pairs():
    q, k, v = qkv()
    bias = torch.zeros(7, 7, dtype=torch.float64)
    bias[:, 4:] = -torch.inf
    valid = torch.arange(7) < 4
    a = crisp.attention(q, k, v, sparsity=0.5, rule="percentile", bias=bias)
    b = crisp.attention(q, k, v, sparsity=0.5, rule="percentile", valid=valid.expand(2, 7))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("tokens", "share_kept"), [(25, 1.0), (40, 0.64), (64, 0.40), (128, 0.20)], ids=lambda value: str(value)
)
def test_counting_padding_reproduces_the_near_dense_percentile(tokens, share_kept):
    """What an 80% percentile over a matrix padded to 128 really keeps (keys masked, padded rows counted)."""
    q, k, v = qkv(batch=1, heads=4, queries=128, keys=128, seed=tokens)
    valid = (torch.arange(128) < tokens)[None]
    everything = torch.ones(1, 128, dtype=torch.bool)
    out = crisp.attention(
        q, k, v, sparsity=0.8, rule="percentile", valid=valid, query_valid=everything,
        count_padding=True, return_details=True,
    )  # fmt: skip
    assert out.counts.valid.unique().item() == 128 * tokens
    kept = (out.counts.kept / out.counts.valid).mean().item()
    assert kept == pytest.approx(share_kept, abs=0.01)
    honest = crisp.attention(q, k, v, sparsity=0.8, rule="percentile", valid=valid, return_details=True)
    assert honest.counts.sparsity.mean().item() == pytest.approx(0.8, abs=0.01)


def test_random_has_the_density_of_what_it_controls_for():
    q, k, v = qkv(batch=3, heads=4, queries=20, keys=20)
    valid = torch.arange(20).expand(3, 20) < torch.tensor([[20], [13], [6]])
    for scope, rule in (("row", "topk"), ("matrix", "percentile")):
        control = crisp.attention(
            q, k, v, sparsity=0.7, rule="random", scope=scope, valid=valid, return_details=True
        )  # fmt: skip
        rival = crisp.attention(q, k, v, sparsity=0.7, rule=rule, valid=valid, return_details=True)
        if scope == "row":
            assert torch.equal(control.counts.kept, rival.counts.kept)
        torch.testing.assert_close(control.counts.sparsity, rival.counts.sparsity, atol=0.06, rtol=0)
        assert not torch.equal(control.keep, rival.keep)


def test_random_uses_its_own_stream():
    q, k, v = qkv()
    state = torch.random.get_rng_state()
    draws = torch.Generator().manual_seed(3)
    first = crisp.attention(q, k, v, sparsity=0.5, rule="random", generator=draws)
    second = crisp.attention(q, k, v, sparsity=0.5, rule="random", generator=draws)
    again = crisp.attention(q, k, v, sparsity=0.5, rule="random", generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_random_differs_between_examples_in_training_only():
    q, k, v = (tensor[:1].expand(4, -1, -1, -1) for tensor in qkv(queries=12, keys=12))
    evaluation = crisp.attention(q, k, v, sparsity=0.5, rule="random")
    training = crisp.attention(q, k, v, sparsity=0.5, rule="random", training=True)
    assert torch.equal(evaluation[0], evaluation[1])
    assert not torch.equal(training[0], training[1])


def test_dropout_comes_after_selection_and_only_in_training():
    q, k, v = qkv(queries=30, keys=30)
    torch.manual_seed(0)
    out = crisp.attention(
        q, k, v, sparsity=0.5, rule="topk", dropout_p=0.5, training=True, return_details=True
    )  # fmt: skip
    dense = crisp.attention(q, k, v, sparsity=0.5, rule="topk", return_details=True)
    assert torch.equal(out.keep, dense.keep)
    dropped = out.weights[out.keep] == 0
    assert 0.4 < dropped.double().mean() < 0.6
    survivors = out.keep & (out.weights != 0)
    torch.testing.assert_close(out.weights[survivors], 2 * dense.weights[survivors])
    quiet = crisp.attention(q, k, v, sparsity=0.5, rule="topk", dropout_p=0.5)
    assert torch.equal(quiet, dense.output)


def test_sparse_and_dense_share_one_dropout_stream():
    q, k, v = qkv(queries=16, keys=16)
    dropped = []
    for sparsity in (0.0, 0.5):
        torch.manual_seed(7)
        out = crisp.attention(
            q, k, v, sparsity=sparsity, rule="topk", dropout_p=0.3, training=True, return_details=True
        )  # fmt: skip
        dropped.append((out.weights == 0, torch.rand(1)))
    assert torch.equal(dropped[0][1], dropped[1][1])
    assert (dropped[1][0] | ~dropped[0][0]).all()  # dropped densely implies zero sparsely


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).*got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"rule": "percentil"}, "Did you mean 'percentile'"),
        ({"rule": "percentile", "causal": True}, "Use rule='topk'"),
        ({"rule": "topk", "scope": "row"}, "would ignore scope"),
        ({"min_keep": 0}, "min_keep must be an integer >= 1, got 0"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"backend": "tritn"}, "Unknown backend 'tritn'"),
        ({"valid": torch.ones(2, 7)}, "valid must be bool"),
        ({"valid": torch.ones(2, 7), "bias": torch.ones(7, 7)}, "valid must be bool"),
        ({"valid": torch.ones(2, 1, 7, 6, dtype=torch.bool)}, r"broadcastable to \[B, H, Q, K\]"),
        ({"valid": torch.ones(2, 9, dtype=torch.bool)}, r"valid must be \[B, K\] = \(2, 7\)"),
        ({"query_valid": torch.ones(2, 6, dtype=torch.bool)}, r"query_valid must be bool \[B, Q\] = \(2, 7\)"),
        ({"bias": torch.ones(3, 3)}, r"bias must be broadcastable .* got \(3, 3\)"),
        ({"bias": torch.ones(7, 7, dtype=torch.bool)}, "bias must be floating point"),
        ({"q": torch.ones(2, 7, 8)}, r"q must be a non-empty floating-point tensor \[B, H, N, D\]"),
        ({"k": torch.ones(2, 2, 7, 8, dtype=torch.float64)}, "do not fit"),
        ({"q": torch.ones(2, 3, 7, 8)}, "must share a dtype"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v, "sparsity": 0.5} | changes
    with pytest.raises(crisp.ConfigurationError, match=message):
        crisp.attention(**arguments)


def test_heads_that_do_not_divide_are_named():
    q, k, v = qkv(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        crisp.attention(q, k, v, sparsity=0.5)


@given(sparsity=SPARSITIES, heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_mask_per_head_is_honoured(sparsity, heads, seed):
    q, k, v = qkv(heads=heads, seed=seed)
    valid = torch.rand(2, heads, 7, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    out = crisp.attention(q, k, v, sparsity=sparsity, rule="percentile", valid=valid, return_details=True)
    assert not (out.keep & ~valid).any()
    for head in range(heads):
        alone = crisp.attention(
            *(tensor[:, head : head + 1] for tensor in (q, k, v)),
            sparsity=sparsity, rule="percentile", valid=valid[:, head : head + 1],
            query_valid=valid.any(1).any(1),
        )  # fmt: skip
        torch.testing.assert_close(out.output[:, head : head + 1], alone)
