"""`nn.MultiheadAttention` made sparse against the stock module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crisp_attention as crisp
from paired_dropout import paired_dropout

WIDTH, HEADS = 16, 4


def multihead(seed: int = 0, **options) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # biases too: zeros would hide a dropped one
            parameter.normal_(std=0.3)
    return module


def draw_mask(draw, shape, kind):
    """A mask that leaves every query its first key; bool, additive, or none."""
    if kind is None:
        return None
    hidden = torch.rand(shape, generator=draw) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, generator=draw, dtype=torch.float64).masked_fill(hidden, -torch.inf)


@given(
    seed=st.integers(0, 10_000),
    options=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "add_bias_kv": st.booleans(),
            "add_zero_attn": st.booleans(),
            "kdim": st.sampled_from([None, 10]),
            "vdim": st.sampled_from([None, 6]),
            "batch_first": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.3]),
        }
    ),
    batch=st.sampled_from([None, 1, 3]),
    self_attention=st.booleans(),
    padding=st.sampled_from([None, "bool", "float"]),
    mask=st.sampled_from([None, "bool", "float"]),
    mask_dims=st.sampled_from([2, 3]),
    need_weights=st.booleans(),
    average=st.booleans(),
    training=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_dense_equals_stock_for_all_arguments(
    seed, options, batch, self_attention, padding, mask, mask_dims, need_weights, average, training
):
    """Sparsity 0 takes the sparse way while watched: outputs, weights, dropout and gradients are stock's."""
    self_attention = self_attention and options["kdim"] is options["vdim"] is None
    draw = torch.Generator().manual_seed(seed)
    queries, keys = 5, 5 if self_attention else 7
    module = multihead(seed, **options).double().train(training)

    def tokens(count, width):
        shape = (count, width) if batch is None else (batch, count, width)
        drawn = torch.randn(shape, generator=draw, dtype=torch.float64)
        return drawn.transpose(0, 1) if batch is not None and not options["batch_first"] else drawn

    query = tokens(queries, WIDTH)
    key, value = (query, query) if self_attention else (tokens(keys, module.kdim), tokens(keys, module.vdim))
    mask_shape = (queries, keys) if mask_dims == 2 else ((batch or 1) * HEADS, queries, keys)
    call = {
        "key_padding_mask": draw_mask(draw, (keys,) if batch is None else (batch, keys), padding),
        "attn_mask": draw_mask(draw, mask_shape, mask),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    weights_shape = (queries, keys + options["add_bias_kv"] + options["add_zero_attn"])
    results, layouts = [], []
    for sparse in (False, True):
        if sparse:
            crisp.sparsify(module, sparsity=0.0)
        inputs = [tensor.clone().requires_grad_() for tensor in dict.fromkeys((query, key, value))]
        q, k, v = inputs if len(inputs) == 3 else inputs * 3
        torch.manual_seed(seed)
        if sparse:
            with crisp.monitor(module) as monitor:
                output, weights = module(q, k, v, **call)
            assert monitor.mean(training) == 0.0
        else:
            with pytest.MonkeyPatch.context() as patch, paired_dropout(patch, lambda x: x.shape[-2:] == weights_shape):
                output, weights = module(q, k, v, **call)
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, *module.parameters()], allow_unused=True)
        results.append([output, weights, *gradients])
        layouts.append(output.stride())
    assert layouts[0] == layouts[1]  # so that a dropout that follows drops the same elements
    for stock, ours in zip(*results, strict=True):
        assert (stock is None) == (ours is None)
        if stock is not None:
            torch.testing.assert_close(ours, stock)


