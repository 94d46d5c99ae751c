"""A study as it is published: what its numbers rest on, and nothing that shows the evaluation texts."""

from __future__ import annotations

import shutil
from pathlib import Path

from crisp_attention.errors import RecordError, StorageError
from crisp_attention.experiment.results.files import whole_folder
from crisp_attention.experiment.results.store import Store

_SHOWN = ("map_rows", "map_lengths", "map_layers", "maps")
"""Attention maps: no number rests on them, and they are most of what a run leaves."""

_REPORT = ("export", "figures", "report.html", "report.md")
"""What `crisp report` and `crisp export` add to a copy, and make again."""


def publish(store: Store, out: Path) -> int:
    """Write a run directory with the specification, what was tuned, and all records with their outputs.

    Left behind are the evaluation texts, attention maps, checkpoints, models and logs. The records are the same but for
    the checksums of their outputs. A directory that an earlier call wrote is replaced.

    Args:
        store: The run directory.
        out: The folder; created if need be.

    Returns:
        How many records there are.

    Raises:
        RecordError: If the directory or a record in it is damaged.
        StorageError: If the folder holds something else, or cannot be written. Nothing is left half-written.
    """
    _, runs, _ = store.study()
    _require_own(out, store)
    records = store.load_all(runs)
    try:
        with whole_folder(out) as scratch:
            copy = Store(scratch)
            copy.records.mkdir()
            copy.take_over(records, store, leave=_SHOWN)
            for path in store.descriptions:
                shutil.copyfile(path, scratch / path.name)
    except OSError as error:
        raise StorageError(f"{out} could not be written: {error.strerror or error}.") from error
    return len(records)


def _require_own(out: Path, store: Store) -> None:
    """Make sure that nothing but a copy of the same study is replaced."""
    if out.resolve() == store.folder.resolve():
        raise StorageError(f"{out} is the run directory itself. Choose another --out.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    other = Store(out)
    try:
        same = other.identity() == store.identity() and not (out / "logs").exists()  # runs are made there
    except RecordError:
        same = False
    if not same:
        raise StorageError(f"{out} exists and is no published copy of this study. Choose another --out.")
    ours = {*(path.name for path in other.descriptions), "records", *_REPORT}
    if strangers := sorted(item.name for item in out.iterdir() if item.name not in ours and item.name[0] != "."):
        raise StorageError(
            f"{out} is replaced as a whole, and holds {', '.join(strangers)} besides. Choose another --out."
        )
