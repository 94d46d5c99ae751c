"""What runs share, how each gets its model, and what is refused before anything is written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.data.dataset import ExperimentData, Split
from crisp_attention.experiment.specification.sections import DataSpec, TrainingSpec
from crisp_attention.experiment.training import model
from crisp_attention.experiment.training.workbench import Workbench, preflight
from record_builders import make_spec
from small_models import tiny_config

DIGITS = DataSpec(source="digits", train_examples=40, test_examples=30)


@pytest.fixture(scope="module")
def films(csv_file):
    return ExperimentData({"": dataset.load(DataSpec(source=str(csv_file), train_examples=20))})


@pytest.fixture(scope="module")
def digits():
    return ExperimentData({"": dataset.load(DIGITS)})


def bench_for(folder, examples):
    return Workbench(model.resolve(str(folder)), examples)


# Dropout


def dropouts(network):
    """Probabilities of the dropout modules by name, and of attention where a module holds it as a number."""
    found = {name: module.p for name, module in network.named_modules() if isinstance(module, nn.Dropout)}
    for name, module in network.named_modules():
        for field in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, field, None), float):
                found[f"{name}.{field}"] = getattr(module, field)
    return found


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_dropout_reaches_the_modules_and_each_kind_its_own(kind, tiny_folders, films):
    bench = bench_for(tiny_folders[kind], films)
    plain = dropouts(bench.model(TrainingSpec()))
    attention = dropouts(bench.model(TrainingSpec(attention_dropout=0.37)))
    hidden = dropouts(bench.model(TrainingSpec(hidden_dropout=0.43)))
    of_attention = {name for name, p in attention.items() if p == 0.37}
    of_hidden = {name for name, p in hidden.items() if p == 0.43}
    assert len(of_attention) >= 2
    assert len(of_hidden) >= 3
    assert not of_attention & of_hidden
    for changed, names in ((attention, of_attention), (hidden, of_hidden)):
        assert {name: p for name, p in changed.items() if name not in names} == {
            name: p for name, p in plain.items() if name not in names
        }


@pytest.mark.parametrize("setting", ["attention_dropout", "hidden_dropout"])
def test_dropout_that_a_model_lacks_is_refused_by_name(tmp_path, tokenizer_folder, films, setting):
    from transformers import T5Config, T5ForSequenceClassification

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30, pad_token_id=0)
    T5ForSequenceClassification(config).save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    bench = bench_for(tmp_path, films)
    with pytest.raises(crisp.ConfigurationError, match=rf"{setting} = 0\.2, but the configuration of .* \(t5\) has no"):
        bench.model(TrainingSpec(**{setting: 0.2}))


def test_an_arm_whose_dropout_the_model_lacks_is_refused_in_preflight(tiny_folders, films, monkeypatch):
    from crisp_attention.experiment.training import workbench

    arms = [{"name": "dense"}, {"name": "dropout", "training": {"attention_dropout": 0.2}}]
    spec = make_spec(arms=arms, primary={"arm": "dropout"}, data={"source": "x.csv", "max_length": 64})
    checkpoint = model.resolve(str(tiny_folders["bert"]))
    preflight(checkpoint, films, spec)
    monkeypatch.setattr(workbench, "_DROPOUT_FIELDS", {"attention_dropout": ("absent",), "hidden_dropout": ()})
    with pytest.raises(crisp.ConfigurationError, match=r"attention_dropout = 0\.2, .*none of absent"):
        preflight(checkpoint, films, spec)


# Arms


def test_what_an_arm_does_in_evaluation_is_checked_too(tmp_path, tokenizer_folder, films):
    """A causal model cannot be evaluated by a rule that would see the future."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, pad_token_id=0
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    arms = [{"name": "dense"}, {"name": "other", "evaluate": {"rule": "percentile", "sparsity": 0.5}}]
    spec = make_spec(arms=arms, primary={"arm": "other"})
    with pytest.raises(crisp.ConfigurationError, match="later tokens would change earlier outputs"):
        preflight(model.resolve(str(tmp_path)), films, spec)


def test_texts_longer_than_the_model_has_positions_for_are_refused(tiny_folders, films):
    spec = make_spec(data={"source": "x.csv", "max_length": 161})
    with pytest.raises(crisp.ConfigurationError, match=r"data\.max_length = 161, but .* has positions for 160 tokens"):
        preflight(model.resolve(str(tiny_folders["bert"])), films, spec)


# The classifier