def test_a_causal_hint_gives_the_stock_result():
    module, x = multihead(batch_first=True), torch.randn(2, 6, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    stock, _ = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    crisp.sparsify(module, sparsity=0.0)
    with crisp.monitor(module):
        ours, _ = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_the_sparse_ones(average):
    module, x = crisp.sparsify(multihead(batch_first=True).eval(), sparsity=0.75), torch.randn(2, 8, WIDTH)
    output, weights = module(x, x, x, average_attn_weights=average)
    assert weights.shape == ((2, 8, 8) if average else (2, HEADS, 8, 8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    if not average:
        assert ((weights > 0).sum(-1) == 2).all()
        value = (x @ module.in_proj_weight[2 * WIDTH :].T + module.in_proj_bias[2 * WIDTH :]).view(2, 8, HEADS, -1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        torch.testing.assert_close(output, module.out_proj(mixed))


@pytest.mark.parametrize("rule", ["topk", "percentile"])
@pytest.mark.parametrize("kind", ["bool", "float", "-1e9"])
@pytest.mark.parametrize("extra_keys", [False, True])
def test_padding_changes_nothing(rule, kind, extra_keys):
    options = {"add_zero_attn": extra_keys, "add_bias_kv": extra_keys}
    module = crisp.sparsify(multihead(batch_first=True, **options).eval(), sparsity=0.6, rule=rule)
    x = torch.randn(1, 9, WIDTH)
    alone, _ = module(x, x, x)
    for pads in (0, 7, 40):
        padded = torch.cat((torch.cat((x, torch.randn(1, pads, WIDTH)), 1), torch.randn(1, 9 + pads, WIDTH)))
        mask = torch.zeros(2, 9 + pads, dtype=torch.bool)
        mask[0, 9:] = True
        if kind != "bool":
            mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf if kind == "float" else -1e9)
        with crisp.monitor(module) as monitor:
            out, _ = module(padded, padded, padded, key_padding_mask=mask)
        torch.testing.assert_close(out[:1, :9], alone, atol=1e-5, rtol=1e-4)
        assert abs(monitor.mean(training=False) - 0.6) < 0.05


def test_dense_training_with_dropout_draws_as_sparse_training_does(monkeypatch):
    """Not through the fused kernel, which on some devices has a stream of its own."""
    x = torch.randn(2, 8, WIDTH)
    stock = []
    forward = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *a, **k: stock.append(1) or forward(*a, **k))
    for dropout, training, wanted in ((0.1, True, 0), (0.1, False, 1), (0.0, True, 1)):
        module = crisp.sparsify(multihead(batch_first=True, dropout=dropout).train(training), sparsity=0.0)
        stock.clear()
        module(x, x, x)
        assert len(stock) == wanted


def test_a_query_without_keys_gives_zeros_not_nan():
    module, x = crisp.sparsify(multihead(batch_first=True), sparsity=0.5), torch.randn(2, 4, WIDTH)
    hidden = torch.tensor([[False] * 4, [True] * 4])
    output, weights = module(x, x, x, key_padding_mask=hidden)
    assert not weights[1].any()
    torch.testing.assert_close(output[1], module.out_proj.bias.expand(4, -1))


@pytest.mark.parametrize("kind", ["hint", "bool", "float", "prefix"])
def test_matrix_rules_refuse_causal_masks_and_topk_serves_them(kind):
    x = torch.randn(2, 6, WIDTH)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if kind == "prefix":
        hidden[:, :3] = False
    mask = torch.zeros(6, 6).masked_fill(hidden, -torch.inf) if kind == "float" else hidden
    module = crisp.sparsify(multihead(batch_first=True), sparsity=0.5, rule="percentile")
    with pytest.raises(crisp.ConfigurationError, match="causal model"):
        module(x, x, x, attn_mask=mask, is_causal=kind == "hint")
    crisp.sparsify(module, sparsity=0.5, rule="topk")
    early, _ = module(x, x, x, attn_mask=mask, is_causal=kind == "hint")
    changed = torch.cat((x[:, :5], torch.randn(2, 1, WIDTH)), dim=1)
    late, _ = module(changed, changed, changed, attn_mask=mask, is_causal=kind == "hint")
    torch.testing.assert_close(early[:, :5], late[:, :5])


def test_a_symmetric_mask_is_no_causal_one():
    x = torch.randn(2, 8, WIDTH)
    hidden = (torch.arange(8)[:, None] - torch.arange(8)).abs() > 3
    padding = torch.arange(8).expand(2, 8) >= 6
    module = crisp.sparsify(multihead(batch_first=True), sparsity=0.5, rule="percentile")
    with crisp.monitor(module) as seen:
        both, _ = module(x, x, x, attn_mask=hidden, key_padding_mask=padding)
    assert seen.mean(training=True) == pytest.approx(0.5, abs=0.02)
    alone, _ = module(x[:1, :6], x[:1, :6], x[:1, :6], attn_mask=hidden[:6, :6])
    torch.testing.assert_close(both[:1, :6], alone)


def test_matrix_rules_refuse_cross_attention_in_a_batch():
    x, memory = torch.randn(2, 4, WIDTH), torch.randn(2, 6, WIDTH)
    module = crisp.sparsify(multihead(batch_first=True), sparsity=0.5, rule="percentile")
    with pytest.raises(crisp.ConfigurationError, match="cross-attention"):
        module(x, memory, memory)
    module(x[:1], memory[:1], memory[:1])
    crisp.sparsify(module, sparsity=0.5)(x, memory, memory)


def test_rules_by_position_refuse_appended_keys():
    x = torch.randn(2, 4, WIDTH)
    module = crisp.sparsify(multihead(batch_first=True, add_zero_attn=True), rule="window", window=1)
    with pytest.raises(crisp.ConfigurationError, match="add_zero_attn"):
        module(x, x, x)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, x: m(x, x, x, is_causal=True), "give the mask"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 4)), "attn_mask must be"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int)), "attn_mask must be"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(4, 2)), "key_padding_mask must be"),
        (lambda m, x: m(x, x[:1], x[:1]), "query, key and value must be"),
        (lambda m, x: m(x[None], x[None], x[None]), "query, key and value must be"),
        (lambda m, x: m(x, x, x[..., :3]), "query, key and value must be"),
    ],
)
def test_wrong_arguments_are_named(call, match):
    module = crisp.sparsify(multihead(batch_first=True), sparsity=0.5)
    with pytest.raises(crisp.ConfigurationError, match=match):
        call(module, torch.randn(2, 4, WIDTH))


