"""Checkpoints of a run in training: whole or not there, the newest only, gone once its record is written.

checkpoints/RUN_ID/
  checkpoint-STEP/   what the Trainer saves, the journal's books, and a manifest that is written last
  resumed            how often the run was taken up again
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from crisp_attention.experiment.results import provenance
from crisp_attention.experiment.results.files import write_atomically
from crisp_attention.experiment.results.store import MANIFEST

_LEAST_SECONDS = 30.0
_MOST_SHARE = 0.05

_BOOKS = "books.pt"
_RESUMED = "resumed"


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from.

    Attributes:
        folder: As the Trainer wants it.
        books: The journal's state.
    """

    folder: Path
    books: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Creating the object touches nothing on disk.

    Args:
        folder: The run's own.
        run_id: Which run.
        note: Told, in a sentence, of a checkpoint that cannot be used or written.
        seconds: Least time between two checkpoints; what takes less is sooner done again.
        share: Most of the time that may go into saving them.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        note: Callable[[str], None] = lambda _: None,
        seconds: float = _LEAST_SECONDS,
        share: float = _MOST_SHARE,
    ) -> None:
        self.folder = folder
        self._run_id = run_id
        self._note = note
        self._least, self._share = seconds, share
        self._interval = seconds
        self._last = self._asked = time.perf_counter()

    @property
    def resumed(self) -> int:
        """How often the run was taken up again."""
        try:
            return int((self.folder / _RESUMED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0

    def take_up(self) -> Saved | None:
        """The newest whole checkpoint, counted as taken up; None to begin at the beginning.

        Discards all others. One that is damaged, or was made by another run or in another
        environment, whose results could differ in the last bit, is noted.
        """
        found = None
        for folder in sorted(self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True):
            # Without a manifest it was being written when the process ended.
            if found is None and (folder / MANIFEST).exists():
                problem = self._problem(folder)
                if problem is None:
                    found = Saved(folder, torch.load(folder / _BOOKS, weights_only=True))
                    continue
                self._note(f"A checkpoint at step {_step(folder)} was discarded: {problem}.")
            shutil.rmtree(folder, ignore_errors=True)
        if found is None:
            self.clear()
        else:
            write_atomically(self.folder / _RESUMED, str(self.resumed + 1).encode())
        return found

    def due(self) -> bool:
        """Whether to save now; the time from here to `complete` is what saving takes."""
        self._asked = time.perf_counter()
        return self._asked - self._last >= self._interval

    def complete(self, step: int, books: dict[str, Any]) -> None:
        """Add the books and the manifest to what the Trainer has just saved, and discard what was before.

        Does nothing where the Trainer's part was given up.

        Args:
            step: Finished training steps.
            books: The journal's state: tensors, numbers, strings, and containers of these.

        Raises:
            OSError: If the disk is full, for example.
            RuntimeError: Likewise, from torch.
        """
        folder = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.exists():
            return
        torch.save(books, folder / _BOOKS)
        manifest = {"run_id": self._run_id, "environment": _environment(), "files": _checksums(folder, flush=True)}
        write_atomically(folder / MANIFEST, json.dumps(manifest).encode())
        for other in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        self._pause()

    def give_up(self, step: int, why: str) -> None:
        """Discard what could not be written whole; checkpoints before it stay."""
        shutil.rmtree(self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", ignore_errors=True)
        self._note(f"No checkpoint could be written at step {step} ({why}); training goes on without.")
        self._pause()

    def clear(self) -> None:
        """Remove all that is kept of the run here."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pause(self) -> None:
        self._last = time.perf_counter()
        self._interval = max(self._least, (self._last - self._asked) / self._share)

    def _problem(self, folder: Path) -> str | None:
        """Why a checkpoint cannot be gone on from; None if it can."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            run_id, environment, files = manifest["run_id"], manifest["environment"], manifest["files"]
            if run_id != self._run_id:
                return f"it is of run {run_id}"
            if environment != _environment():
                return "it was made with other package versions or another number of threads or processes"
            return None if files == _checksums(folder) else "it is damaged"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"it is damaged ({error})"


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _environment() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "packages": provenance.packages(),
        "threads": torch.get_num_threads(),
        "processes": provenance.processes(),
        "device": device,
    }


def _checksums(folder: Path, *, flush: bool = False) -> dict[str, str]:
    """SHA-256 of each file but the manifest; with `flush`, all of them on disk before it is returned."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        if flush:
            with path.open("r+b") as stream:  # Windows flushes only what is open for writing
                os.fsync(stream.fileno())
    return found
