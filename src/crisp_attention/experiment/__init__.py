"""The experiment: arms x seeds of fine-tuning runs, and an honest verdict on them.

    import crisp_attention as crisp
    study = crisp.experiment.run("experiment.toml")

The way through: specification -> data, training -> results -> statistics -> conclusions -> report; `study`
walks it, `display` and `notebook` show it, `api` offers it to Python. Nothing above this package imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crisp_attention.experiment.api import Study, load, plan, rebuild, run

__all__ = ["Study", "load", "plan", "rebuild", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.api"), name)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "crisp_attention":
            raise
        raise ModuleNotFoundError(
            f"crisp_attention.experiment.{name} needs the extra 'experiment' ({missing.name} is missing): "
            "pip install 'crisp-attention[experiment]'",
            name=missing.name,
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
