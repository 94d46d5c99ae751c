"""The part of the training split on which settings are chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_attention.errors import DataError
from crisp_attention.experiment.data import dataset as dataset_module
from crisp_attention.experiment.data.dataset import Dataset, Split, carve
from crisp_attention.experiment.data.sources import Table
from crisp_attention.experiment.specification.sections import DataSpec
from data_files import ROWS, everything, load_file, sides, write


def split(texts, groups=None):
    return Split(tuple(texts), None, np.arange(len(texts)) % 2, groups=groups)


def dataset(train, test=None):
    return Dataset("made-up", ("no", "yes"), train, test or split(["a", "b"]), ("One row was dropped.",))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_about_the_share_is_held_out_whatever_share_the_evaluation_split_was(tmp_path, share):
    rows = [(f"text {number}", number % 2) for number in range(3000)]
    whole = load_file(write(tmp_path, "films.csv", rows), test_share=0.5)
    carved = carve(whole, share)
    assert len(carved.test) / len(whole.train) == pytest.approx(share, abs=0.03)
    assert sorted(everything(carved)) == sorted(
        (text, None, whole.classes[label]) for text, label in zip(whole.train.texts, whole.train.labels, strict=True)
    )


def test_an_exploration_is_judged_on_a_part_of_the_training_split(tmp_path):
    file = write(tmp_path, "films.csv", [(f"text {number}", number % 2) for number in range(600)])
    whole, explored = load_file(file), load_file(file, validation_share=0.3, train_examples=100)
    assert set(explored.test.texts) == set(carve(whole, 0.3).test.texts)
    assert not set(explored.test.texts) & set(whole.test.texts)
    assert set(explored.train.texts) < set(carve(whole, 0.3).train.texts)
    assert (len(explored.train), len(explored.test)) == (100, len(carve(whole, 0.3).test))
    assert "The evaluation split was left alone" in explored.notes[-1]
    with pytest.raises(DataError, match=r"validation_share = 1e-09 leaves a validation part of 0 with fewer than two"):
        load_file(file, validation_share=1e-9)


def test_no_row_of_the_evaluation_split_is_in_it_and_none_decides_anything(tmp_path):
    whole = load_file(write(tmp_path, "films.csv", ROWS))
    carved = carve(whole, 0.2)
    assert not set(sides(carved)) & set(whole.test.texts)
    other = dataclasses.replace(whole, test=split(["something", "else"]))
    assert carve(other, 0.2).fingerprint == carved.fingerprint


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=200, max_size=300))
def test_repeats_and_sentences_of_one_document_stay_on_one_side(rows):
    texts, documents = zip(*((f"Text {text}", f"document {document}") for text, document in rows), strict=True)
    # Another spacing or case is the same text.
    train = split([text.upper() if place % 3 else f"{text} " for place, text in enumerate(texts)], documents)
    try:
        carved = carve(dataset(train), 0.5)
    except DataError:  # all of them hang together
        return
    for side, other in ((carved.train, carved.test), (carved.test, carved.train)):
        assert not set(side.groups) & set(other.groups)
        assert not set(side.identities()) & set(other.identities())


def test_documents_are_remembered_by_every_part_of_a_split():
    whole = split([f"text {number}" for number in range(6)], tuple("aabbcc"))
    assert whole.take([5, 0]).groups == ("c", "a")
    assert split(["x"]).take([0]).groups is None


def test_the_sources_documents_are_kept_in_mind(monkeypatch):
    labels, documents = [str(number % 2) for number in range(400)], [f"document {number // 5}" for number in range(400)]
    table = Table(labels, [f"text {number}" for number in range(400)], groups=documents, notes=("One was dropped.",))
    monkeypatch.setattr(dataset_module, "read", lambda *_: table)
    whole = dataset_module.load(DataSpec(source="reviews", train_examples=200))
    carved = carve(whole, 0.3)
    held_out, trained_on = set(carved.test.groups), set(carved.train.groups)
    assert held_out
    assert not held_out & trained_on
    assert not (held_out | trained_on) & set(whole.test.groups)
    note = f"{len(carved.test)} of 200 training examples were held out for validation."
    assert carved.notes == (*whole.notes, note)
    assert whole.notes[0] == "One was dropped."


@pytest.mark.parametrize(("share", "side"), [(1e-6, "validation part of 0"), (1 - 1e-6, "training part of 0")])
def test_too_little_to_divide_is_told(share, side):
    with pytest.raises(DataError, match=rf"of 80 training examples, tune.share = {share:g} leaves a {side} with fewer"):
        carve(dataset(split([text for text, _ in ROWS])), share)
