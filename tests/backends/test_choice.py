"""Which backend serves a call."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import crisp_attention as crisp
from cases import qkv
from crisp_attention import backends
from crisp_attention.backends import choice
from crisp_attention.backends.cpu import compiling
from crisp_attention.operator import attend
from crisp_attention.rules import Pairs

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
        ({"scale": torch.tensor(0.5)}, "the scale is a tensor"),
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


def _trace(function, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is old, and fixes what Python decides
        return torch.jit.trace(function, inputs, check_trace=False)


@pytest.mark.parametrize(
    ("surround", "reason"),
    [
        (lambda f: torch.func.vmap(f)(Q[None]), "a transform"),
        (lambda f: torch.func.grad(lambda q: f(q).sum())(Q), "a transform"),
        (lambda f: make_fx(f)(Q), "a transform"),
        (lambda f: _trace(f, Q), "a compiled graph"),
        (lambda f: torch.compile(f, backend="eager")(Q), "a compiled graph"),
    ],
    ids=["vmap", "grad", "make_fx", "trace", "compile"],
)
def test_transforms_and_graphs_get_the_reference_and_a_named_backend_refuses(surround, reason):
    surround(lambda q: crisp.attention(q, K, V, sparsity=0.5))
    with pytest.raises(crisp.ConfigurationError, match=f"'cpu' cannot serve this call: the call is part of {reason}"):
        surround(lambda q: crisp.attention(q, K, V, sparsity=0.5, backend="cpu"))


def test_what_was_traced_computes_anything():
    others = qkv(dtype=torch.float32, seed=1)
    for traced in (_trace, lambda function, *inputs: make_fx(function)(*inputs)):
        attention = traced(lambda q, k, v: crisp.attention(q, k, v, sparsity=0.5), Q, K, V)
        torch.testing.assert_close(attention(*others), crisp.attention(*others, sparsity=0.5))


def test_forward_mode_differentiation_gets_its_tangents():
    tangents = []
    for backend in ("auto", "reference"):
        with forward_ad.dual_level():
            out = crisp.attention(forward_ad.make_dual(Q, K), K, V, sparsity=0.5, backend=backend)
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert torch.equal(*tangents)


def test_a_scale_that_learns_gets_its_gradient():
    gradients = []
    for scale in (torch.tensor(0.3, requires_grad=True), torch.full((3, 1, 1), 0.3, requires_grad=True)):
        crisp.attention(Q, K, V, sparsity=0.5, scale=scale).square().sum().backward()
        gradients.append(scale.grad.sum())
    torch.testing.assert_close(*gradients)
    assert gradients[0] != 0


def test_an_empty_batch_gets_an_empty_output():
    empty = [x[:0].requires_grad_() for x in (Q, K, V)]
    pairs = Pairs((0, 3, 7, 7), torch.device("cpu"))
    result = attend(*empty, config=crisp.SparsityConfig(sparsity=0.5), pairs=pairs)
    assert "there are no pairs" in result.choice.reason
    result.output.sum().backward()
    assert result.output.shape == empty[0].grad.shape == (0, 3, 7, 8)


@pytest.fixture
def asked_anew():
    choice._missing.cache_clear()
    yield
    choice._missing.cache_clear()


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, asked_anew):
    monkeypatch.setattr(choice, "find_spec", lambda package: None)
    name, reason = chosen()
    assert name == "reference"
    assert "numba is not installed (pip install 'crisp-attention[cpu]')" in reason
    with pytest.raises(crisp.ConfigurationError, match=r"crisp-attention\[cpu\]"):
        chosen(backend="cpu")


@pytest.mark.parametrize("error", [ImportError("Numba needs NumPy 2.2 or less"), OSError("libllvmlite.so: no GLIBC")])
def test_a_compiler_that_cannot_be_imported_is_as_good_as_none(monkeypatch, asked_anew, error):
    original = choice.import_module

    def import_module(name):
        if name == "numba":
            raise error
        return original(name)

    monkeypatch.setattr(choice, "import_module", import_module)
    name, reason = chosen()
    assert name == "reference"
    assert f"numba is installed but cannot be imported: {error}" in reason
    with pytest.raises(crisp.ConfigurationError, match=f"cannot be imported: {error}"):
        chosen(backend="cpu")


def test_nothing_is_compiled_where_the_environment_forbids_it(monkeypatch):
    monkeypatch.setattr(compiling, "DISABLED", True)
    assert chosen() == ("reference", "'cpu' cannot serve it: NUMBA_DISABLE_JIT is set")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(crisp.ConfigurationError, match=r"Unknown backend 'cpus'.*cpu"):
        chosen(backend="cpus")
    with pytest.raises(crisp.ConfigurationError, match=r"Unknown backend None\. Valid: auto, cpu, reference, triton"):
        chosen(backend=None)


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
