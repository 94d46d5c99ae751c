"""Small configurations of every architecture in the installed Transformers, by introspection.

A configuration class says by its fields what can be made small: widths, depths, heads, vocabularies, images. What
follows from other fields (head widths, layer types) is left to the class itself wherever it computes it. Architectures
whose fields constrain each other in their own way are listed in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, LAYERS, INNER, VOCABULARY = 32, 4, 2, 8, 2, 48, 96
IMAGE, PATCH, WINDOW, POSITIONS = 32, 8, 6, 128

_RULES: list[tuple[str, Any]] = [
    # The first pattern that matches a field's whole name decides; "=" entries keep the default.
    (r"index_n_heads", 16),  # with few, all of an index's scores are often zero, and a tie chooses the keys
    (
        r"(linear_|vision_|text_|decoder_|encoder_)?num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num",
        KV_HEADS,
    ),
    (r"linear_num_key_heads|linear_num_value_heads", 4),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|nhead)", HEADS),
    (
        r"linear_key_head_dim|linear_value_head_dim|qk_rope_head_dim|v_head_dim|qk_nope_head_dim|index_head_dim",
        HEAD_WIDTH,
    ),
    (r"qk_head_dim", 2 * HEAD_WIDTH),
    (r"(.*_)?(head_dim|dim_head|d_kv|head_width)|attention_head_size|kv_channels|global_head_dim", HEAD_WIDTH),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (
        r"(.*_)?(num_hidden_layers|hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_blocks|depth)",
        LAYERS,
    ),
    (
        r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|inner_dim|d_ff|mlp_dim|ffn_hidden_size|feed_forward_size)|n_inner|ff_dim",
        INNER,
    ),
    (r"d_inner", 2 * WIDTH),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|embed_size|projection_dim|projection_size|latent_dim)",
        WIDTH,
    ),
    (
        r"(.*_)?(projector_hidden_size|output_hidden_size|out_hidden_size|output_dim|query_dim|hidden_channels|pooler_output_size|emb_dim)|dim",
        WIDTH,
    ),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (
        r"max_source_positions|max_target_positions|n_positions|(.*_)?max_(sequence|seq|speech|text)_(length|positions)|max_position_embeddings|n_ctx|max_seq_len",
        POSITIONS,
    ),
    (r"(.*_)?sliding_window(_size)?|local_attention|attention_chunk_size", WINDOW),
    (r"(num|n_routed|n|moe_num|num_local|n_shared)_experts|num_experts|n_routed_experts|num_local_experts", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|top_k_experts|moe_top_k)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(pretrain_)?image_size|img_size|input_size", IMAGE),
    (r"patch_size", PATCH),
    (r"num_mel_bins|n_mels|num_mels|mel_bins|feature_size_mel", 16),
    (r"num_queries|num_query_tokens|num_latents|resampler_n_latents", 8),
    (r"num_frames", 4),
    (r"index_topk", 8),
    (r"query_pre_attn_scalar", HEAD_WIDTH),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"(mamba_)?chunk_size", 8),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"codebook_size", 32),
    (r"conv_dim|tdnn_dim|xvector_output_dim|codevector_dim|proj_codevector_dim|classifier_proj_size", WIDTH),
    (r"tdnn_kernel|tdnn_dilation", 1),
    (r"depths|num_residual_layers|num_adapter_layers|encoder_depths|layers_per_stage", 1),
    (
        r"hidden_sizes|encoder_hidden_sizes|neck_hidden_sizes|decoder_hidden_size|fusion_hidden_size|vision_hidden_size",
        WIDTH,
    ),
    (r"num_filters|base_channels|stem_channels|upsample_initial_channel", 8),
    (
        r"vocoder_.*_dim|variance_predictor_.*_dim|.*condition_dim|adapter_input_size|spkr_embed_dim|lang_embed_dim",
        WIDTH,
    ),
    (r"window_layers|max_window_layers", 1),
    (r"prediction_length|context_length", 16),
    (r"num_denoising|num_points", 4),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_TOKEN = re.compile(r".*(token_id|token_index|_token)")
_KEPT = re.compile(r".*(token_id|token_index)s?|stage_names|_?out_(features|indices)")

# What a configuration class demands beyond its fields' names; `...` leaves a field to the class.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": ..., "ffn_config": ...},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": HEADS},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS, "index_topk": 16}},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_topk": 16},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "informer": {"prediction_length": 8, "context_length": 16},
    "ministral": {"head_dim": HEAD_WIDTH},
    "nemotron": {"head_dim": HEAD_WIDTH},
    "qwen2_moe": {"shared_expert_intermediate_size": INNER},
    "swin": {"patch_size": 4, "depths": [2], "num_heads": [2], "window_size": 4, "embed_dim": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "vitpose_backbone": {"image_size": [IMAGE, IMAGE], "patch_size": [PATCH, PATCH]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of about two layers, four heads and width 32."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_merge(_shrunk(cls), OVERRIDES.get(model_type, {})))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return {name: value for name, value in merged.items() if value is not ...}


def _shrunk(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        default = cls()
    except Exception:  # some have no default that passes their own validation
        default = None
    names = {field.name for field in dataclasses.fields(cls)}
    fields: dict[str, Any] = {}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name in names:
        value = _value(default, name, defaults[name])
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type, **_shrunk(type(value))}
        else:
            small = _small(name, value)
            if small is not None:
                fields[name] = small
    for name in getattr(cls, "sub_configs", {}):
        value = getattr(default, name, None)
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type, **_shrunk(type(value))}
    _layer_lists(fields, default, names)
    return fields


def _value(config: Any, name: str, default: Any) -> Any:
    try:
        value = getattr(config, name, None)
    except Exception:  # may vary by layer, and then has no value of the whole
        value = None
    if value is None and isinstance(default, (bool, int, float, str, list, tuple)):
        return default
    return value


def _small(name: str, value: Any) -> Any:
    if isinstance(value, (bool, str)):
        return None
    if isinstance(value, float) and name == "attn_logit_softcapping":
        return 1.0  # so low that it bends the scores of a small model
    if isinstance(value, float):
        return 0.0 if name.endswith(("layerdrop", "drop_path_rate")) else None
    if _TOKEN.fullmatch(name):
        return value % 16 + 64 if isinstance(value, int) and value >= VOCABULARY else None
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            return _like(value, small, name)
    return None


def _like(value: Any, small: int, name: str) -> Any:
    if isinstance(value, int):
        return small
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return type(value)(small for _ in value)
    return None


def _layer_lists(fields: dict[str, Any], default: Any, names: set[str]) -> None:
    """Lists with one entry a layer: one layer of every kind, at least two; and what heads depend on."""
    if "kv_lora_rank" in names and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # keys and values share their low rank instead
    count_name = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields), None)
    before = _value(default, count_name, None) if count_name else None
    lists = {
        name: value
        for name in names
        if not isinstance(getattr(type(default), name, None), property)
        and isinstance(value := _value(default, name, None), list)
        and before
        and len(value) == before
        and before > 1
    }
    kinds = lists.get("layer_types") or lists.get("layers_block_type") or lists.get("mlp_layer_types")
    if kinds is None and "layer_types" in names and isinstance(types := _value(default, "layer_types", None), list):
        kinds, lists["layer_types"] = types, types
    if kinds is not None:
        places = sorted({kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}.values())
        places = places if len(places) > 1 else [0, 0]
        fields[count_name or "num_hidden_layers"] = len(places)
    else:
        places = list(range(LAYERS))
    for name, value in lists.items():
        small = [value[place] for place in places]
        fields[name] = [_small(name, item) or item for item in small] if isinstance(value[0], int) else small
    if "mrope_section" in getattr(type(default), "ignore_keys_at_rope_validation", ()):
        rope = dict(_value(default, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
        share = rope.get("partial_rotary_factor", 1.0)
        half = int((fields.get("head_dim") or HEAD_WIDTH) * (share if isinstance(share, float) else 1.0)) // 2
        fields["rope_parameters"] = rope | {"mrope_section": [half - half // 3 * 2 or half, half // 3, half // 3]}
        if half == 4:
            fields["rope_parameters"]["mrope_section"] = [2, 1, 1]
