"""The modules of docs/site, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parent.parent / "docs"


def site_module(name: str) -> ModuleType:
    """A module by its file's name; it may import its neighbours."""
    if str(DOCS / "site") not in sys.path:
        sys.path.append(str(DOCS / "site"))
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look it up
    spec.loader.exec_module(found)
    return found
