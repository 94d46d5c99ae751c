"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What a file system without hard links answers: FAT, and some that live in a cloud.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    with _whole(path, content) as scratch:
        os.replace(scratch, path)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file as `write_atomically` does, unless there is one: of several writers one succeeds.

    Where a file system has no hard links, writers at the same instant may both succeed, and the last one's content
    stands.

    Returns:
        Whether it was written.
    """
    with _whole(path, content) as scratch:
        try:
            os.link(scratch, path)
        except FileExistsError:
            # A network file system may repeat a request whose answer was lost.
            return scratch.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(scratch, path)
    return True


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; gone after the block unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    scratch = Path(name)
    try:
        os.chmod(scratch, 0o644)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` after the block; gone if the block fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        scratch.chmod(0o755)
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _whole(path: Path, content: bytes) -> Iterator[Path]:
    """A file of that content beside `path`, on disk; gone after the block unless it was renamed."""
    with beside(path) as scratch:
        with scratch.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield scratch
