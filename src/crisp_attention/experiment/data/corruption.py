"""Data made worse on purpose: wrong training labels, and typing errors in evaluation texts.

Everything is a pure function of the example and the share, drawn by hashes: the same on every machine,
and nested, so that what is wrong at a small share is wrong at a larger one too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Labels = np.ndarray[Any, np.dtype[np.int64]]

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def uniform(key: str) -> float:
    """A hash of a string, uniform in [0, 1); the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:7]) / 2**56


def wrong_labels(labels: Labels, keys: Sequence[str], classes: int, share: float, seed: int) -> Labels:
    """Labels of which a share is replaced by another class, drawn uniformly among the others.

    Args:
        labels: Int64 `[N]`.
        keys: What tells the examples apart, `[N]`; equal ones are made wrong one after another.
        classes: Number of classes, two or more.
        share: Of the labels that become wrong, in [0, 1): `round(share * N)` of them.
        seed: Of the draw.

    Returns:
        Int64 `[N]`, a new array.
    """
    order = np.argsort([uniform(f"{seed}\tnoise\t{key}") for key in keys], kind="stable")
    chosen = order[: round(share * len(labels))]
    steps = np.fromiter((int(uniform(f"{seed}\tclass\t{keys[row]}") * (classes - 1)) for row in chosen), np.int64)
    wrong = labels.copy()
    wrong[chosen] = (labels[chosen] + 1 + steps) % classes
    return wrong


def mistype(text: str, share: float) -> str:
    """A text with a share of its letters mistyped.

    Of n letters, `share * n` are mistyped, rounded up or down by a draw so that the share holds over
    many texts. Which ones, and how, is drawn from the text alone. A letter is replaced by its neighbour
    on a QWERTY keyboard, swapped with the next one of its word, left out or typed twice, each as likely
    as the others where it is possible: the errors of Pruthi et al., arXiv 1905.11268. The only letter
    of a word is never left out. Spaces, digits and punctuation stay.

    Args:
        text: Any text.
        share: Of its letters, in [0, 1).
    """
    # Hashes of a hash, so that long texts are not hashed once a letter.
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    letters = [place for place, character in enumerate(text) if character.isalpha()]
    count = int(share * len(letters) + uniform(f"{key}\tcount"))
    letters.sort(key=lambda place: uniform(f"{key}\t{place}"))
    mistyped = set(letters[:count])
    result, place = [], 0
    while place < len(text):
        typed, used = (text[place], 1) if place not in mistyped else _mistyped(text, place, key)
        result.append(typed)
        place += used
    return "".join(result)


def _mistyped(text: str, place: int, key: str) -> tuple[str, int]:
    """What is typed for the letter at a place, and how many letters that takes the place of."""
    letter = text[place]
    before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 2]
    ways = [(letter + letter, 1)]
    if before.isalpha() or after.isalpha():
        ways.append(("", 1))
    if after.isalpha() and after != letter:
        ways.append((after + letter, 2))
    if neighbours := _NEIGHBOURS.get(letter.lower()):
        typed = neighbours[int(uniform(f"{key}\t{place}\tkey") * len(neighbours))]
        ways.append((typed.upper() if letter.isupper() else typed, 1))
    return ways[int(uniform(f"{key}\t{place}\tway") * len(ways))]


def _neighbours() -> dict[str, str]:
    """The keys that touch each letter's: beside it, and in the rows above and below."""
    found = {}
    for row, keys in enumerate(_KEYBOARD):
        for column, key in enumerate(keys):
            places = [(row, column - 1), (row, column + 1), (row - 1, column), (row - 1, column + 1)]
            places += [(row + 1, column - 1), (row + 1, column)]
            found[key] = "".join(
                _KEYBOARD[r][c] for r, c in places if 0 <= r < len(_KEYBOARD) and 0 <= c < len(_KEYBOARD[r])
            )
    return found


_NEIGHBOURS = _neighbours()
