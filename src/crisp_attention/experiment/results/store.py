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

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from crisp_attention.errors import ConfigurationError, RecordError
from crisp_attention.experiment.results import examples
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.faults import HINT, damaged, first, unknown_schema
from crisp_attention.experiment.results.files import write_atomically
from crisp_attention.experiment.results.identity import describe, difference
from crisp_attention.experiment.results.leases import Lease, Leases, exclusively
from crisp_attention.experiment.results.record import READABLE
from crisp_attention.experiment.results.records import Records, to_json
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


class Store(Records):
    """Access to one run directory. Creating the object touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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
                write_atomically(self.folder / _STUDY, to_json(study))
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
            write_atomically(self.folder / _STUDY, to_json(study))

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
            write_atomically(self.folder / _TUNING, to_json(tuning.model_dump(mode="json", by_alias=True)))

    def save_examples(self, examples: Examples) -> None:
        """Keep the evaluation texts beside the records.

        Raises:
            StorageError: If they cannot be written.
        """
        with self.writing():
            write_atomically(self.folder / _EXAMPLES, to_json(dataclasses.asdict(examples)))

    def examples(self) -> Examples | None:
        """The evaluation texts; None where they were not kept, as in published results.

        Raises:
            RecordError: If the file is damaged.
        """
        return examples.read(self.folder / _EXAMPLES)

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
