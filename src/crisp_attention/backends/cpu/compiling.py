"""How the kernels are compiled.

What Numba compiles is a language of its own, without annotations: arguments are told by docstrings. What threads call
is cached on disk beside the source, or where NUMBA_CACHE_DIR says.
"""

from __future__ import annotations

import hashlib
import warnings
from importlib.resources import files
from typing import Any

from numba import config, njit
from numba.extending import intrinsic

DISABLED = bool(getattr(config, "DISABLE_JIT", False))
"""Whether the environment forbids to compile; the instructions below mean nothing to Python."""

compiled: Any = njit(nogil=True)
"""Decorator of a part of a kernel, which runs without Python's lock and allocates nothing."""

instruction: Any = intrinsic
"""Decorator of what writes instructions for LLVM in a kernel."""


def _fingerprint() -> int:
    room = files(__package__)
    sources = [*(file for file in room.iterdir() if file.name.endswith(".py")), files("crisp_attention") / "noise.py"]
    content = (file.read_bytes() for file in sorted(sources, key=lambda file: file.name))
    return int.from_bytes(hashlib.sha256(b"\0".join(content)).digest()[:7])


SOURCES = _fingerprint()
"""A hash of all files that kernels are made of, the default of their last argument.

Numba looks at one file to tell whether what it finds in its cache is still true, and at the types of the arguments,
which hold the values of defaults. Parts are not cached: what was kept of them would not know of their own parts.
"""


class Kernel:
    """What threads call: compiled once for all processes, or in each where its cache cannot be used.

    Attributes:
        dispatcher: Numba's.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        try:
            self.dispatcher = njit(cache=True, nogil=True)(function)
        except RuntimeError:  # Numba's, of no place to write to
            self._renounce("neither the package's directory nor the user's cache can be written to")

    def __call__(self, *arguments: Any) -> None:
        """Run it. What it does not read of its cache, or cannot write there, it compiles for this process alone."""
        dispatcher = self.dispatcher
        try:
            dispatcher(*arguments)
        # A kernel raises nothing of its own: the disk is full, or a file was cut short, which raises many things.
        except Exception as error:
            if dispatcher is self.dispatcher:  # no other thread was first
                self._renounce(f"Numba's cache in {dispatcher.stats.cache_path} failed with {error!r}")
            self.dispatcher(*arguments)

    def _renounce(self, reason: str) -> None:
        warnings.warn(
            f"Compiled attention kernels cannot be kept: {reason}. Each process compiles them anew, for about 20 "
            "seconds. Set NUMBA_CACHE_DIR to a directory that can be used.",
            stacklevel=3,
        )
        self.dispatcher = compiled(self._function)
