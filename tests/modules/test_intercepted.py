"""timm's attention, and the mixin that serves it on a layer written as timm writes them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import crisp_attention as crisp
from crisp_attention.modules.intercept import InterceptedAttention
from crisp_attention.state import LayerState, ModelState, attach
from paired_dropout import paired_dropout


class Attention(nn.Module):
    """As timm's, with the parts that a copy of it would forget."""

    calls = 1

    def __init__(self, drop=0.0):
        super().__init__()
        self.num_heads, self.fused_attn = 4, False
        self.qkv, self.q_norm, self.gate, self.proj = (
            nn.Linear(16, 48), nn.LayerNorm(4), nn.Linear(16, 16), nn.Linear(16, 16),
        )  # fmt: skip
        self.attn_drop = nn.Dropout(drop)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q_norm(q)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            for _ in range(self.calls):
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal
                )
        else:
            hidden = torch.zeros(x.shape[1], x.shape[1]) if attn_mask is None else attn_mask
            if is_causal:
                hidden = hidden.masked_fill(torch.ones_like(hidden, dtype=torch.bool).triu(1), -torch.inf)
            out = self.attn_drop((q @ k.transpose(-2, -1) / 2 + hidden).softmax(-1)) @ v
        return self.proj(out.transpose(1, 2).flatten(2) * self.gate(x).sigmoid())


class Sparse(InterceptedAttention, Attention):
    stock = Attention


def served(**settings):
    torch.manual_seed(0)
    module = Attention(drop=settings.pop("drop", 0.0))
    module.__class__ = Sparse
    attach(module, LayerState("layer", 0, 1, ModelState(crisp.SparsityConfig(**settings))))
    return module


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", [None, "float", "causal"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_sparsity_zero_is_the_layer_as_it_is_written(mask, drop, monkeypatch):
    module = served(sparsity=0.0, drop=drop)
    call = {None: {}, "float": {"attn_mask": torch.randn(8, 8)}, "causal": {"is_causal": True}}[mask]
    torch.manual_seed(1)
    stock = Attention.forward(module, X, **call) if not drop else None
    if drop:
        module.__class__ = Attention
        with paired_dropout(monkeypatch):
            stock = module(X, **call)
        module.__class__ = Sparse
    torch.manual_seed(1)
    with crisp.monitor(module) as monitor:
        torch.testing.assert_close(module(X, **call), stock)
    assert monitor.mean(True) == 0.0


def test_is_sparse_in_place_of_the_fused_call_and_dense_when_told():
    module = served(sparsity=0.75).eval()
    with crisp.monitor(module) as monitor:
        sparse = module(X)
    assert monitor.mean(False) == 0.75
    with crisp.dense(module):
        assert not module.fused_attn
        dense = module(X)
    assert module.fused_attn
    assert not torch.allclose(dense, sparse, atol=1e-3)
    q, k, v = module.qkv(X).reshape(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    wanted = crisp.attention(module.q_norm(q), k, v, sparsity=0.75).transpose(1, 2).flatten(2)
    torch.testing.assert_close(sparse, module.proj(wanted * module.gate(X).sigmoid()))
    padding = torch.arange(8) < torch.tensor([[8], [5]])
    short = module(X, attn_mask=padding[:, None, None, :])
    torch.testing.assert_close(short[1:, :5], module(X[1:, :5]))


def test_calls_that_cannot_be_served_are_refused():
    with pytest.raises(crisp.ConfigurationError, match="causal model"):
        served(rule="percentile")(X, is_causal=True)
    module = served(sparsity=0.5)
    module.calls = 2
    with pytest.raises(crisp.UnsupportedModelError, match="2 times"):
        module(X)


def test_compiles_to_one_graph():
    module = served(sparsity=0.5)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(X), module(X))


@pytest.fixture(scope="module")
def timm():
    """The real timm, where it is installed."""
    return pytest.importorskip("timm")


VITS = {
    "plain": ("vit_tiny_patch16_224", {}, 2),
    "norms": ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2, "init_values": 0.1}, 2),
    "pooled": ("vit_base_patch16_siglip_224", {"embed_dim": 192, "num_heads": 3}, 3),
    "rotary": ("eva02_tiny_patch14_224", {"patch_size": 16}, 2),
}


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("fused", [False, True])
def test_real_timm(timm, kind, fused):
    name, options, layers = VITS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, depth=2, num_classes=3, **options).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stock, types = model(images), [type(module) for module in model.modules()]
        crisp.sparsify(model, sparsity=0.0, inputs={"x": images})
        assert torch.equal(model(images), stock)
        with crisp.monitor(model) as monitor:
            torch.testing.assert_close(model(images), stock, atol=1e-5, rtol=1e-4)
        assert len(monitor.realised(False)) == layers
        for rule in ("topk", "percentile"):
            crisp.sparsify(model, sparsity=0.7, rule=rule)
            with crisp.monitor(model) as monitor:
                sparse = model(images)
            assert all(abs(realised - 0.7) < 0.05 for realised in monitor.realised(False).values())
            assert not torch.allclose(sparse, stock, atol=1e-7)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(images), sparse)
        assert crisp.check(model, {"x": images}).ok
        with pytest.raises(RuntimeError, match="crisp_attention"):
            crisp.densify(copy.deepcopy(model)).load_state_dict(model.state_dict())
        crisp.densify(model)
        assert torch.equal(model(images), stock)
    assert [type(module) for module in model.modules()] == types


def test_real_timm_trains_with_checkpointing(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, attn_drop_rate=0.1)
    crisp.sparsify(model, sparsity=0.5, rule="random")
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        crisp.set_forward_index(model, 0)
        torch.manual_seed(0)
        model.zero_grad()
        model(torch.ones(2, 3, 64, 64)).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        crisp.sparsify(model, sparsity=0.5, rule="random")
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "module"),
    [("swin_tiny_patch4_window7_224", "WindowAttention"), ("cait_xxs24_224", "TalkingHeadAttn")],
)
def test_other_attention_of_timm_is_refused_by_name(timm, name, module):
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(crisp.UnsupportedModelError, match=module):
        crisp.sparsify(model, sparsity=0.5)


def test_a_block_that_attends_by_another_name_is_not_overlooked(timm):
    from timm.models.vision_transformer import ParallelScalingBlock

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, block_fn=ParallelScalingBlock)
    with pytest.raises(crisp.UnsupportedModelError, match="ParallelScalingBlock"):
        crisp.sparsify(model, sparsity=0.5)
