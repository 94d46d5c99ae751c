"""sparsify and its fellows on models that are no Transformers models."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import BertConfig, BertModel

import crisp_attention as crisp

WIDTH, HEADS = 16, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Classifier(nn.Module):
    """Two encoder layers and a head, as people write them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x)


X = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(1))


def test_every_verb_works():
    model = Classifier().eval()
    stock = model(X)
    assert crisp.sparsify(model, sparsity=0.75) is model
    sparse = model(X)
    with crisp.monitor(model) as monitor:
        model(X)
    assert monitor.realised(False) == {"encoder.layers.0.self_attn": 0.75, "encoder.layers.1.self_attn": 0.75}
    with crisp.dense(model):
        assert torch.equal(model(X), stock)
    assert torch.equal(model(X), sparse)
    report = crisp.check(model, {"x": X})
    assert report.ok
    assert [(layer.index, layer.heads, layer.realised) for layer in report.layers] == [(0, 4, 0.75), (1, 4, 0.75)]
    with pytest.raises(crisp.UnsupportedModelError, match="Pass inputs"):
        crisp.check(model)
    assert torch.equal(crisp.densify(model)(X), stock)
    for verb in (crisp.check, lambda m: crisp.set_progress(m, 0.5), lambda m: crisp.dense(m).__enter__()):
        with pytest.raises(crisp.ConfigurationError, match="not sparsified"):
            verb(model)
    assert torch.equal(crisp.densify(model)(X), stock)


def test_a_loop_of_ones_own_follows_a_schedule():
    model = crisp.sparsify(Classifier(), sparsity=0.75, schedule={"kind": "linear"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    realised = []
    for step in range(4):
        crisp.set_progress(model, step / 3)
        with crisp.monitor(model) as monitor:
            model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        realised.append(monitor.mean(True))
    assert realised == [0.0, 0.25, 0.5, 0.75]


def test_settings_travel_in_the_state_dict():
    """Whichever way back: rebuilt and sparsified it is the same model, and never dense in silence."""
    model = crisp.sparsify(Classifier().eval(), sparsity=0.5, layers=[1])
    wanted, saved = model(X), model.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    for state in (saved, torch.load(buffer, weights_only=True), load(save(saved))):
        twin = crisp.sparsify(Classifier().eval(), sparsity=0.5, layers=[1])
        twin.load_state_dict(state)
        assert torch.equal(twin(X), wanted)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*self_attn\.crisp_attention"):
            Classifier().load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"with dense attention; this one has rule='topk', sparsity=0\.5"):
            crisp.sparsify(Classifier(), sparsity=0.5).load_state_dict(state)
    crisp.sparsify(twin, sparsity=0.9)  # other settings, once it is loaded
    damaged = saved | {"encoder.layers.1.self_attn.crisp_attention": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="damaged"):
        model.load_state_dict(damaged)
    assert crisp.densify(model).state_dict().keys() == Classifier().state_dict().keys()


def test_dense_weights_load_into_a_sparse_model_and_progress_comes_back():
    model = crisp.sparsify(Classifier(), sparsity=0.5, schedule={"kind": "linear"})
    model.load_state_dict(Classifier().state_dict())
    crisp.set_progress(model, 0.5)
    twin = crisp.sparsify(Classifier(), sparsity=0.5, schedule={"kind": "linear"})
    twin.load_state_dict(model.state_dict())
    with crisp.monitor(twin) as monitor:
        twin.eval()(X)
    assert monitor.mean(False) == 0.25


def test_random_masks_change_with_each_forward_of_the_model():
    model = crisp.sparsify(Classifier(), sparsity=0.5, rule="random")
    first, second = model(X), model(X)
    assert not torch.equal(first, second)
    crisp.set_forward_index(model, 0)
    with pytest.raises(crisp.ConfigurationError, match="same masks again"):
        [model.encoder(model.embed(X)) for _ in range(2)]
    crisp.set_forward_index(model, 0)
    assert torch.equal(model(X), first)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert not crisp.densify(model)._forward_pre_hooks
    model(X)


def test_open_blocks_stay_in_force_when_settings_change():
    model = crisp.sparsify(Classifier().eval(), sparsity=0.5)
    with crisp.monitor(model) as monitor:
        crisp.sparsify(model, sparsity=0.75)
        model(X)
    assert monitor.mean(False) == 0.75


def test_what_copies_state_into_state_of_the_same_sizes_can():
    """As averages of weights and distributed checkpoints do."""
    model = crisp.sparsify(Classifier(), sparsity=0.5, schedule={"kind": "linear"})
    twin = crisp.sparsify(Classifier(), sparsity=0.5, schedule={"kind": "linear"})
    crisp.set_progress(model, 1 / 3)
    state = twin.state_dict()
    for name, value in model.state_dict().items():
        state[name].copy_(value)
    twin.load_state_dict(state)
    crisp.set_progress(model, 0.0)
    twin.load_state_dict(model.state_dict())
    # Without the padding it reads as well.
    written = {name: value for name, value in model.state_dict().items() if name.endswith("crisp_attention")}
    short = {name: torch.tensor(list(bytes(value.tolist()).rstrip())) for name, value in written.items()}
    assert all(len(short[name]) < len(value) for name, value in written.items())
    twin.load_state_dict(model.state_dict() | short)


def test_a_failed_sparsify_keeps_the_progress_of_training():
    model = crisp.sparsify(Classifier(), sparsity=0.5, schedule={"kind": "linear"})
    crisp.set_progress(model, 0.5)
    before = model.state_dict()
    with pytest.raises(crisp.ConfigurationError):
        crisp.sparsify(model, sparsity=0.5, layers=[7])
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    with crisp.monitor(model) as monitor:
        model(X)
    assert monitor.mean(True) == 0.25


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": [2]}, "has 2 attention layers"),
        ({"heads": [4]}, r"'encoder\.layers\.0\.self_attn' has 4 heads"),
        ({"layer_sparsity": [0.5]}, "has 1 values"),
        ({"exclude": ["encodr"]}, "Did you mean 'encoder'"),
        ({"rule": "percentile", "inputs": {"y": X}}, None),
    ],
)
def test_a_failed_sparsify_changes_nothing(settings, match):
    for model in (Classifier().eval(), crisp.sparsify(Classifier().eval(), sparsity=0.75)):
        before, types = model(X), [type(module) for module in model.modules()]
        with pytest.raises(crisp.ConfigurationError if match else TypeError, match=match):
            crisp.sparsify(model, **settings)
        assert torch.equal(model(X), before)
        assert [type(module) for module in model.modules()] == types


