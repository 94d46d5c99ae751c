"""`CrispAttention`, the module for layers of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import crisp_attention as crisp


class Block(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.first = crisp.CrispAttention(16, 4, **settings)
        self.second = crisp.CrispAttention(16, 4, num_kv_heads=2, **settings)

    def forward(self, x, valid=None):
        return self.second(x + self.first(x, valid=valid), valid=valid)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("context", [False, True])
def test_is_the_operator_between_projections(kv_heads, context):
    module = crisp.CrispAttention(16, 4, num_kv_heads=kv_heads, sparsity=0.5)
    x = torch.randn(2, 6, 16)
    source = torch.randn(2, 9, 16) if context else x
    valid = torch.arange(source.shape[1]) < torch.tensor([[source.shape[1]], [4]])
    q = module.q_proj(x).view(2, 6, 4, 4).transpose(1, 2)
    k, v = (p(source).view(2, -1, kv_heads, 4).transpose(1, 2) for p in (module.k_proj, module.v_proj))
    wanted = crisp.attention(q, k, v, sparsity=0.5, valid=valid).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x, source if context else None, valid=valid), module.out_proj(wanted))


def test_dense_equals_multihead_attention():
    module, stock = crisp.CrispAttention(16, 4, sparsity=0.0), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(torch.cat([p.weight for p in (module.q_proj, module.k_proj, module.v_proj)]))
        stock.in_proj_bias.copy_(torch.cat([p.bias for p in (module.q_proj, module.k_proj, module.v_proj)]))
        stock.out_proj.load_state_dict(module.out_proj.state_dict())
    x = torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(module(x, causal=True), stock(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("rule", ["topk", "percentile"])
def test_padding_changes_nothing(rule):
    module, x = crisp.CrispAttention(16, 4, sparsity=0.6, rule=rule).eval(), torch.randn(1, 9, 16)
    padded = torch.cat((x, torch.randn(1, 30, 16)), dim=1)
    valid = torch.arange(39)[None] < 9
    torch.testing.assert_close(module(padded, valid=valid)[:, :9], module(x), atol=1e-5, rtol=1e-4)


def test_verbs_work_on_modules_made_alone():
    model, x = Block(sparsity=0.5).eval(), torch.randn(2, 8, 16)
    sparse = model(x)
    with crisp.monitor(model) as monitor:
        model(x)
    assert monitor.realised(False) == {"first": 0.5, "second": 0.5}
    with crisp.dense(model):
        dense = model(x)
    assert not torch.allclose(dense, sparse)
    assert torch.equal(model(x), sparse)
    report = crisp.check(model, {"x": x})
    assert [layer.name for layer in report.layers] == ["first", "second"]
    crisp.sparsify(model, sparsity=0.75, rule="percentile")
    with crisp.monitor(model) as monitor:
        model(x)
    assert 0.7 < monitor.mean(False) <= 0.75  # each query keeps one key
    assert type(crisp.densify(model).first) is crisp.CrispAttention
    assert torch.equal(model(x), dense)
    assert "dense" in repr(model.first)


def test_a_schedule_follows_progress():
    module, x = crisp.CrispAttention(16, 4, sparsity=0.5, schedule={"kind": "linear"}), torch.randn(2, 8, 16)
    with pytest.raises(crisp.ConfigurationError, match="set_progress"):
        module(x)
    for progress, realised in ((0.0, 0.0), (0.5, 0.25), (1.0, 0.5)):
        crisp.set_progress(module, progress)
        with crisp.monitor(module) as monitor:
            module(x)
        assert monitor.mean(True) == realised


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        ((15, 4), {}, "multiple of num_heads"),
        ((16, 4), {"num_kv_heads": 3}, "multiple of num_heads"),
        ((16, 4), {"dropout": 1.0}, "dropout"),
        ((16, 4), {"rule": "random"}, "sparsify"),
        ((16, 4), {"layers": [0]}, "sparsify"),
        ((16, 4), {"heads": [4]}, "has 4 heads"),
        ((16, 4), {"sparsty": 0.5}, "Did you mean 'sparsity'"),
        ((16, 4), {"config": crisp.SparsityConfig(), "sparsity": 0.5}, "not both"),
    ],
)
def test_wrong_settings_are_named(arguments, settings, match):
    with pytest.raises(crisp.ConfigurationError, match=match):
        crisp.CrispAttention(*arguments, **settings)


def test_calls_that_cannot_be_served_are_refused():
    module, x = crisp.CrispAttention(16, 4, rule="percentile"), torch.randn(2, 8, 16)
    with pytest.raises(crisp.ConfigurationError, match="causal model"):
        module(x, causal=True)
    with pytest.raises(crisp.ConfigurationError, match="cross-attention"):
        module(x, torch.randn(2, 5, 16))
    module(x, torch.randn(2, 5, 16), query_valid=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(crisp.ConfigurationError, match=r"x must be \[B, N, E\]"):
        module(x[0])
    with pytest.raises(crisp.ConfigurationError, match="as many rows"):
        module(x, torch.randn(3, 5, 16))
