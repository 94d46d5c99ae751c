"""Small data files of every kind, and what a data set holds, for tests."""

from __future__ import annotations

import json

import pandas as pd

from crisp_attention.experiment.data.dataset import load
from crisp_attention.experiment.specification.sections import DataSpec

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


def glue_folder(folder, train=ROWS, dev=(("dev text 1", "0"), ("dev text 2", "1"))):
    for name, rows in (("train.tsv", train), ("dev.tsv", dev)):
        write(folder, name, rows, ("sentence", "label"))
    return folder
