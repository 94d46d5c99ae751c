"""The command line as a user types it, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

CRISP = [sys.executable, "-m", "crisp_attention.cli"]
ENVIRONMENT = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def crisp(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CRISP, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=ENVIRONMENT | environment,
    )


def here(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `crisp`, in this process: what loads torch anew for each command takes most of a test's time."""
    from transformers.utils import logging

    from crisp_attention.cli import main

    printed, complained = io.StringIO(), io.StringIO()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crisp", *map(str, arguments)])
        for name, value in ({"COLUMNS": "100"} | environment).items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(complained),
            pytest.raises(SystemExit) as end,
        ):
            main()
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    code = end.value.code or 0
    return subprocess.CompletedProcess(arguments, int(code), printed.getvalue(), complained.getvalue())
