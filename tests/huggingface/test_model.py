from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import crisp_attention as crisp
from crisp_attention.state import attending
from paired_dropout import paired_dropout

RULES = ["percentile", "topk", "random"]


def batch(rows: int = 3, length: int = 12, seed: int = 0):
    """Token ids and a mask with rows of different length."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 3 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def test_sparsity_zero_equals_the_stock_model(model):
    stock = logits(model, **batch())
    assert torch.equal(logits(crisp.sparsify(model, sparsity=0.0), **batch()), stock)
    with crisp.monitor(model):  # watched, attention takes the operator's own path
        torch.testing.assert_close(logits(model, **batch()), stock, atol=1e-6, rtol=0)


def test_sparsity_zero_trains_like_the_stock_model(model, monkeypatch):
    """Same dropout, same gradients: a dense arm is the stock model."""
    gradients = []
    for sparse in (False, True):
        if sparse:
            crisp.sparsify(model, sparsity=0.0)
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        with paired_dropout(monkeypatch):
            model(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for stock, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_changes_outputs_and_densify_restores_them_exactly(model, rule):
    stock = logits(model, **batch())
    implementation, settings = model.config._attn_implementation, model.config.to_dict()
    assert crisp.sparsify(model, sparsity=0.7, rule=rule) is model
    sparse = logits(model, **batch())
    assert not torch.allclose(sparse, stock, atol=1e-6)
    with crisp.dense(model):
        assert torch.equal(logits(model, **batch()), stock)
        with crisp.dense(model):
            pass
        assert torch.equal(logits(model, **batch()), stock)
    assert torch.equal(logits(model, **batch()), sparse)
    crisp.densify(model)
    assert torch.equal(logits(model, **batch()), stock)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == settings
    assert not any("crisp" in name for module in model.modules() for name in module.__dict__)
    assert not model._forward_pre_hooks


def test_dense_ends_with_its_block_even_on_errors(bert):
    crisp.sparsify(bert, sparsity=0.7)
    sparse = logits(bert, **batch())
    with pytest.raises(RuntimeError), crisp.dense(bert):
        raise RuntimeError
    assert torch.equal(logits(bert, **batch()), sparse)


def test_densify_of_a_dense_model_does_nothing(bert):
    assert crisp.densify(bert) is bert
    assert bert.config._attn_implementation == "sdpa"


def test_sparsify_again_replaces_the_settings(bert):
    stock = logits(bert, **batch())
    crisp.sparsify(bert, sparsity=0.9)
    crisp.sparsify(bert, sparsity=0.3, rule="percentile")
    assert bert.config.crisp_attention["sparsity"] == 0.3
    fresh = crisp.densify(copy.deepcopy(bert))
    assert torch.equal(logits(fresh, **batch()), stock)


@pytest.mark.parametrize(("apply", "in_training", "in_evaluation"), [("train", True, False), ("eval", False, True)])
def test_apply_is_a_setting(bert, apply, in_training, in_evaluation):
    crisp.sparsify(bert, sparsity=0.5, apply=apply)
    with crisp.monitor(bert) as monitor:
        bert.train()
        bert(**batch())
        bert.eval()
        bert(**batch())
    assert (monitor.mean(training=True) > 0.3) is in_training
    assert (monitor.mean(training=False) > 0.3) is in_evaluation


@pytest.mark.parametrize("rule", RULES)
def test_load_restores_the_settings(model, rule, tmp_path):
    crisp.sparsify(model, sparsity=0.6, rule=rule)
    sparse = logits(model, **batch())
    model.save_pretrained(tmp_path)
    loaded = crisp.load(AutoModelForSequenceClassification, tmp_path).eval()
    assert torch.equal(logits(loaded, **batch()), sparse)
    crisp.densify(loaded)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("rule", ["percentile", "topk"])
def test_plain_from_pretrained_is_sparse_too(model, rule, tmp_path):
    crisp.sparsify(model, sparsity=0.6, rule=rule)
    sparse = logits(model, **batch())
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, **batch()), sparse)
    # What was loaded plainly and saved again is not dense either.
    plain.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, **batch()), sparse)


def test_plain_from_pretrained_refuses_random(model, tmp_path):
    """It could draw neither by layer nor by step: the same masks in all of them would be no control."""
    crisp.sparsify(model, sparsity=0.6, rule="random").save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(crisp.ConfigurationError, match=r"crisp_attention\.load"):
        plain(**batch())


@pytest.mark.slow
def test_a_saved_model_is_not_silently_dense_without_the_package(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.6).save_pretrained(tmp_path)
    code = f"""
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "crisp" in done.stderr


