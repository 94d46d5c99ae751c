"""The few kinds of error this package raises.

Each is also the built-in exception that a caller would expect (as `ValueError` for a bad value), so
that code which knows nothing of this package still catches it. Messages say what was expected and
what came.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CrispError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigurationError(CrispError, ValueError):
    """A setting, an argument or a specification has a value that cannot be served."""


class UnsupportedModelError(CrispError, ValueError):
    """A model (or one of its layers) would not be touched, or would give a wrong result."""


class UnsupportedArgumentError(CrispError, NotImplementedError):
    """A model passed its attention an argument that this operator would have to drop."""


class DataError(CrispError, ValueError):
    """A data set is missing, malformed or unfit for the task."""


class AssetError(CrispError, OSError):
    """Weights or data could not be fetched, or are not what their checksum says."""


class RecordError(CrispError, ValueError):
    """A run directory or a record in it is damaged or belongs to another experiment."""


class StorageError(CrispError, OSError):
    """A run directory cannot be written: the disk is full or the directory read-only, for example."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the valid names, the nearest to `name` first if one is close.

    Args:
        name: What the user wrote.
        known: All valid names.

    Returns:
        A sentence to append to an error message.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(known)}."
