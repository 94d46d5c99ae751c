"""`torch.nn.MultiheadAttention`, sparse: its arguments, its parameters, its results at sparsity 0.

`nn.TransformerEncoderLayer` and `nn.TransformerEncoder` have fused paths in evaluation mode that read
the parameters of their attention and never call it. Both are closed while it is sparse.

Letters: B batch, H heads, Q queries, K keys, D head width, E embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crisp_attention.backends import Detail
from crisp_attention.errors import ConfigurationError, UnsupportedArgumentError
from crisp_attention.modules.masks import multihead_masks, require_servable
from crisp_attention.modules.sparse import SparseModule, active, as_stock

_NESTED = "_crisp_use_nested_tensor"


class SparseMultiheadAttention(SparseModule, nn.MultiheadAttention):
    """What `sparsify` makes of an `nn.MultiheadAttention`.

    Takes every argument of the stock module but nested tensors. Three things differ: a query that
    may attend to no key gives a zero in place of NaN (before the output projection); a mask is read
    even where `is_causal` promises that it is causal; and additive masks hide a pair from -1e4 down.
    """

    stock = nn.MultiheadAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # The encoder layer's fused path asks for it, and stays closed where it is False.
        return bool(self.__dict__["_qkv_same_embed_dim"]) and as_stock(self, self.dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`.

        Attention is taken for self-attention, with a padding mask that holds for queries too, where
        query and key are the same tensor.

        Args:
            query: `[B, Q, E]` if `batch_first`, else `[Q, B, E]`, or `[Q, E]`.
            key: The same with K tokens of width `kdim`.
            value: The same with width `vdim`.
            key_padding_mask: `[B, K]` (`[K]` if unbatched), bool with True = hidden, or additive.
            need_weights: Whether to return the weights.
            attn_mask: `[Q, K]` or `[B * H, Q, K]`, bool with True = hidden, or additive.
            average_attn_weights: Whether to average the returned weights over the heads.
            is_causal: That `attn_mask` is causal.

        Returns:
            The output, shaped as the query, and the sparse weights after dropout, `[B, Q, K]` or
            `[B, H, Q, K]` (without B if unbatched), or None.

        Raises:
            ConfigurationError: If a shape does not fit, or the rule cannot serve this call.
            UnsupportedArgumentError: If an input is a nested tensor.
        """
        layer = self.layer
        if layer is None or as_stock(self, self.dropout):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_inputs(self, query, key, value)
        if is_causal and attn_mask is None:
            raise ConfigurationError("is_causal is a hint on attn_mask; give the mask too.")
        cross = query is not key
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        extra_keys = k.shape[2] - key.shape[1]
        pairs, bias = multihead_masks(
            (q.shape[0], q.shape[1], q.shape[2], key.shape[1]),
            q.device,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            cross=cross,
            extra_keys=extra_keys,
        )
        require_servable(active(self), pairs, causal=is_causal, extra_keys=extra_keys)
        dropout_p = self.dropout if self.training else 0.0
        out = layer.attend(
            q,
            k,
            v,
            training=self.training,
            pairs=pairs,
            bias=bias,
            dropout_p=dropout_p,
            detail=Detail.WEIGHTS if need_weights else Detail.OUTPUT,
        )
        # [Q, B, E] in memory as stock's, or a dropout that follows would drop other elements.
        output = F.linear(out.output.permute(2, 0, 1, 3).flatten(2), self.out_proj.weight, self.out_proj.bias)
        weights = None
        if need_weights:
            weights = out.weights.mean(dim=1) if average_attn_weights else out.weights
        if not batched:
            return output[:, 0], None if weights is None else weights[0]
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, D]`, with the keys that the module itself appends."""
        if self.__dict__["_qkv_same_embed_dim"]:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(*given) for given in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)), dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v


def guard_nested(model: nn.Module) -> None:
    """Let every `nn.TransformerEncoder` choose at each call whether it may use nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            module.__dict__[_NESTED] = True
            module.register_forward_pre_hook(_choose_path)


def unguard_nested(model: nn.Module) -> None:
    """Undo `guard_nested`."""
    for module in model.modules():
        if module.__dict__.pop(_NESTED, None) is not None:
            module.__dict__["use_nested_tensor"] = True
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _choose_path:
                    del module._forward_pre_hooks[key]


def _choose_path(encoder: nn.Module, _: Any) -> None:
    ours = (module for module in encoder.modules() if isinstance(module, SparseMultiheadAttention))
    encoder.__dict__["use_nested_tensor"] = all(as_stock(module, module.dropout) for module in ours)


def _check_inputs(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    if any(tensor.is_nested for tensor in tensors.values()):
        raise UnsupportedArgumentError(
            "Sparse attention takes padded tensors with key_padding_mask; nested tensors are not supported."
        )
    axis = 1 if module.batch_first else 0
    widths = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    dims = query.dim()
    fits = dims in (2, 3) and all(
        tensor.dim() == dims and tensor.shape[-1] == widths[name] for name, tensor in tensors.items()
    )
    if fits and dims == 3:
        fits = key.shape[:2] == value.shape[:2] and query.shape[1 - axis] == key.shape[1 - axis]
    elif fits:
        fits = key.shape[0] == value.shape[0]
    if not fits:
        order = "[B, N, width]" if module.batch_first else "[N, B, width]"
        raise ConfigurationError(
            f"query, key and value must be {order} or [N, width] with widths {list(widths.values())}, key and value as "
            f"long as each other; got {', '.join(str(list(tensor.shape)) for tensor in tensors.values())}."
        )
