"""Small forward passes for models of every kind: text, images, video, audio and their mixtures.

Nothing about an architecture is known here by name: what a model takes is read from its forward
pass's signature and from its configuration. Where that leaves several possibilities open (are mel
bins the second or the third dimension?), `candidates` yields them in turn.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from crisp_attention.errors import CrispError, UnsupportedModelError

LENGTH = 16
# Beside images or sounds: no other count of theirs, so that calls on text are told apart by length.
MIXED_LENGTH = 19
DECODER_LENGTH = 12
PADDING = 4
_FRAMES = 48
_SAMPLES = 4000
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_token_id")
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "audio_token")


def working_inputs(model: PreTrainedModel, before_each: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """The first of the `candidates` that a model accepts, after one forward pass on it.

    Args:
        model: Any model, in evaluation mode and without gradients if that matters.
        before_each: Called before every attempt.

    Raises:
        UnsupportedModelError: If it accepts none.
        CrispError: If attention itself refuses.
    """
    failure: Exception | None = None
    for batch in candidates(model):
        before_each()
        try:
            model(**batch)
        except CrispError:
            raise
        except Exception as error:  # whatever a model raises on a batch that is not its kind
            failure = failure or error
        else:
            return batch
    reason = "No default inputs are known for" if failure is None else "The default inputs do not suit"
    detail = "" if failure is None else f"; {type(failure).__name__}: {failure}"
    raise UnsupportedModelError(
        f"{reason} {type(model).__name__} (main input {model.main_input_name!r}{detail}). "
        "Pass inputs={...}, the keyword arguments of a small forward pass."
    )


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Small batches of two that a model may accept, the likeliest first.

    Text has a padded second row, and a decoder's text another length than its encoder's.

    Args:
        model: Any model; its weights are used where the number of an image's tokens must be asked.
    """
    parameters = inspect.signature(model.forward).parameters
    seen = list(_images(model, parameters))
    heard = list(_sounds(model, parameters))
    text = _text(model, parameters, LENGTH if not (seen or heard) else MIXED_LENGTH)
    marked = any(_token(model.config, names) is not None for names in (_IMAGE_TOKENS, _AUDIO_TOKENS))
    if marked and text:
        for batch in seen:
            yield from _with_features(model, text, batch, _IMAGE_TOKENS, ("get_image_features",))
        for batch in heard:
            yield from _with_features(model, text, batch, _AUDIO_TOKENS, ("get_audio_features", "get_audio_tokens"))
        yield text
    for senses in ([*seen, {}], [*heard, {}]):
        for batch in senses:
            if batch:
                yield from _merged(text, batch, model.main_input_name)
    if text:
        yield text


def _merged(text: dict[str, Tensor], batch: dict[str, Any], main: str) -> Iterator[dict[str, Any]]:
    """Both kinds together where the model takes both, then one alone."""
    decoder = {name: value for name, value in text.items() if name.startswith("decoder_")}
    if main == "input_ids":
        yield {**batch, **text}
        yield text
    elif "input_ids" in text:
        yield {**batch, **text}
    if decoder:
        yield {**batch, **decoder}
    yield batch


def _text(model: PreTrainedModel, parameters: Mapping[str, Any], length: int) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    config = model.config.get_text_config()
    if "input_ids" in parameters:
        ids, mask = _tokens(model, config, length)
        if type(model).__name__.endswith("MultipleChoice"):
            ids, mask = (tensor[:, None].expand(-1, 2, -1).contiguous() for tensor in (ids, mask))
        batch["input_ids"] = ids
        if "attention_mask" in parameters or _any_keyword(parameters):
            batch["attention_mask"] = mask
    if "decoder_input_ids" in parameters:
        ids, mask = _tokens(model, model.config.get_text_config(decoder=True), DECODER_LENGTH)
        batch["decoder_input_ids"] = ids
        if "decoder_attention_mask" in parameters:
            batch["decoder_attention_mask"] = mask
    return batch


