from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

import crisp_attention as crisp
import oracle
from cases import NORMALIZERS, configs, expected, masks, qkv, select
from crisp_attention.backends import reference
from crisp_attention.masks import hides_future
from crisp_attention.rules import Pairs
from crisp_attention.traits import RULES

SPARSITIES = st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.75, 0.8, 0.9, 0.99])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def operator_calls(draw, rule):
    """Arguments of `attention` for a rule: any shape, dtype, mask, bias, soft-cap, sinks, heads."""
    config = draw(configs(rule))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, keys = kv_heads * groups, draw(st.integers(1, 7))
    causal = config.per_row and draw(st.booleans())
    fewer = causal or not config.by_position
    queries = draw(st.integers(1, keys)) if fewer else keys
    seed = draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v = qkv(batch, heads, queries, keys, draw(st.integers(1, 5)), dtype, seed, kv_heads)
    valid, query_valid = draw(masks(batch, heads, queries, keys, generator))
    arguments = {"q": q, "k": k, "v": v, "valid": valid, "query_valid": query_valid, "causal": causal}
    if draw(st.booleans()):
        bias = torch.randn(heads, queries, keys, generator=generator)
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = -torch.inf
        arguments["bias"] = bias.to(dtype)
        seen = (bias > -torch.inf).expand(batch, heads, queries, keys)
        assume(config.per_row or queries != keys or not hides_future(seen if valid is None else seen & valid))
    if draw(st.booleans()):
        arguments["softcap"] = 1.5
    if draw(st.booleans()):
        arguments["scale"] = draw(st.sampled_from([0.5, 2.0]))
    if rule not in NORMALIZERS and draw(st.booleans()):
        arguments["sinks"] = torch.randn(heads, generator=generator)
    if draw(st.booleans()):
        config = config.replace(heads=[draw(st.integers(0, heads - 1))])
    return config, arguments


