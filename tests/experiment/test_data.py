from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import sentence_rows
from crisp_attention.errors import AssetError, DataError
from crisp_attention.experiment import data
from crisp_attention.experiment.data import PACKAGED, RATED, Dataset, Split, load
from crisp_attention.experiment.spec import DataSpec

ROWS = [(f"text number {number}", str(number % 2)) for number in range(80)]


def write(folder, name, rows, header=("text", "label")):
    """A data file of the kind that its suffix says."""
    file = folder / name
    frame = pd.DataFrame(rows, columns=list(header))
    if file.suffix.lower() == ".csv":
        frame.to_csv(file, index=False)
    elif file.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in [header, *rows]]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif file.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        frame.to_parquet(file)
    return str(file)


def load_file(file, **settings):
    return load(DataSpec(source=str(file), **settings))


def everything(dataset):
    """All examples of both splits: (text, pair, class name), sorted."""
    rows = []
    for split in (dataset.train, dataset.test):
        pairs = split.pairs or [None] * len(split)
        rows += [(a, b, dataset.classes[k]) for a, b, k in zip(split.texts, pairs, split.labels, strict=True)]
    return sorted(rows, key=str)


def sides(dataset):
    """Which side each text is on; fails if one is on both."""
    train, test = set(dataset.train.texts), set(dataset.test.texts)
    assert not train & test
    return dict.fromkeys(train, "train") | dict.fromkeys(test, "test")


# Files


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_all_kinds_of_file_give_the_same_examples(tmp_path, suffix):
    rows = [*ROWS, ("naïve «café» 映画 🎬", "1"), ("NA", "0"), ("null", "1"), ("nan", "0")]
    dataset = load_file(write(tmp_path, f"films{suffix}", rows))
    assert everything(dataset) == sorted([(text, None, label) for text, label in rows], key=str)
    assert dataset.classes == ("0", "1")
    assert dataset.name == f"films{suffix}"
    assert dataset.train.labels.dtype == np.int64
    assert dataset.fingerprint == load_file(write(tmp_path, "other.csv", rows)).fingerprint


def test_a_fixture_file_reads_as_written(csv_file):
    dataset = load_file(csv_file)
    assert everything(dataset) == sorted([(text, None, label) for text, label in sentence_rows(160)], key=str)
    assert dataset.classes == ("negative", "positive")


def test_quotes_in_a_tsv_are_characters_of_the_text(tmp_path):
    rows = [*ROWS, ('"a quote at the start', "0"), ('one " inside', "1"), ('"all quoted"', "0"), ("it's, a comma", "1")]
    dataset = load_file(write(tmp_path, "films.tsv", rows))
    assert everything(dataset) == sorted([(text, None, label) for text, label in rows], key=str)


def test_quotes_in_a_csv_quote(tmp_path):
    file = tmp_path / "films.csv"
    rows = [*ROWS, ('she said "no", twice', "0"), ("two\nlines", "1")]
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert everything(load_file(file)) == sorted([(text, None, label) for text, label in rows], key=str)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, suffix):
    file = tmp_path / f"films{suffix}"
    write(tmp_path, file.name, ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(everything(load_file(file))) == len(ROWS)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path, suffix):
    file = tmp_path / f"films{suffix}"
    write(tmp_path, file.name, [*ROWS, ("CAFE", "1")])
    file.write_bytes(file.read_bytes().replace(b"CAFE", b"caf\xe9 au lait"))
    with pytest.raises(DataError, match=rf"films\{suffix} is not UTF-8.* at byte \d+"):
        load_file(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("films.csv", b"", "cannot be read as .csv"),
        ("films.csv", b"text,label\n", "training split is empty"),
        ("films.csv", b"text,label\na,0\nb,1\nan, unquoted, comma,1\n", r"cannot be read as \.csv.*line 4"),
        ("films.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "la', r"cannot be read as \.jsonl"),
        ("films.parquet", b"PAR1 no", r"cannot be read as \.parquet"),
        ("films.txt", b"good\t1\n", r"unknown kind of data file '\.txt'.*Did you mean '\.tsv'"),
        ("films", b"good\t1\n", "unknown kind of data file ''.*Valid: .csv, .jsonl, .parquet, .tsv"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_rows_with_a_field_too_many_are_refused_also_where_the_first_row_is_one(tmp_path):
    """pandas would take the first field for an index, shift the columns and lose the other rows."""
    file = tmp_path / "films.csv"
    lines = [f"{'well, ' * (number % 2 == 0)}text {number},{number // 2 % 2}" for number in range(80)]
    file.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(file))):
        load_file(file)


@pytest.mark.parametrize("source", ["no/such.csv", "./nothing", "/nowhere", "~/nowhere-at-all"])
def test_a_missing_file_is_named(source):
    with pytest.raises(DataError, match=f"No such data file or folder: {re.escape(source)}"):
        load(DataSpec(source=source))


def test_a_missing_test_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"No such data file: .*absent\.csv"):
        load_file(write(tmp_path, "films.csv", ROWS), test=str(tmp_path / "absent.csv"))


