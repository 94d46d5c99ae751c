"""How attention is computed. No backend imports another; `reference` is the specification."""

from __future__ import annotations

from crisp_attention.errors import ConfigurationError, nearest

__all__ = ["BACKENDS", "choose"]

BACKENDS = ("reference",)


def choose(name: str) -> str:
    """Resolve a requested backend to one that serves; 'auto' takes the best available.

    Args:
        name: "auto" or the name of a backend. A named one is used or refused, never replaced.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    if name == "auto":
        return "reference"
    if name not in BACKENDS:
        raise ConfigurationError(f"Unknown backend {name!r}. {nearest(name, ['auto', *BACKENDS])}")
    return name
