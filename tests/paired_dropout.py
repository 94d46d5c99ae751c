"""Stock attention whose dropout drops the pairs that ours drops, so that training can be compared number by number."""

from __future__ import annotations

import contextlib
import math

import torch
from torch.nn import functional as F

from crisp_attention.backends import draw_dropout


def drop(weights, p):
    """Dropout on attention weights `[..., Q, K]` as the operator applies it, one draw from the global stream."""
    dropout = draw_dropout(p, weights.device)
    if dropout is None:
        return weights
    survivors = dropout.survivors((weights[..., 0, 0].numel(), 1, *weights.shape[-2:]))
    return weights * survivors.view(weights.shape) / (1 - p)


@contextlib.contextmanager
def paired_dropout(monkeypatch, is_weights=lambda x: x.dim() == 4):
    """Within it torch's functions drop attention weights as we do.

    Args:
        monkeypatch: Pytest's.
        is_weights: Which inputs of `F.dropout` are attention weights.
    """
    stock_dropout, stock_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        return drop(x, p if training else 0.0) if is_weights(x) else stock_dropout(x, p, training, inplace)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        if not dropout_p:
            return stock_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **rest)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            bias = torch.zeros(attn_mask.shape, dtype=q.dtype)
            scores = scores + (bias.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
        return drop(scores.softmax(-1), dropout_p) @ v

    with monkeypatch.context() as patched:
        patched.setattr(F, "dropout", dropout)
        patched.setattr(F, "scaled_dot_product_attention", attention)
        yield
