"""How the kernels are compiled.

What Numba compiles is a language of its own, without annotations: arguments are told by docstrings. The result is
cached on disk beside the source, or where NUMBA_CACHE_DIR says.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numba.extending import intrinsic

compiled: Any = njit(cache=True, nogil=True)
"""Decorator of a kernel, which runs without Python's lock and allocates nothing."""

instruction: Any = intrinsic
"""Decorator of what writes instructions for LLVM in a kernel."""
