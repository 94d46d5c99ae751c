"""Who trains a run: leases that are renewed while it trains and taken over when they are not, beside file locks.

leases/NAME/N   the N-th lease of a run: who holds it, and how often it was renewed

Locks of a network folder may exclude nobody, or stay when their holder is gone. So each holder writes a lease,
which a thread renews. The N-th lease ends when its holder releases it or the N+1-st is there, which is created
by one taker only, however many there are. The newest is never deleted: their numbers would begin anew.

Nobody's clock is compared with anybody else's. A lease says how long it lasts; whoever has seen the same
content for so long, by a clock of its own, may take the next one. A holder on this machine is judged by its
process instead, at once: gone, or not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from crisp_attention.experiment.results.files import write_once

DURATION = 60.0
"""Seconds after which a lease that is not renewed has ended."""

_RENEWALS = 6
"""How often a lease is renewed while it lasts."""

# A sweep holds a run for an instant, which must not keep anybody from training it.
_PATIENCE = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class LeaseLostError(Exception):
    """Another process has taken over a run because its holder was silent for too long."""


class _Claim(BaseModel):
    """Content of a lease.

    Attributes:
        holder: Host, process and a random part: no other lease has the same. Empty once it is released.
        place: Where `pid` means the holder, see `here`.
        pid: The holder's process.
        began: When that began, in its kernel's own count; empty where nobody can tell.
        beat: How often it was renewed.
        seconds: How long it lasts without being renewed.
    """

    holder: str
    place: str
    pid: int
    began: str
    beat: int
    seconds: float

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> bytes:
        return (self.model_dump_json() + "\n").encode()


@dataclass(frozen=True)
class _Standing:
    """The newest lease of a run, as it is seen now.

    Attributes:
        number: Which; 0 where there is none.
        content: Of its file.
        state: "free"; "held" by a living process of this machine; "watched": by another machine, and not yet seen
            unchanged for long enough; "silent": seen so.
    """

    number: int
    content: bytes
    state: Literal["free", "held", "watched", "silent"]


class Lease:
    """A run that this process holds: renewed by a thread until it is released or lost."""

    def __init__(self, path: Path, claim: _Claim, lock: FileLock | None) -> None:
        self._path, self._claim, self._lock = path, claim, lock
        self._lost = False
        self._renewed = _awake_or_not()
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=f"lease {path.parent.name}", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Make sure that the run is still held.

        Cheap: only where the thread was kept from renewing, as in a machine that slept, the folder is looked at.

        Raises:
            LeaseLostError: If another process has taken it over.
        """
        if _awake_or_not() - self._renewed > self._claim.seconds / 2:
            self.renew()
        if self._lost:
            raise LeaseLostError(f"Run {self._path.parent.name} was taken over by another process.")

    def renew(self) -> None:
        """Show others that the run is held, and find out whether it still is."""
        with self._writing:
            if self._lost or self._ended.is_set():
                return
            # A folder that cannot be reached tells nothing: the run goes on, and its record is written once only.
            with contextlib.suppress(OSError):
                found = self._find()
                if found is None:
                    self._lost = True
                    return
                self._claim = found.model_copy(update={"beat": found.beat + 1})
                self._write(self._claim)
                # Listed after it was written to: a network file system must not answer from memory.
                self._lost = _newest(self._path.parent) != int(self._path.name)
                self._renewed = _awake_or_not()

    def release(self) -> None:
        """Let others have the run."""
        self._ended.set()
        with self._writing:
            if not self._lost:
                with contextlib.suppress(OSError):
                    self._write(self._claim.model_copy(update={"holder": "", "place": "", "pid": 0, "began": ""}))
        self._thread.join()
        if self._lock is not None:
            self._lock.release()

    def _keep(self) -> None:
        while not self._ended.wait(self._claim.seconds / _RENEWALS):
            self.renew()

    def _find(self) -> _Claim | None:
        """This lease as it lies in the folder; None if it is gone, or somebody else's."""
        try:
            found = _parse(self._path.read_bytes())
        except FileNotFoundError:
            return None
        return None if found is None or found.holder != self._claim.holder else found

    def _write(self, claim: _Claim) -> None:
        # Nobody else writes this lease, and a half of it that a power cut leaves is as silent as the whole.
        scratch = self._path.with_name(f".{self._path.name}")
        scratch.write_bytes(claim.to_json())
        os.replace(scratch, self._path)


