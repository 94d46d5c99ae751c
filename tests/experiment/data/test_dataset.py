from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crisp_attention.errors import DataError
from crisp_attention.experiment.data import dataset as dataset_module
from crisp_attention.experiment.data.dataset import Dataset, Split, load
from crisp_attention.experiment.results.record import SURER
from crisp_attention.experiment.specification.sections import DataSpec
from data_files import ROWS, everything, glue_folder, load_file, sides, write
from record_builders import make_spec

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


def test_a_share_that_a_hash_misses_by_far_is_noted(tmp_path):
    few, many = (
        load_file(write(tmp_path, "films.csv", [(f"text {row}", row % 2) for row in range(count)]))
        for count in (24, 3000)
    )
    held_out = len(few.test)
    assert abs(held_out / 24 - 0.2) > 0.04
    assert few.notes == (
        f"{held_out} of 24 texts ({held_out / 24:.0%}) are held out, where test_share asks for 20%: a hash of each "
        "decides, which is uneven where there are few.",
    )
    assert many.notes == ()


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


def test_a_test_file_without_the_second_texts_is_told(tmp_path):
    """It would be evaluated on the first ones alone."""
    pairs = [(text, f"other {text}", label) for text, label in ROWS]
    train = write(tmp_path, "train.csv", pairs, ("question1", "question2", "label"))
    test = write(tmp_path, "test.csv", pairs, ("question1", "question_2", "label"))
    with pytest.raises(DataError, match=r"training split holds pairs of texts, the evaluation split single texts"):
        load_file(train, test=test)


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


def test_limits_of_another_source_are_lowered_to_what_there_is(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    whole = load_file(file)
    fitted = dataset_module.fit_limits(make_spec(data={"source": file, "train_examples": 10_000, "test_examples": 3}))
    assert (fitted.data.train_examples, fitted.data.test_examples) == (len(whole.train), 3)
    assert dataset_module.fit_limits(make_spec(data={"source": file})).data.train_examples is None


def test_training_sizes_for_another_source_end_at_what_there_is(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    there = len(load_file(file).train)
    fitted = dataset_module.fit_limits(make_spec(data={"source": file}, vary={"train_examples": [20, 40, 500, 2000]}))
    assert (fitted.vary.train_examples, fitted.vary.epochs) == ((20, 40, there), None)
    timed = {"train_examples": [20, 40, 500, 2000], "epochs": [9, 7, 5, 3]}
    assert dataset_module.fit_limits(make_spec(data={"source": file}, vary=timed)).vary.epochs == (9, 7, 5)
    with pytest.raises(DataError, match=f"has {there} training examples, too few to compare .* 500, 2000"):
        dataset_module.fit_limits(make_spec(data={"source": file}, vary={"train_examples": [500, 2000]}))


# Conditions


def conditions_of(file, **changes):
    return dataset_module.load_experiment(make_spec(data={"source": file}, **changes))


def rows_of(split):
    return Counter(zip(split.texts, split.labels.tolist(), strict=True))


def test_conditions_are_read_once(csv_file, monkeypatch):
    reads = []

    def read(*arguments):
        reads.append(arguments)
        return original(*arguments)

    original = dataset_module.read
    monkeypatch.setattr(dataset_module, "read", read)
    found = conditions_of(str(csv_file), vary={"train_examples": [20, 40, 80]})
    assert len(reads) == 1
    assert len(found.conditions) == 3


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(8, 100), min_size=2, max_size=4, unique=True).map(sorted), seed=st.integers(0, 9))
def test_training_splits_of_conditions_are_nested_and_the_evaluation_split_is_one(csv_file, sizes, seed):
    spec = make_spec(data={"source": str(csv_file), "seed": seed}, vary={"train_examples": sizes})
    found = dataset_module.load_experiment(spec)
    assert list(found.conditions) == [f"train_examples={size}" for size in sizes]
    datasets = list(found.conditions.values())
    assert [len(dataset.train) for dataset in datasets] == sizes
    for smaller, larger in itertools.pairwise(datasets):
        assert rows_of(smaller.train) < rows_of(larger.train)
    assert all(dataset.test is found.test for dataset in datasets)
    assert found.test.texts == load_file(csv_file, seed=seed).test.texts
    assert not set(found.test.texts) & set(datasets[-1].train.texts)
    for size, dataset in zip(sizes, datasets, strict=True):
        alone = load_file(csv_file, seed=seed, train_examples=size)
        assert dataset.fingerprint == alone.fingerprint
        assert found.of(alone.fingerprint) is dataset


