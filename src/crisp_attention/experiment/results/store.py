"""A run directory: the study's identity, one atomic record a run, a lease and a lock a run.

Nothing is overwritten but the record of a run that failed or diverged, where it is done again.

runs/NAME/
  study.json          the specification, fingerprints, and how many seeds were asked for when
  records/ID.json     one finished, diverged or failed run
  records/ID.npz      its per-example outputs
  leases/ID/N         who trains that run, and how often that was renewed; see `leases`
  locks/ID.lock       locked besides, where the file system has locks
  checkpoints/ID/     where it goes on if it is interrupted; gone once its record is there
  models/ID/          the trained model of a run that was to keep it
  model/              the one of these that `crisp tune` recommends, with a model card
  tuning.json         what was found for each arm, once and for all; only where the study tunes
  tuning/             the trials: runs like the others, on data without the evaluation split, and Optuna's database
  examples.json       the evaluation texts, for the page of disagreements; not needed for any number
  logs/               what the workers printed
  report.md  report.html  figures/
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from crisp_attention.errors import ConfigurationError, RecordError, StorageError
from crisp_attention.experiment.results import examples
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.faults import HINT, damaged, first, unknown_schema, unwritable
from crisp_attention.experiment.results.files import write_atomically, write_once
from crisp_attention.experiment.results.identity import describe, difference
from crisp_attention.experiment.results.leases import Lease, Leases, exclusively
from crisp_attention.experiment.results.record import READABLE, Arrays, Record
from crisp_attention.experiment.results.tuning import Tuning
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, expand
from crisp_attention.experiment.specification.spec import ExperimentSpec, parse
from crisp_attention.experiment.specification.tuned import apply

_STUDY = "study.json"
_EXAMPLES = "examples.json"
_TUNING = "tuning.json"
# What is at stake is the order in which numbers of seeds were asked for.
_PATIENCE = 10.0

MANIFEST = "manifest.json"
"""The file of a checkpoint that is written last: with it the checkpoint is whole."""


class Store:
    """Access to one run directory. Creating the object touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = folder / "records"
        self.leases = Leases(folder)

    def require(self, spec: ExperimentSpec, prints: Fingerprints) -> None:
        """Make sure that the directory is new or belongs to this experiment; writes nothing.

        Args:
            spec: The experiment.
            prints: Of its model and data.

        Raises:
            RecordError: If it belongs to another experiment or is not a run directory, or its arms were tuned
                with another number of trials.
        """
        if self.begun:
            existing, wanted = self._read_study(), describe(spec, prints)
            if existing["identity"] != wanted["identity"]:
                raise RecordError(f"{self.folder} holds another experiment ({difference(existing, wanted)}). {HINT}")
            self.tuning(spec)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RecordError(f"{self.folder} exists and is not a run directory (it has no {_STUDY}). {HINT}")

    @property
    def begun(self) -> bool:
        """Whether there is a study in it."""
        return (self.folder / _STUDY).exists()

    @property
    def descriptions(self) -> list[Path]:
        """The files that say what the study is: its specification, and what was tuned."""
        return [path for path in (self.folder / _STUDY, self.folder / _TUNING) if path.exists()]

    def open(self, spec: ExperimentSpec, prints: Fingerprints, source: Store | None = None) -> None:
        """Create the directory, or go on in it.

        Asking for another number of seeds is allowed and remembered: the report says so.

        Args:
            spec: The experiment.
            prints: Of its model and data.
            source: Another run directory, to take over runs from. If it is of the same experiment, what was asked for
                and found there was asked for and found here.

        Raises:
            RecordError: As `require`.
            StorageError: If it cannot be written.
        """
        self.require(spec, prints)
        study = describe(spec, prints)
        with self.writing():
            self._lay_out()
            with exclusively(self.folder / "locks" / "study.lock", _PATIENCE):
                asked = self._read_study()["seeds_asked"] if self.begun else []
                taken = self.taken_over() if self.begun else {}
                if source is not None and source.holds(spec, prints):
                    before = source._read_study()["seeds_asked"]
                    taken |= source.taken_over()
                    asked = asked if asked[: len(before)] == before else [*before, *asked]
                    if self.tuning(spec) is None and (found := source.tuning(spec)) is not None:
                        self.save_tuning(found)
                study["seeds_asked"] = asked if asked[-1:] == [spec.seeds] else [*asked, spec.seeds]
                study |= {"taken_over": taken} if taken else {}
                write_atomically(self.folder / _STUDY, _to_json(study))
        self._sweep()

    def open_trials(self) -> Store:
        """Access to the trials of a study that tunes; creates their directory, or goes on in it.

        Raises:
            StorageError: If it cannot be written.
        """
        trials = Store(self.folder / "tuning")
        with self.writing():
            trials._lay_out()
        trials._sweep()
        return trials

    def _lay_out(self) -> None:
        for path in (self.records, self.folder / "locks", self.folder / "logs"):
            path.mkdir(parents=True, exist_ok=True)

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

    def study(self) -> tuple[ExperimentSpec, list[PlannedRun], list[int]]:
        """The experiment that a directory holds.

        Returns:
            Its specification as it was asked for, all its runs (with what was found, once it is), and the numbers
            of seeds that were asked for in turn.

        Raises:
            RecordError: If there is no readable study.
        """
        study = self._read_study()
        path = self.folder / _STUDY
        try:
            spec = parse(study["spec"], str(path))
        except ConfigurationError as error:
            raise damaged(path, str(error)) from None
        data = {"": study["data"]} if isinstance(study["data"], str) else study["data"]
        if set(data) != set(spec.conditions()):
            raise damaged(path, "its data are not those of its conditions")
        prints = Fingerprints(study["model"], data, study.get("evaluations", {}))
        tuning = self.tuning(spec)
        return spec, list(expand(spec if tuning is None else apply(spec, tuning.values), prints)), study["seeds_asked"]

    def taken_over(self) -> dict[str, str]:
        """Runs that were made for another study, whose results could be seen before this one: its name by run id.

        Raises:
            RecordError: If there is no readable study.
        """
        return dict(self._read_study().get("taken_over", {}))

    def note_taken_over(self, run_ids: Iterable[str], source: Store) -> None:
        """Remember that runs come from a directory of another study.

        Raises:
            StorageError: If it cannot be written.
        """
        with self.writing(), exclusively(self.folder / "locks" / "study.lock", _PATIENCE):
            study = self._read_study()
            name = str(source._read_study()["spec"]["name"])
            study["taken_over"] = dict.fromkeys(run_ids, name) | study.get("taken_over", {})
            write_atomically(self.folder / _STUDY, _to_json(study))

    def identity(self) -> str:
        """Hash of what makes two studies the same, see `identity.describe`.

        Raises:
            RecordError: If there is no readable study.
        """
        return str(self._read_study()["identity"])

    def holds(self, spec: ExperimentSpec, prints: Fingerprints) -> bool:
        """Whether it is of this experiment, perhaps with other numbers of seeds.

        Args:
            spec: The experiment.
            prints: Of its model and data.
        """
        return self.begun and self.identity() == describe(spec, prints)["identity"]

    def tuning(self, spec: ExperimentSpec, hint: str = HINT) -> Tuning | None:
        """What was tried and found for the arms; None if nothing is searched, or not found yet.

        Args:
            spec: The experiment.
            hint: What can be done where another number of trials found it.

        Raises:
            RecordError: If the file is damaged, or holds what another number of trials found.
        """
        path = self.folder / _TUNING
        if spec.tune is None:
            return None
        try:
            tuning = Tuning.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise damaged(path, first(error)) from None
        if fault := tuning.fault(spec):
            raise damaged(path, fault)
        if tuning.trials != spec.tune.trials:
            raise RecordError(
                f"{self.folder} holds runs with what {tuning.trials} trials of each arm found; tune.trials = "
                f"{spec.tune.trials} would choose anew when results can be seen. {hint}"
            )
        return tuning

    def save_tuning(self, tuning: Tuning) -> None:
        """Keep what was found, once and for all.

        Raises:
            StorageError: If it cannot be written.
        """
        with self.writing():
            write_atomically(self.folder / _TUNING, _to_json(tuning.model_dump(mode="json", by_alias=True)))

    def save_examples(self, examples: Examples) -> None:
        """Keep the evaluation texts beside the records.

        Raises:
            StorageError: If they cannot be written.
        """
        with self.writing():
            write_atomically(self.folder / _EXAMPLES, _to_json(dataclasses.asdict(examples)))

    def examples(self) -> Examples | None:
        """The evaluation texts; None where they were not kept, as in published results.

        Raises:
            RecordError: If the file is damaged.
        """
        return examples.read(self.folder / _EXAMPLES)

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

    def take_over(self, run_ids: Iterable[str], source: Store, leave: Collection[str] = ()) -> None:
        """Copy runs, records and outputs, from another run directory; those that are here stand.

        Args:
            run_ids: Which.
            source: The other directory.
            leave: Names of outputs to leave behind.

        Raises:
            RecordError: If a run is damaged there.
            StorageError: If the directory cannot be written.
        """
        for run_id in run_ids:
            record = source.load(run_id)
            if record is None or self.load(run_id) is not None:
                continue
            outputs = None if record.arrays is None else source.load_arrays(record)
            kept = outputs and {name: own for name, own in outputs.items() if name not in leave}
            self.save(record.model_copy(update={"arrays": None}), kept)

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
            plain = _to_json(record.model_dump(mode="json", by_alias=True))
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

    def checkpoints(self, run_id: str) -> Path:
        """Where a run's checkpoints are kept while it is in training."""
        return self.folder / "checkpoints" / run_id

    def has_checkpoint(self, run_id: str) -> bool:
        """Whether there is a whole checkpoint that a run can go on from."""
        return any(self.checkpoints(run_id).glob(f"*/{MANIFEST}"))

    def model(self, run_id: str) -> Path:
        """Where the trained model of a run is kept, if it is to be."""
        return self.folder / "models" / run_id

    def lock(self, run_id: str) -> Lease | None:
        """Take a run for this process; None if another holds it. Others have it when the process ends.

        Raises:
            StorageError: If there is no room for the lease.
        """
        with self.writing():
            return self.leases.take(run_id)

    def in_training(self, run_id: str) -> bool:
        """Whether a process is training a run now, or may be on another machine; writes nothing."""
        return self.leases.held(run_id)

    def abandoned(self, run_ids: Iterable[str] | None, announce: Callable[[str], None]) -> set[str]:
        """Those of the given runs (None: of all) that nobody is training, so that they can be taken.

        A holder on another machine that shows no sign of life is watched for as long as its lease lasts.

        Args:
            run_ids: Which.
            announce: Told if that takes a while.

        Raises:
            StorageError: If the directory cannot be written.
        """
        with self.writing():
            return self.leases.abandoned(
                run_ids, lambda count: announce(f"Waiting for a sign of life from other machines ({count} begun there)")
            )

    def _sweep(self) -> None:
        """Remove what processes that were killed left behind: halves of files, checkpoints of finished runs."""
        halves = (path for path in self.records.glob(".*") if path.is_file())  # whatever else hides there is not ours
        for path in (*halves, *self.checkpoints("").glob("*")):
            run_id = path.name.removeprefix(".").partition(".")[0]
            lock = self.lock(run_id)
            if lock is None:  # its process is alive
                continue
            if path.parent == self.records:
                path.unlink(missing_ok=True)
            elif (record := self.load(run_id)) is not None and record.status == "finished":
                shutil.rmtree(path, ignore_errors=True)
            lock.release()

    def _read_study(self) -> dict[str, Any]:
        path = self.folder / _STUDY
        try:
            study = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RecordError(f"{self.folder} is not a run directory: it has no {_STUDY}.") from None
        except (OSError, ValueError) as error:
            raise damaged(path, str(error)) from None
        wanted = {"schema", "spec", "model", "data", "identity", "seeds_asked"}
        if not isinstance(study, dict) or not wanted <= set(study) or not study["seeds_asked"]:
            raise damaged(path, f"expected the keys {', '.join(sorted(wanted))}, none of them empty")
        if not isinstance(study.get("taken_over", {}), dict):
            raise damaged(path, "taken_over is no table of runs")
        if study["schema"] not in READABLE:
            raise unknown_schema(path, study["schema"])
        return study


def _to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