# Columns


@pytest.mark.parametrize(
    ("header", "settings"),
    [
        (("review", "stars"), {}),
        (("content", "sentiment"), {}),
        (("body", "verdict"), {"text": "body", "label": "verdict"}),
        (("label", "text"), {"text": "label", "label": "text"}),
    ],
)
def test_columns_are_found_by_usual_names_or_told(tmp_path, header, settings):
    dataset = load_file(write(tmp_path, "films.csv", ROWS, header), **settings)
    assert everything(dataset) == sorted([(text, None, label) for text, label in ROWS], key=str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "txt"}, "no text column 'txt'. Did you mean 'text'"),
        ({"label": "labl"}, "no label column 'labl'. Did you mean 'label'"),
        ({"text_pair": "extar"}, "no text_pair column 'extar'. Did you mean 'extra'"),
        ({"text": "label", "label": "label"}, "no label column 'label'"),
        ({"text_pair": "text"}, "no text_pair column 'text'"),
        ({"text_pair": "label"}, "no text_pair column 'label'"),
    ],
)
def test_a_wrong_column_is_named_with_the_nearest(tmp_path, settings, message):
    file = write(tmp_path, "films.csv", [(*row, "x") for row in ROWS], ("text", "label", "extra"))
    with pytest.raises(DataError, match=message):
        load_file(file, **settings)


def test_without_a_usual_name_the_columns_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"no text column by a usual name \(text, .*it has: body, label. Name it with"):
        load_file(write(tmp_path, "films.csv", ROWS, ("body", "label")))
    with pytest.raises(DataError, match=r"no label column by a usual name .*it has: verdict"):
        load_file(write(tmp_path, "films.csv", ROWS, ("text", "verdict")))


def test_columns_may_be_called_by_numbers(tmp_path):
    with pytest.raises(DataError, match="it has: 0, 1"):
        load_file(write(tmp_path, "films.jsonl", ROWS, ("0", "1")))
    assert len(everything(load_file(tmp_path / "films.jsonl", text="0", label="1"))) == len(ROWS)


@pytest.mark.parametrize(
    ("first", "second", "settings"),
    [
        ("premise", "hypothesis", {}),
        ("sentence1", "sentence2", {}),
        ("question1", "question2", {}),
        ("question", "sentence", {}),  # GLUE's QNLI: without its question a sentence has no class
        ("a", "b", {"text": "a", "text_pair": "b"}),
    ],
)
def test_pairs_of_texts(tmp_path, first, second, settings):
    rows = [(number, f"first {number}", f"second {number}", number % 2) for number in range(80)]
    dataset = load_file(write(tmp_path, "pairs.tsv", rows, ("index", first, second, "label")), **settings)
    assert everything(dataset) == sorted(((a, b, str(label)) for _, a, b, label in rows), key=str)


def test_a_named_text_column_alone_is_no_pair(tmp_path):
    rows = [(f"first {number}", f"second {number}", number % 2) for number in range(80)]
    dataset = load_file(write(tmp_path, "pairs.csv", rows, ("premise", "hypothesis", "label")), text="premise")
    assert dataset.train.pairs is None
    assert dataset.test.pairs is None


def test_empty_cells_are_dropped_and_told(tmp_path):
    rows = [*ROWS, ("", "1"), ("   ", "0"), ("text without a label", ""), ("  kept, and stripped ", " 1 ")]
    dataset = load_file(write(tmp_path, "films.csv", rows))
    assert everything(dataset) == sorted(
        [(text, None, label) for text, label in [*ROWS, ("kept, and stripped", "1")]], key=str
    )
    assert len(dataset.notes) == 1
    assert "3 of 84 rows of films.csv were dropped" in dataset.notes[0]


