"""`Examples`: the evaluation split as people read it, beside the records. No number rests on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from crisp_attention.experiment.results.faults import damaged


@dataclass(frozen=True)
class Examples:
    """The evaluation split as people read it.

    Attributes:
        texts: One an example, in the data set's order; empty where they are no texts.
        pairs: Second texts; empty where there are none.
        map_rows: The examples whose attention maps the runs keep.
        map_tokens: Their tokens, in the same order.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...]
    map_rows: tuple[int, ...]
    map_tokens: tuple[tuple[str, ...], ...]


def read(path: Path) -> Examples | None:
    """The evaluation texts; None where they were not kept, as in published results.

    Args:
        path: A JSON file with the attributes of `Examples`.

    Raises:
        RecordError: If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Examples(
            texts=tuple(content["texts"]),
            pairs=tuple(content["pairs"]),
            map_rows=tuple(content["map_rows"]),
            map_tokens=tuple(map(tuple, content["map_tokens"])),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from None
