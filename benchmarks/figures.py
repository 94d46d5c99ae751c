"""What a benchmark found, as a file beside what it was found with."""

from __future__ import annotations

import argparse
import json
from typing import Any

from crisp_attention.experiment.results import provenance


def keep(options: argparse.Namespace, **found: Any) -> None:
    """Write figures, the options, the machine and its packages to `options.json`, if that was given."""
    if options.json is None:
        return
    content = {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "packages": provenance.packages(),
        "platform": provenance.host(),
        **found,
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