def test_nothing_dropped_is_nothing_told(tmp_path):
    assert load_file(write(tmp_path, "films.csv", ROWS)).notes == ()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_label_changes_no_other_label(tmp_path, suffix):
    rows = [(text, int(label)) for text, label in ROWS]
    whole = write(tmp_path, f"test{suffix}", rows)
    gap = write(tmp_path, f"train{suffix}", [*rows, ("no label", None)])
    dataset = load_file(gap, test=whole)
    assert dataset.classes == ("0", "1")
    assert "no label" not in dataset.train.texts


@pytest.mark.parametrize("name", ["films.csv", "films.jsonl"])
def test_classes_of_minus_one_are_not_dropped_in_silence(tmp_path, name):
    """Hub data hides labels by -1, but in a file of -1, 0, 1 it is a class like the others."""
    rows = [(f"text {number}", number % 3 - 1) for number in range(90)]
    dataset = load_file(write(tmp_path, name, rows))
    assert dataset.classes == ("-1", "0", "1") or any("-1" in note or "hidden" in note for note in dataset.notes)


# Classes


def test_classes_are_sorted_by_value_then_by_spelling(tmp_path):
    labels = ["10", "9", "-2", "2.5", "b", "a"]
    rows = [(f"text {number}", labels[number % 6]) for number in range(120)]
    dataset = load_file(write(tmp_path, "films.csv", rows))
    assert dataset.classes == ("-2", "2.5", "9", "10", "a", "b")


def test_one_class_is_no_task(tmp_path):
    with pytest.raises(DataError, match=r"needs two classes or more, got one: 'yes'"):
        load_file(write(tmp_path, "films.csv", [(text, "yes") for text, _ in ROWS]))


def test_a_split_of_one_class_is_no_task(tmp_path):
    train = write(tmp_path, "train.csv", ROWS)
    test = write(tmp_path, "test.csv", [(f"other {number}", "1") for number in range(10)])
    with pytest.raises(DataError, match="evaluation split of 10 examples has one class only"):
        load_file(train, test=test)
    with pytest.raises(DataError, match="training split of 1 examples has one class only"):
        load_file(train, train_examples=1)


def test_labels_that_training_lacks_are_named(tmp_path):
    train = write(tmp_path, "train.csv", ROWS)
    test = write(tmp_path, "test.csv", [*ROWS[:9], ("odd", "neutral"), ("other", "2")])
    with pytest.raises(DataError, match=r"evaluation split has labels that training lacks: 2, neutral"):
        load_file(train, test=test)


@pytest.mark.parametrize("count", [60, 1500 * 4])
def test_labels_that_are_no_classes_are_refused(tmp_path, count):
    rows = [(f"text {number}", f"label {number if count < 100 else number % 1500}") for number in range(count)]
    with pytest.raises(DataError, match=rf"{min(count, 1500)} different labels in {count} rows; is the label column"):
        load_file(write(tmp_path, "films.csv", rows))


# Splits


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_held_out_share_is_about_what_was_asked_for(tmp_path, share):
    rows = [(f"text {number}", number % 2) for number in range(3000)]
    dataset = load_file(write(tmp_path, "films.csv", rows), test_share=share)
    assert len(dataset.test) / 3000 == pytest.approx(share, abs=0.03)
    assert len(everything(dataset)) == 3000


