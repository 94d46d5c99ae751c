"""`crisp`: each command is a few lines that call a room of the package."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from crisp_attention.cli.application import app, needs_extra
from crisp_attention.errors import CrispError

# Each registers its commands, in the order in which the help shows them.
from crisp_attention.cli import studies, export, tune, models, data, bench  # noqa: F401  # isort: skip

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Entry point: errors that the user can mend are one sentence and exit code 2."""
    # Results must not depend on telemetry or progress bars of libraries underneath.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "crisp_attention":
            raise
        sys.exit(needs_extra(missing))
    except BrokenPipeError:
        # The reader (as `head`) has seen enough; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CrispError, OSError) as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True).print("[bold red]Error:[/bold red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(0)