def test_models_without_attention_that_is_known_are_refused():
    with pytest.raises(crisp.UnsupportedModelError, match=r"Looked for: torch\.nn\.MultiheadAttention"):
        crisp.sparsify(nn.Linear(2, 2), sparsity=0.5)
    with pytest.raises(crisp.UnsupportedModelError, match=r"would stay dense: 1 \(OwnAttention\).*CrispAttention"):
        crisp.sparsify(nn.Sequential(nn.Linear(2, 2), OwnAttention()), sparsity=0.5)
    with pytest.raises(crisp.UnsupportedModelError, match="got str"):
        crisp.sparsify("bert", sparsity=0.5)

    class Mine(nn.MultiheadAttention):
        pass

    with pytest.raises(crisp.UnsupportedModelError, match=r"the model itself \(Mine\)"):
        crisp.sparsify(Mine(WIDTH, HEADS), sparsity=0.5)


def test_attention_that_would_stay_dense_is_named_until_it_is_excluded():
    model = nn.ModuleDict({"known": Classifier(), "own": OwnAttention()})
    with pytest.raises(crisp.UnsupportedModelError, match=r"exclude=\['own'\]"):
        crisp.sparsify(model, sparsity=0.5)
    assert type(model.known.encoder.layers[0].self_attn) is nn.MultiheadAttention
    crisp.sparsify(model, sparsity=0.5, exclude=["own", "known.encoder.layers.0"])
    assert type(model.known.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert type(model.known.encoder.layers[1].self_attn) is not nn.MultiheadAttention


def test_a_transformers_model_inside_is_pointed_at():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    model = nn.ModuleDict({"bert": bert, "head": nn.MultiheadAttention(WIDTH, HEADS)})
    with pytest.raises(crisp.UnsupportedModelError, match=r"sparsify\(model\.bert, \.\.\.\)"):
        crisp.sparsify(model, sparsity=0.5)
    crisp.sparsify(model, sparsity=0.5, exclude=["bert"])
    crisp.sparsify(model.bert, sparsity=0.75)
    with pytest.raises(crisp.ConfigurationError, match="use layers"):
        crisp.sparsify(model.bert, sparsity=0.75, exclude=["encoder"])
    with crisp.monitor(model) as monitor:
        model.bert(torch.arange(8)[None])
        model.head(*[torch.randn(8, 1, WIDTH)] * 3)
    assert all(math.isclose(x, y) for x, y in zip(monitor.realised(True).values(), (0.75, 0.5), strict=True))
    crisp.densify(model)
    assert model.bert.config._attn_implementation == "crisp"


def test_inputs_show_attention_under_another_name():
    class Mix(nn.Module):
        def forward(self, x):
            x = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)

    model = nn.Sequential(crisp.CrispAttention(WIDTH, HEADS), Mix())
    inputs = {"input": torch.randn(1, 4, WIDTH)}
    with pytest.raises(crisp.UnsupportedModelError, match=r"compute attention on their own and stay dense: 1\."):
        crisp.sparsify(model, sparsity=0.5, inputs=inputs)
    crisp.sparsify(model, sparsity=0.5)
    assert not crisp.check(model, inputs).ok
    crisp.sparsify(model, sparsity=0.5, inputs=inputs, exclude=["1"])
    assert crisp.check(model, inputs).ok


def test_inputs_prove_that_every_layer_runs():
    model = Classifier()
    model.idle = nn.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(crisp.UnsupportedModelError, match=r"did not run .*: idle"):
        crisp.sparsify(model, sparsity=0.5, inputs={"x": X})
    crisp.sparsify(model, sparsity=0.5)
    assert crisp.check(model, {"x": X}).problems == ("these attention layers did not run with the given inputs: idle.",)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = crisp.CrispAttention(WIDTH, HEADS)

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(1, 4, WIDTH)
    crisp.sparsify(Twice(), sparsity=0.5, inputs={"x": x})
    with pytest.raises(crisp.UnsupportedModelError, match="several times"):
        crisp.sparsify(Twice(), rule="random", inputs={"x": x})
