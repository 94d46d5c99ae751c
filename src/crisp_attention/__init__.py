"""Crisp attention: let a Transformer attend to less, and find out honestly whether it helps.

    import crisp_attention as crisp
    crisp.sparsify(model, sparsity=0.8)

Importing the package is instant: each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from crisp_attention.huggingface.autoregister import install

if TYPE_CHECKING:
    from crisp_attention import experiment as experiment
    from crisp_attention.checking import CheckReport
    from crisp_attention.config import SparsityConfig
    from crisp_attention.errors import (
        AssetError,
        ConfigurationError,
        CrispError,
        DataError,
        RecordError,
        StorageError,
        UnsupportedArgumentError,
        UnsupportedModelError,
    )
    from crisp_attention.huggingface.audit import AuditReport, audit
    from crisp_attention.huggingface.callback import SparsityCallback
    from crisp_attention.huggingface.model import dense, load, monitor, set_forward_index, set_progress
    from crisp_attention.modules.attention import CrispAttention
    from crisp_attention.monitoring import SparsityMonitor
    from crisp_attention.operator import AttentionOutput, attention
    from crisp_attention.schedule import Schedule
    from crisp_attention.verbs import check, densify, sparsify

__version__ = "0.1.0"

_HOMES = {
    "AssetError": "errors",
    "AttentionOutput": "operator",
    "AuditReport": "huggingface.audit",
    "CheckReport": "checking",
    "ConfigurationError": "errors",
    "CrispAttention": "modules.attention",
    "CrispError": "errors",
    "DataError": "errors",
    "RecordError": "errors",
    "Schedule": "schedule",
    "SparsityCallback": "huggingface.callback",
    "SparsityConfig": "config",
    "SparsityMonitor": "monitoring",
    "StorageError": "errors",
    "UnsupportedArgumentError": "errors",
    "UnsupportedModelError": "errors",
    "attention": "operator",
    "audit": "huggingface.audit",
    "check": "verbs",
    "dense": "huggingface.model",
    "densify": "verbs",
    "load": "huggingface.model",
    "monitor": "huggingface.model",
    "set_forward_index": "huggingface.model",
    "set_progress": "huggingface.model",
    "sparsify": "verbs",
}

__all__ = [
    "AssetError",
    "AttentionOutput",
    "AuditReport",
    "CheckReport",
    "ConfigurationError",
    "CrispAttention",
    "CrispError",
    "DataError",
    "RecordError",
    "Schedule",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityMonitor",
    "StorageError",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "attention",
    "audit",
    "check",
    "dense",
    "densify",
    "load",
    "monitor",
    "set_forward_index",
    "set_progress",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if name == "experiment":
        return importlib.import_module(f"{__name__}.{name}")
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "experiment"})


install()
