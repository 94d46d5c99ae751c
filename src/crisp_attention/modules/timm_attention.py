"""timm's attention (`pip install crisp-attention[timm]`): the classes that can be sparse.

Those whose forward is one call of the fused function over all of an image's tokens. Others in timm
(windows, pooled keys, talking heads) compute otherwise and are refused by name.
"""

from __future__ import annotations

import importlib

from torch import nn

from crisp_attention.modules.intercept import InterceptedAttention

# Home of each stock class, and whether its queries are learned tokens of their own. Older versions
# of timm know some of these elsewhere, or not at all.
_STOCK = (
    ("timm.layers.attention", "Attention", False),
    ("timm.layers.attention", "AttentionRope", False),
    ("timm.layers.attention_pool", "AttentionPoolLatent", True),
    ("timm.models.eva", "EvaAttention", False),
    ("timm.models.vision_transformer", "Attention", False),
)


def _sparse_classes() -> dict[type[nn.Module], type[InterceptedAttention]]:
    classes: dict[type[nn.Module], type[InterceptedAttention]] = {}
    for home, name, cross in _STOCK:
        try:
            stock = getattr(importlib.import_module(home), name, None)
        except ModuleNotFoundError:
            continue
        if stock is not None and stock not in classes:
            members = {"__module__": __name__, "__doc__": f"timm's {name}, sparse.", "stock": stock, "cross": cross}
            classes[stock] = type(f"Sparse{name}", (InterceptedAttention, stock), members)
    return classes


CLASSES = _sparse_classes()
"""The sparse class of each stock class."""

# Where pickle looks for them.
globals().update({sparse.__name__: sparse for sparse in CLASSES.values()})