class Leases:
    """The leases of one run directory. Creating the object touches nothing on disk.

    Args:
        folder: The run directory.
        place: Where this process is.
        clock: Seconds since any moment.
    """

    def __init__(self, folder: Path, place: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._locks = folder / "leases", folder / "locks"
        self._place = here() if place is None else place
        self._clock = clock
        self._seen: dict[str, tuple[tuple[int, bytes], float]] = {}

    def take(self, name: str) -> Lease | None:
        """Take a run for this process; None if another holds it.

        Raises:
            OSError: If the directory cannot be written.
        """
        try:
            lock = file_lock(self._locks / f"{name}.lock", _PATIENCE)
        except Timeout:
            # The lock of a machine that is gone may stay for ever: where there are leases, they decide.
            if self._look(name).number == 0:
                return None
            lock = None
        lease = None
        try:
            lease = self._claim(name, lock)
        finally:
            if lease is None and lock is not None:
                lock.release()
        return lease

    def held(self, name: str) -> bool:
        """Whether another process seems to be training a run now; writes nothing."""
        return self._look(name).state in ("held", "watched")

    def abandoned(self, names: Iterable[str] | None, announce: Callable[[int], None]) -> set[str]:
        """Which runs are free now, those of silent holders freed; watches each holder until it shows itself or is late.

        Args:
            names: Which runs; None for all that ever had a lease.
            announce: Told of how many runs must be watched, once, if any.
        """
        names = sorted(path.name for path in self._folder.glob("*")) if names is None else names
        first = {name: self._look(name) for name in names}
        found = {name for name, standing in first.items() if standing.state == "free"}
        unclear = {name: standing for name, standing in first.items() if standing.state in ("watched", "silent")}
        if any(standing.state == "watched" for standing in unclear.values()):
            announce(len(unclear))
        while unclear:
            for name, before in list(unclear.items()):
                now = self._look(name)
                if now.state == "silent" and (lease := self.take(name)) is not None:
                    lease.release()
                    found.add(name)
                elif now.state == "watched" and now.content == before.content:
                    continue
                del unclear[name]
            if unclear:
                time.sleep(DURATION / 60)
        return found

    def _claim(self, name: str, lock: FileLock | None) -> Lease | None:
        """Create the lease that follows the newest one, if that has ended and nobody else is faster."""
        standing = self._look(name)
        if standing.state in ("held", "watched"):
            return None
        pid = os.getpid()
        holder = f"{platform.node()}-{pid}-{uuid.uuid4().hex}"
        claim = _Claim(holder=holder, place=self._place, pid=pid, began=_began(pid) or "", beat=0, seconds=DURATION)
        path = self._folder / name / str(standing.number + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not write_once(path, claim.to_json()):
            return None
        # Where the list was an old one, or the file system has no hard links, somebody else may be the holder.
        if _newest(path.parent) != standing.number + 1 or path.read_bytes() != claim.to_json():
            return None
        path.with_name(str(standing.number)).unlink(missing_ok=True)  # its holder finds out by that too
        return Lease(path, claim, lock)

    def _look(self, name: str) -> _Standing:
        number = _newest(self._folder / name)
        if number == 0:
            return _Standing(0, b"", "free")
        try:
            content = (self._folder / name / str(number)).read_bytes()
        except OSError:  # replaced while it was read, on some network file systems
            content = b""
        claim = _parse(content)
        if claim is not None:
            alive = self._alive(claim)
            if not claim.holder or alive is False:
                return _Standing(number, content, "free")
            if alive:
                return _Standing(number, content, "held")
        now = self._clock()
        what, since = self._seen.get(name, (None, now))
        if what != (number, content):
            self._seen[name] = (number, content), now
            since = now
        silent = now - since >= (DURATION if claim is None else claim.seconds)
        return _Standing(number, content, "silent" if silent else "watched")

    def _alive(self, claim: _Claim) -> bool | None:
        """Whether the process that holds a lease is alive; None if that cannot be told from here."""
        if claim.place != self._place:
            return None
        began = _began(claim.pid)
        if began is None:
            return False
        # Without a beginning, another process may have the same number.
        return began == claim.began if began and claim.began else None


def file_lock(path: Path, seconds: float) -> FileLock | None:
    """Lock a file; None where its file system has no locks.

    Raises:
        filelock.Timeout: If somebody else holds it for so long.
        OSError: If the file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds, poll_interval=_PATIENCE / 5)
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


@contextlib.contextmanager
def exclusively(path: Path, seconds: float) -> Iterator[None]:
    """Lock a file during the block, or do without where somebody holds it for too long or there are no locks."""
    lock = None
    with contextlib.suppress(Timeout):
        lock = file_lock(path, seconds)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def here() -> str:
    """The machine since it was last started, as far as a number means the same process."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # containers count their processes on their own
    if len(parts) == 1:
        parts.append(f"{uuid.getnode():x}")
    return " ".join(parts)


def _began(pid: int) -> str | None:
    """When a process of this machine began; empty if nobody can tell, None if it is gone."""
    if os.name != "posix":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it is somebody else's
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in ("Z", "X") else fields[18]


def _newest(folder: Path) -> int:
    """Number of the newest lease of a run; 0 if there is none."""
    try:
        return max((int(name) for name in os.listdir(folder) if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def _parse(content: bytes) -> _Claim | None:
    """A lease; None if it is damaged."""
    try:
        return _Claim.model_validate_json(content)
    except ValueError:
        return None


def _awake_or_not() -> float:
    """Seconds since some moment, those included in which the machine slept, where it can tell."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
