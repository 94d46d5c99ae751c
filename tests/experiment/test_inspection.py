from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from typer.testing import CliRunner

import crisp_attention as crisp
from crisp_attention.cli import app
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.experiment.inspection import MAX_TOKENS, inspect
from crisp_attention.experiment.report.attention import InspectedLayer, Inspection, Level, render_attention
from crisp_attention.experiment.training.model import resolve
from crisp_attention.traits import RULES

TEXT = "the film was not very good"


@pytest.fixture(scope="module")
def checkpoint(tiny_folders):
    return resolve(str(tiny_folders["bert"]))


def save(model, folder, tokenizer_folder):
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return resolve(str(folder))


def by_operator(scores, **settings):
    """Survivors and weights of one layer's scores `[H, T, T]`."""
    one = torch.eye(scores.shape[-1])[None, None].expand(1, len(scores), -1, -1)
    values = torch.from_numpy(np.where(np.isinf(scores), 0.0, scores))[None]
    valid = torch.from_numpy(~np.isinf(scores))[None]
    out = crisp.attention(values, one, one, scale=1.0, valid=valid, return_details=True, **settings)
    return out.keep[0].numpy(), out.probabilities[0].numpy()


def test_scores_are_those_of_the_models_own_attention(checkpoint):
    from transformers import AutoModel, AutoTokenizer

    found = inspect(checkpoint, TEXT, "a dull plot")
    network = AutoModel.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(checkpoint.folder)(TEXT, "a dull plot", return_tensors="pt")
    with torch.no_grad():
        expected = network(**inputs, output_attentions=True).attentions
    assert len(found.layers) == len(expected) == 2
    for layer, weights in zip(found.layers, expected, strict=True):
        np.testing.assert_allclose(softmax(layer.scores, axis=-1), weights[0].numpy(), atol=1e-6)
    assert found.tokens == ("[CLS]", *TEXT.split(), "[SEP]", "a", "dull", "plot", "[SEP]")
    assert found.text == f"{TEXT} / a dull plot"


def test_the_default_is_topk_at_its_default_sparsity(checkpoint):
    found = inspect(checkpoint, TEXT)
    assert (found.rule, found.start, found.levels, found.cut) == ("topk", 0.8, (), 0)
    assert inspect(checkpoint, TEXT, rule="percentile", sparsity=0.3).start == 0.3


def test_a_model_that_was_saved_sparse_is_shown_as_it_was(checkpoint, tmp_path, tokenizer_folder):
    from transformers import AutoModel

    model = crisp.sparsify(AutoModel.from_pretrained(checkpoint.folder), rule="percentile", sparsity=0.6)
    saved = save(model, tmp_path, tokenizer_folder)
    found = inspect(saved, TEXT)
    assert (found.rule, found.start) == ("percentile", 0.6)
    assert inspect(saved, TEXT, rule="topk").rule == "topk"
    np.testing.assert_allclose(found.layers[1].scores, inspect(checkpoint, TEXT).layers[1].scores, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({"rule": "window", "window": 3}, {"rule": "window", "window": 3}),
        ({"rule": "window", "window": 0}, {"rule": "window", "window": 0}),
        ({"rule": "window", "window": 2, "stride": 4}, {"rule": "window", "window": 2, "stride": 4}),
        ({"rule": "top_p", "p": 0.6}, {"rule": "top_p", "p": 0.6}),
        ({"rule": "temperature", "entropy": 0.7}, {"rule": "temperature", "entropy": 0.7}),
        ({"rule": "nm", "m": 2}, {"rule": "nm", "m": 2}),
        ({"sparsity": 0.7, "keep_first": 1}, {"sparsity": 0.7, "keep_first": 1}),
        ({"rule": "bottomk", "heads": [0], "layers": [0]}, {"rule": "bottomk"}),
        ({"rule": "bottomk", "layer_sparsity": [0.3, 0.6]}, {"rule": "bottomk", "sparsity": 0.6}),
        ({"rule": "bottomk", "apply": "train", "schedule": {"kind": "linear"}}, {"rule": "bottomk"}),
    ],
)
def test_a_models_own_settings_count_in_every_head(checkpoint, tmp_path, tokenizer_folder, own, shown):
    from transformers import AutoModel

    model = crisp.sparsify(AutoModel.from_pretrained(checkpoint.folder), **own)
    found = inspect(save(model, tmp_path, tokenizer_folder), TEXT)
    level = found.levels[int(found.start)]
    for layer, keep in zip(found.layers, level.keep, strict=True):
        np.testing.assert_array_equal(keep, by_operator(layer.scores, **shown)[0])


def test_a_models_own_settings_are_named(checkpoint, tmp_path, tokenizer_folder):
    from transformers import AutoModel

    model = crisp.sparsify(AutoModel.from_pretrained(checkpoint.folder), sparsity=0.6, min_keep=2)
    saved = save(model, tmp_path, tokenizer_folder)
    found = inspect(saved, TEXT)
    assert (found.rule, found.start, found.levels, found.settings) == ("topk", 0.6, (), {"min_keep": 2})
    found = inspect(saved, TEXT, sparsity=0.3)
    assert (found.rule, found.start, found.settings) == ("topk", 0.3, {"min_keep": 2})
    assert "layers. With min_keep = 2. Scores" in render_attention(found)
    assert "layers. Scores" in render_attention(inspect(checkpoint, TEXT))