def _tokens(model: PreTrainedModel, config: PreTrainedConfig, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[2, length]`; the second row is padded, each row ends in its end token."""
    vocabulary = next(
        (
            size
            for size in (getattr(config, name, None) for name in ("vocab_size", "n_vocab", "num_embeddings"))
            if isinstance(size, int) and size > 0
        ),
        32,
    )
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > PADDING:
        length = min(length, positions)
    device = model.device
    # No token twice in a text where the vocabulary allows it: in a layer without positions their keys would tie, and
    # rounding, which differs from one processor and batch to another, would choose between them.
    ids = torch.arange(2 * length, device=device).view(2, length) * 5 % max(min(vocabulary, 64) - 8, 1)
    # Past the special tokens where the vocabulary allows it: some models derive positions from them.
    ids = (ids + 8).clamp(max=vocabulary - 1)
    mask = torch.ones_like(ids)
    mask[1, -PADDING:] = 0
    end = _single(getattr(config, "eos_token_id", None))
    if end is not None and end < vocabulary:
        ids[0, -1] = ids[1, -PADDING - 1] = end
    pad = _single(getattr(config, "pad_token_id", None))
    ids[1, -PADDING:] = pad if pad is not None and 0 <= pad < vocabulary else 0
    return ids, mask


def _images(model: PreTrainedModel, parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    vision = _part(
        model.config, ("vision_config", "backbone_config", "image_config", "vision_encoder_config", "encoder")
    )
    channels = _first(vision, ("num_channels", "in_channels", "in_chans", "num_input_channels"), 3)
    channels = channels if isinstance(channels, int) else 3
    grid_name = next((name for name in ("image_grid_thw", "grid_thw", "image_grid_hw") if name in parameters), None)
    patch = _number(_first(vision, ("patch_size", "spatial_patch_size"), 16))
    if grid_name is not None:
        yield from _patches(model, vision, parameters, grid_name, channels, patch)
    main = next(
        (name for name in ("pixel_values", "pixel_values_videos", "image", "images") if name in parameters), None
    )
    if main is None:
        return
    for size in _image_sizes(model.config, vision, patch):
        picture = _noise((2, channels, size, size), model)
        frames = _first(vision, ("num_frames", "frames_per_clip"), 4)
        film = picture[:, None].expand(-1, frames if isinstance(frames, int) else 4, -1, -1, -1).contiguous()
        sizes = {"image_sizes": torch.tensor([[size, size]] * 2)} if "image_sizes" in parameters else {}
        shapes = [film, picture] if main != "pixel_values" or _is_video(vision) else [picture, film]
        for shape in shapes:
            yield {main: shape, **sizes}
        if sizes:
            yield {main: picture[:, None], **sizes}


def _patches(
    model: PreTrainedModel, vision: Any, parameters: Mapping[str, Any], grid_name: str, channels: int, patch: int
) -> Iterator[dict[str, Any]]:
    """Two images as rows of patches `[2 * patches, C * T * P * P]` and their grids."""
    merge = _number(_first(vision, ("spatial_merge_size", "merge_size"), 2))
    frames = _number(_first(vision, ("temporal_patch_size",), 1))
    side = 2 * merge
    width = channels * frames * patch * patch
    grid = [[1, side, side]] * 2 if grid_name.endswith("thw") else [[side, side]] * 2
    name = next((name for name in ("pixel_values", "hidden_states") if name in parameters), "pixel_values")
    yield {name: _noise((2 * side * side, width), model), grid_name: torch.tensor(grid, device=model.device)}


def _image_sizes(config: Any, vision: Any, patch: int) -> list[int]:
    declared = [_first(place, ("image_size", "img_size", "input_size"), None) for place in (vision, config)]
    sizes = [max(size) if isinstance(size, (list, tuple)) else size for size in declared]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return list(dict.fromkeys([*known, 4 * patch, 64, 224]))[:3]


def _is_video(vision: Any) -> bool:
    return any(hasattr(vision, name) for name in ("num_frames", "frames_per_clip", "tubelet_size"))


def _sounds(model: PreTrainedModel, parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    audio = _part(model.config, ("audio_config", "audio_encoder_config", "encoder_config", "speech_encoder", "encoder"))
    mels = _first(
        audio,
        (
            "num_mel_bins",
            "feature_size",
            "input_feat_per_channel",
            "input_dim",
            "n_mels",
            "feature_projection_input_dim",
        ),
        80,
    )
    mels = mels if isinstance(mels, int) else 80
    frames = _number(_first(audio, ("max_source_positions", "max_length"), 0))
    device = model.device
    for name in ("input_features", "audio_values", "audio_input_features"):
        if name not in parameters:
            continue
        for count in dict.fromkeys([2 * frames or _FRAMES, _FRAMES, 1024]):
            wave = _noise((2, mels, count), model)
            masks = _frame_masks(parameters, count, device)
            for features in (wave, wave.transpose(1, 2).contiguous(), wave[:, None], wave.transpose(1, 2)[:, None]):
                for mask in masks:
                    yield {name: features, **mask}
    if "input_values" in parameters:
        wave = _noise((2, _SAMPLES), model)
        for mask in _frame_masks(parameters, _SAMPLES, device):
            yield {"input_values": wave, **mask}
        yield {"input_values": wave[:, None]}
        length = _number(_first(audio, ("max_length",), 128))
        yield {"input_values": _noise((2, length, mels), model)}


def _frame_masks(parameters: Mapping[str, Any], count: int, device: torch.device) -> list[dict[str, Tensor]]:
    masks: list[dict[str, Tensor]] = []
    full = torch.ones(2, count, dtype=torch.long, device=device)
    for name in ("input_features_mask", "feature_attention_mask", "attention_mask", "padding_mask"):
        if name in parameters:
            padded = full.clone()
            padded[1, -(count // 4) :] = 0
            masks += [{name: padded}, {name: full}]
            break
    return [*masks, {}]


def _with_features(
    model: PreTrainedModel,
    text: dict[str, Tensor],
    batch: dict[str, Any],
    tokens: tuple[str, ...],
    methods: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    """Text in which each example's images or sounds have as many placeholders as they make features."""
    token = _token(model.config, tokens)
    method = next((getattr(owner, name) for owner in (model, getattr(model, "model", None)) for name in methods
                   if hasattr(owner, name)), None)  # fmt: skip
    if token is None or method is None or "input_ids" not in text:
        return
    accepted = inspect.signature(method).parameters
    try:
        with torch.no_grad():
            features = method(**{name: value for name, value in batch.items() if name in accepted})
    except Exception:  # this candidate does not suit the model; the next may
        return
    for count in _feature_counts(features):
        places = torch.full((2, count), token, device=model.device)
        yield {
            **text,
            **batch,
            "input_ids": torch.cat([places, text["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(places), text["attention_mask"]], dim=1),
            **({"mm_token_type_ids": _kinds(places, text["input_ids"])}
               if "mm_token_type_ids" in inspect.signature(model.forward).parameters else {}),
        }  # fmt: skip


def _kinds(places: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(places), torch.zeros_like(ids)], dim=1)


def _feature_counts(features: Any) -> list[int]:
    """Features of one example, from whatever a model returns for two."""
    pooled = getattr(features, "pooler_output", None)
    last = getattr(features, "last_hidden_state", None)
    counts = []
    for found in (pooled, last, features):
        if isinstance(found, (list, tuple)) and found and all(isinstance(item, Tensor) for item in found):
            counts.append(sum(math.prod(item.shape[:-1]) for item in found) // 2)
        elif isinstance(found, Tensor):
            counts.append(math.prod(found.shape[:-1]) // 2)
    return list(dict.fromkeys(count for count in counts if 0 < count <= 2048))


def _noise(shape: tuple[int, ...], model: PreTrainedModel) -> Tensor:
    """The same noise each time: no two patches or frames are alike, so that no scores tie."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw).to(device=model.device, dtype=model.dtype)


def _part(config: Any, names: tuple[str, ...]) -> Any:
    """The first sub-configuration of these names, at any depth; the configuration itself if none."""
    for name in names:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            return _part(part, names)
    return config


def _token(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _number(value: Any) -> int:
    while isinstance(value, (list, tuple)) and value:
        value = value[-1]
    return value if isinstance(value, int) else 0


def _single(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _any_keyword(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
