from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.training import evaluation, model, train
from crisp_attention.experiment.training.workbench import silence_training


def test_a_quarter_of_the_examples_a_bin():
    lengths = np.array([9, 3, 4, 12, 5, 30, 7, 8])
    pairs = np.stack([lengths, 2 * lengths], axis=1)
    pairs[5] = [6, 60]
    bins = evaluation.length_bins(lengths, pairs)
    assert [(item.shortest, item.longest, item.examples) for item in bins] == [
        (3, 4, 2),
        (5, 7, 2),
        (8, 9, 2),
        (12, 30, 2),
    ]
    assert [item.realised for item in bins[:3]] == [0.5, 0.5, 0.5]
    assert bins[3].realised == pytest.approx(1 - (12 + 6) / (24 + 60))


@pytest.mark.parametrize(
    ("lengths", "expected"), [([7] * 5, [(7, 7, 5)]), ([2, 2, 2, 2, 2, 2, 2, 9], [(2, 2, 7), (9, 9, 1)])]
)
def test_equal_lengths_share_a_bin(lengths, expected):
    lengths = np.array(lengths)
    bins = evaluation.length_bins(lengths, np.stack([lengths, lengths], axis=1))
    assert [(item.shortest, item.longest, item.examples) for item in bins] == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (np.full(10, 33), []),
        (np.array([5, 40, 32, 33, 6]), [0, 2, 4]),
        (np.full(48, 9), list(range(48))),
        (np.arange(4800) % 2 * 60 + 5, None),
    ],
)
def test_maps_are_kept_of_short_examples_evenly_spread(lengths, expected):
    rows = evaluation.map_rows(lengths)
    if expected is not None:
        assert rows.tolist() == expected
        return
    assert len(rows) == 48
    assert (lengths[rows] <= 32).all()
    assert rows[0] == 0
    assert rows[-1] == 4798
    assert set(np.diff(rows)) <= {100, 102, 104}


@pytest.fixture(scope="module")
def finished(tiny_folders, csv_file):
    """Bench, and record and outputs by arm of a study's first seed."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, seeds=1, epochs=1, train=32)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    silence_training()
    bench = tiny_study.bench_of(checkpoint, loaded)
    runs = {run.arm: run for run in expand(spec, tiny_study.prints_of(checkpoint, loaded))}
    return bench, {name: train.run(runs[name], bench, lambda _: None) for name in ("dense", "percentile-80")}


def test_lengths_are_those_of_the_tokenizer(finished):
    bench, runs = finished
    for _, outputs in runs.values():
        own = [len(bench.processor(text)["input_ids"]) for text in bench.data.test.texts]
        assert outputs["test_lengths"].tolist() == own
        assert outputs["test_lengths"].dtype == np.int64


def test_realised_sparsity_by_length_adds_up_to_the_whole(finished):
    _, runs = finished
    dense, sparse = (runs[arm][0] for arm in ("dense", "percentile-80"))
    assert {item.realised for item in dense.realised_by_length} == {0.0}
    lengths = runs["percentile-80"][1]["test_lengths"]
    assert sum(item.examples for item in sparse.realised_by_length) == len(lengths)
    parts = [
        (item.realised, sum(n * n for n in lengths if item.shortest <= n <= item.longest))
        for item in sparse.realised_by_length
    ]
    assert len(parts) > 1
    whole = sum(share * pairs for share, pairs in parts) / sum(pairs for _, pairs in parts)
    assert whole == pytest.approx(np.mean(list(sparse.realised_sparsity.test.values())), rel=1e-6)


def test_entropy_is_of_each_layer_and_lower_where_attention_is_sparse(finished):
    _, runs = finished
    dense, sparse = (runs[arm][0].entropy for arm in ("dense", "percentile-80"))
    assert dense.keys() == sparse.keys() == runs["dense"][0].realised_sparsity.test.keys()
    for layer, value in sparse.items():
        assert 0 < value < dense[layer] < np.log(32)


def unpack(outputs):
    """Maps by example, `[L, T, T]`."""
    layers, start = int(outputs["map_layers"]), 0
    for row, tokens in zip(outputs["map_rows"], outputs["map_lengths"], strict=True):
        size = layers * tokens**2
        yield row, outputs["maps"][start : start + size].reshape(layers, tokens, tokens)
        start += size
    assert start == len(outputs["maps"])


@pytest.mark.parametrize("arm", ["dense", "percentile-80"])
def test_maps_are_the_models_own(finished, arm):
    _, outputs = finished[1][arm]
    np.testing.assert_array_equal(outputs["map_lengths"], outputs["test_lengths"][outputs["map_rows"]])
    assert outputs["maps"].dtype == np.uint8
    assert int(outputs["map_layers"]) == 2
    zeros = 0
    for _, maps in unpack(outputs):
        np.testing.assert_allclose(maps.sum(axis=2) / 255, 1.0, atol=0.5 * maps.shape[2] / 255)
        zeros += int((maps == 0).sum())
    assert (zeros > 0) == (arm != "dense")


def test_a_map_is_the_mean_over_heads_of_that_example_alone(finished, tmp_path):
    """Against one forward per sentence, without a batch and without padding."""
    from transformers import Trainer, TrainingArguments

    import crisp_attention as crisp

    bench, _ = finished
    torch.manual_seed(0)
    network = bench.model(TrainingSpec())
    crisp.sparsify(network, sparsity=0.5)
    split = bench.encoded(bench.data.test, 64)
    collate = bench.collator("longest", 64)
    trainer = Trainer(network, TrainingArguments(str(tmp_path), report_to=[]), data_collator=collate)
    outputs = evaluation.attention_maps(trainer, split)
    network.eval()
    for row, maps in unpack(outputs):
        inputs = bench.processor(bench.data.test.texts[row], return_tensors="pt")
        with torch.no_grad():
            own = network(**inputs, output_attentions=True).attentions
        expected = torch.stack(own).mean(dim=2)[:, 0].numpy()
        np.testing.assert_allclose(maps / 255, expected, atol=0.5 / 255 + 1e-6)


def test_an_architecture_that_returns_no_maps_has_none(finished, monkeypatch):
    bench, _ = finished

    class Silent(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"attentions": None})()

    trainer = type(
        "Stub",
        (),
        {
            "model": Silent(),
            "data_collator": bench.collator("longest", 64),
            "args": type("Arguments", (), {"device": "cpu"}),
        },
    )
    monkeypatch.setattr(evaluation, "PreTrainedModel", Silent)
    assert evaluation.attention_maps(trainer, bench.encoded(bench.data.test, 64)) == {}