@settings(max_examples=15)
@given(shares=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.9]), min_size=2, unique=True).map(sorted))
def test_label_noise_is_nested_and_never_reaches_the_evaluation_split(csv_file, shares):
    clean = load_file(csv_file)
    found = conditions_of(str(csv_file), vary={"label_noise": shares})
    wrong_before = np.zeros(len(clean.train), dtype=bool)
    for share, dataset in zip(shares, found.conditions.values(), strict=True):
        assert dataset.train.texts == clean.train.texts
        wrong = dataset.train.labels != clean.train.labels
        assert wrong.sum() == round(share * len(clean.train))
        assert wrong[wrong_before].all()
        wrong_before = wrong
        assert dataset.test.texts == clean.test.texts
        assert np.array_equal(dataset.test.labels, clean.test.labels)
        told = f"{wrong.sum()} of {len(wrong)} training labels were replaced by another class on purpose."
        assert dataset.notes == ((told,) if share else ())
    prints, _ = found.prints()
    assert len(set(prints.values())) == len(shares)


def test_a_condition_too_large_is_told(csv_file):
    with pytest.raises(DataError, match="5000 training examples asked for"):
        conditions_of(str(csv_file), vary={"train_examples": [20, 5000]})


# Further evaluations


def test_typing_errors_change_the_texts_of_the_evaluation_split_alone(csv_file):
    evaluations = [{"name": "few", "typos": 0.05}, {"name": "many", "typos": 0.5}]
    found, again = (conditions_of(str(csv_file), evaluations=evaluations) for _ in range(2))
    plain = load_file(csv_file)
    assert found.conditions[""].fingerprint == plain.fingerprint
    changed = {}
    for name, split in found.evaluations.items():
        assert np.array_equal(split.labels, plain.test.labels)
        assert split.texts == again.evaluations[name].texts
        changed[name] = sum(a != b for a, b in zip(split.texts, plain.test.texts, strict=True))
    assert 0 < changed["few"] < changed["many"]
    prints = found.prints()
    assert prints == again.prints()
    assert len(set(prints[1].values())) == 2


def test_both_texts_of_a_pair_are_mistyped(tmp_path):
    rows = [(f"the first text {number}", f"a second text {number}", number % 2) for number in range(80)]
    file = write(tmp_path, "pairs.csv", rows, ("premise", "hypothesis", "label"))
    found = conditions_of(file, evaluations=[{"name": "typos", "typos": 0.5}])
    split = found.evaluations["typos"]
    for typed, plain in ((split.texts, found.test.texts), (split.pairs, found.test.pairs)):
        assert len(typed) == len(plain)
        assert sum(a != b for a, b in zip(typed, plain, strict=True)) > len(plain) / 2


def test_another_source_is_evaluated_with_classes_matched_by_name(tmp_path):
    file = write(tmp_path, "films.csv", [(text, ("bad", "fair", "good")[n % 3]) for n, (text, _) in enumerate(ROWS)])
    other = write(
        tmp_path, "books.csv", [(f"book {n}", "good" if n % 2 else "bad") for n in range(60)], ("review", "stars")
    )
    found = conditions_of(file, evaluations=[{"name": "books", "source": other, "test_examples": 7}])
    split = found.evaluations["books"]
    assert len(split) == 7
    for text, label in zip(split.texts, split.labels, strict=True):
        assert found.classes[label] == ("good" if int(text.split()[1]) % 2 else "bad")
    assert set(split.texts) <= set(load_file(other).test.texts)


