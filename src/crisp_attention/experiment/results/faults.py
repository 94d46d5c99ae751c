"""What to tell of files that are damaged, foreign, or cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

from pydantic import ValidationError

from crisp_attention.errors import RecordError, StorageError
from crisp_attention.experiment.results.record import READABLE

HINT = "Choose another --out, or move that directory away."
"""What to do about a run directory that is not the wanted one."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of the errors that mean a disk and no mistake in a program."""

_REMEDIES = {
    errno.ENOSPC: "Make room on its disk",
    errno.EDQUOT: "Make room in your quota",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Make it writable",
    errno.EPERM: "Make it writable",
}


def unwritable(folder: Path, error: OSError) -> StorageError:
    """A run directory that cannot be written, and how to go on."""
    remedy = _REMEDIES.get(error.errno or 0, "See to its disk")
    return StorageError(
        f"{folder} could not be written: {error.strerror or error}. Finished runs in it are kept. {remedy} "
        "and give the same command again: it goes on from there."
    )


def first(error: Exception) -> str:
    """The first of the faults that a validation found, or the error as it is."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def damaged(path: Path, why: str) -> RecordError:
    """A file that cannot be read, and what to do."""
    record = f"{path.stem.partition('-')[0]}.json"
    again = f"Delete {record if path.suffix == '.npz' else 'it'} to have that run done again."
    if path.name == "tuning.json":
        return RecordError(f"{path} is damaged: {why}. Delete it: what was found is read from the trials again.")
    if path.name == "examples.json":
        return RecordError(f"{path} is damaged: {why}. Delete it: no number rests on the texts in it.")
    advice = again if path.parent.name == "records" else HINT
    return RecordError(f"{path} is damaged: {why}. {advice}")


def unknown_schema(path: Path, found: object) -> RecordError:
    """A file of another version of the record format."""
    *older, newest = READABLE
    return RecordError(
        f"{path} has record schema {found!r}, this version reads {', '.join(map(str, older))} and {newest}. "
        "Update crisp-attention, or use the version that wrote it."
    )
