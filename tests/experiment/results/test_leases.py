from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from crisp_attention.experiment.results import leases
from crisp_attention.experiment.results.leases import LeaseLostError, Leases, file_lock
from made_up_worker import Useless


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, begins=0.0):
        self.now = begins

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "locks").mkdir()
    return tmp_path


@pytest.fixture
def machines(folder):
    """Two machines on one folder: the first never renews by itself, the second watches by a clock of its own."""
    clock = Clock(1e6)
    return Leases(folder, place="there"), Leases(folder, place="here", clock=clock), clock


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No lease is renewed unless a test does it."""
    monkeypatch.setattr(leases.Lease, "_keep", lambda lease: None)


def file_of(folder, name="run"):
    """The newest lease's."""
    return max((folder / "leases" / name).glob("[0-9]*"), key=lambda path: int(path.name))


# Taking and releasing


def test_a_run_has_one_holder_until_it_is_released(folder):
    mine, other = Leases(folder), Leases(folder)
    lease = mine.take("run")
    assert lease is not None
    assert mine.take("run") is None
    assert other.take("run") is None
    assert other.held("run")
    assert not other.held("another")
    lease.release()
    assert not other.held("run")
    again = other.take("run")
    assert again is not None
    assert [path.name for path in (folder / "leases" / "run").iterdir()] == ["2"]
    again.release()


def test_looking_writes_nothing(folder):
    assert not Leases(folder).held("run")
    assert [path.name for path in folder.rglob("*")] == ["locks"]


def test_a_released_lease_names_nobody(folder):
    lease = Leases(folder).take("run")
    assert json.loads(file_of(folder).read_bytes())["pid"] == os.getpid()
    lease.release()
    content = json.loads(file_of(folder).read_bytes())
    assert [content[key] for key in ("holder", "place", "pid", "began")] == ["", "", 0, ""]


def test_locks_that_exclude_nobody_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(leases, "FileLock", Useless)
    lease = Leases(folder).take("run")
    assert Leases(folder).take("run") is None
    assert Leases(folder, place="there").take("run") is None
    lease.release()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_will_do(folder, monkeypatch, error):
    class Unavailable(Useless):
        def acquire(self, **arguments):
            raise error

    monkeypatch.setattr(leases, "FileLock", Unavailable)
    with leases.exclusively(folder / "locks" / "study.lock", 0.05):
        pass
    lease = Leases(folder).take("run")
    assert Leases(folder).take("run") is None
    lease.release()


def test_a_lock_without_a_lease_holds_a_run(folder):
    """As of a process that has just come, or of an older version."""
    lock = file_lock(folder / "locks" / "run.lock", 0.05)
    assert Leases(folder).take("run") is None
    lock.release()
    lease = Leases(folder).take("run")
    assert lease is not None
    lease.release()


def test_another_error_of_a_lock_is_one(folder, monkeypatch):
    class Broken(Useless):
        def acquire(self, **arguments):
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(leases, "FileLock", Broken)
    with pytest.raises(OSError, match="Read-only"):
        Leases(folder).take("run")


def test_a_lock_that_somebody_keeps_holds_nobody_up_for_ever(folder):
    lock = file_lock(folder / "locks" / "study.lock", 0.05)
    with leases.exclusively(folder / "locks" / "study.lock", 0.05):
        pass
    assert lock.is_locked
    lock.release()


# Other machines


def test_a_silent_holder_on_another_machine_is_followed_after_its_time(machines):
    there, here, clock = machines
    lease = there.take("run")
    assert here.take("run") is None
    clock.now += leases.DURATION - 1
    assert here.take("run") is None
    clock.now += 1
    # The lock of that machine is still there: a network file system may keep it for ever.
    taken = here.take("run")
    assert taken is not None
    lease.renew()
    with pytest.raises(LeaseLostError, match="run was taken over"):
        lease.require()
    lease.release()
    taken.require()
    assert there.take("run") is None
    taken.release()


def test_a_holder_that_renews_keeps_its_run(machines):
    there, here, clock = machines
    lease = there.take("run")
    for _ in range(10):
        assert here.take("run") is None
        clock.now += leases.DURATION - 1
        lease.renew()
    lease.require()
    lease.release()
    taken = here.take("run")
    assert taken is not None
    taken.release()


@pytest.mark.parametrize("skew", [-90.0, 90.0])
def test_clocks_that_differ_by_more_than_a_lease_change_nothing(machines, folder, monkeypatch, skew):
    """Neither that of the machine that holds the run, nor that of the server which dates its file."""
    there, here, clock = machines
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    lease = there.take("run")
    for _ in range(3):
        date = real() + skew
        os.utime(file_of(folder), (date, date))
        assert here.take("run") is None
        clock.now += leases.DURATION / 2
        lease.renew()
    assert here.take("run") is None
    clock.now += leases.DURATION
    taken = here.take("run")
    assert taken is not None
    taken.release()
    lease.release()


def test_a_lease_lasts_as_long_as_it_says(machines, monkeypatch):
    there, here, clock = machines
    with monkeypatch.context() as patch:
        patch.setattr(leases, "DURATION", 5.0)
        lease = there.take("run")
    assert here.take("run") is None
    clock.now += 5.0
    taken = here.take("run")
    assert taken is not None
    taken.release()
    lease.release()


