"""Which backend serves a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from crisp_attention.backends import reference
from crisp_attention.backends.call import Call, Computed
from crisp_attention.errors import ConfigurationError, nearest

BACKENDS = ("reference", "cpu", "triton")

# The backend that "auto" takes on a type of device. "triton" serves on request only, until it has run on a GPU.
_OF_DEVICE = {"cpu": "cpu"}
# What a backend is compiled with, and the extra that brings it.
_COMPILERS = {"cpu": ("numba", "cpu"), "triton": ("triton", "gpu")}


@dataclass(frozen=True)
class Choice:
    """A backend for a call.

    Attributes:
        name: Its name.
        reason: Why it was chosen, as half a sentence.
        attention: What computes the call.
    """

    name: str
    reason: str
    attention: Callable[[Call], Computed]


def require_known(name: str) -> None:
    """Raise `ConfigurationError` unless a name is "auto" or that of a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ConfigurationError(f"Unknown backend {name!r}. {nearest(str(name), ['auto', *BACKENDS])}")


def choose(name: str, call: Call) -> Choice:
    """The backend that serves a call.

    "auto" takes the compiled backend that is the default of the call's device, if it is installed and serves the
    call, and the reference otherwise: within compiled or exported graphs and torch.func transforms, for float64, for
    whoever wants to see the weights, for what the compiled one does not implement.

    Args:
        name: "auto" or the name of a backend. A named one is used or refused, never replaced.
        call: The call.

    Raises:
        ConfigurationError: If the name is unknown, its extra is not installed, or it cannot serve the call.
    """
    require_known(name)
    if name == "auto":
        return _automatic(call)
    reason = _refusal(name, call)
    if reason is not None:
        raise ConfigurationError(
            f"backend={name!r} cannot serve this call: {reason}. backend='auto' takes one that can."
        )
    return Choice(name, "it was asked for", _module(name).attention)


def _automatic(call: Call) -> Choice:
    if torch.compiler.is_compiling():
        return _reference("the call is part of a compiled graph")
    device = call.query.device.type
    name = _OF_DEVICE.get(device)
    if name is None:
        return _reference(f"no other is the default for device {device!r}")
    if call.query.dtype == torch.float64:
        return _reference("float64 is for checking")
    reason = _refusal(name, call)
    if reason is not None:
        return _reference(f"{name!r} cannot serve it: {reason}")
    return Choice(name, "it is the fastest that serves the call", _module(name).attention)


def _reference(reason: str) -> Choice:
    return Choice("reference", reason, reference.attention)


def _refusal(name: str, call: Call) -> str | None:
    """Why a backend cannot serve a call; None if it can."""
    if name in _COMPILERS:
        missing = _missing(*_COMPILERS[name])
        if missing is not None:
            return missing
    reason: str | None = _module(name).refusal(call)
    return reason


@cache
def _missing(compiler: str, extra: str) -> str | None:
    """What keeps a compiler from being used, as half a sentence; None if nothing does."""
    if find_spec(compiler) is None:
        return f"{compiler} is not installed (pip install 'crisp-attention[{extra}]')"
    try:
        import_module(compiler)
    except (ImportError, OSError) as error:  # it wants another NumPy, or a library that is not there
        return f"{compiler} is installed but cannot be imported: {error}"
    return None


def _module(name: str) -> ModuleType:
    # By name and late: compiled backends bring optional dependencies.
    return import_module(f"crisp_attention.backends.{name}")
