"""A plan in words."""

from __future__ import annotations

import pytest

from crisp_attention.experiment import outline
from record_builders import make_spec


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sparsity": 0.8, "schedule": {"kind": "stochastic"}}, "topk sparsity=0.8 schedule=stochastic"),
        (
            {"sparsity": 0.8, "layers": [4, 5], "schedule": {"kind": "anneal", "end": 0.5}},
            "topk sparsity=0.8 layers=[4, 5] schedule=anneal(end=0.5)",
        ),
        ({"sparsity": 0.5, "evaluate": {}}, "topk sparsity=0.5; evaluated dense"),
    ],
)
def test_an_arm_is_told_by_what_it_changes(settings, line):
    arm = {"name": "sparse", **settings}
    spec = make_spec(arms=[{"name": "dense"}, arm], primary={"arm": "sparse"})
    assert outline._settings(spec.arm("sparse")) == line
