"""What the callback warns of: sparsity that is not what was asked for."""

from __future__ import annotations

import warnings

import pytest
import torch

import crisp_attention as crisp
from crisp_attention.huggingface.recorder import Tally, explain
from small_trainings import rows, trainer


@pytest.mark.parametrize(("sparsity", "reason"), [(0.5, "chance"), (0.95, "length")])
def test_a_draw_of_each_pair_alone_misses_by_chance_or_where_rows_are_short(sparsity, reason):
    config = crisp.SparsityConfig(rule="random", scope="pair", sparsity=sparsity)
    tally = Tally("layer", config, pairs=100.0, kept=40.0, asked=100.0 * sparsity, queries=10.0)
    assert explain(tally)[0] == reason


@pytest.mark.parametrize(
    ("settings", "length", "sentence"),
    [
        (
            {"sparsity": 0.95},
            6,
            r"0\.833 where 0\.950 was requested.*had 6\.0 valid keys.*0\.3 were.*min_keep=1",
        ),
        ({"sparsity": 0.8, "min_keep": 8}, 12, "of which 2.4 were to survive: whole keys do, at least min_keep=8"),
        ({"sparsity": 0.6, "min_keep": 1, "rule": "topk"}, 2, "had 2.0 valid keys"),
        ({"sparsity": 0.65, "rule": "nm"}, 12, r"0\.750 where.*m=4 can remove 0\.00, 0\.25, 0\.50, 0\.75 of each"),
        ({"sparsity": 0.5, "rule": "block_topk"}, 12, "whole blocks of 16 keys, and queries had 12.0 valid keys"),
        ({"sparsity": 0.8, "keep_first": 6, "min_keep": 1}, 12, "2.4 were to survive, and keep_first and.*keep 6"),
        ({"sparsity": 0.9, "rule": "percentile"}, 60, "leaves some queries nothing; each keeps min_keep=1 keys"),
    ],
)
def test_warns_once_of_a_miss_with_its_reason(bert, tmp_path, settings, length, sentence):
    if settings.get("rule") == "percentile":
        with torch.no_grad():  # scores are one feature of the query times another of the key: few queries take all
            for layer in bert.bert.encoder.layer:
                for feature, side in enumerate((layer.attention.self.query, layer.attention.self.key)):
                    side.weight.zero_()[:, feature] = 1.0
    crisp.sparsify(bert, **settings)
    with pytest.warns(UserWarning, match="Up to step 1, bert.encoder.layer") as caught:
        trainer(bert, tmp_path, examples=rows(16, length)).train()
    said = [str(warning.message) for warning in caught if "Up to step" in str(warning.message)]
    assert len(said) == 1
    import re

    assert re.search(sentence, said[0]), said[0]
    assert "SparsityCallback(tolerance=...) says how far off is reported, 0.05 now." in said[0]


def test_warns_of_padding_counted(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, count_padding=True)
    examples = [
        {**row, "attention_mask": (torch.arange(12) < 4 + 8 * (number % 2)).long()} for number, row in enumerate(rows())
    ]
    with pytest.warns(UserWarning, match="count_padding=True counts padding among the removed pairs"):
        trainer(bert, tmp_path, examples=examples).train()


def test_warns_of_ties(bert, tmp_path):
    with torch.no_grad():
        for layer in bert.bert.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    crisp.sparsify(bert, sparsity=0.8)
    with pytest.warns(UserWarning, match=r"0\.000 where 0\.800 was requested. Scores that tie"):
        trainer(bert, tmp_path, examples=rows(32, 40), steps=1).train()


@pytest.mark.parametrize("tolerance", [None, 0.2])
def test_within_the_tolerance_nothing_is_said(bert, tmp_path, tolerance):
    crisp.sparsify(bert, sparsity=0.95)  # of six keys one survives: 0.83
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Up to step")
        trainer(bert, tmp_path, examples=rows(16, 6), callbacks=[crisp.SparsityCallback(tolerance=tolerance)]).train()


@pytest.mark.parametrize("tolerance", [-0.1, 5, "0.1"])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(crisp.ConfigurationError, match="tolerance must be"):
        crisp.SparsityCallback(tolerance=tolerance)