def test_another_sparsity_takes_the_place_of_a_models_own_strength(checkpoint, tmp_path, tokenizer_folder):
    from transformers import AutoModel

    model = crisp.sparsify(AutoModel.from_pretrained(checkpoint.folder), rule="window", window=3, stride=4)
    saved = save(model, tmp_path, tokenizer_folder)
    found = inspect(saved, TEXT, sparsity=0.5)
    assert found.levels[int(found.start)].label == "sparsity 50%"
    model = crisp.sparsify(AutoModel.from_pretrained(checkpoint.folder), rule="top_p", p=0.7)
    with pytest.raises(ConfigurationError, match=r"would ignore sparsity=0\.5"):
        inspect(save(model, tmp_path, tokenizer_folder), TEXT, sparsity=0.5)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"topk", "percentile"}))
def test_other_rules_bring_what_the_operator_keeps(checkpoint, rule):
    found = inspect(checkpoint, TEXT, rule=rule)
    traits = RULES[rule]
    assert len(found.levels) == (len({level.label for level in found.levels}) if traits.strengths else 1)
    settings = {traits.strengths[0]: traits.settings[traits.strengths[0]]} if traits.strengths else {}
    level = found.levels[int(found.start)]
    for layer, keep in zip(found.layers, level.keep, strict=True):
        expected, weights = by_operator(layer.scores, rule=rule, **settings)
        if rule != "random":  # which draws by the layer
            np.testing.assert_array_equal(keep, expected)
        assert keep.sum() == expected.sum()
        if level.weights is not None:
            shown = level.weights[found.layers.index(layer)]
            np.testing.assert_allclose(shown, weights, atol=1e-6)
    assert (level.weights is not None) == (rule in ("temperature", "entmax15", "sparsemax"))


def test_a_causal_model_shows_its_future_as_not_allowed(tmp_path, tokenizer_folder):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    checkpoint = save(GPT2Model(config), tmp_path, tokenizer_folder)
    scores = inspect(checkpoint, TEXT).layers[0].scores
    future = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    np.testing.assert_array_equal(np.isinf(scores), np.broadcast_to(future, scores.shape))
    with pytest.raises(ConfigurationError, match="would change earlier outputs"):
        inspect(checkpoint, TEXT, rule="percentile")


def test_what_is_no_text_to_itself_is_refused(tmp_path, tokenizer_folder):
    from transformers import T5Config, T5Model, ViTConfig, ViTModel

    images = ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    )
    two = T5Model(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="ViTModel reads pixel_values"):
        inspect(save(images, tmp_path / "vit", tokenizer_folder), TEXT)
    with pytest.raises(UnsupportedModelError, match="T5Model has two sequences"):
        inspect(save(two, tmp_path / "t5", tokenizer_folder), TEXT)


def test_an_empty_text_is_refused(checkpoint):
    with pytest.raises(ConfigurationError, match="text is empty"):
        inspect(checkpoint, " ")


def test_a_long_text_is_cut_and_the_page_says_so(checkpoint):
    found = inspect(checkpoint, "good " * 150)
    assert (len(found.tokens), found.cut) == (MAX_TOKENS, 24)
    assert "(24 more were cut off)" in render_attention(found)


def test_the_page_has_no_text_as_markup(checkpoint):
    page = render_attention(inspect(checkpoint, "<script>alert(1)</script> film"))
    assert page.count("<script") == 2
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("rule", ["topk", "temperature"])
def test_thirty_tokens_fit_in_a_page_that_opens_anywhere(rule):
    """As large as minilm-l6: 6 layers of 12 heads."""
    random = np.random.default_rng(0)
    layers = tuple(
        InspectedLayer(f"layer.{number}", random.normal(size=(12, 30, 30)).astype(np.float32)) for number in range(6)
    )
    keep = tuple(random.random(layer.scores.shape) < 0.5 for layer in layers)
    weights = tuple(softmax(layer.scores, axis=-1) for layer in layers)
    levels = () if rule == "topk" else tuple(Level(str(number), keep, weights) for number in range(10))
    found = Inspection("made-up", "a text", ("token",) * 30, 0, rule, {}, layers, levels, 0.0)
    assert len(render_attention(found).encode()) < 2_000_000


def test_the_command_writes_the_page(checkpoint, tmp_path):
    page = tmp_path / "page.html"
    arguments = [
        "inspect",
        str(checkpoint.folder),
        TEXT,
        "--rule",
        "percentile",
        "--sparsity",
        "0.5",
        "--out",
        str(page),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"Attention page: {page}" in done.output
    assert page.read_text(encoding="utf-8") == render_attention(inspect(checkpoint, TEXT, None, "percentile", 0.5))
