"""Sparse attention for a module that calls `F.scaled_dot_product_attention` once in its forward.

Its own forward runs as it is written, with its projections, norms, rotary embeddings and gates; only
that one call is answered by the operator. So nothing of a layer is copied here, and nothing that a
later version of it adds is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crisp_attention.errors import UnsupportedArgumentError, UnsupportedModelError
from crisp_attention.masks import read_pairs
from crisp_attention.modules.masks import additive, require_servable
from crisp_attention.modules.sparse import SparseModule, active, as_stock
from crisp_attention.state import LayerState


class InterceptedAttention(SparseModule):
    """Mixin that stands before the stock class.

    Attributes:
        cross: Whether queries are other tokens than keys; such queries are learned, none is padding.
    """

    cross: ClassVar[bool] = False

    @property
    def fused_attn(self) -> bool:
        """Whether the stock forward calls the fused function: always while sparse."""
        return bool(self.__dict__["fused_attn"]) or not as_stock(self, _dropout(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock module's.

        Raises:
            UnsupportedModelError: If it does not call `F.scaled_dot_product_attention` exactly once.
        """
        layer = self.layer
        if layer is None or as_stock(self, _dropout(self)):
            return super().forward(*args, **kwargs)
        calls: list[None] = []

        def answer(*call: Any, **options: Any) -> Tensor:
            calls.append(None)
            return self._attend(layer, *call, **options)

        with _Interception(answer):
            output = super().forward(*args, **kwargs)
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"{type(self).__name__} called scaled_dot_product_attention {len(calls)} times in one forward, "
                "expected once; it cannot be served."
            )
        return output

    def _attend(
        self,
        layer: LayerState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if is_causal and shape[2] != shape[3]:
            raise UnsupportedArgumentError(
                f"is_causal with {shape[2]} queries over {shape[3]} keys is not supported; give the mask."
            )
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool
        pairs, bias = read_pairs(
            shape,
            query.device,
            valid=attn_mask if boolean else None,
            query_valid=torch.ones(shape[0], shape[2], dtype=torch.bool, device=query.device) if self.cross else None,
            bias=None if attn_mask is None or boolean else additive(attn_mask),
            causal=is_causal,
            cross=self.cross,
        )
        require_servable(active(self), pairs, causal=is_causal)
        return layer.attend(
            query, key, value, training=self.training, pairs=pairs, bias=bias, scale=scale, dropout_p=dropout_p
        ).output


class _Interception(TorchFunctionMode):
    """Answers `F.scaled_dot_product_attention` within a `with` block, in this thread."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called = self._answer if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


def _dropout(module: SparseModule) -> float:
    """The probability with which a timm module drops attention weights."""
    dropout = getattr(module, "attn_drop", None)
    return float(getattr(dropout, "p", dropout or 0.0))