def test_a_larger_share_only_moves_texts_from_training_to_test(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    small, large = (set(load_file(file, test_share=share).test.texts) for share in (0.2, 0.5))
    assert small < large


@settings(max_examples=25)
@given(order=st.randoms(use_true_random=False), repeats=st.integers(0, 30))
def test_a_text_has_one_side_whatever_the_order_of_rows(tmp_path_factory, order, repeats):
    folder = tmp_path_factory.mktemp("order")
    rows = ROWS + [(text.upper().replace(" ", "  "), label) for text, label in ROWS[:repeats]]
    shuffled = list(rows)
    order.shuffle(shuffled)
    first, second = (load_file(write(folder, f"{name}.csv", table)) for name, table in (("a", rows), ("b", shuffled)))
    assert sides(first) == sides(second)
    assert everything(first) == everything(second)
    folded = defaultdict(set)
    for text, side in sides(first).items():
        folded[" ".join(text.lower().split())].add(side)
    assert all(len(found) == 1 for found in folded.values())


def test_rows_keep_the_order_of_the_source(tmp_path):
    rows = random.Random(0).sample(ROWS, len(ROWS))
    dataset = load_file(write(tmp_path, "films.csv", rows), train_examples=30)
    place = {text: number for number, (text, _) in enumerate(rows)}
    for split in (dataset.train, dataset.test):
        assert [place[text] for text in split.texts] == sorted(place[text] for text in split.texts)


def test_a_source_too_small_to_split_is_told(tmp_path):
    rows = [("a", "0"), ("b", "1"), ("c", "0"), ("d", "1")]
    with pytest.raises(DataError, match="evaluation split is empty"):
        load_file(write(tmp_path, "films.csv", rows), test_share=1e-9)
    with pytest.raises(DataError, match="training split is empty"):
        load_file(write(tmp_path, "films.csv", rows), test_share=1 - 1e-9)


def test_a_test_file_is_the_evaluation_split(tmp_path):
    test_rows = [(f"other {number}", number % 2) for number in range(10)]
    train, test = write(tmp_path, "train.csv", ROWS), write(tmp_path, "test.jsonl", test_rows)
    dataset = load_file(train, test=test)
    assert dataset.train.texts == tuple(text for text, _ in ROWS)
    assert dataset.test.texts == tuple(text for text, _ in test_rows)
    assert dataset.test.labels.tolist() == [0, 1] * 5
    assert dataset.notes == ()


def test_texts_in_both_of_the_sources_splits_are_counted_in_a_note(tmp_path):
    train = write(tmp_path, "train.csv", ROWS)
    test = write(tmp_path, "test.csv", [("Text  NUMBER 3", "1"), ("text number 4", "0"), ("new", "1")])
    assert load_file(train, test=test).notes == (
        "2 texts occur in both of the source's own splits; they were left in.",
    )


def test_an_empty_test_file_is_told(tmp_path):
    with pytest.raises(DataError, match="evaluation split is empty"):
        load_file(write(tmp_path, "train.csv", ROWS), test=write(tmp_path, "test.csv", [("a", ""), ("b", "")]))


def test_a_test_file_is_used_or_refused_beside_a_folder(tmp_path):
    glue_folder(tmp_path)
    test = write(tmp_path, "mine.csv", [("mine 1", "0"), ("mine 2", "1")])
    try:
        dataset = load_file(tmp_path, test=test)
    except DataError:
        return
    assert dataset.test.texts == ("mine 1", "mine 2")


# Limits


@pytest.mark.parametrize(
    ("key", "side", "name"), [("train_examples", "training", "train"), ("test_examples", "evaluation", "test")]
)
def test_more_examples_than_there_are_cannot_be_had(tmp_path, key, side, name):
    file = write(tmp_path, "films.csv", ROWS)
    there = len(getattr(load_file(file), name))
    for count in (there + 1, 500):
        with pytest.raises(DataError, match=rf"{count} {side} examples asked for, {there} there are"):
            load_file(file, **{key: count})
    assert load_file(file, **{key: there}).fingerprint == load_file(file).fingerprint


@settings(max_examples=25)
@given(small=st.integers(8, 40), more=st.integers(0, 20), seed=st.integers(0, 50))
def test_limited_splits_are_nested_and_repeatable(csv_file, small, more, seed):
    first, again, larger = (
        load_file(csv_file, train_examples=count, test_examples=8 + count // 4, seed=seed)
        for count in (small, small, small + more)
    )
    assert first.fingerprint == again.fingerprint
    for side in ("train", "test"):
        fewer, those = (Counter(getattr(dataset, side).texts) for dataset in (first, larger))
        assert fewer <= those
    assert (len(first.train), len(first.test)) == (small, 8 + small // 4)


def test_another_seed_chooses_other_examples_from_the_same_split(csv_file):
    first, second = (load_file(csv_file, train_examples=30, seed=seed) for seed in (0, 1))
    assert set(first.train.texts) != set(second.train.texts)
    assert first.test.texts == second.test.texts
    assert load_file(csv_file, seed=0).fingerprint == load_file(csv_file, seed=1).fingerprint


def test_a_limited_choice_does_not_depend_on_the_order_of_rows(tmp_path):
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    chosen = [
        set(load_file(write(tmp_path, f"{number}.csv", rows), train_examples=20).train.texts)
        for number, rows in enumerate((ROWS, shuffled))
    ]
    assert chosen[0] == chosen[1]


# Fingerprints and splits as values


def made(texts=("a", "b", "c"), pairs=None, labels=(0, 1, 0), test_labels=(1, 0), classes=("x", "y"), name="n"):
    test = Split(("d", "e"), None if pairs is None else ("q", "r"), np.array(test_labels))
    return Dataset(name, classes, Split(tuple(texts), pairs, np.array(labels)), test, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": ("a", "b", "C")},
        {"texts": ("b", "a", "c")},
        {"texts": ("ab", "", "c")},
        {"texts": ("a", "bc", "")},
        {"labels": (0, 1, 1)},
        {"labels": (1, 0, 0)},
        {"test_labels": (0, 1)},
        {"classes": ("y", "x")},
        {"classes": ("x", "y", "z")},
        {"pairs": ("p", "p", "p")},
        {"pairs": ("", "", "")},
    ],
)
def test_any_change_of_examples_changes_the_fingerprint(changes):
    assert made(**changes).fingerprint != made().fingerprint


def test_the_fingerprint_is_of_content_alone():
    narrow = np.array([0, 1, 0], dtype=np.int32)
    same = Dataset("other", ("x", "y"), Split(("a", "b", "c"), None, narrow), made().test, ("a note",))
    assert same.fingerprint == made().fingerprint


@given(rows=st.lists(st.tuples(st.text("ab ", max_size=4), st.integers(0, 2)), min_size=2, max_size=6), data=st.data())
def test_no_two_lists_of_examples_share_a_fingerprint(rows, data):
    def fingerprint(examples):
        texts, labels = zip(*examples, strict=True)
        return made(texts, labels=labels, classes=("x", "y", "z")).fingerprint

    others = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=6))
    assert (fingerprint(rows) == fingerprint(others)) == (rows == others)


