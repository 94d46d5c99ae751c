"""A trained model as others load it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.training.keeping import save, settled
from crisp_attention.huggingface.model import sparsify

TEXTS = ["the film was good", "a very dull plot and not a good movie but is the film great", "awful " * 60]


def config(**settings):
    return SparsityConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("attention", "evaluated"),
    [
        ({"sparsity": 0.0}, None),
        ({"sparsity": 0.5}, {"sparsity": 0.5}),
        ({"sparsity": 0.5, "apply": "train"}, None),
        ({"sparsity": 0.5, "apply": "eval"}, {"sparsity": 0.5}),
        ({"sparsity": 0.5, "schedule": {"kind": "linear", "end": 0.5}}, {"sparsity": 0.5}),
        ({"sparsity": 0.5, "schedule": {"kind": "anneal"}}, None),
        ({"sparsity": 0.5, "schedule": {"kind": "anneal", "final": 0.25}}, {"sparsity": 0.25}),
        (
            {"sparsity": 0.5, "rule": "percentile", "layers": [-1]},
            {"sparsity": 0.5, "rule": "percentile", "layers": [-1]},
        ),
        ({"layer_sparsity": [0.5, 0.0], "schedule": {"kind": "cubic"}}, {"layer_sparsity": [0.5, 0.0]}),
    ],
)
def test_a_schedule_stands_where_it_ends(attention, evaluated):
    assert settled(config(**attention)) == (None if evaluated is None else config(**evaluated))


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0]


@pytest.mark.parametrize("settings", [{"rule": "percentile", "layers": [1], "sparsity": 0.8}, {"sparsity": 0.0}])
def test_a_pipeline_of_the_folder_is_the_model(bert, tiny_folders, tmp_path, settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders["bert"], model_max_length=32)
    sparsify(bert, config(**settings))
    expected = [logits(bert, tokenizer, text) for text in TEXTS]
    before = tokenizer.model_max_length = 1000
    (tmp_path / "model").mkdir()  # replaced
    save(bert, tokenizer, config(**settings), 32, tmp_path / "model")
    assert tokenizer.model_max_length == before
    classify = pipeline("text-classification", str(tmp_path / "model"), truncation=True, top_k=None)
    for text, own in zip(TEXTS, expected, strict=True):
        scores = {item["label"]: item["score"] for item in classify([text])[0]}
        wanted = own.softmax(0)
        assert [scores["LABEL_0"], scores["LABEL_1"]] == pytest.approx(wanted.tolist(), abs=1e-5)
    written = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert ("crisp_attention" in written) == bool(settings["sparsity"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_saved_leaves_what_was_there(bert, tiny_folders, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(bert), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save(bert, AutoTokenizer.from_pretrained(tiny_folders["bert"]), config(sparsity=0.5), 32, tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_layers_of_a_model_that_was_only_loaded_know_whether_they_are_sparse(bert, tmp_path):
    sparsify(bert, sparsity=0.5, layers=[-1])
    bert.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["crisp_attention"]["attention_layers"] == 2
    )
    ids = torch.randint(5, 20, (2, 9))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, bert(ids).logits)
    # And saved again it is the same.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, bert(ids).logits)
