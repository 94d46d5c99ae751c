"""A named, fingerprinted checkpoint. Resolving one imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crisp_attention.errors import AssetError, ConfigurationError, CrispError, UnsupportedModelError, nearest
from crisp_attention.experiment.data.assets import ASSETS, cache_folder, fetch
from crisp_attention.experiment.results.files import whole_folder

PACKAGED = ("minilm-l6",)
ARCHITECTURES = {"tiny-vit": "a Vision Transformer of 3 layers, trained from scratch"}
"""Models that come without weights: each run draws them by its seed."""

_ARCHITECTURES = Path(__file__).parent / "architectures"

_WEIGHTS = "*.safetensors"
# Vocabularies in other forms than JSON.
_VOCABULARIES = ("*.model", "*.spm", "*.tiktoken", "*.codes", "*.tokenizer", "merges.txt", "tekken.json", "vocab*")
_WANTED = (_WEIGHTS, "*.json", "*.txt", *_VOCABULARIES)
# Weights and whatever a tokenizer or an image processor may be made of; config.json is read apart.
_DECIDING = (
    _WEIGHTS,
    *_VOCABULARIES,
    "added_tokens.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights, configuration and tokenizer or image processor in a local folder.

    Attributes:
        name: As the user named it; the last part of a path.
        folder: Where the files are.
        fingerprint: Hash of the files that decide a run: weights, model configuration, tokenizer.
        pretrained: Whether there are weights; otherwise each run draws its own.
    """

    name: str
    folder: Path
    fingerprint: str
    pretrained: bool = True


def resolve(name: str, announce: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """Find a checkpoint: a packaged one, a folder, or a name on the hub.

    Args:
        name: "minilm-l6", "tiny-vit", a path, or as "distilbert-base-uncased".
        announce: Told before something slow happens.

    Raises:
        ConfigurationError: If a folder holds no model.
        UnsupportedModelError: If it could only be loaded by running code that comes with it.
        AssetError: If the hub is not reachable or lacks the name; names the offline alternative.
    """
    if name in PACKAGED:
        return _checkpoint(name, fetch(ASSETS[name], announce))
    if name in ARCHITECTURES:
        folder = _ARCHITECTURES / name
        return Checkpoint(name, folder, _fingerprint(folder), pretrained=False)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _checkpoint(path.resolve().name, path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise ConfigurationError(f"Model {name!r} is not a folder with config.json and *.safetensors weights.")
    return _checkpoint(name, _from_hub(name, announce))


def pack(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a checkpoint by name, to take it to another machine."""
    files = {file for pattern in (*_WANTED, *_DECIDING) for file in checkpoint.folder.glob(pattern)}
    return {file.name: file.read_bytes() for file in sorted(files) if file.is_file()}


def is_here(checkpoint: Checkpoint) -> bool:
    """Whether this machine has a checkpoint in its folder, with the same content."""
    try:
        return _fingerprint(checkpoint.folder) == checkpoint.fingerprint
    except ConfigurationError:
        return False


def unpack(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Checkpoint:
    """A checkpoint of another machine, in this machine's cache.

    Args:
        checkpoint: As it is there.
        files: What `pack` returned there.

    Raises:
        OSError: If the cache cannot be written.
    """
    folder = cache_folder() / "checkpoints" / checkpoint.fingerprint
    here = replace(checkpoint, folder=folder)
    if is_here(here):
        return here
    # What is there is damaged, or another process has just written the same.
    with whole_folder(folder) as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
    return here


def _checkpoint(name: str, folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file() or not any(folder.glob(_WEIGHTS)):
        raise ConfigurationError(
            f"Model folder {folder} needs config.json and *.safetensors weights (as save_pretrained writes them); "
            f"it has: {', '.join(sorted(item.name for item in folder.iterdir())) or 'nothing'}."
        )
    fingerprint = _fingerprint(folder)
    _refuse_foreign_code(name, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return Checkpoint(name, folder, fingerprint)


def load(checkpoint: Checkpoint, auto_class: Any, **options: Any) -> Any:
    """What a checkpoint holds, by one of Transformers' auto classes; code that comes with it is never run.

    Args:
        checkpoint: Where it is.
        auto_class: As `AutoModel`.
        **options: For its `from_pretrained`.

    Raises:
        UnsupportedModelError: If Transformers cannot load it.
    """
    with failing_as(lambda why: UnsupportedModelError(f"{checkpoint.name} cannot be loaded: {why}")):
        return auto_class.from_pretrained(checkpoint.folder, trust_remote_code=False, **options)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        UnsupportedModelError: If it has none. Transformers then makes up one that knows no word, and every text
            would be the same to the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = load(checkpoint, AutoTokenizer)
    except UnsupportedModelError:
        if any(file for pattern in (*_VOCABULARIES, "tokenizer*.json") for file in checkpoint.folder.glob(pattern)):
            raise
        raise UnsupportedModelError(
            f"{checkpoint.name} has no tokenizer, as models of images have none. For texts choose another model, or "
            "save its tokenizer beside it, with its save_pretrained."
        ) from None
    # One made up may have a token or two beside the special ones, as for a space.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
        raise UnsupportedModelError(
            f"{checkpoint.name} has no vocabulary: {checkpoint.folder} holds "
            f"{', '.join(sorted(item.name for item in checkpoint.folder.iterdir()))}. Save the tokenizer beside the "
            "model, with its save_pretrained."
        )
    return tokenizer


@contextlib.contextmanager
def failing_as(refusal: Callable[[str], UnsupportedModelError]) -> Iterator[None]:
    """Say in our words what Transformers raises within, which may be anything: files hold what their authors wrote.

    Raises:
        UnsupportedModelError: What `refusal` makes of the reason.
    """
    try:
        yield
    except CrispError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise refusal(str(error)) from None
    except Exception as error:  # these say less without their names
        raise refusal(f"{type(error).__name__}: {error}") from None


def _refuse_foreign_code(name: str, config: dict[str, Any]) -> None:
    if "auto_map" not in config:
        return
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{name} comes with code of its own (auto_map in config.json), which is never run, and model_type {kind!r} "
            "is none that the installed Transformers knows. If you trust that code, load the model in Python with "
            "trust_remote_code=True and call crisp_attention.sparsify."
        )


def _fingerprint(folder: Path) -> str:
    """sha256 over the deciding files; the config without the keys that name where it came from."""
    digest = hashlib.sha256()
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{folder / 'config.json'} is not a model configuration: {error}") from None
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    if pictures := _nested_image_processor(folder):
        digest.update(json.dumps(pictures, sort_keys=True).encode())
    for file in sorted({file for pattern in _DECIDING for file in folder.glob(pattern)}):
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _nested_image_processor(folder: Path) -> object:
    """What a processor of texts and images says of images, which Transformers prefers to the processor of images."""
    try:
        content = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{folder / 'processor_config.json'} is damaged: {error}") from None
    return content.get("image_processor") if isinstance(content, dict) else None


def _from_hub(name: str, announce: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    announce(f"Looking for model {name!r} on the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise AssetError(
            f"Model {name!r} is not packaged, not a folder, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}). {nearest(name, [*PACKAGED, *ARCHITECTURES])} "
            "Without the hub use --model minilm-l6, which comes from the package index, or a folder of your own."
        ) from None