@pytest.mark.filterwarnings("ignore:.*single key")
@pytest.mark.parametrize("rule", sorted(RULES))
@given(data=st.data())
def test_agrees_with_the_oracle(rule, data):
    config, arguments = data.draw(operator_calls(rule))
    settings = {name: value for name, value in config.to_dict().items() if name != "apply"}
    out = crisp.attention(**arguments, **settings, return_details=True)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    bias, causal = arguments.get("bias"), arguments["causal"]
    shape = (*q.shape[:3], k.shape[2])
    valid = torch.ones(shape, dtype=torch.bool) if arguments["valid"] is None else arguments["valid"].expand(shape)
    if bias is not None:
        valid = valid & (bias > -torch.inf)
    padded = arguments["valid"] is not None or bias is not None
    query_valid = arguments["query_valid"]
    if query_valid is None and padded and shape[2] == shape[3]:
        query_valid = valid.any(1).any(1)
    if causal:
        valid = valid & torch.ones(shape[2:], dtype=torch.bool).tril(shape[3] - shape[2])
    pairs = Pairs(shape, q.device, valid, query_valid, causal)

    finite = None if bias is None else bias.masked_fill(bias == -torch.inf, 0.0)
    how = {name: arguments.get(name) for name in ("scale", "softcap")}
    scores = reference.score(
        q, k.repeat_interleave(shape[1] // k.shape[1], 1), bias=finite,
        scale=how["scale"] or 1 / math.sqrt(q.shape[-1]), softcap=how["softcap"],
    )  # fmt: skip
    precise = 1e-12 if q.dtype == torch.float64 else 1e-5
    for b in range(len(q)):
        exact = oracle.scores_of(
            q[b].double().numpy(), k[b].double().numpy(), None if bias is None else finite.double().numpy(), **how
        )
        np.testing.assert_allclose(scores[b].numpy(), exact, atol=precise, rtol=precise)

    # Ranks are those of the operator's own scores, in fp32 where the inputs are lower.
    if rule in NORMALIZERS:
        keep = valid
        normalize = oracle.normalizer(rule, **{name: settings.get(name) for name in ("sparsity", "entropy")})
    else:
        noise = select(config, pairs).form.ranking if rule == "random" else None
        keep, normalize = expected(config, scores, pairs, noise), None
        assert torch.equal(out.keep, keep)
        counted = valid if query_valid is None else valid & query_valid[:, None, :, None]
        assert torch.equal(out.counts.valid, counted.sum((-1, -2)))
        assert torch.equal(out.counts.kept, (keep & counted).sum((-1, -2)))
    budget = 8 * torch.finfo(q.dtype).eps
    if rule == "temperature":  # an entropy is flat where weights are nearly equal or nearly one
        budget = max(budget, 1e-6 if q.dtype == torch.float64 else 5e-3)
    for b in range(len(q)):
        sinks = None if "sinks" not in arguments else arguments["sinks"].double().numpy()
        weights = oracle.weights_of(scores[b].double().numpy(), keep[b].numpy(), sinks, normalize)
        if config.heads is not None and normalize is not None:
            dense = oracle.weights_of(scores[b].double().numpy(), valid[b].numpy())
            weights = np.stack([weights[h] if h in config.heads else dense[h] for h in range(len(weights))])
        wanted = oracle.outputs_of(weights, v[b].double().numpy())
        np.testing.assert_allclose(out.output[b].double().numpy(), wanted, atol=4 * budget, rtol=budget)


@pytest.mark.parametrize("rule", [rule for rule in sorted(RULES) if "sparsity" in RULES[rule].strengths])
@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
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


def test_soft_cap_and_sinks_equal_a_form_written_by_hand():
    q, k, v = qkv()
    sinks, bias = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    scores = 3.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.7 / 3.0) + bias
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    out = crisp.attention(
        q, k, v, sparsity=0.0, bias=bias, scale=0.7, softcap=3.0, sinks=sinks, return_details=True
    )  # fmt: skip
    torch.testing.assert_close(out.weights, weights)
    torch.testing.assert_close(out.output, weights @ v)
    sparse = crisp.attention(
        q, k, v, sparsity=0.5, bias=bias, scale=0.7, softcap=3.0, sinks=sinks, return_details=True
    )  # fmt: skip
    assert torch.equal(sparse.keep, scores >= scores.topk(4, dim=-1).values[..., -1:])
    kept = scores.exp() * sparse.keep
    torch.testing.assert_close(
        sparse.weights, kept / (kept.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    )  # fmt: skip


def test_a_head_that_is_not_named_is_dense():
    q, k, v = qkv()
    out = crisp.attention(q, k, v, sparsity=0.6, heads=[0, 2], return_details=True)
    sparse, dense = crisp.attention(q, k, v, sparsity=0.6), crisp.attention(q, k, v, sparsity=0.0)
    torch.testing.assert_close(out.output[:, [0, 2]], sparse[:, [0, 2]])
    torch.testing.assert_close(out.output[:, 1], dense[:, 1])
    assert out.counts.sparsity[:, 1].eq(0).all()
    assert out.counts.sparsity[:, [0, 2]].gt(0.5).all()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_single_key_is_kept(rule):
    """A sparsity of 0.8 of one key removes 0.8 keys; `min_keep` gives it back, and a warning says so."""
    q, k, v = qkv(queries=1, keys=1)
    told = "sparsity" in RULES[rule].strengths
    with pytest.warns(UserWarning, match="of a single key removes nothing") if told else contextlib.nullcontext():
        out = crisp.attention(q, k, v, rule=rule, return_details=True)
    torch.testing.assert_close(out.output, v)
    assert (out.counts.sparsity == 0).all()


@pytest.mark.parametrize("rule", [rule for rule in sorted(RULES) if RULES[rule].per_row])
@pytest.mark.filterwarnings("ignore:.*single key")
def test_a_single_key_is_kept_in_causal_attention(rule):
    q, k, v = qkv(queries=1, keys=1)
    torch.testing.assert_close(crisp.attention(q, k, v, rule=rule, causal=True), v)


def test_dense_attention_over_a_single_key_is_no_mistake(recwarn):
    crisp.attention(*qkv(queries=1, keys=1), sparsity=0.0)
    assert not recwarn.list


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_equal_scores_give_finite_outputs(rule, dtype):
    q, k, v = qkv(dtype=dtype)
    for scale in (0.0, 1e4, 1e-30):
        out = crisp.attention(q, k, v, rule=rule, scale=scale, valid=(torch.arange(7) < 5).expand(2, 7))
        assert torch.isfinite(out).all()
        assert out.dtype == dtype


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("place", ["query", "key", "bias"])
def test_scores_that_diverge_show_and_do_not_spread(rule, place):
    """NaN in a query's scores is NaN in its output, unless its pair was removed unseen; other rows are as before."""
    q, k, v = qkv()
    bias = torch.zeros(2, 3, 7, 7, dtype=torch.float64)
    if place == "query":
        q[:, :, 2] = torch.nan
    elif place == "key":
        k[:, :, 2] = torch.nan
    else:
        bias[:, :, 2, 4] = torch.nan
    out = crisp.attention(q, k, v, rule=rule, bias=bias, return_details=True)
    broken = torch.isnan(q @ k.transpose(-1, -2) + bias)
    seen = (broken & out.keep).any(-1)
    if rule not in ("random", "window"):  # blind to scores
        assert torch.equal(seen, broken.any(-1))
    assert torch.equal(torch.isnan(out.output).all(-1), seen)
    assert torch.equal(torch.isnan(out.output).any(-1), seen)


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
