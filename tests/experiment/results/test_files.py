from __future__ import annotations

import errno
import os
import threading

import pytest

from crisp_attention.experiment.results import files
from crisp_attention.experiment.results.files import write_atomically, write_once


def everything(folder):
    """Path and content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert everything(tmp_path) == {"file": b"two"}
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step, error):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(file, b"new")
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "fresh", b"new")
    assert everything(tmp_path) == {"file": b"old"}


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    for step in ("fsync", "replace"):
        original = getattr(os, step)
        monkeypatch.setattr(
            files.os, step, lambda *args, step=step, original=original: (steps.append(step), original(*args))
        )
    write_atomically(tmp_path / "file", b"content")
    assert steps == ["fsync", "replace"]


# Writing once


def test_a_file_is_written_once_and_what_is_there_stands(tmp_path):
    assert write_once(tmp_path / "file", b"one")
    assert not write_once(tmp_path / "file", b"two")
    assert everything(tmp_path) == {"file": b"one"}


def test_of_many_writers_one_succeeds(tmp_path):
    gate = threading.Barrier(8)
    won = []

    def write(number):
        gate.wait()
        own = b"%d" % number
        won.extend((str(place), own) for place in range(20) if write_once(tmp_path / str(place), own))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 20
    assert dict(won) == everything(tmp_path)


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", fail)
    assert write_once(tmp_path / "file", b"one")
    assert not write_once(tmp_path / "file", b"two")
    assert everything(tmp_path) == {"file": b"one"}


def test_a_request_that_a_network_file_system_repeats_has_succeeded(tmp_path, monkeypatch):
    """The answer to the first was lost; the second finds the link there."""
    original = os.link

    def twice(*arguments):
        original(*arguments)
        original(*arguments)

    monkeypatch.setattr(files.os, "link", twice)
    assert write_once(tmp_path / "file", b"one")
    assert everything(tmp_path) == {"file": b"one"}
