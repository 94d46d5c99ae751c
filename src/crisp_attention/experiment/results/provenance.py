"""With what a run is done: versions, platform, the checkout's commit, the processes that train together."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crisp_attention

_PACKAGES = (
    "accelerate",
    "datasets",
    "numba",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)


def packages() -> dict[str, str]:
    """Versions of everything that can change a number, this package's first."""
    versions = {"crisp-attention": crisp_attention.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def host() -> dict[str, str]:
    """Operating system, architecture and Python; nothing that identifies the machine."""
    return {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}


def git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package runs from; None if it is installed elsewhere."""
    folder = Path(crisp_attention.__file__).parent

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A virtual environment inside somebody's repository is not our checkout: our files must be tracked.
    if not ask("ls-files", "--error-unmatch", "__init__.py"):
        return None
    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--", "."))}


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher (torchrun, `accelerate launch`) started to train together.

    Attributes:
        rank: Its number; 0 leads.
        size: How many there are.
        local_rank: Its number on this machine.
        local_size: How many there are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch() -> Launch | None:
    """What a launcher has set for this process; None where none started it."""
    if not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launch(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def processes() -> int:
    """How many processes train a run together."""
    launched = launch()
    return 1 if launched is None else launched.size
