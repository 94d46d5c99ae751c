"""A named, fingerprinted data set: texts or images, labels, and a split that never leaks.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from crisp_attention.errors import DataError
from crisp_attention.experiment.data.corruption import mistype, uniform, wrong_labels
from crisp_attention.experiment.data.sources import Table, read
from crisp_attention.experiment.results.record import SURER
from crisp_attention.experiment.specification.sections import DataSpec, EvaluationSpec, VarySpec
from crisp_attention.experiment.specification.spec import ExperimentSpec

Kind = Literal["text", "image"]

_MOST_CLASSES = 1000
# Unsalted, the hash would hold out nothing: it has put these rows into the training split.
_VALIDATION_SALT = "validation\t"
_EXPLORED = "The evaluation split was left alone: what is found here is an exploration."
_MANY_REPEATS = 0.05
_OTHER_CLASSES = 0.2
"""By how much a class's share of the examples held out may exceed its share of all without being noted."""
_UNEVEN = 0.2
"""By how much of itself the share of examples held out may miss the one asked for without being noted."""


@dataclass(frozen=True)
class Split:
    """Examples and their classes.

    Attributes:
        texts: One a row; empty if the rows are images.
        pairs: Second texts, or None.
        labels: Int64 `[N]`, indices into the data set's classes.
        images: The content of an image file a row, or None if the rows are texts.
        groups: What each row belongs to, as the document of a sentence; rows of one group never fall into
            different splits. None where each row stands for itself.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray[Any, np.dtype[np.int64]]
    images: tuple[bytes, ...] | None = None
    groups: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> Kind:
        """What the examples are."""
        return "text" if self.images is None else "image"

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> Split:
        """The given rows, in the given order."""
        columns = {"texts": self.texts, "pairs": self.pairs, "images": self.images, "groups": self.groups}
        taken: dict[str, Any] = {name: column and tuple(column[i] for i in rows) for name, column in columns.items()}
        return Split(labels=self.labels[np.asarray(rows, dtype=np.int64)], **taken)

    def identities(self) -> list[str]:
        """What makes two rows the same example: the text, case and spacing folded, or the image's content."""
        if self.images is not None:
            return [hashlib.sha256(image).hexdigest() for image in self.images]
        pairs = self.pairs or ("",) * len(self.texts)
        return [f"{_fold(text)}\t{_fold(pair)}" for text, pair in zip(self.texts, pairs, strict=True)]