def test_a_classifier_of_another_number_of_classes_is_new(tiny_folders, films):
    """The tiny checkpoints hold one for two classes; ten are wanted of the same encoder."""
    labels = np.arange(10)
    ten = dataset.Dataset("ten", tuple("abcdefghij"), Split(("x",) * 10, None, labels), films.test, ())
    bench = bench_for(tiny_folders["bert"], ExperimentData({"": ten}))
    network = bench.model(TrainingSpec())
    assert network.classifier.weight.shape == (10, 32)
    two = bench_for(tiny_folders["bert"], films).model(TrainingSpec())
    assert torch.equal(network.bert.embeddings.word_embeddings.weight, two.bert.embeddings.word_embeddings.weight)


def test_weights_of_another_shape_than_the_configuration_s_are_refused(tiny_folders, films, tmp_path):
    folder = shutil.copytree(tiny_folders["bert"], tmp_path / "bert")
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(crisp.UnsupportedModelError, match=r"bert cannot be fine-tuned to 2 classes of text: .*shape"):
        bench_for(folder, films).model(TrainingSpec())


# Images


def test_a_model_from_scratch_draws_its_weights_from_the_global_stream(digits):
    checkpoint = model.resolve("tiny-vit")
    assert not checkpoint.pretrained
    bench = Workbench(checkpoint, digits)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.cat([p.flatten() for p in bench.model(TrainingSpec()).parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert bench.model(TrainingSpec()).config.num_labels == 10


def test_images_become_batches_of_normalised_pixels(digits):
    bench = Workbench(model.resolve("tiny-vit"), digits)
    split = bench.encoded(digits.test, 128)
    assert bench.encoded(digits.test, 128) is split
    assert len(split) == 30
    assert set(split.lengths) == {16}
    batch = bench.collator("longest", 128)([split[row] for row in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.float32
    assert -1 <= batch["pixel_values"].min() < -0.9
    assert 0.5 < batch["pixel_values"].max() <= 1
    assert batch["labels"].tolist() == digits.test.labels[:5].tolist()
    logits = bench.model(TrainingSpec()).eval()(pixel_values=batch["pixel_values"]).logits
    assert logits.shape == (5, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkpoint_on_disk_brings_its_own_image_processor(tmp_path, digits, channels):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=24, patch_size=8,
        num_channels=channels, num_labels=1000,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    mean = [0.25] * channels
    ViTImageProcessorPil(size={"height": 24, "width": 24}, image_mean=mean, image_std=mean).save_pretrained(tmp_path)
    checkpoint = model.resolve(str(tmp_path))
    bench = Workbench(checkpoint, digits)
    split = bench.encoded(digits.test, 128)
    pixels = split[0]["pixel_values"]
    assert pixels.shape == (channels, 24, 24)
    assert pixels.min() == -1.0
    assert set(split.lengths) == {9}
    assert bench.model(TrainingSpec()).classifier.weight.shape == (10, 16)
    changed = (tmp_path / "preprocessor_config.json").read_text(encoding="utf-8").replace("0.25", "0.5")
    (tmp_path / "preprocessor_config.json").write_text(changed, encoding="utf-8")
    assert model.resolve(str(tmp_path)).fingerprint != checkpoint.fingerprint


def test_images_for_a_model_of_texts_and_texts_for_one_of_images_are_refused(tiny_folders, films, digits):
    spec = make_spec()
    for checkpoint, examples, message in (
        (model.resolve(str(tiny_folders["bert"])), digits, "cannot be fine-tuned to 10 classes of image"),
        (model.resolve("tiny-vit"), films, "tiny-vit cannot be fine-tuned to 2 classes of text"),
    ):
        with pytest.raises(crisp.UnsupportedModelError, match=message):
            preflight(checkpoint, examples, spec)


def test_a_split_is_encoded_once_whatever_its_condition(tiny_folders, csv_file):
    spec = tiny_study.spec(tiny_folders["bert"], csv_file)
    spec = spec.model_copy(update={"vary": make_spec(vary={"label_noise": [0.0, 0.5]}).vary})
    found = dataset.load_experiment(spec)
    bench = bench_for(tiny_folders["bert"], found)
    clean, noisy = found.conditions.values()
    assert bench.encoded(clean.test, 128) is bench.encoded(noisy.test, 128)
    assert bench.encoded(clean.test, 128) is not bench.encoded(clean.test, 16)
    first, second = (bench.encoded(dataset.train, 128) for dataset in (clean, noisy))
    assert (first.labels != second.labels).sum() == round(0.5 * len(first))
    assert first[0]["input_ids"] == second[0]["input_ids"]
    assert tiny_config("bert").num_labels == len(found.classes)
