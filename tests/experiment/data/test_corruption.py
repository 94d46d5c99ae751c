from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_attention.experiment.data.corruption import mistype, wrong_labels
from small_models import sentence_rows

SHARES = st.floats(0.0, 0.99)
KEYS = st.lists(st.text("abc", max_size=3), min_size=1, max_size=60)
TEXTS = [text for text, _ in sentence_rows(120)]


def labels_for(keys, classes):
    return np.arange(len(keys), dtype=np.int64) * 7 % classes


# Wrong labels


@given(keys=KEYS, classes=st.integers(2, 6), share=SHARES, seed=st.integers(0, 9))
def test_exactly_that_share_of_labels_becomes_another_class(keys, classes, share, seed):
    labels = labels_for(keys, classes)
    before = labels.copy()
    wrong = wrong_labels(labels, keys, classes, share, seed)
    assert (wrong != labels).sum() == round(share * len(keys))
    assert set(wrong) <= set(range(classes))
    assert wrong.dtype == np.int64
    assert np.array_equal(labels, before)
    assert np.array_equal(wrong, wrong_labels(labels, keys, classes, share, seed))


@given(keys=KEYS, classes=st.integers(2, 6), shares=st.lists(SHARES, min_size=2, max_size=4).map(sorted))
def test_what_is_wrong_at_a_small_share_is_wrong_in_the_same_way_at_a_larger_one(keys, classes, shares):
    labels = labels_for(keys, classes)
    rising = [wrong_labels(labels, keys, classes, share, 0) for share in shares]
    for fewer, more in itertools.pairwise(rising):
        changed = fewer != labels
        assert np.array_equal(more[changed], fewer[changed])


def test_examples_and_classes_are_drawn_uniformly():
    keys = [f"text {number}" for number in range(8000)]
    labels = labels_for(keys, 4)
    wrong = wrong_labels(labels, keys, 4, 0.5, 0)
    changed = wrong != labels
    for halves in (changed[:4000], changed[::2]):
        assert abs(halves.mean() - 0.5) < 5 * (0.25 / 4000) ** 0.5
    steps = (wrong - labels)[changed] % 4
    for step in (1, 2, 3):
        assert abs((steps == step).mean() - 1 / 3) < 5 * (2 / 9 / 4000) ** 0.5


def test_another_seed_draws_other_examples():
    keys = [f"text {number}" for number in range(200)]
    labels = labels_for(keys, 2)
    first, second = (wrong_labels(labels, keys, 2, 0.3, seed) != labels for seed in (0, 1))
    assert 5 < (first & second).sum() < 35


# Typing errors


@given(text=st.text(max_size=80), share=SHARES)
def test_only_letters_are_mistyped(text, share):
    typed = mistype(text, share)
    assert [c for c in typed if not c.isalpha()] == [c for c in text if not c.isalpha()]
    assert typed == mistype(text, share)
    letters = sum(character.isalpha() for character in text)
    assert abs(len(typed) - len(text)) <= share * letters + 1


@given(text=st.text(max_size=80))
def test_a_share_of_zero_changes_nothing(text):
    assert mistype(text, 0.0) == text


@given(words=st.lists(st.sampled_from(["I", "a", "ab", "film"]), min_size=1, max_size=12), share=SHARES)
def test_words_of_one_letter_are_not_left_out(words, share):
    typed = mistype(" ".join(words), share).split(" ")
    for word, own in zip(words, typed, strict=True):
        assert len(own) >= 1 or len(word) > 1


def distance(first, second):
    """Edit distance in which swapping two neighbours counts once."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    table[:, 0], table[0] = range(len(first) + 1), range(len(second) + 1)
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
            if i > 1 and j > 1 and (a, b) == (second[j - 2], first[i - 2]):
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[-1, -1]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_the_share_holds_over_many_texts(share):
    """Errors that touch can make one: at small shares few do."""
    letters = sum(character.isalpha() for text in TEXTS for character in text)
    errors = sum(distance(text, mistype(text, share)) for text in TEXTS)
    bound = 5 * (share * letters) ** 0.5
    assert 0.9 * share * letters - bound < errors < share * letters + bound


def test_what_is_mistyped_at_a_small_share_is_mistyped_at_a_larger_one():
    """Seen at words alone in their texts: a letter that is chosen at one share is chosen at the next."""
    words = [f"{number} word" for number in range(400)]
    changed = [{word for word in words if mistype(word, share) != word} for share in (0.05, 0.1, 0.2)]
    assert 0 < len(changed[0]) < len(changed[1]) < len(changed[2])
    assert changed[0] <= changed[1] <= changed[2]


def test_all_four_kinds_of_error_occur_as_often_where_all_are_possible():
    kinds = {"left out": 0, "doubled": 0, "swapped": 0, "neighbour": 0}
    for number in range(4000):
        word = f"{number} word"
        typed = mistype(word, 0.25).split(" ")[1]
        if len(typed) < 4:
            kinds["left out"] += 1
        elif len(typed) > 4:
            kinds["doubled"] += 1
        elif sorted(typed) == sorted("word"):
            kinds["swapped"] += 1
        else:
            kinds["neighbour"] += 1
    # The last letter has no next one to swap with: 3 places of 4 choose among four ways, one among three.
    expected = {name: (3 / 16 + (1 / 12 if name != "swapped" else 0)) * 4000 for name in kinds}
    for name, count in kinds.items():
        assert abs(count - expected[name]) < 5 * expected[name] ** 0.5


@pytest.mark.parametrize(("letter", "keys"), [("q", "wa"), ("g", "fhtyvb"), ("m", "njk"), ("p", "ol")])
def test_neighbours_are_those_of_a_keyboard_in_the_same_case(letter, keys):
    seen = {mistype(f"{number} {letter}", 0.999)[len(str(number)) + 1 :] for number in range(300)}
    assert seen - {letter} == {letter * 2, *keys}
    upper = {mistype(f"{number} {letter.upper()}", 0.999)[len(str(number)) + 1 :] for number in range(300)}
    assert upper - {letter.upper()} == {item.upper() for item in seen - {letter}}