def test_nested_tensors_are_refused():
    module = crisp.sparsify(multihead(batch_first=True).eval(), sparsity=0.5)
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with torch.no_grad(), pytest.raises(crisp.UnsupportedArgumentError, match="nested"):
        module(nested, nested, nested)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_as_many(dtype):
    module, x = crisp.sparsify(multihead(batch_first=True).eval(), sparsity=0.75), torch.randn(2, 8, WIDTH)
    with torch.autocast("cpu", dtype=dtype), crisp.monitor(module) as monitor:
        output, _ = module(x, x, x)
    assert output.dtype == dtype
    assert monitor.mean(training=False) == 0.75
    halved = module.to(dtype)(*[x.to(dtype)] * 3, need_weights=False)[0]
    assert halved.dtype == dtype
    assert halved.isfinite().all()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_sparse_and_independent(how):
    module, x = crisp.sparsify(multihead(batch_first=True).eval(), sparsity=0.5), torch.randn(2, 8, WIDTH)
    sparse = module(x, x, x)[0]
    twin = how(module)
    assert torch.equal(twin(x, x, x)[0], sparse)
    crisp.densify(twin)
    assert torch.equal(module(x, x, x)[0], sparse)
    assert not torch.allclose(twin(x, x, x)[0], sparse)


def test_compiles_to_one_graph():
    module, x = crisp.sparsify(multihead(batch_first=True), sparsity=0.5), torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x, x, x)[0], module(x, x, x)[0])