@dataclass(frozen=True)
class Dataset:
    """Both splits as a run sees them.

    Attributes:
        name: The source's name, without folders.
        classes: Class names; a label is an index into them.
        train: Training split.
        test: Evaluation split; used for nothing else.
        notes: What was dropped, and what a reader must know, in sentences.
        fingerprint: Hash of both splits in order, and of the class names.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...]
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.classes, self.train, self.test))


@dataclass(frozen=True)
class ExperimentData:
    """All data of an experiment.

    Attributes:
        conditions: The data set of each condition by its name; one without a name where nothing varies.
            All have the same evaluation split and classes.
        evaluations: What else each model is evaluated on, by name; labels are indices into the same classes.
    """

    conditions: Mapping[str, Dataset]
    evaluations: Mapping[str, Split] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return next(iter(self.conditions.values())).classes

    @property
    def test(self) -> Split:
        """The evaluation split."""
        return next(iter(self.conditions.values())).test

    def prints(self) -> tuple[dict[str, str], dict[str, str]]:
        """Fingerprints by name: of the conditions, and of the further evaluations."""
        return (
            {name: dataset.fingerprint for name, dataset in self.conditions.items()},
            {name: fingerprint(self.classes, split) for name, split in self.evaluations.items()},
        )

    def of(self, digest: str) -> Dataset:
        """The data set with that fingerprint."""
        return next(dataset for dataset in self.conditions.values() if dataset.fingerprint == digest)


def fingerprint(classes: tuple[str, ...], *splits: Split) -> str:
    """Hash of splits in order, and of the class names."""
    digest = hashlib.sha256("\x1f".join(classes).encode())
    for split in splits:
        for row in (split.texts, split.pairs or ()):
            digest.update("\x1e".join(row).encode())
            digest.update(b"\x1d")
        for image in split.images or ():
            digest.update(hashlib.sha256(image).digest())
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def load(spec: DataSpec, announce: Callable[[str], None] = lambda _: None) -> Dataset:
    """Read, split, limit and fingerprint a data set.

    A source without a split of its own is divided by a hash of its texts or images (or of the document
    a sentence comes from): equal ones share a side, whatever the order of rows.

    Args:
        spec: What to read.
        announce: Told before something slow happens.

    Raises:
        DataError: If the source is missing or malformed, a split is empty, or there is one class.
        AssetError: If it cannot be downloaded.
    """
    return _load_conditions({"": spec}, announce)[""]


def load_experiment(spec: ExperimentSpec, announce: Callable[[str], None] = lambda _: None) -> ExperimentData:
    """All data of an experiment; each source is read once.

    Training splits of different sizes are nested, and so are wrong labels of different shares.

    Args:
        spec: The experiment.
        announce: Told before something slow happens.

    Raises:
        DataError: As `load`, or if a further evaluation does not fit the data: texts for images, or classes
            that training lacks.
        AssetError: If a source cannot be downloaded.
    """
    conditions = _load_conditions(spec.conditions(), announce)
    first = next(iter(conditions.values()))
    evaluations, told = {}, []
    for item in spec.evaluations:
        evaluations[item.name], notes = _evaluation(item, spec.data, first, announce)
        told += notes
    return ExperimentData({name: _noted(own, evaluations, told) for name, own in conditions.items()}, evaluations)


def _noted(dataset: Dataset, evaluations: Mapping[str, Split], told: Sequence[str]) -> Dataset:
    """A data set with what is to be known of its further evaluations."""
    if not evaluations:
        return dataset
    trained = set(dataset.train.identities())
    overlaps = {name: sum(key in trained for key in split.identities()) for name, split in evaluations.items()}
    notes = [
        f"{count} of {len(evaluations[name])} {dataset.test.kind}s of evaluation {name!r} are training examples, too."
        for name, count in overlaps.items()
        if count
    ]
    return dataclasses.replace(dataset, notes=(*dataset.notes, *told, *notes))


def fit_limits(spec: ExperimentSpec, announce: Callable[[str], None] = lambda _: None) -> ExperimentSpec:
    """Lower the limits of an experiment to what its source holds.

    For limits that were chosen for another source, as a preset's.

    Args:
        spec: The experiment.
        announce: Told before something slow happens.

    Raises:
        DataError: As `load`, or if the source is too small for two of the training sizes.
    """
    whole = load(spec.data.model_copy(update={"train_examples": None, "test_examples": None}), announce)
    sizes = {"train_examples": len(whole.train), "test_examples": len(whole.test)}
    lowered = {name: size for name, size in sizes.items() if (getattr(spec.data, name) or 0) > size}
    changes: dict[str, Any] = {"data": spec.data.model_copy(update=lowered)}
    if spec.vary is not None and spec.vary.train_examples is not None:
        there = [min(size, len(whole.train)) for size in spec.vary.train_examples]
        fitting = sorted(set(there))
        if len(fitting) < 2:
            raise DataError(
                f"{spec.data.source} has {len(whole.train)} training examples, too few to compare training splits of "
                f"{', '.join(map(str, spec.vary.train_examples))}."
            )
        epochs = spec.vary.epochs and tuple(spec.vary.epochs[there.index(size)] for size in fitting)
        changes["vary"] = VarySpec(train_examples=tuple(fitting), epochs=epochs)
    return spec.model_copy(update=changes)


def carve(dataset: Dataset, share: float, setting: str = "tune.share") -> Dataset:
    """Carve a validation part off the training split, to choose settings on.

    By a hash of its own, so that it does not depend on how the evaluation split was drawn: rows of one
    text, image or document stay on one side.

    Args:
        dataset: Whose training split is divided; its evaluation split is not looked at.
        share: About how much of the training split is held out.
        setting: Which setting says so.

    Returns:
        The rest of the training split, and the validation part in the place of the evaluation split.

    Raises:
        DataError: If a part has fewer than two classes.
    """
    train, validation = _hash_split(dataset.train, share, _VALIDATION_SALT)
    for side, split in (("training", train), ("validation", validation)):
        if len(np.unique(split.labels)) < 2:
            raise DataError(
                f"{dataset.name}: of {len(dataset.train)} training examples, {setting} = {share:g} leaves a {side} "
                f"part of {len(split)} with fewer than two classes. It needs more examples or another share."
            )
    note = f"{len(validation)} of {len(dataset.train)} training examples were held out for validation."
    return Dataset(dataset.name, dataset.classes, train, validation, (*dataset.notes, note))


def _load_conditions(conditions: Mapping[str, DataSpec], announce: Callable[[str], None]) -> dict[str, Dataset]:
    """Data sets that differ in the size of the training split or in label noise, from one reading."""
    spec = next(iter(conditions.values()))
    table = read(spec, announce)
    if not table.labels:
        raise DataError(" ".join([f"{spec.source}: the training split is empty.", *table.notes]))
    if table.test is not None and not table.test.labels:
        raise DataError(" ".join([f"{spec.source}: the evaluation split is empty.", *table.test.notes]))
    classes = _classes(table, spec.source)
    whole = _split(table, classes)
    notes = list(table.notes)
    if table.test is not None:
        train, test = whole, _split(table.test, classes)
        if _form(train) != _form(test):
            raise DataError(
                f"{spec.source}: the training split holds {_form(train)}, the evaluation split {_form(test)}. Their "
                "columns must have the same names."
            )
        shared = set(train.identities()) & set(test.identities())
        if shared:
            notes.append(f"{len(shared)} {whole.kind}s occur in both of the source's own splits; they were left in.")
    else:
        train, test = _hash_split(whole, spec.test_share)
        share = len(test) / len(whole)
        if abs(share - spec.test_share) > _UNEVEN * spec.test_share:
            notes.append(
                f"{len(test)} of {len(whole)} {whole.kind}s ({share:.0%}) are held out, where test_share asks for "
                f"{spec.test_share:.0%}: a hash of each decides, which is uneven where there are few."
            )
        held, all_ = (np.bincount(own.labels, minlength=len(classes)) / max(len(own), 1) for own in (test, whole))
        most = int((held - all_).argmax())
        if held[most] - all_[most] > _OTHER_CLASSES:
            notes.append(
                f"{held[most]:.0%} of the {whole.kind}s held out are of class {classes[most]!r}, {all_[most]:.0%} of "
                "all: a hash of each decides. Give an evaluation split of your own with test, or another test_share."
            )
    name = Path(spec.source).name or Path(spec.source).resolve().name
    if spec.validation_share is not None:
        carved = carve(Dataset(name, classes, train, test, tuple(notes)), spec.validation_share, "validation_share")
        train, test, notes = carved.train, carved.test, [*carved.notes, _EXPLORED]
    test = _limit(test, spec.test_examples, spec.seed, "evaluation", spec.source)
    if repeats := len(test) - len(set(test.identities())):
        surer = f" {SURER}" if repeats > _MANY_REPEATS * len(test) else ""
        verb = "repeats" if repeats == 1 else "repeat"
        notes.append(f"{repeats} of {len(test)} evaluation {test.kind}s {verb} another one.{surer}")
    found = {}
    for condition, own in conditions.items():
        limited = _limit(train, own.train_examples, spec.seed, "training", spec.source)
        for side, split in (("training", limited), ("evaluation", test)):
            if len(np.unique(split.labels)) < 2:
                raise DataError(f"{spec.source}: the {side} split of {len(split)} examples has one class only.")
        noise: tuple[str, ...] = ()
        if own.label_noise:
            labels = wrong_labels(limited.labels, limited.identities(), len(classes), own.label_noise, spec.seed)
            wrong = int((labels != limited.labels).sum())
            noise = (f"{wrong} of {len(labels)} training labels were replaced by another class on purpose.",)
            limited = dataclasses.replace(limited, labels=labels)
        found[condition] = Dataset(name, classes, limited, test, (*notes, *noise))
    return found


def _evaluation(
    item: EvaluationSpec, spec: DataSpec, dataset: Dataset, announce: Callable[[str], None]
) -> tuple[Split, list[str]]:
    """What a further evaluation evaluates, its labels as indices into the data set's classes, and notes on it."""
    if item.typos is not None:
        if dataset.test.kind != "text":
            raise DataError(f"evaluation {item.name!r}: typos need texts; the examples of {dataset.name} are images.")
        texts = tuple(mistype(text, item.typos) for text in dataset.test.texts)
        pairs = dataset.test.pairs and tuple(mistype(text, item.typos) for text in dataset.test.pairs)
        return Split(texts, pairs, dataset.test.labels), []
    columns = {"text": item.text, "text_pair": item.text_pair, "label": item.label, "subset": None, "test": None}
    own = {"source": item.source, "test_examples": item.test_examples, "train_examples": None, "label_noise": 0.0}
    other = load(spec.model_copy(update={**columns, **own}), announce)
    theirs, ours = _form(other.test), _form(dataset.test)
    if theirs != ours:
        raise DataError(f"evaluation {item.name!r}: {other.name} holds {theirs}, training {ours}.")
    if unknown := sorted(set(other.classes) - set(dataset.classes)):
        raise DataError(
            f"evaluation {item.name!r}: {other.name} has the classes {', '.join(other.classes)}, of which training "
            f"lacks {', '.join(unknown[:5])}; training has {', '.join(dataset.classes)}. Classes are matched by name."
        )
    index = np.array([dataset.classes.index(name) for name in other.classes])
    notes = [f"Evaluation {item.name!r}: {note}" for note in other.notes]
    return dataclasses.replace(other.test, labels=index[other.test.labels]), notes


