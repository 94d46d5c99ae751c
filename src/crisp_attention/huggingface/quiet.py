"""Silence from Transformers, where we show what is going on ourselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


def silence() -> None:
    """From now on Transformers neither warns nor draws progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """As `silence` within; afterwards Transformers is as talkative as before."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    silence()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
