from __future__ import annotations

import copy

import pytest
import torch
from transformers import BartConfig, BartModel, ViTConfig, ViTModel

import crisp_attention as crisp
from fragments import words


def test_names_every_layer_and_what_it_realises(model):
    report = crisp.check(crisp.sparsify(model, sparsity=0.5, rule="percentile"))
    assert report.ok
    assert [layer.index for layer in report.layers] == [0, 1]
    for layer in report.layers:
        assert model.get_submodule(layer.name) is not None
        assert layer.heads == 4
        assert layer.realised == pytest.approx(0.5, abs=0.02)
        assert not layer.causal
        assert not layer.cross
    assert str(report).count("of 0.500 requested") == repr(report).count("of 0.500 requested") == 2
    shown = words(report._repr_html_())
    assert shown.startswith(f"ok {type(model).__name__} rule percentile, sparsity 0.5, in training and evaluation.")
    assert all(f"{layer.index} {layer.name} 4 0.500 {layer.realised:.3f}" in shown for layer in report.layers)
    assert f"computed by {report.layers[0].backend}" in shown


def test_names_an_untouched_layer(bert):
    """A layer whose attention is computed some other way is found by name."""

    class OtherSelfAttention(torch.nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states, None

    layer = bert.bert.encoder.layer[1].attention
    stock = layer.self
    layer.self = OtherSelfAttention()
    with pytest.raises(crisp.UnsupportedModelError, match=r"bert\.encoder\.layer\.1\.attention\.self"):
        crisp.sparsify(bert, sparsity=0.5)
    layer.self = stock
    crisp.sparsify(bert, sparsity=0.5)
    layer.self = OtherSelfAttention()
    report = crisp.check(bert)
    assert not report.ok
    assert "bert.encoder.layer.1.attention.self" in report.problems[0]
    assert "NOT SERVED" in str(report)
    shown = words(report._repr_html_())
    assert shown.startswith("not served BertForSequenceClassification")
    assert report.problems[0] in shown


def test_names_what_did_not_run_and_so_was_not_checked(bert):
    bert.spare = copy.deepcopy(bert.bert.encoder.layer[0].attention)
    report = crisp.check(crisp.sparsify(bert, sparsity=0.5))
    assert report.ok
    assert report.idle
    assert all(name.startswith("spare") for name in report.idle)
    told = f"{report.idle[0]}: did not run on these inputs, not checked"
    assert told in repr(report)
    assert told in words(report._repr_html_())


@pytest.mark.parametrize("how", ["sdpa", "softmax"])
def test_names_a_layer_that_attends_under_another_name(bert, how):
    class Mixer(torch.nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            x = hidden_states[:, None]
            if how == "sdpa":
                return torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0], None
            return (torch.nn.functional.softmax(x @ x.transpose(-1, -2), dim=-1) @ x)[:, 0], None

    bert.bert.encoder.layer[1].attention.self = Mixer()
    with pytest.raises(crisp.UnsupportedModelError, match=r"stay dense: bert\.encoder\.layer\.1\.attention\.self"):
        crisp.sparsify(bert, sparsity=0.5)


def test_leaves_modes_random_state_and_results_alone(bert):
    crisp.sparsify(bert, sparsity=0.5)
    bert.train()
    bert.bert.encoder.layer[0].eval()
    modes = [module.training for module in bert.modules()]
    state = torch.random.get_rng_state()
    crisp.check(bert)
    assert [module.training for module in bert.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in bert.parameters())


def test_probes_the_sparse_mode_whatever_apply_says(bert):
    crisp.sparsify(bert, sparsity=0.5, apply="train")
    assert all(layer.realised > 0.4 for layer in crisp.check(bert).layers)


def test_images_are_probed_by_default():
    model = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
                  patch_size=8)
    )  # fmt: skip
    report = crisp.check(crisp.sparsify(model, sparsity=0.5, rule="percentile"))
    assert report.ok
    assert report.layers[0].realised == pytest.approx(0.5, abs=0.02)


def test_inputs_can_be_given(bert):
    crisp.sparsify(bert, sparsity=0.5)
    report = crisp.check(bert, {"input_ids": torch.arange(5, 15)[None]})
    assert report.layers[0].realised == 0.5
    assert report.ok


def test_a_model_that_was_only_loaded_is_checked_as_any_other(bert, tmp_path):
    """It said "ok" of no layer at all."""
    crisp.sparsify(bert, sparsity=0.5).save_pretrained(tmp_path)
    loaded = type(bert).from_pretrained(tmp_path)
    report = crisp.check(loaded)
    assert report == crisp.check(bert)
    assert len(report.layers) == 2


@pytest.mark.parametrize(
    ("settings", "requested"),
    [
        ({"sparsity": 0.5, "heads": [0]}, 0.5),
        ({"sparsity": 0.5, "rule": "temperature"}, None),
        ({"sparsity": 0.5, "schedule": {"kind": "linear"}}, 0.5),
    ],
    ids=str,
)
def test_requested_and_realised_speak_of_the_same_pairs(bert, settings, requested):
    for layer in crisp.check(crisp.sparsify(bert, **settings)).layers:
        assert layer.requested == requested
        assert layer.realised == pytest.approx(requested or 0.0, abs=0.06)


def test_requested_is_what_a_schedule_asks_for_now(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    for progress in (0.0, 0.5):
        crisp.set_progress(bert, progress)
        for layer in crisp.check(bert).layers:
            assert layer.requested == pytest.approx(0.8 * progress)
            assert layer.realised == pytest.approx(layer.requested, abs=0.06)


@pytest.mark.parametrize("given", [True, False])
def test_two_texts_of_one_length_are_two_sequences_all_the_same(given):
    """In cross-attention a rule over all queries would tell a decoder of its later tokens."""
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    model = BartModel(BartConfig(vocab_size=50, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)).eval()
    ids = torch.arange(5, 15).expand(2, 10)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if given else {"input_ids": ids}
    # In calling order: the encoder's two layers, then self- and cross-attention by turns.
    assert crisp.check(crisp.sparsify(model, sparsity=0.5, inputs=inputs), inputs).layers[3].cross
    crisp.densify(model)
    with pytest.raises(crisp.ConfigurationError, match="of a causal model"):
        crisp.sparsify(model, sparsity=0.5, rule="percentile", layers=[3, 5], inputs=inputs)
