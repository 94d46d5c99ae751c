"""The tables of a study as Parquet or CSV, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow.csv
import pyarrow.parquet

from crisp_attention.errors import StorageError
from crisp_attention.experiment.export.tables import Tables
from crisp_attention.experiment.results.files import beside, write_atomically
from crisp_attention.experiment.results.store import Store

Format = Literal["parquet", "csv"]

_MANIFEST = "export.json"
_WRITERS: dict[Format, Callable[[str, Any], Any]] = {
    "parquet": pyarrow.parquet.ParquetWriter,
    "csv": pyarrow.csv.CSVWriter,
}


def export(store: Store, kind: Format, out: Path) -> list[Path]:
    """Write `runs.KIND` and `predictions.KIND` into a folder.

    Files that an earlier export of this study wrote there are replaced; `export.json` says which.

    Args:
        store: The run directory.
        kind: "parquet" or "csv".
        out: The folder; created if need be.

    Returns:
        What was written.

    Raises:
        RecordError: If the directory or a record in it is damaged.
        StorageError: If a file there is somebody else's, or the folder cannot be written. Nothing is left half-written.
    """
    tables = Tables(store)
    runs = tables.runs_table()
    paths = [out / f"runs.{kind}", out / f"predictions.{kind}"]
    written = _own(out, store)
    for path in paths:
        if path.exists() and path.name not in written:
            raise StorageError(
                f"{path} exists and was not written by an export of this study: it is left alone. Choose another "
                "--out, or move that file away."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        manifest = {"study": store.identity(), "files": sorted({*written, *(path.name for path in paths)})}
        with contextlib.ExitStack() as stack:
            # Both are whole before either gets its name.
            halves = [stack.enter_context(beside(path)) for path in paths]
            with _WRITERS[kind](str(halves[0]), runs.schema) as writer:
                writer.write_table(runs)
            with _WRITERS[kind](str(halves[1]), tables.prediction_schema()) as writer:
                for table in tables.predictions():
                    writer.write_table(table)
            write_atomically(out / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            for half, path in zip(halves, paths, strict=True):
                os.replace(half, path)
    except OSError as error:
        raise StorageError(f"{out} could not be written: {error.strerror or error}.") from error
    return paths


def _own(out: Path, store: Store) -> list[str]:
    """Names of the files in a folder that earlier exports of this study wrote.

    Raises:
        StorageError: If the folder is that of another study, or none of ours.
    """
    path = out / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        study, files = manifest["study"], list(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise StorageError(f"{path} exists and is no list of exported files. Choose another --out.") from None
    if study != store.identity():
        raise StorageError(f"{out} holds the export of another study. Choose another --out.")
    return files