def test_training_examples_in_a_further_evaluation_are_counted_in_a_note(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    other = write(tmp_path, "books.csv", [*ROWS[:10], *((f"book {n}", str(n % 2)) for n in range(30)), ("none", "")])
    test = write(tmp_path, "test.csv", [(f"new {n}", str(n % 2)) for n in range(8)])
    spec = make_spec(data={"source": file, "test": test}, evaluations=[{"name": "books", "source": other}])
    found = dataset_module.load_experiment(spec)
    split, train = found.evaluations["books"], found.conditions[""].train
    known = sum(text in train.texts for text in split.texts)
    assert known
    notes = found.conditions[""].notes
    assert f"{known} of {len(split)} texts of evaluation 'books' are training examples, too." in notes
    assert "Evaluation 'books': 1 of 41 rows of books.csv were dropped: empty text or label." in notes


def test_another_source_keeps_none_of_the_settings_that_are_the_first_ones_own(tmp_path):
    file = write(tmp_path, "films.csv", ROWS, ("body", "verdict"))
    test = write(tmp_path, "held-out.csv", [(f"new {n}", n % 2) for n in range(9)], ("body", "verdict"))
    other = write(tmp_path, "books.csv", [(f"book {n}", n % 2) for n in range(60)])
    settings = {"source": file, "text": "body", "label": "verdict", "test": test, "label_noise": 0.3}
    spec = make_spec(data=settings, evaluations=[{"name": "books", "source": other}])
    split = dataset_module.load_experiment(spec).evaluations["books"]
    plain = load_file(other).test
    assert split.texts == plain.texts
    assert np.array_equal(split.labels, plain.labels)


def test_columns_of_another_source_can_be_named(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    odd = write(tmp_path, "odd.csv", [(n % 2, f"book {n}", "same") for n in range(60)], ("mark", "said", "label"))
    own = {"name": "odd", "source": odd, "text": "said", "label": "mark"}
    split = dataset_module.load_experiment(make_spec(data={"source": file}, evaluations=[own])).evaluations["odd"]
    assert all(int(text.split()[1]) % 2 == label for text, label in zip(split.texts, split.labels, strict=True))
    with pytest.raises(DataError, match=r"odd\.csv has no text column 'sayd'. Did you mean 'said'"):
        dataset_module.load_experiment(make_spec(data={"source": file}, evaluations=[own | {"text": "sayd"}]))


def test_another_source_that_does_not_fit_is_refused(tmp_path):
    file = write(tmp_path, "films.csv", ROWS)
    stars = write(tmp_path, "stars.csv", [(text, int(label) + 1) for text, label in ROWS])
    pairs = write(tmp_path, "pairs.csv", [(*row, "x") for row in ROWS], ("sentence1", "label", "sentence2"))
    for source, message in (
        (stars, r"'other': stars\.csv has the classes 1, 2, of which training lacks 2; training has 0, 1"),
        (pairs, r"'other': pairs\.csv holds pairs of texts, training single texts"),
        ("digits", "'other': digits holds images, training single texts"),
    ):
        with pytest.raises(DataError, match=message):
            conditions_of(file, evaluations=[{"name": "other", "source": source}])


def test_images_have_no_typing_errors():
    with pytest.raises(DataError, match="'typos': typos need texts; the examples of digits are images"):
        conditions_of("digits", evaluations=[{"name": "typos", "typos": 0.1}])


@pytest.mark.parametrize(("repeats", "many"), [(0, False), (2, False), (10, True)])
def test_repeats_among_evaluation_texts_are_told(tmp_path, repeats, many):
    rows = [f"film {number},{number % 2}" for number in range(100)]
    for name, own in (("train", [f"a {row}" for row in rows]), ("test", rows + rows[:repeats])):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(own) + "\n", encoding="utf-8")
    found = load(DataSpec(source=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv")))
    told = [note for note in found.notes if "repeat another one" in note]
    assert told == [f"{repeats} of {100 + repeats} evaluation texts repeat another one." + f" {SURER}" * many] * (
        repeats > 0
    )


def test_a_split_of_other_classes_than_the_whole_is_told(tmp_path, monkeypatch):
    """A hash that holds out one class above all, as chance may where there are few."""
    monkeypatch.setattr(dataset_module, "uniform", lambda text: 0.1 if "good" in text or "17" in text else 0.9)
    rows = [f"{'good' if number < 8 else 'a'} film {number},{int(number < 16)}" for number in range(40)]
    (tmp_path / "films.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = load(DataSpec(source=str(tmp_path / "films.csv")))
    (note,) = [note for note in found.notes if "held out are of class" in note]
    assert note.startswith("89% of the texts held out are of class '1', 40% of all: a hash of each decides.")
