"""The modules of docs/site, which is no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parent.parent / "docs"


def site_module(name: str) -> ModuleType:
    """A module by its file's name: the one that its neighbours import, with what it has computed already."""
    if str(DOCS / "site") not in sys.path:
        sys.path.append(str(DOCS / "site"))
    return importlib.import_module(name)
