"""`nn.Transformer` and its layers: their fused paths in evaluation mode must not go around sparsity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import crisp_attention as crisp
from paired_dropout import paired_dropout

WIDTH, HEADS = 16, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, **options)


def padding_mask(rows: int = 2, length: int = 8, pads: int = 3) -> torch.Tensor:
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[-1, length - pads :] = True
    return mask


@torch.no_grad()
def slow(module: nn.Module, *args, **kwargs):
    """A module's output with torch's fused paths switched off altogether."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def fused(monkeypatch):
    """Counts calls of the encoder layer's fused kernel."""
    calls = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or kernel(*a))
    return calls


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_is_sparse_and_equals_the_slow_path(fused, norm_first, grad):
    layer, x = encoder_layer(norm_first=norm_first).eval(), torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        stock = layer(x)
    assert len(fused) == 1  # the fused path is what stock takes here
    crisp.sparsify(layer, sparsity=0.75)
    with torch.set_grad_enabled(grad), crisp.monitor(layer) as monitor:
        sparse = layer(x)
    assert monitor.mean(training=False) == 0.75
    with torch.no_grad():
        unwatched = layer(x)
    assert torch.equal(unwatched, sparse)
    assert torch.equal(unwatched, slow(layer, x))
    assert not torch.allclose(unwatched, stock, atol=1e-3)
    assert len(fused) == 1


def test_dense_blocks_and_densify_take_the_fused_path_again(fused):
    layer, x = encoder_layer().eval(), torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        stock = layer(x)
        crisp.sparsify(layer, sparsity=0.75)
        with crisp.dense(layer):
            assert torch.equal(layer(x), stock)
            with crisp.monitor(layer) as monitor:
                torch.testing.assert_close(layer(x), stock)
            assert monitor.mean(training=False) == 0.0
        crisp.sparsify(layer, sparsity=0.75, apply="train")
        assert torch.equal(layer(x), stock)
        crisp.densify(layer)
        assert torch.equal(layer(x), stock)
    assert len(fused) == 4


@pytest.mark.parametrize("copied", [False, True])
def test_an_encoder_makes_no_nested_tensors_while_sparse(fused, copied):
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    before = copy.deepcopy(encoder.__dict__)
    x, mask = torch.randn(2, 8, WIDTH), padding_mask()
    with torch.no_grad():
        stock = encoder(x, src_key_padding_mask=mask)
    assert (stock[1, 5:] == 0).all()  # nested tensors leave their mark: zeros at padding
    assert len(fused) == 2
    crisp.sparsify(encoder, sparsity=0.6, rule="percentile")
    if copied:
        encoder = copy.deepcopy(encoder)
    with torch.no_grad():
        sparse = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(sparse[~mask], slow(encoder, x, src_key_padding_mask=mask)[~mask])
        torch.testing.assert_close(sparse[1:, :5], encoder(x[1:, :5]), atol=1e-5, rtol=1e-4)
        with crisp.monitor(encoder) as monitor:
            encoder(x, src_key_padding_mask=mask)
        assert set(monitor.realised(False)) == {"layers.0.self_attn", "layers.1.self_attn"}
        assert abs(monitor.mean(False) - 0.6) < 0.02
        assert len(fused) == 2
        with crisp.dense(encoder):
            assert torch.equal(encoder(x, src_key_padding_mask=mask), stock)
        crisp.densify(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=mask), stock)
    assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert set(encoder.__dict__) == set(before)
    assert encoder.use_nested_tensor
    assert not encoder._forward_pre_hooks
    assert not any("crisp" in name for module in encoder.modules() for name in module.__dict__)


def test_some_layers_may_stay_dense():
    encoder = nn.TransformerEncoder(encoder_layer(), 3).eval()
    crisp.sparsify(encoder, layer_sparsity=[0.0, 0.5, 0.75])
    with torch.no_grad(), crisp.monitor(encoder) as monitor:
        encoder(torch.randn(2, 8, WIDTH), src_key_padding_mask=padding_mask(pads=0))
    assert list(monitor.realised(False).values()) == [0.0, 0.5, 0.75]


def test_an_encoder_around_a_sparse_layer_is_refused_rather_than_dense():
    """Only the layer was sparsified, so that nobody closed the encoder's own path."""
    encoder = nn.TransformerEncoder(encoder_layer(), 1).eval()
    crisp.sparsify(encoder.layers[0], sparsity=0.5)
    with torch.no_grad(), pytest.raises(crisp.UnsupportedArgumentError, match="nested"):
        encoder(torch.randn(2, 8, WIDTH), src_key_padding_mask=padding_mask())


def test_the_whole_transformer_with_causal_decoder():
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 32, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 8, WIDTH), torch.randn(2, 6, WIDTH)
    call = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(6), "src_key_padding_mask": padding_mask()}
    call["memory_key_padding_mask"] = padding_mask()
    crisp.sparsify(model, sparsity=0.5)
    with torch.no_grad(), crisp.monitor(model) as monitor:
        out = model(source, target, **call)
        changed = torch.cat((target[:, :5], torch.randn(2, 1, WIDTH)), dim=1)
        torch.testing.assert_close(model(source, changed, **call)[:, :5], out[:, :5], atol=1e-5, rtol=1e-4)
    assert list(monitor.realised(False)) == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    assert all(0.3 < realised < 0.55 for realised in monitor.realised(False).values())
    crisp.sparsify(model, sparsity=0.5, rule="percentile")
    with torch.no_grad(), pytest.raises(crisp.ConfigurationError, match="causal model"):
        model(source, target, **call)
    crisp.sparsify(model, sparsity=0.5, rule="percentile", layers=[0, 1])  # the encoder's
    with torch.no_grad():
        model(source, target, **call)


def test_a_dense_training_step_is_stocks(monkeypatch):
    """Dense and sparse arms stay paired: at sparsity 0, watched, a step is the stock model's."""
    layer, x = encoder_layer(dropout=0.2), torch.randn(2, 8, WIDTH)
    gradients = []
    for sparse in (False, True):
        if sparse:
            crisp.sparsify(layer, sparsity=0.0)
        layer.zero_grad()
        torch.manual_seed(1)
        with paired_dropout(monkeypatch):
            layer(x, src_key_padding_mask=padding_mask()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for stock, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_repeats_the_random_masks():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = encoder_layer(dropout=0.0)

        def forward(self, x, checkpointing):
            if checkpointing:
                return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
            return self.layer(x)

    model, x = Checkpointed(), torch.randn(2, 8, WIDTH)
    gradients = []
    for checkpointing in (False, True):
        crisp.sparsify(model, sparsity=0.5, rule="random")
        model.zero_grad()
        for _ in range(2):
            model(x, checkpointing).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
