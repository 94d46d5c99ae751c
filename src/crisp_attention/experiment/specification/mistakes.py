"""What is wrong with a specification, in sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from crisp_attention.errors import nearest

KnownKeys = Callable[[tuple[str | int, ...]], list[str]]


def told(error: ValidationError, content: Any, known_keys: KnownKeys) -> str:
    """Each mistake in a sentence; an arm or an evaluation is called by its name.

    Args:
        error: What pydantic found.
        content: The specification that it looked at.
        known_keys: The keys that would be valid beside the one at a location.
    """
    found = error.errors()
    # An arm that is refused is not counted either, which would be told as a mistake of its own.
    refused = any(item["loc"][0] == "arms" and len(item["loc"]) > 1 for item in found if item["loc"])
    items = [item for item in found if not (refused and item["loc"] == ("arms",))]
    return " ".join(_explain(item, content, known_keys) for item in items)


def _explain(item: Any, content: Any, known_keys: KnownKeys) -> str:
    owner, key = _place(item["loc"], content)
    if item["type"] == "extra_forbidden":
        of = f" of {owner}" if owner else ""
        return f"Unknown key {key!r}{of}. {nearest(str(item['loc'][-1]), known_keys(item['loc']))}"
    if item["type"] == "missing":
        return f"Missing key {key!r}{f' of {owner}' if owner else ''}."
    place = ", ".join(part for part in (owner, key) if part)
    message = item["msg"].removeprefix("Value error, ").rstrip(".")
    given = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{place}: {message}{given}." if place else f"{message}."


def _place(location: tuple[str | int, ...], content: Any) -> tuple[str, str]:
    """Where in a specification: an arm or an evaluation by its name, if it has one, and the key in it."""
    keys = [str(part) for part in location]
    noun = {"arms": "arm", "evaluations": "evaluation"}.get(keys[0]) if len(keys) > 1 else None
    if noun is None:
        return "", ".".join(keys)
    try:
        table = content[location[0]][location[1]]
        name = table["name"]
    except (LookupError, TypeError):
        return "", ".".join(keys)
    # What is written directly in an arm's table is gathered under this key.
    gathered = keys[2:3] == ["attention"] and "attention" not in table
    return f"{noun} {name!r}", ".".join(keys[3:] if gathered else keys[2:])