def _form(split: Split) -> str:
    if split.images is not None:
        return "images"
    return "single texts" if split.pairs is None else "pairs of texts"


def _classes(table: Table, source: str) -> tuple[str, ...]:
    names = sorted(set(table.labels), key=_natural)
    if len(names) < 2:
        raise DataError(f"{source}: classification needs two classes or more, got one: {names[0]!r}.")
    if len(names) > min(_MOST_CLASSES, max(2, len(table.labels) // 2)):
        raise DataError(
            f"{source}: {len(names)} different labels in {len(table.labels)} rows; is the label column categorical? "
            f"First labels: {', '.join(map(repr, names[:3]))}."
        )
    unseen = sorted(set(table.test.labels) - set(names)) if table.test is not None else []
    if unseen:
        raise DataError(f"{source}: the evaluation split has labels that training lacks: {', '.join(unseen[:5])}.")
    return tuple(names)


def _split(table: Table, classes: tuple[str, ...]) -> Split:
    index = {name: number for number, name in enumerate(classes)}
    labels = np.fromiter((index[label] for label in table.labels), dtype=np.int64, count=len(table.labels))
    return Split(
        tuple(table.texts),
        None if table.pairs is None else tuple(table.pairs),
        labels,
        None if table.images is None else tuple(table.images),
        None if table.groups is None else tuple(table.groups),
    )


def _hash_split(whole: Split, share: float, salt: str = "") -> tuple[Split, Split]:
    """Divide by a salted hash of each row's group; groups that share a text stay together."""
    identities = whole.identities()
    (texts, text_of), (names, group_of) = (
        np.unique(np.asarray(column, dtype=object), return_inverse=True)
        for column in (identities, whole.groups or identities)
    )
    size = len(texts) + len(names)
    links = coo_array((np.ones(len(whole)), (text_of, len(texts) + group_of)), shape=(size, size))
    island = connected_components(links, directed=False)[1][len(texts) :]
    # Named after the first of its groups, so that the order of rows does not matter.
    first = {int(number): str(names[place]) for place, number in reversed(list(enumerate(island)))}
    in_test = np.array([uniform(salt + first[int(number)]) < share for number in island])
    test = in_test[group_of]
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _limit(split: Split, count: int | None, seed: int, side: str, source: str) -> Split:
    if not len(split):
        raise DataError(f"{source}: the {side} split is empty.")
    if count is None:
        return split
    if count > len(split):
        raise DataError(f"{source}: {count} {side} examples asked for, {len(split)} there are.")
    order = np.argsort([uniform(f"{seed}\t{key}") for key in split.identities()], kind="stable")
    return split.take(np.sort(order[:count]))


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by value, then words by spelling."""
    try:
        value = float(label)
    except ValueError:
        return (1, 0.0, label)
    return (1, 0.0, label) if math.isnan(value) else (0, value, label)
