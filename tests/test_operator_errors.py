"""What the operator refuses, and what its messages tell to do."""

from __future__ import annotations

import pytest
import torch

import crisp_attention as crisp
from cases import qkv
from crisp_attention.traits import RULES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).*got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"rule": "percentil"}, "Did you mean 'percentile'"),
        ({"rule": "percentile", "causal": True}, "Use rule='topk'"),
        ({"rule": "topk", "scope": "row"}, "would ignore scope"),
        ({"rule": "percentile", "valid": torch.ones(7, 7).tril().bool()[None, None]}, "Use rule='topk'"),
        ({"rule": "percentile", "bias": torch.full((7, 7), -torch.inf).triu(1)}, "Use rule='topk'"),
        ({"rule": "topk", "count_padding": True, "causal": True}, "Use count_padding=False"),
        ({"rule": "random", "scope": "matrix", "causal": True}, "Use scope='row'"),
        ({"rule": "block_topk", "causal": True}, "Use query_block=1, or rule='topk'"),
        ({"rule": "random", "p": 0.5}, "Rule 'random' would ignore p=0.5; it is set by sparsity. p is read by: top_p"),
        ({"rule": "entmax15"}, "Rule 'entmax15' would ignore sparsity=0.5; it has no strength to set"),
        ({"rule": "top_p"}, "Rule 'top_p' would ignore sparsity=0.5; it is set by p"),
        ({"heads": [3]}, r"heads=\[3\] names 3, but there are 3 query heads \(0 to 2\)"),
        ({"heads": [-1]}, "heads must hold different integers >= 0"),
        ({"layers": [0]}, "layers is a setting of a model, not of one attention call; use sparsify"),
        ({"layer_sparsity": [0.5]}, "layer_sparsity is a setting of a model.*use sparsify"),
        ({"schedule": {"kind": "linear"}}, "schedule is a setting of a model.*use sparsify"),
        ({"apply": "train"}, "apply is a setting of a model.*use sparsify"),
        ({"keep_frist": 1}, "Unknown sparsity setting 'keep_frist'. Did you mean 'keep_first'"),
        ({"softcap": 0.0}, "softcap must be greater than 0, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be greater than 0, got nan"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[H\] = \(3,\), got \(2,\)"),
        ({"min_keep": 0}, "min_keep must be an integer >= 1, got 0"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"backend": "tritn"}, "Unknown backend 'tritn'"),
        ({"valid": torch.ones(2, 7)}, "valid must be bool"),
        ({"valid": torch.ones(2, 7), "bias": torch.ones(7, 7)}, "valid must be bool"),
        ({"valid": torch.ones(2, 1, 7, 6, dtype=torch.bool)}, r"broadcastable to \[B, H, Q, K\]"),
        ({"valid": torch.ones(2, 9, dtype=torch.bool)}, r"valid must be \[B, K\] = \(2, 7\)"),
        ({"query_valid": torch.ones(2, 6, dtype=torch.bool)}, r"query_valid must be bool \[B, Q\] = \(2, 7\)"),
        ({"bias": torch.ones(3, 3)}, r"bias must be broadcastable .* got \(3, 3\)"),
        ({"bias": torch.ones(7, 7, dtype=torch.bool)}, r"bias must be floating point \(use valid= for a bool mask\)"),
        ({"bias": torch.zeros(2, 3, 7, 6)}, r"bias must be broadcastable .* got \(2, 3, 7, 6\)"),
        ({"bias": torch.zeros(1, 2, 3, 7, 7)}, "bias must be broadcastable"),
        ({"q": torch.ones(2, 3, 0, 8)}, "q must be a non-empty"),
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


@pytest.mark.parametrize(
    "settings", [{"keep_self": True}, {"rule": "window"}, {"rule": "random"}, {"rule": "block_topk"}]
)
@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4)])
def test_rules_by_place_refuse_cross_attention(settings, queries, keys):
    q, k, v = qkv(queries=queries, keys=keys)
    with pytest.raises(crisp.ConfigurationError, match=f"{queries} queries over {keys} keys of another"):
        crisp.attention(q, k, v, sparsity=0.5, **settings)


@pytest.mark.parametrize("rule", [rule for rule in sorted(RULES) if not RULES[rule].per_row])
def test_rules_that_look_at_other_rows_refuse_to_be_causal_unless_they_remove_nothing(rule):
    q, k, v = qkv()
    with pytest.raises(crisp.ConfigurationError, match="later tokens would change earlier outputs"):
        crisp.attention(q, k, v, rule=rule, sparsity=0.5, causal=True)
    dense = crisp.attention(q, k, v, sparsity=0.0, causal=True)
    assert torch.equal(crisp.attention(q, k, v, rule=rule, sparsity=0.0, causal=True), dense)


def test_a_mistake_is_a_value_error_too():
    with pytest.raises(ValueError, match="Did you mean 'topk'"):
        crisp.attention(*qkv(), sparsity=0.5, rule="top_k")