@pytest.mark.parametrize("name", ["missing", "missing/below"])
def test_load_says_that_a_folder_is_missing(tmp_path, name):
    with pytest.raises(crisp.ConfigurationError, match=rf"There is no folder .*{name}'"):
        crisp.load(AutoModelForSequenceClassification, tmp_path / name)


def test_load_refuses_a_checkpoint_without_settings(tiny_folders):
    with pytest.raises(crisp.ConfigurationError, match="saved without 'crisp_attention' settings"):
        crisp.load(AutoModelForSequenceClassification, tiny_folders["bert"])


def test_densified_model_saves_without_a_trace(bert, tmp_path):
    crisp.densify(crisp.sparsify(bert, sparsity=0.6)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "crisp_attention" not in content
    assert "attn_implementation" not in content


@pytest.mark.slow
@pytest.mark.parametrize("import_first", [True, False])
def test_attn_implementation_the_transformers_way(tiny_folders, import_first):
    """The name is known whichever of the two packages was imported first."""
    imports = ["import crisp_attention", "from transformers import AutoConfig, AutoModelForSequenceClassification"]
    if not import_first:
        imports.reverse()
    code = (
        "\n".join(imports)
        + f"""
import torch
config = AutoConfig.from_pretrained({str(tiny_folders["bert"])!r})
config.crisp_attention = crisp_attention.SparsityConfig(sparsity=0.5).to_dict()
model = AutoModelForSequenceClassification.from_config(config, attn_implementation="crisp")
with crisp_attention.monitor(model.eval()) as monitor, torch.no_grad():
    model(input_ids=torch.arange(5, 15)[None])
assert 0.4 < monitor.mean(training=False) < 0.6
assert crisp_attention.check(model).ok
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_implementation_without_settings_raises_at_the_first_call(tiny_folders):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert"], attn_implementation="crisp")
    with pytest.raises(crisp.ConfigurationError, match=r"Call crisp_attention\.sparsify"):
        model(**batch())


def test_two_models_with_different_settings_live_side_by_side(tiny_folders):
    first, second = (AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert"]).eval() for _ in range(2))
    crisp.sparsify(first, sparsity=0.2)
    crisp.sparsify(second, sparsity=0.8)
    with crisp.monitor(first) as low, crisp.monitor(second) as high:
        logits(first, **batch())
        logits(second, **batch())
    assert low.mean(training=False) < 0.35
    assert high.mean(training=False) > 0.65


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_sparse_and_independent(bert, how):
    crisp.sparsify(bert, sparsity=0.7, rule="random", seed=5)
    sparse = logits(bert, **batch())
    twin = how(bert)
    assert torch.equal(logits(twin, **batch()), sparse)
    crisp.densify(twin)
    assert torch.equal(logits(bert, **batch()), sparse)
    assert not torch.allclose(logits(twin, **batch()), sparse, atol=1e-6)


def test_random_masks_depend_on_step_not_on_global_state(bert):
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bert.train()
    state = torch.random.get_rng_state()
    first, second = bert(**batch()).logits, bert(**batch()).logits
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, second)
    crisp.set_forward_index(bert, 0)
    assert torch.equal(bert(**batch()).logits, first)


def test_output_attentions_returns_sparse_weights(model):
    crisp.sparsify(model, sparsity=0.5)
    with torch.no_grad():
        attentions = model(**batch(), output_attentions=True).attentions
    assert len(attentions) == 2
    weights = attentions[0]
    assert weights.shape == (3, 4, 12, 12)
    assert ((weights > 0).sum(-1)[0] == 6).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 12))
    with crisp.dense(model), torch.no_grad():
        dense = model(**batch(), output_attentions=True).attentions[0]
    assert (dense[0] > 0).all()


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
def test_models_that_never_call_us_are_refused_and_left_alone(kind):
    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30
    )
    model = AutoModelForSequenceClassification.from_config(config)
    before = model.config.to_dict()
    with pytest.raises(crisp.UnsupportedModelError, match="never calls"):
        crisp.sparsify(model, sparsity=0.5)
    assert model.config.to_dict() == before


def gemma2():
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=64, vocab_size=50, attn_logit_softcapping=2.0,
        )
    ).eval()  # fmt: skip


def test_arguments_that_would_be_dropped_are_refused(monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2

    model = gemma2()
    stock = modeling_gemma2.Gemma2Attention.forward

    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs, unheard_of=1)

    monkeypatch.setattr(modeling_gemma2.Gemma2Attention, "forward", forward)
    with pytest.raises(crisp.UnsupportedArgumentError, match="'unheard_of'"):
        crisp.sparsify(model, sparsity=0.5)
    assert model.config._attn_implementation != "crisp"


def test_a_model_whose_scores_differ_in_secret_is_refused(bert, monkeypatch):
    """Nothing but the outputs shows that a module's own eager attention adds something of its own."""
    from transformers.models.bert import modeling_bert

    stock = modeling_bert.BertSelfAttention.forward

    def forward(self, hidden_states, *args, **kwargs):
        secret = 9.0 if self.config._attn_implementation != "crisp" else 1.0
        return stock(self, secret * hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_bert.BertSelfAttention, "forward", forward)
    with torch.no_grad():
        for layer in bert.bert.encoder.layer:
            layer.attention.self.query.weight *= 50  # far from uniform attention, as trained models are
            layer.attention.self.value.weight *= 50
    with pytest.raises(crisp.UnsupportedModelError, match="with every score kept differs"):
        crisp.sparsify(bert, sparsity=0.5)
    assert bert.config._attn_implementation == "sdpa"
    assert "crisp_attention" not in bert.config.to_dict()


def test_a_model_that_leaves_its_mask_out_and_was_eager_is_not_causal():
    """Eager attention takes no mask for "attend to all", whatever SDPA would make of the module."""
    from transformers import SplinterConfig, SplinterModel

    model = SplinterModel(
        SplinterConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
            initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    assert model.config._attn_implementation == "eager"
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        stock = model(ids).last_hidden_state
        crisp.sparsify(model, sparsity=0.0)
        with crisp.monitor(model):
            torch.testing.assert_close(model(ids).last_hidden_state, stock, atol=1e-5, rtol=0)


def test_settings_reach_every_configuration_of_a_composite_model(tmp_path):
    import zoo

    model = zoo.build("clip").float()
    before = [
        model.config.to_dict(),
        *(part.to_dict() for part in (model.text_model.config, model.vision_model.config)),
    ]
    crisp.sparsify(model, sparsity=0.5)
    for part in (model.config, model.config.text_config, model.config.vision_config, model.vision_model.config):
        assert part.crisp_attention["sparsity"] == 0.5
    # A part that is saved alone does not come back dense in silence either.
    copy.deepcopy(model.vision_model).save_pretrained(tmp_path)
    plain = type(model.vision_model).from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "crisp"
    crisp.densify(model)
    after = [model.config.to_dict(), *(part.to_dict() for part in (model.text_model.config, model.vision_model.config))]
    assert after == before


def test_pooling_heads_that_stay_dense_are_named():
    import zoo

    model = zoo.build("siglip_vision_model").float()
    with pytest.warns(UserWarning, match=r"head\.attention"):
        crisp.sparsify(model, sparsity=0.5)
    assert crisp.check(model).dense == ("head.attention",)


def test_a_failed_sparsify_leaves_earlier_settings_in_force(bert):
    crisp.sparsify(bert, sparsity=0.5)
    sparse = logits(bert, **batch())
    with pytest.raises(crisp.ConfigurationError):
        crisp.sparsify(bert, sparsity=1.5)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        crisp.sparsify(bert, sparsity=0.9, inputs={"no_such_input": 1})
    assert torch.equal(logits(bert, **batch()), sparse)
    assert bert.config.crisp_attention["sparsity"] == 0.5


def test_config_and_keywords_together_are_refused(bert):
    with pytest.raises(crisp.ConfigurationError, match="not both"):
        crisp.sparsify(bert, crisp.SparsityConfig(), sparsity=0.5)


@pytest.mark.parametrize("verb", [crisp.check, lambda model: crisp.dense(model).__enter__()], ids=["check", "dense"])
def test_verbs_on_a_dense_model_say_so(bert, verb):
    with pytest.raises(crisp.ConfigurationError, match="not sparsified"):
        verb(bert)


def test_gradient_checkpointing_gives_the_same_gradients(bert):
    gradients = []
    for checkpointing in (False, True):
        crisp.sparsify(bert, sparsity=0.5, rule="random")
        if checkpointing:
            bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        bert.train()
        bert.zero_grad()
        torch.manual_seed(0)
        bert(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        gradients.append([p.grad.clone() for p in bert.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_switching_to_another_implementation_is_not_silently_dense(bert):
    crisp.sparsify(bert, sparsity=0.5)
    sparse = logits(bert, **batch())
    bert.set_attn_implementation("sdpa")
    with pytest.raises(crisp.ConfigurationError, match="switched to attn_implementation='sdpa'"):
        bert(**batch())
    crisp.sparsify(bert, sparsity=0.5)
    assert torch.equal(logits(bert, **batch()), sparse)
    crisp.densify(bert)
    bert.set_attn_implementation("eager")
    bert(**batch())


def test_a_model_that_shares_its_configuration_does_not_become_sparse_with_it(bert):
    teacher = type(bert)(bert.config).eval()
    stock = logits(teacher, **batch())
    crisp.sparsify(bert, sparsity=0.8)
    with pytest.raises(crisp.ConfigurationError, match="shares its configuration object"):
        teacher(**batch())
    crisp.densify(bert)
    assert torch.equal(logits(teacher, **batch()), stock)


def test_a_causal_mask_of_ones_own_is_no_way_around_the_refusal(bert):
    crisp.sparsify(bert, sparsity=0.5, rule="percentile")
    triangle = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(crisp.ConfigurationError, match="later tokens would change earlier outputs"):
        bert(input_ids=batch()["input_ids"], attention_mask=triangle)


def test_the_cross_attention_of_a_causal_decoder_counts_as_causal():
    from transformers import BartConfig, BartModel

    model = BartModel(
        BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
        )
    )  # fmt: skip
    with pytest.raises(crisp.ConfigurationError, match="Use rule='topk'"):
        crisp.sparsify(model, sparsity=0.5, rule="percentile", layers=[2])
    crisp.sparsify(model, sparsity=0.5, rule="percentile", layers=[0])


@pytest.mark.parametrize("lowest", [-1e4, -1e9, -65504.0])
def test_additive_masks_hide_padding_however_they_write_it(bert, lowest):
    crisp.sparsify(bert, sparsity=0.5, rule="percentile")
    given = batch()
    hidden = (1.0 - given["attention_mask"][:, None, None, :].float()).expand(-1, 1, 12, -1) * lowest
    ours = logits(bert, input_ids=given["input_ids"], attention_mask=hidden)
    torch.testing.assert_close(ours, logits(bert, **given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [0.8, {"sparsity": 0.8}, "topk"])
def test_settings_without_a_name_are_told_how_to_be_given(bert, config):
    with pytest.raises(crisp.ConfigurationError, match="Expected a SparsityConfig, got"):
        crisp.sparsify(bert, config)


def test_other_settings_hold_within_a_block_and_are_undone_after_it(model):
    """What an arm does that is evaluated otherwise than trained."""
    own, other = crisp.SparsityConfig(sparsity=0.5), crisp.SparsityConfig(rule="bottomk", layer_sparsity=[0.8, 0.0])
    sentences = batch()
    wanted = {config: logits(crisp.sparsify(model, config), **sentences) for config in (other, own)}
    with attending(model, other):
        assert torch.equal(logits(model, **sentences), wanted[other])
        with crisp.dense(model):
            dense = logits(model, **sentences)
    assert torch.equal(logits(model, **sentences), wanted[own])
    with attending(model, None):
        assert torch.equal(logits(model, **sentences), wanted[own])
    with pytest.raises(KeyError), attending(model, other):
        raise KeyError
    assert torch.equal(logits(model, **sentences), wanted[own])
    torch.testing.assert_close(logits(crisp.densify(model), **sentences), dense, atol=1e-6, rtol=0)
