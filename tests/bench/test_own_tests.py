"""Transformers' own model tests judge the operator; they are fetched by hand, so here is what they call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_what_stands_in_for_sdpa_is_the_operator_and_counts_its_calls():
    file = ROOT / "benchmarks" / "transformers_own_tests.py"
    spec = importlib.util.spec_from_file_location("transformers_own_tests", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind()
    layer = torch.nn.Module()
    layer.is_causal = False
    output, weights = module._operator(layer, q, k, v, None, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None
    assert module._Watched.calls == 1
    _, weights = module._operator(layer, q, k, v, None, scaling=0.5, output_attentions=True)
    torch.testing.assert_close(weights, (q @ k.mT * 0.5).softmax(dim=-1))
    assert module._Watched.calls == 2
