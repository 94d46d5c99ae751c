"""The records of runs, each beside its per-example outputs, in one folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from crisp_attention.errors import RecordError, StorageError
from crisp_attention.experiment.results.faults import damaged, first, unknown_schema, unwritable
from crisp_attention.experiment.results.files import write_atomically, write_once
from crisp_attention.experiment.results.record import READABLE, Arrays, Record
from crisp_attention.experiment.specification.runs import PlannedRun


class Records:
    """Access to the records of a run directory.

    Args:
        folder: The run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = folder / "records"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say what happened, and how to go on, where the directory cannot be written within the block.

        Raises:
            StorageError: In place of an `OSError`.
        """
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> StorageError:
        """What to tell a user of an error of the disk."""
        return unwritable(self.folder, error)

    def load(self, run_id: str) -> Record | None:
        """The record of a run, or None if there is none yet.

        Raises:
            RecordError: If the record is damaged, of an unknown version or of another run.
        """
        path = self.records / f"{run_id}.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise damaged(path, str(error)) from None
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise damaged(path, "not a JSON object")
            if content.get("schema") not in READABLE:
                raise unknown_schema(path, content.get("schema"))
            record = Record.model_validate(content)
        except json.JSONDecodeError as error:
            raise damaged(path, f"not valid JSON ({error.msg} at character {error.pos}); truncated?") from None
        except ValidationError as error:
            raise damaged(path, first(error)) from None
        if record.run_id != run_id:
            raise damaged(path, f"it describes run {record.run_id}")
        return record

    def load_all(self, runs: list[PlannedRun]) -> dict[str, Record]:
        """All records there are of the given runs, by run id."""
        found = {run.config.run_id: self.load(run.config.run_id) for run in runs}
        return {run_id: record for run_id, record in found.items() if record is not None}

    def load_arrays(self, record: Record) -> dict[str, np.ndarray[Any, Any]]:
        """The per-example outputs of a finished run.

        Raises:
            RecordError: If the file is missing or differs from what the record says.
        """
        if record.arrays is None:
            raise RecordError(f"Run {record.run_id} is {record.status} and has no per-example outputs.")
        own = [self.records / f"{record.run_id}{part}.npz" for part in ("", f"-{record.arrays.sha256[:8]}")]
        # By the run's id, never by a name that a record brings along, which could lead out of the directory.
        path = next((path for path in own if path.name == record.arrays.file), None)
        if path is None:
            raise damaged(own[0], f"its record names the file {record.arrays.file!r}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise damaged(path, str(error)) from None
        if hashlib.sha256(content).hexdigest() != record.arrays.sha256:
            raise damaged(path, "its checksum differs from the record's")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def save(
        self, record: Record, arrays: Mapping[str, np.ndarray[Any, Any]] | None, before: Record | None = None
    ) -> Record:
        """Write a run's outputs, then its record: a record on disk is always complete.

        The first record of a run stands. Runs are deterministic: whoever comes later, because it was silent for so
        long that another process took its run over, has nothing to add.

        Args:
            record: The record, its `arrays` not yet filled in.
            arrays: Per-example outputs of a finished run.
            before: The record that this one replaces, of a run that was done again.

        Returns:
            The record that stands.

        Raises:
            StorageError: If they cannot be written; there is no record then.
        """
        with self.writing():
            if arrays is not None:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, allow_pickle=False, **arrays)
                record = record.model_copy(update={"arrays": self._save_outputs(record.run_id, buffer.getvalue())})
            plain = to_json(record.model_dump(mode="json", by_alias=True))
            path = self.records / f"{record.run_id}.json"
            if before is not None and self.load(record.run_id) == before:
                write_atomically(path, plain)
            elif not write_once(path, plain):
                return self.load(record.run_id) or record
        return record

    def _save_outputs(self, run_id: str, content: bytes) -> Arrays:
        """Write outputs; a file of that name with others may be named by a record, and is left alone."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.records / f"{run_id}.npz"
        if not write_once(path, content) and path.read_bytes() != content:
            path = self.records / f"{run_id}-{sha256[:8]}.npz"
            write_atomically(path, content)
        return Arrays(file=path.name, sha256=sha256)


def to_json(content: Any) -> bytes:
    """As every JSON file of a run directory is written: the same content gives the same bytes."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
