"""Which backend serves a call."""

from __future__ import annotations

import pytest
import torch

import crisp_attention as crisp
from cases import qkv
from crisp_attention import backends
from crisp_attention.backends import choice

Q, K, V = qkv(dtype=torch.float32)


def chosen(**arguments):
    """Name and reason of the backend that a call gets."""
    seen = []
    original = backends.choose

    def choose(name, call):
        seen.append(original(name, call))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", choose)
        crisp.attention(**({"q": Q, "k": K, "v": V, "sparsity": 0.5} | arguments))
    return seen[0].name, seen[0].reason


def test_auto_takes_the_compiled_backend():
    assert chosen() == ("cpu", "it is the fastest that serves the call")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({name: x.double() for name, x in (("q", Q), ("k", K), ("v", V))}, "float64 is for checking"),
        ({"return_details": True}, "wants to see the weights"),
        ({"softcap": 2.0}, "soft-capped"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"rule": "entmax15", "sparsity": None}, "not one of a threshold"),
        ({"sparsity": 0.0}, "nothing is to be removed"),
        ({"gradient": "straight_through"}, "straight-through"),
        ({"bias": torch.zeros(7, 7, requires_grad=True)}, "bias wants a gradient"),
    ],
)
def test_auto_falls_back_to_the_reference_and_a_named_backend_refuses(arguments, reason):
    name, why = chosen(**arguments)
    assert name == "reference"
    assert reason in why
    if "float64" in reason:
        reason = "it computes in float32"
    with pytest.raises(crisp.ConfigurationError, match=f"backend='cpu' cannot serve this call: .*{reason}"):
        chosen(backend="cpu", **arguments)
    assert chosen(backend="reference", **arguments) == ("reference", "it was asked for")


def test_transforms_get_the_reference():
    names = []
    original = choice._reference

    def reference(reason):
        names.append(reason)
        return original(reason)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_reference", reference)
        torch.func.grad(lambda q: crisp.attention(q, K, V, sparsity=0.5).sum())(Q)
    assert names == ["the call is part of a transform"]


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda package: False)
    name, reason = chosen()
    assert name == "reference"
    assert "numba is not installed (pip install 'crisp-attention[cpu]')" in reason
    with pytest.raises(crisp.ConfigurationError, match=r"crisp-attention\[cpu\]"):
        chosen(backend="cpu")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(crisp.ConfigurationError, match=r"Unknown backend 'cpus'.*cpu"):
        chosen(backend="cpus")


def test_a_model_is_computed_by_what_was_asked_for(model):
    inputs = {"input_ids": torch.randint(5, 20, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    outputs = {}
    for name in ("reference", "cpu"):
        crisp.sparsify(model, sparsity=0.5, backend=name)
        assert f"computed by {name!r}: it was asked for" in str(crisp.check(model))
        with torch.no_grad():
            outputs[name] = model(**inputs).logits
    torch.testing.assert_close(outputs["cpu"], outputs["reference"])
    with pytest.raises(crisp.ConfigurationError, match="wants to see the weights"):
        model(**inputs, output_attentions=True)
    crisp.sparsify(model, sparsity=0.5)
    assert "computed by 'cpu': it is the fastest that serves the call" in str(crisp.check(model))
    assert model(**inputs, output_attentions=True).attentions[0].shape == (2, 4, 9, 9)


def test_a_model_that_a_named_backend_cannot_serve_is_left_as_it_was(model):
    with pytest.raises(crisp.ConfigurationError, match="backend='cpu' cannot serve this call: the rule is not one of"):
        crisp.sparsify(model, rule="entmax15", backend="cpu")
    assert not hasattr(model.config, "crisp_attention")
    with pytest.raises(crisp.ConfigurationError, match="Unknown backend"):
        crisp.sparsify(model, sparsity=0.5, backend="gpu")


def test_a_plain_module_is_computed_by_what_was_asked_for():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    outputs = []
    for name in ("reference", "cpu"):
        crisp.sparsify(layer, sparsity=0.5, backend=name)
        assert f"computed by {name!r}" in str(crisp.check(layer, inputs={"src": x}))
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
