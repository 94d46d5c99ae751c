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
    from crisp_attention.config import SparsityConfig
    from crisp_attention.errors import (
        AssetError,
        ConfigurationError,
        CrispError,
        DataError,
        RecordError,
        UnsupportedArgumentError,
        UnsupportedModelError,
    )
    from crisp_attention.huggingface.audit import AuditReport, audit
    from crisp_attention.huggingface.callback import SparsityCallback
    from crisp_attention.huggingface.check import CheckReport, check
    from crisp_attention.huggingface.model import dense, densify, load, monitor, set_forward_index, sparsify
    from crisp_attention.monitoring import SparsityMonitor
    from crisp_attention.operator import AttentionOutput, attention

__version__ = "0.1.0"

_HOMES = {
    "AssetError": "errors",
    "AttentionOutput": "operator",
    "AuditReport": "huggingface.audit",
    "CheckReport": "huggingface.check",
    "ConfigurationError": "errors",
    "CrispError": "errors",
    "DataError": "errors",
    "RecordError": "errors",
    "SparsityCallback": "huggingface.callback",
    "SparsityConfig": "config",
    "SparsityMonitor": "monitoring",
    "UnsupportedArgumentError": "errors",
    "UnsupportedModelError": "errors",
    "attention": "operator",
    "audit": "huggingface.audit",
    "check": "huggingface.check",
    "dense": "huggingface.model",
    "densify": "huggingface.model",
    "load": "huggingface.model",
    "monitor": "huggingface.model",
    "set_forward_index": "huggingface.model",
    "sparsify": "huggingface.model",
}

__all__ = [
    "AssetError",
    "AttentionOutput",
    "AuditReport",
    "CheckReport",
    "ConfigurationError",
    "CrispError",
    "DataError",
    "RecordError",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityMonitor",
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
    "sparsify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