def test_of_two_takers_one_succeeds(machines, folder, monkeypatch):
    """Both have seen it silent, and both are about to take it."""
    there, here, clock = machines
    monkeypatch.setattr(leases, "FileLock", Useless)
    lease = there.take("run")
    third = Leases(folder, place="elsewhere", clock=clock)
    assert here.take("run") is third.take("run") is None
    clock.now += leases.DURATION
    original, taken = leases.write_once, []

    def first_the_other(path, content):
        monkeypatch.setattr(leases, "write_once", original)
        taken.append(third.take("run"))
        return original(path, content)

    monkeypatch.setattr(leases, "write_once", first_the_other)
    assert here.take("run") is None
    assert taken[0] is not None
    taken[0].require()
    lease.release()
    taken[0].release()


def test_who_listed_an_old_state_takes_nothing(machines, monkeypatch):
    """A network file system may answer from memory: a number that was deleted can be created again."""
    there, here, _ = machines
    monkeypatch.setattr(leases, "FileLock", Useless)
    there.take("run").release()
    there.take("run").release()
    lease = there.take("run")
    original = leases._newest
    answers = iter([0])
    monkeypatch.setattr(leases, "_newest", lambda path: next(answers, None) or original(path))
    monkeypatch.setattr(here, "_look", lambda name: leases._Standing(0, b"", "free"))
    assert here.take("run") is None
    lease.renew()
    lease.require()
    lease.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"holder": 1}'])
def test_a_damaged_lease_is_a_silent_one(machines, folder, content):
    there, here, clock = machines
    lease = there.take("run")
    file_of(folder).write_bytes(content)
    assert here.take("run") is None
    clock.now += leases.DURATION
    taken = here.take("run")
    assert taken is not None
    lease.renew()
    with pytest.raises(LeaseLostError):
        lease.require()
    taken.release()
    lease.release()


def test_a_holder_that_slept_looks_before_it_goes_on(machines, monkeypatch):
    there, here, clock = machines
    lease = there.take("run")
    assert here.take("run") is None
    clock.now += leases.DURATION
    taken = here.take("run")
    lease.require()  # nobody has told it yet
    real = leases._awake_or_not
    monkeypatch.setattr(leases, "_awake_or_not", lambda: real() + leases.DURATION)
    with pytest.raises(LeaseLostError):
        lease.require()
    taken.require()
    taken.release()
    lease.release()


def test_a_folder_that_cannot_be_reached_for_a_while_loses_nothing(machines, monkeypatch):
    there, _, _ = machines
    lease = there.take("run")

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(leases.os, "replace", fail)
        lease.renew()
    lease.renew()
    lease.require()
    lease.release()


# This machine

HOLDER = """
import sys
from pathlib import Path
from crisp_attention.experiment.results.leases import Leases
print(Leases(Path(sys.argv[1])).take("run") is not None, flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_on_this_machine_is_followed_at_once_and_a_living_one_never(folder, monkeypatch):
    monkeypatch.setattr(leases, "FileLock", Useless)
    clock = Clock()
    here = Leases(folder, clock=clock)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "True\n"
        assert here.take("run") is None
        clock.now += 10 * leases.DURATION  # suspended by hand, perhaps
        assert here.take("run") is None
        process.kill()
        # Not yet waited for: a zombie trains nothing.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lease = here.take("run")
        assert lease is not None
        lease.release()


def test_a_number_that_another_process_has_now_is_not_the_holder(folder, monkeypatch):
    lease = Leases(folder).take("run")
    content = json.loads(file_of(folder).read_bytes())
    file_of(folder).write_text(json.dumps(content | {"began": "1"}), encoding="utf-8")
    monkeypatch.setattr(leases, "FileLock", Useless)
    taken = Leases(folder).take("run")
    assert taken is not None
    taken.release()
    lease.release()


def test_where_nobody_can_tell_when_a_process_began_its_silence_counts(folder, monkeypatch):
    monkeypatch.setattr(leases, "_began", lambda pid: "")
    clock = Clock()
    here = Leases(folder, clock=clock)
    lease = here.take("run")
    assert here.take("run") is None
    clock.now += leases.DURATION
    taken = here.take("run")
    assert taken is not None
    taken.release()
    lease.release()


# Watching


def test_only_silent_holders_are_given_up(folder, monkeypatch):
    there, here, clock = Leases(folder, place="there"), Leases(folder), Clock()
    watcher = Leases(folder, clock=clock)
    held = {
        "silent": there.take("silent"), "alive": there.take("alive"), "ending": there.take("ending"),
        "ours": here.take("ours"),
    }  # fmt: skip
    here.take("done").release()
    told = []

    def sleep(seconds):
        clock.now += leases.DURATION / 2
        held["alive"].renew()
        held["ending"].release()

    monkeypatch.setattr(leases.time, "sleep", sleep)
    names = [*held, "done", "never"]
    assert watcher.abandoned(names, told.append) == {"silent", "done", "never"}
    assert told == [3]
    taken = Leases(folder).take("silent")
    assert taken is not None
    assert watcher.abandoned(None, told.append) == {"done", "ending"}
    taken.release()
    for lease in held.values():
        lease.release()


def test_renewing_goes_on_by_itself(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(leases, "DURATION", 0.06)
    lease = Leases(folder).take("run")
    while json.loads(file_of(folder).read_bytes())["beat"] < 3:
        time.sleep(0.005)
    lease.release()
    assert json.loads(file_of(folder).read_bytes())["holder"] == ""
    assert not lease._thread.is_alive()
