"""Of `crisp_attention.experiment.training.model`; `test_model.py` is the one of the verbs on a model."""

from __future__ import annotations

import json
import shutil

import pytest

from crisp_attention.errors import AssetError, ConfigurationError, UnsupportedModelError
from crisp_attention.experiment.data.assets import ASSETS
from crisp_attention.experiment.training import model
from crisp_attention.experiment.training.model import PACKAGED, load, load_tokenizer, resolve


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that looks like a model; its weights are never read as such."""
    folder = tmp_path / "some-model"
    folder.mkdir()
    config = {"model_type": "bert", "hidden_size": 8, "_name_or_path": "x", "transformers_version": "5.0.0"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return folder


def fingerprint(folder):
    return resolve(str(folder)).fingerprint


def test_a_folder_is_found_and_named_by_its_last_part(checkpoint, monkeypatch):
    found = resolve(str(checkpoint))
    assert (found.name, found.folder) == ("some-model", checkpoint)
    assert len(found.fingerprint) == 64
    monkeypatch.chdir(checkpoint)
    assert resolve(".").name == "some-model"
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("some-model").fingerprint == found.fingerprint


def test_a_home_folder_is_expanded(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve("~/some-model").fingerprint == fingerprint(checkpoint)


def test_real_checkpoints_have_fingerprints_of_their_own(tiny_folders):
    assert len({fingerprint(folder) for folder in tiny_folders.values()}) == len(tiny_folders)


def test_the_fingerprint_does_not_depend_on_where_a_model_came_from(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "other-name")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config = dict(reversed(config.items())) | {"_name_or_path": "/home/me", "transformers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    (copy / "README.md").write_text("a card", encoding="utf-8")
    (copy / "training_args.bin").write_bytes(b"of no consequence")
    assert fingerprint(copy) == fingerprint(checkpoint)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", "other weights"),
        ("model-2.safetensors", "more weights"),
        ("config.json", '{"model_type": "bert", "hidden_size": 9}'),
        ("tokenizer.json", '{"other": 1}'),
        ("tokenizer_config.json", '{"do_lower_case": false}'),
        ("vocab.txt", "[PAD]"),
        ("spiece.model", "pieces"),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", "a b"),
        ("sentencepiece.bpe.model", "pieces"),
        ("tokenizer.model", "pieces"),
        ("added_tokens.json", '{"[NEW]": 9}'),
        ("special_tokens_map.json", '{"pad_token": "[P]"}'),
        ("processor_config.json", '{"image_processor": {"image_mean": [0.9]}}'),
    ],
)
def test_any_change_of_weights_configuration_or_tokenizer_changes_the_fingerprint(checkpoint, name, content):
    if name != "tokenizer.json":
        (checkpoint / "tokenizer.json").unlink()  # it would make the other tokenizer files superfluous
    before = fingerprint(checkpoint)
    (checkpoint / name).write_text(content, encoding="utf-8")
    assert fingerprint(checkpoint) != before


def test_a_processor_that_says_nothing_of_images_changes_no_fingerprint(checkpoint):
    before = fingerprint(checkpoint)
    (checkpoint / "processor_config.json").write_text('{"processor_class": "X"}', encoding="utf-8")
    assert fingerprint(checkpoint) == before
    (checkpoint / "processor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"processor_config\.json is damaged"):
        fingerprint(checkpoint)


def test_moving_bytes_from_one_file_to_the_next_changes_the_fingerprint(checkpoint):
    (checkpoint / "a.safetensors").write_bytes(b"12")
    (checkpoint / "b.safetensors").write_bytes(b"3")
    before = fingerprint(checkpoint)
    (checkpoint / "a.safetensors").write_bytes(b"1")
    (checkpoint / "b.safetensors").write_bytes(b"23")
    assert fingerprint(checkpoint) != before


def test_the_same_bytes_under_another_name_are_another_tokenizer(checkpoint):
    before = fingerprint(checkpoint)
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.txt")
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize(
    ("missing", "has"), [("config.json", "model.safetensors"), ("model.safetensors", "config.json")]
)
def test_a_folder_without_a_model_is_told_what_it_needs_and_has(checkpoint, missing, has):
    (checkpoint / missing).unlink()
    with pytest.raises(ConfigurationError, match=rf"needs config\.json and \*\.safetensors weights.*it has: {has}, "):
        resolve(str(checkpoint))


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="it has: nothing"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_garbled_configuration_is_told(checkpoint, content):
    (checkpoint / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        resolve(str(checkpoint))


@pytest.mark.parametrize("name", ["./nothing", "/nowhere", "~/nowhere-at-all", "../nothing"])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(name):
    told = []
    with pytest.raises(ConfigurationError, match="is not a folder with config"):
        resolve(name, told.append)
    assert told == []


def test_a_file_is_no_model(checkpoint):
    with pytest.raises(ConfigurationError, match="is not a folder"):
        resolve(str(checkpoint / "model.safetensors"))


@pytest.mark.parametrize("name", ["distilbert-base-uncased", "org/model", "a/b/c", "with space", "minilm-l"])
def test_without_the_hub_the_offline_alternative_is_named(name):
    told = []
    with pytest.raises(AssetError, match=r"Without the hub use --model minilm-l6") as caught:
        resolve(name, told.append)
    assert f"Model {name!r} is not packaged" in str(caught.value)
    assert told == [f"Looking for model {name!r} on the Hugging Face hub"]


def test_a_hub_model_is_a_checkpoint_under_its_hub_name(checkpoint, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        assert {"*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken"} <= set(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("org/model")
    assert (found.name, found.fingerprint) == ("org/model", fingerprint(checkpoint))
    assert asked == ["org/model"]


def test_a_packaged_name_comes_from_its_wheel(checkpoint, monkeypatch):
    assert set(PACKAGED) <= set(ASSETS)

    def fetch(asset, announce):
        announce(f"fetching {asset.name}")
        return checkpoint

    monkeypatch.setattr(model, "fetch", fetch)
    told = []
    found = resolve("minilm-l6", told.append)
    assert (found.name, found.folder) == ("minilm-l6", checkpoint)
    assert told == ["fetching minilm-l6"]


def test_a_folder_without_a_vocabulary_is_refused(tiny_folders, tmp_path):
    """As `model.save_pretrained` alone leaves it; every text would be the same to the model."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folders["bert"] / name, tmp_path / name)
    with pytest.raises(UnsupportedModelError, match="has no vocabulary"):
        load_tokenizer(resolve(str(tmp_path)))
    shutil.copy(tiny_folders["bert"] / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    with pytest.raises(UnsupportedModelError, match="has no vocabulary"):
        load_tokenizer(resolve(str(tmp_path)))
    assert len(load_tokenizer(resolve(str(tiny_folders["bert"])))) > 10


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"hidden_size": "32"}, "hidden_size"), ({"num_attention_heads": 0}, "cannot be loaded"), ({}, "SafetensorError")],
)
def test_whatever_is_wrong_with_a_folder_is_a_sentence(tiny_folders, tmp_path, settings, told):
    from transformers import AutoModel

    folder = tmp_path / "broken"
    shutil.copytree(tiny_folders["bert"], folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    if not settings:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModelError, match=told):
        load(resolve(str(folder)), AutoModel)