def test_taking_rows_keeps_texts_pairs_and_labels_together():
    split = Split(("a", "b", "c"), ("x", "y", "z"), np.array([0, 1, 2]))
    taken = split.take([2, 0])
    assert (taken.texts, taken.pairs, taken.labels.tolist()) == (("c", "a"), ("z", "x"), [2, 0])
    assert len(split.take([])) == 0
    assert Split(("a",), None, np.array([1])).take([0]).pairs is None


def test_identities_fold_case_and_spacing_and_nothing_else():
    split = Split(("A  b", "a b ", "ab", "a b", "a"), ("", "", "", "c", "b c"), np.zeros(5, dtype=np.int64))
    keys = split.identities()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


# A GLUE folder


def glue_folder(folder, train=ROWS, dev=(("dev text 1", "0"), ("dev text 2", "1"))):
    for name, rows in (("train.tsv", train), ("dev.tsv", dev)):
        write(folder, name, rows, ("sentence", "label"))
    return folder


def test_a_glue_folder_has_its_own_splits(tmp_path):
    dataset = load_file(glue_folder(tmp_path, dev=[('a "quoted', "0"), ("plain", "1")]))
    assert dataset.train.texts == tuple(text for text, _ in ROWS)
    assert dataset.test.texts == ('a "quoted', "plain")
    assert dataset.name == tmp_path.name


