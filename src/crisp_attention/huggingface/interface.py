"""What Transformers calls: the attention function and the mask function behind the name "crisp".

Both must be registered: for an attention name without a mask function Transformers passes no mask
at all, and padding would be attended in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.output_capturing import _active_collector

from crisp_attention.backends import Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedArgumentError, UnsupportedModelError
from crisp_attention.huggingface.persistence import IMPLEMENTATION, layer_state
from crisp_attention.masks import LOWEST_BIAS, causal_refusal, padding_from_pairs, require_two_ways, split_mask
from crisp_attention.rules import Pairs
from crisp_attention.state import LayerState

# Arguments that models hand to every attention function and that change nothing in the result,
# given the mask. Any other that is not None is refused rather than dropped.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "grid_thw",  # an image's grid, from which its mask and positions were made
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "sliding_window",
        "use_cache",
    }
)

# Lower biases than this are masks, however they are written (Swin and CLAP: -100).
_LOWEST_PLAIN_BIAS = -50.0


def crisp_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A bool mask `[B, 1, Q, K]`, True = may be attended; None if all pairs may.

    As for SDPA, except that a causal mask is always built: leaving it to an `is_causal` flag would
    leave a later None ambiguous.
    """
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def crisp_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function in Transformers' signature.

    Args:
        module: The attention module that calls.
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, K, D]`.
        value: `[B, Hkv, K, Dv]`.
        attention_mask: Bool or additive float `[B, 1 | H, Q, K]`, or None.
        dropout: Dropout on the weights, 0 in evaluation.
        scaling: Factor on q.k.
        is_causal: Overrides the module's own flag where no mask is given.
        position_bias: Added to the scores before they are ranked.
        softcap: Bounds the scaled scores before they are ranked (Gemma 2).
        s_aux: `[H]`, attention sinks: a logit for each head that takes weight and has no value (gpt-oss).
        sinks: The same under another name, `[H]` or broadcastable to `[B, H, Q, 1]`.
        indices: The keys that the model itself selected for each query, int `[B, Q, selected]`.
        **kwargs: Refused unless known not to matter.

    Returns:
        The output `[B, Q, H, D]` and the weights `[B, H, Q, K]` (None where nobody wants to see them and
        what computed the output did not store them).

    Raises:
        UnsupportedArgumentError: If an argument would have to be dropped.
        ConfigurationError: If the rule cannot serve a causal model.
    """
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS:
            raise UnsupportedArgumentError(
                f"{type(module).__name__} passes {name!r} to its attention, which crisp attention does not "
                "implement and will not drop in silence. This model is not supported."
            )
    layer = layer_state(module)
    config = layer.begin(module.training)
    causal = _is_causal(module, attention_mask, is_causal, layer, queries=query.shape[2])
    sinks = s_aux if sinks is None else sinks
    if config is not None and causal and not config.per_row:
        raise causal_refusal(config)
    if indices is not None:
        attention_mask = _within(indices, attention_mask, query, key, causal)
    shown = _weights_are_shown(module, kwargs)
    if config is None and not (dropout or shown or layer.model.monitors) and softcap is None and sinks is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=causal,
            position_bias=position_bias,
        )
    if config is not None and config.by_key_position:
        chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
        _require_all_keys(config, query, key, kwargs.get("sliding_window") or chunk)
    pairs, bias = _read_mask(attention_mask, query, key, causal, cross=layer.cross)
    if layer.model.untried and bias is not None:
        _require_biases(module, bias)
    if config is not None and not config.per_row:
        require_two_ways(config, pairs)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    # Dense attention with dropout takes this way too: one dropout stream for sparse and dense arms.
    out = layer.attend(
        query,
        key,
        value,
        training=module.training,
        pairs=pairs,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=sinks.view(1, -1, 1, 1) if sinks is not None and sinks.dim() == 1 else sinks,
        dropout_p=dropout,
        detail=Detail.WEIGHTS if shown else Detail.OUTPUT,
    )
    return out.output.transpose(1, 2).contiguous(), out.computed.weights


def _weights_are_shown(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the model's output will hold the weights: asked for in the call or the configuration, or captured."""
    if arguments.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    # Not every model hands the argument down to its attention.
    captured = _active_collector.get()
    return bool(captured) and any("attentions" in key for key in captured)


def _is_causal(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None, layer: LayerState, *, queries: int
) -> bool:
    """Whether later keys are hidden where no mask says so.

    SDPA reads this from an argument or from the module, and takes a module that does not say for
    causal. Eager attention reads it nowhere: to it, no mask means that every pair may be attended.

    Raises:
        UnsupportedModelError: If the model was loaded sparse, so that nobody knows which it was.
    """
    stated = is_causal if is_causal is not None else getattr(module, "is_causal", None)
    if mask is not None or queries == 1:
        return bool(stated)
    if layer.stock == "eager":
        return False
    if stated is None and layer.stock is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes no mask and does not say whether it is causal. Load the model with "
            "crisp_attention.load, which finds out, instead of from_pretrained."
        )
    return stated is not False


def _require_biases(module: nn.Module, bias: Tensor) -> None:
    """Refuse a mask that hides pairs by a number that could be a bias.

    Asked while a model is tried out, on short inputs, where no bias of distance gets as far down.

    Raises:
        UnsupportedModelError: If it does.
    """
    if torch.compiler.is_compiling() or float(bias.detach().min()) > _LOWEST_PLAIN_BIAS:
        return
    raise UnsupportedModelError(
        f"{type(module).__name__} adds {float(bias.detach().min()):.3g} to scores, which hides pairs as a mask does, "
        f"but stays above {LOWEST_BIAS:g}, from where crisp attention takes a pair for hidden: it would count and rank "
        "hidden pairs. This model is not supported."
    )


def _within(indices: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """A bool mask `[B, 1 | H, Q, K]` of the valid pairs whose key the model itself selected.

    Where attention is "eager" or "sdpa" such models write their selection into the mask; to any
    other implementation they hand it over like this.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    selected = torch.zeros(batch, queries, keys, dtype=torch.bool, device=query.device)
    selected = selected.scatter(-1, indices.long(), True)[:, None]
    pairs, bias = _read_mask(mask, query, key, causal, cross=False)
    if bias is not None:
        return torch.where(selected, mask[..., :keys], torch.finfo(bias.dtype).min)  # type: ignore[index]
    return selected if pairs.valid is None else selected & pairs.valid


def _require_all_keys(config: SparsityConfig, query: Tensor, key: Tensor, sliding_window: int | None) -> None:
    """Refuse to count key positions in a cache that has forgotten its first keys."""
    queries, keys = query.shape[2], key.shape[2]
    if sliding_window is not None and queries < keys and keys >= sliding_window:
        raise ConfigurationError(
            f"These settings (rule {config.rule!r}) go by the place of keys in the sequence, which a sliding-window "
            f"cache of {sliding_window} tokens forgets. Generate with use_cache=False, or use rule='topk' without "
            "keep_first and keep_self."
        )


def _read_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, *, cross: bool
) -> tuple[Pairs, Tensor | None]:
    """Split a mask into valid pairs and a finite bias."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    valid: Tensor | None = None
    bias: Tensor | None = None
    if mask is None:
        if causal and queries > 1:
            # Upper-left aligned, as stock SDPA does when a model leaves causality to the flag.
            valid = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
            valid = valid.expand(batch, 1, queries, keys)
    else:
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            valid = mask
        elif mask.is_floating_point():
            bias, valid = split_mask(mask)
            bias = bias.expand(batch, -1, queries, keys)
        else:
            raise ConfigurationError(
                f"An attention mask of pairs must be bool (True = may be attended) or floating point (added to the "
                f"scores), got {mask.dtype} {tuple(mask.shape)}. Call .bool() on a mask of ones and zeros."
            )
        valid = None if valid is None else valid.expand(batch, -1, queries, keys)
    query_valid = None
    if mask is not None and valid is not None and queries <= keys and not cross:
        query_valid = padding_from_pairs(valid, queries)
    return Pairs((batch, heads, queries, keys), query.device, valid, query_valid, causal, cross), bias


# Process-wide names; settings live on each model.
AttentionInterface.register(IMPLEMENTATION, crisp_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, crisp_mask)
