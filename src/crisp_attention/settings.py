"""Settings of frozen dataclasses: help texts, defaults that depend on a kind, and checks that name the culprit.

Shared by `SparsityConfig` (its kind is the rule) and `Schedule`, so that both refuse in the same way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, Self, TypeVar

from crisp_attention.errors import ConfigurationError, nearest


class _FromDict(Protocol):
    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self: ...


Settings = TypeVar("Settings", bound=_FromDict)


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text in `metadata["help"]`."""
    return dataclasses.field(default=default, metadata={"help": help})


def written(instance: Any, names: Iterable[str]) -> str:
    """An instance as Python writes it, with the settings of these names alone."""
    values = ", ".join(f"{name}={getattr(instance, name)!r}" for name in names)
    return f"{type(instance).__name__}({values})"


def known_keys(cls: type, values: object, what: str) -> dict[str, Any]:
    """The mapping as a dict, if all of its keys are fields of a dataclass.

    Args:
        cls: The dataclass.
        values: What the user gave.
        what: What it is called in messages, as "sparsity setting".

    Raises:
        ConfigurationError: If it is no mapping or has an unknown key.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"Expected a mapping of {what}s, got {type(values).__name__}.")
    known = {item.name for item in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"Unknown {what} {key!r}. {nearest(str(key), known)}")
    return dict(values)


def given(cls: type[Settings], config: Settings | None, settings: Mapping[str, Any]) -> Settings:
    """A configuration, or one made of keywords.

    Args:
        cls: The dataclass; it has a `from_dict`.
        config: What the user gave, or None.
        settings: The keywords that the user gave.

    Raises:
        ConfigurationError: If both are given, or a keyword cannot be served.
    """
    if config is not None and settings:
        raise ConfigurationError(
            f"Give a {cls.__name__} or keywords, not both; got both config and {sorted(settings)}."
        )
    if config is not None and not isinstance(config, cls):
        raise ConfigurationError(
            f"Expected a {cls.__name__}, got {config!r}. Settings are given by name, as sparsity=0.8, or as a dict by "
            f"{cls.__name__}.from_dict."
        )
    return cls.from_dict(settings) if config is None else config


def resolve(instance: Any, what: str, kind: str, optional: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill in the defaults of the settings that a kind reads; refuse those that it would ignore.

    Args:
        instance: A frozen dataclass under construction, unset settings None.
        what: What a kind is called in messages, as "Rule".
        kind: Its rule or kind, a key of `optional`.
        optional: The settings that each kind reads, with their defaults.

    Raises:
        ConfigurationError: If a setting is given that the kind does not read.
    """
    own = optional[kind]
    for name in frozenset().union(*optional.values()):
        value = getattr(instance, name)
        if name in own:
            if value is None:
                object.__setattr__(instance, name, own[name])
        elif value is not None:
            readers = sorted(reader for reader, settings in optional.items() if name in settings)
            raise ConfigurationError(
                f"{what} {kind!r} would ignore {name}={value!r}; it is read by: {', '.join(readers)}."
            )


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `ConfigurationError` unless a value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"Unknown {name} {value!r}. {nearest(str(value), choices)}")


def require_flag(name: str, value: object) -> None:
    """Raise `ConfigurationError` unless a value is a bool."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be true or false, got {value!r}.")


def require_integer(name: str, value: object, least: int) -> None:
    """Raise `ConfigurationError` unless a value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be an integer >= {least}, got {value!r}.")


def require_real(name: str, value: object) -> float:
    """A finite number as a float, or `ConfigurationError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def require_share(name: str, value: object) -> float:
    """A number in [0, 1] as a float, or `ConfigurationError`."""
    share = require_real(name, value)
    if not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"{name} must be a share in [0, 1], got {value!r}.")
    return share


def require_sparsity(name: str, value: object) -> float:
    """A number in [0, 1) as a float, or `ConfigurationError`."""
    sparsity = require_real(name, value)
    if not 0.0 <= sparsity < 1.0:
        raise ConfigurationError(
            f"{name} must be in [0, 1) (a share of removed scores, 0.8 removes 80%), got {value!r}."
        )
    return sparsity