@pytest.mark.parametrize("missing", ["train.tsv", "dev.tsv"])
def test_an_incomplete_glue_folder_is_told_what_it_lacks_and_has(tmp_path, missing):
    other = ({"train.tsv", "dev.tsv"} - {missing}).pop()
    (glue_folder(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=rf"needs train\.tsv and dev\.tsv; missing: {missing}\. It has: {other}\."):
        load_file(tmp_path)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(DataError, match=r"missing: train\.tsv, dev\.tsv\. It has: nothing"):
        load_file(tmp_path)


def test_the_folder_we_are_in_has_a_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(glue_folder(tmp_path))
    assert load_file(".").name == tmp_path.name


# Packaged sources


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Gives a packaged name the content of a hand-made file; nothing is downloaded."""

    def give(name, text):
        file = tmp_path / f"{name}.asset"
        file.write_text(text, encoding="utf-8")

        def fetch(asset, announce):
            assert asset.name == name
            announce(f"fetching {name}")
            return file

        monkeypatch.setattr(data, "fetch", fetch)
        return lambda **settings: load(DataSpec(source=name, **settings))

    return give


def rated(rows):
    return "\n".join(["id\tsentiment\ttext", *(f"{key}\t{rating}\t{text}" for key, rating, text in rows)]) + "\n"


def test_every_packaged_source_is_an_asset():
    assert set(PACKAGED) <= set(data.ASSETS)
    assert set(RATED) <= set(PACKAGED)


@pytest.mark.parametrize("name", RATED)
def test_ratings_become_classes_by_sign_and_near_neutral_ones_are_dropped(packaged, name):
    rows = [(f"{number}_1", 1.0 if number % 2 else -1.0, f'a "text {number}') for number in range(60)]
    extra = [("60_1", 0.5, "just kept"), ("61_1", -0.5, "kept too"), ("62_1", 0.49, "no"), ("63_1", 0.0, "no, no")]
    dataset = packaged(name, rated(rows + extra))()
    expected = [(text, None, "positive" if rating > 0 else "negative") for _, rating, text in [*rows, *extra[:2]]]
    assert everything(dataset) == sorted(expected, key=str)
    assert dataset.notes == ("2 of 64 sentences with a rating nearer to 0 than 0.5 were dropped.",)


@pytest.mark.parametrize(("neutral", "kept"), [(0.0, 62), (0.25, 61), (1.0, 60)])
def test_the_neutral_zone_can_be_set_and_zero_is_never_a_class(packaged, neutral, kept):
    rows = [(number, 1.0 if number % 2 else -1.0, f"text {number}") for number in range(60)]
    extra = [(60, 0.001, "slightly"), (61, -0.25, "somewhat"), (62, 0.0, "not at all")]
    dataset = packaged("movie-snippets", rated(rows + extra))(neutral=neutral)
    assert len(everything(dataset)) == kept
    assert dataset.notes[0].startswith(f"{63 - kept} of 63 sentences")


def documents(share_texts, count=40, seed=0):
    draw = random.Random(seed)
    rows = []
    for document in range(count):
        for sentence in range(draw.randint(1, 5)):
            text = f"text {document} {sentence}"
            if share_texts and sentence == 0 and document % 4 < 2:
                text = f"text that documents {document // 4 * 4} and {document // 4 * 4 + 1} share"
            rows.append((f"{document}_{sentence}", draw.choice([-2.0, 2.0]), text))
    return rows


def document_sides(dataset, rows):
    home, found = defaultdict(set), sides(dataset)
    for key, _, text in rows:
        home[key.split("_")[0]].add(found[text])
    return home


@pytest.mark.parametrize("name", ["amazon-snippets", "nyt-snippets"])
@pytest.mark.parametrize("share_texts", [False, True], ids=["texts of their own", "shared texts"])
def test_sentences_of_a_document_are_never_separated(packaged, name, share_texts):
    for seed in range(5):
        rows = documents(share_texts, seed=seed)
        home = document_sides(packaged(name, rated(rows))(test_share=0.4), rows)
        assert {len(found) for found in home.values()} == {1}
        assert set().union(*home.values()) == {"train", "test"}


@pytest.mark.parametrize("share_texts", [False, True], ids=["texts of their own", "shared texts"])
def test_a_split_by_document_does_not_depend_on_the_order_of_rows(packaged, share_texts):
    for seed in range(5):
        rows = documents(share_texts, seed=seed)
        shuffled = random.Random(seed).sample(rows, len(rows))
        first, second = (packaged("nyt-snippets", rated(table))(test_share=0.4) for table in (rows, shuffled))
        assert sides(first) == sides(second)


def test_trec_takes_the_coarse_class_and_drops_repeated_questions(packaged):
    names = ("DESC:manner", "ENTY:cremat", "HUM:ind", "HUM:gr")
    lines = [f"{names[number % 4]} What is number {number} ?" for number in range(80)]
    dataset = packaged("trec", "\n".join([*lines, *lines[:7]]) + "\n")()
    assert dataset.classes == ("DESC", "ENTY", "HUM")
    expected = [(line.split(" ", 1)[1], None, line.split(":")[0]) for line in lines]
    assert everything(dataset) == sorted(expected, key=str)
    assert dataset.notes == ("7 repeated questions were dropped.",)


def test_sms_spam_names_its_classes(packaged):
    lines = [f'{number},{number % 2},"message, number {number}"' for number in range(60)]
    dataset = packaged("sms-spam", "\n".join([",spam,text", *lines]) + "\n")()
    assert dataset.classes == ("ham", "spam")
    expected = [(f"message, number {number}", None, ("ham", "spam")[number % 2]) for number in range(60)]
    assert everything(dataset) == sorted(expected, key=str)


def test_a_slow_source_is_announced(packaged):
    packaged("movie-snippets", rated([(n, 1.0 if n % 2 else -1.0, f"text {n}") for n in range(60)]))
    told = []
    load(DataSpec(source="movie-snippets"), told.append)
    assert told == ["fetching movie-snippets"]


# The hub


def test_without_the_hub_the_offline_alternative_is_named():
    told = []
    with pytest.raises(AssetError, match=r"Without the hub use --dataset movie-snippets") as caught:
        load(DataSpec(source="movie-snipets"), told.append)
    assert "'movie-snipets'" in str(caught.value)
    assert "Did you mean 'movie-snippets'" in str(caught.value)
    assert told == ["Looking for data set 'movie-snipets' on the Hugging Face hub"]


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one data set; returns what it was asked for."""
    import datasets

    asked = []

    def give(**splits):
        tables = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}

        def load_dataset(*names):
            asked.append(names)
            return datasets.DatasetDict(tables)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return give


def columns(count, start=0):
    numbers = range(start, start + count)
    return {"sentence": [f"text {n}" for n in numbers], "label": [n % 2 for n in numbers], "idx": list(numbers)}


def test_sst2_is_glues(hub):
    asked = hub(train=columns(20), validation=columns(6, start=100), test=columns(6, start=200))
    dataset = load(DataSpec(source="sst2"))
    assert asked == [("nyu-mll/glue", "sst2")]
    assert dataset.train.texts == tuple(columns(20)["sentence"])
    assert dataset.test.texts == tuple(columns(6, start=100)["sentence"])
    assert (dataset.classes, dataset.name) == (("0", "1"), "sst2")


def test_a_subset_is_passed_on(hub):
    asked = hub(train=columns(20), validation=columns(6, start=100))
    load(DataSpec(source="org/set", subset="part"))
    assert asked == [("org/set", "part")]


@pytest.mark.parametrize("name", ["validation", "validation_matched", "dev", "test"])
def test_the_hubs_evaluation_split_is_found(hub, name):
    hub(**{"train": columns(20), name: columns(6, start=100)})
    assert load(DataSpec(source="org/set")).test.texts == tuple(columns(6, start=100)["sentence"])


def test_a_hub_set_with_training_alone_is_divided(hub):
    hub(train=columns(80))
    dataset = load(DataSpec(source="org/set"))
    assert len(sides(dataset)) == 80


def test_a_hub_set_without_training_is_told(hub):
    hub(validation=columns(6), other=columns(6))
    with pytest.raises(DataError, match="org/set: expected a 'train' split, got validation, other"):
        load(DataSpec(source="org/set"))


def test_hidden_labels_of_the_hub_are_no_examples(hub):
    some = columns(20)
    some["label"] = [-1, -1, *some["label"][2:]]
    hub(train=some, validation=columns(6, start=100))
    dataset = load(DataSpec(source="org/set"))
    assert dataset.classes == ("0", "1")
    assert dataset.train.texts == tuple(some["sentence"][2:])
    assert "2 of 20 rows of train were dropped" in dataset.notes[0]
    hidden = columns(6, start=100) | {"label": [-1] * 6}
    hub(train=columns(20), test=hidden)
    with pytest.raises(DataError, match="evaluation split is empty"):
        load(DataSpec(source="org/set"))


def test_limits_of_another_source_are_lowered_to_what_there_is(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    whole = load_file(file)
    wanted = DataSpec(source=str(file), train_examples=10_000, test_examples=3)
    fitted = data.fit_limits(wanted)
    assert (fitted.train_examples, fitted.test_examples) == (len(whole.train), 3)
    assert data.fit_limits(DataSpec(source=str(file))).train_examples is None
