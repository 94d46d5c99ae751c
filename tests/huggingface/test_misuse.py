"""What somebody might do to a sparse model, and must not get a wrong number from in silence."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    SwinConfig,
    SwinModel,
)

import crisp_attention as crisp
from small_models import tiny_config

IDS = torch.randint(5, 20, (2, 12), generator=torch.Generator().manual_seed(0))
BLOCKS = torch.block_diag(torch.ones(7, 7), torch.ones(5, 5)).bool().expand(2, 1, 12, 12)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


@pytest.fixture
def trainable(bert):
    """A classifier in training mode without dropout, checkpointing its layers."""
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bert.enable_input_require_grads()
    return bert.train()


# Masks


def test_a_mask_that_hides_by_a_small_number_is_no_bias():
    """Swin adds -100: of its shifted windows 44% of the pairs are hidden, and would be counted as valid."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    model = SwinModel(SwinConfig(**sizes)).eval()
    with pytest.raises(crisp.UnsupportedModelError, match=r"adds -100 to scores.*count and rank hidden pairs"):
        crisp.sparsify(model, sparsity=0.5)
    assert crisp.audit(model).verdict == "refused"


def test_a_mask_of_pairs_must_be_bool_or_additive(bert):
    crisp.sparsify(bert, sparsity=0.2)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.long)
    with pytest.raises(crisp.ConfigurationError, match=r"must be bool .* got torch.int64 \(2, 1, 12, 12\). Call .bool"):
        bert(IDS, attention_mask=mask)
    bert(IDS, attention_mask=mask.bool())


@torch.no_grad()
def test_padding_behind_a_prefix_does_not_enter_the_percentile(bert):
    """With more keys than queries, as prefix tuning has them, padded queries are still known."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for name, parameter in bert.named_parameters():
        if "weight" in name and "Norm" not in name:
            parameter.mul_(10)
    prefixed = peft.get_peft_model(bert, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    crisp.sparsify(prefixed, sparsity=0.5, rule="percentile")
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    alone = prefixed(input_ids=IDS[1:, :7], attention_mask=mask[1:, :7]).logits[0]
    torch.testing.assert_close(prefixed(input_ids=IDS, attention_mask=mask).logits[1], alone, atol=1e-5, rtol=1e-4)


def test_texts_packed_in_a_row_do_not_share_a_threshold(bert):
    crisp.sparsify(bert, sparsity=0.5, rule="percentile")
    with pytest.raises(crisp.ConfigurationError, match=r"Several texts are packed in a row.*Use rule='topk'"):
        bert(IDS, attention_mask=BLOCKS)
    crisp.sparsify(bert, sparsity=0.5, rule="topk")
    bert(IDS, attention_mask=BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one way", "packed"])
def test_a_compiled_model_refuses_masks_that_rules_over_rows_cannot_serve(bert, kind):
    model = crisp.sparsify(bert, rule="percentile", sparsity=0.7)
    compiled = torch.compile(model, backend="eager")
    both = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    mask = (
        both.tril() if kind == "one way" else torch.block_diag(both[0, 0, :7, :7], both[0, 0, :5, :5]).expand_as(both)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, attention_mask=both).logits, model(IDS, attention_mask=both).logits)
        with pytest.raises(RuntimeError, match="hides later tokens from earlier ones, or packs several texts"):
            compiled(IDS, attention_mask=mask)
    torch._dynamo.reset()


def test_counting_padding_would_tell_a_causal_model_of_its_future():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SMALL))
    with pytest.raises(crisp.ConfigurationError, match=r"number of later tokens.*Use count_padding=False"):
        crisp.sparsify(model, sparsity=0.5, count_padding=True)


# Another implementation, another model, another state


def test_switching_a_part_of_a_composite_model_is_not_silently_dense():
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 64, "eos_token_id": 2},
        vision_config={**SMALL, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    model = crisp.sparsify(CLIPModel(config).eval(), sparsity=0.8)
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "sdpa"})
    pixels = torch.randn(2, 3, 16, 16)
    with pytest.raises(crisp.ConfigurationError, match="switched to attn_implementation='sdpa'"):
        model(input_ids=IDS, pixel_values=pixels)
    with pytest.raises(crisp.ConfigurationError, match="switched to attn_implementation='sdpa'"):
        model.get_image_features(pixel_values=pixels)
    crisp.densify(model)
    model.set_attn_implementation("sdpa")
    model(input_ids=IDS, pixel_values=pixels)


def test_the_inner_model_of_a_switched_model_is_not_silently_dense(bert):
    crisp.sparsify(bert, sparsity=0.5)
    bert.set_attn_implementation("sdpa")
    with pytest.raises(crisp.ConfigurationError, match="switched to attn_implementation='sdpa'"):
        bert.bert(IDS)


def test_two_sparse_models_do_not_share_a_configuration_object(bert, tmp_path):
    first = crisp.sparsify(bert, sparsity=0.5)
    second = type(bert)(bert.config)
    with pytest.raises(crisp.ConfigurationError, match=r"shared with another sparsified.*copy.deepcopy\(config\)"):
        crisp.sparsify(second, sparsity=0.9)
    first.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["crisp_attention"]["sparsity"] == 0.5
    assert first(IDS).logits.shape == (2, 2)
    crisp.densify(first)
    crisp.sparsify(second, sparsity=0.9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_of_a_sparse_models_configuration_is_free(bert, copied):
    crisp.sparsify(bert, sparsity=0.5)
    other = AutoModelForSequenceClassification.from_config(copied(bert.config))
    crisp.sparsify(other, sparsity=0.9)
    assert bert.config.crisp_attention["sparsity"] == 0.5


def test_check_tells_the_settings_in_force_whatever_the_configuration_says(bert):
    crisp.sparsify(bert, sparsity=0.8)
    bert.config.crisp_attention["sparsity"] = 0.2
    assert crisp.check(bert).config.sparsity == 0.8


def test_progress_set_on_a_part_of_a_model_reaches_all_of_it(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    crisp.set_progress(bert.bert.encoder.layer[0], 0.5)
    assert bert.config.crisp_attention["progress"] == 0.5
    with crisp.monitor(bert.train()) as seen:
        bert(IDS)
    assert set(seen.realised(training=True).values()) == {1 - 7 / 12}


@pytest.mark.parametrize("model", ["transformers", "torch"])
def test_settings_that_are_given_anew_wait_for_progress_anew(bert, model):
    module, inputs = bert, (IDS,)
    if model == "torch":
        module, inputs = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True), (torch.randn(2, 8, 16),)
    settings = {"sparsity": 0.8, "schedule": {"kind": "linear"}}
    crisp.set_progress(crisp.sparsify(module, **settings), 0.5)
    module.train()(*inputs)
    crisp.sparsify(module, **settings)
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it how far training has come"):
        module(*inputs)


def test_a_model_made_sparse_in_inference_mode_can_follow_a_schedule(bert):
    with torch.inference_mode():
        crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    crisp.set_progress(bert, 0.5)
    with crisp.monitor(bert) as seen:
        bert.train()(IDS).logits.sum().backward()
    assert 0.2 < seen.mean(training=True) < 0.6  # half of the way


def test_rules_by_place_do_not_serve_the_cross_attention_of_a_decoder_built_from_a_sparse_encoder(tmp_path):
    model = BertModel(tiny_config("bert"))
    crisp.sparsify(model, rule="window", window=1).save_pretrained(tmp_path)
    both = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path, tmp_path).eval()
    with pytest.raises(crisp.ConfigurationError, match="must know which layers are cross-attention"):
        both(input_ids=IDS, decoder_input_ids=IDS)


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", ["dense", "progress", "settings"])
def test_recomputing_other_attention_than_the_forward_had_is_refused(trainable, reentrant, change):
    schedule = {"kind": "linear"} if change == "progress" else None
    crisp.sparsify(trainable, sparsity=0.8, **({} if schedule is None else {"schedule": schedule}))
    if schedule is not None:
        crisp.set_progress(trainable, 0.2)
    trainable.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if change == "dense":
        with crisp.dense(trainable):
            loss = trainable(IDS, labels=torch.tensor([0, 1])).loss
    else:
        loss = trainable(IDS, labels=torch.tensor([0, 1])).loss
    if change == "progress":
        crisp.set_progress(trainable, 0.9)
    elif change == "settings":
        crisp.sparsify(trainable, sparsity=0.5)
    # Without the reentrant form torch itself may notice first that shapes of what it saved differ.
    with pytest.raises((crisp.ConfigurationError, torch.utils.checkpoint.CheckpointError)):
        loss.backward()


def test_looking_at_a_dense_model_between_forward_and_backward_is_allowed(trainable):
    crisp.sparsify(trainable, sparsity=0.8)
    trainable.gradient_checkpointing_enable({"use_reentrant": True})
    loss = trainable(IDS, labels=torch.tensor([0, 1])).loss
    with crisp.dense(trainable), torch.no_grad():
        trainable.eval()(IDS)
    trainable.train()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable.parameters() if p.grad is not None)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_under_autocast_is_no_other_model(bert, seed):
    """Rounding to half precision is not something that crisp attention does not know of."""
    torch.manual_seed(seed)
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert crisp.check(crisp.sparsify(bert.eval(), sparsity=0.5)).ok


def test_sparsify_seeds_no_stream_but_the_one_that_it_puts_back(bert, monkeypatch):
    """Of a GPU it would put none back: every seed would drop the same weights there."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded every device"))
    before = torch.random.get_rng_state()
    crisp.sparsify(bert, sparsity=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings", [{"rule": "block_topk", "query_block": 1, "key_block": 2}, {"rule": "topk"}], ids=str
)
def test_a_cache_with_room_behind_the_text_changes_nothing(settings):
    """Queries are not the last of its places."""
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": 50, "num_key_value_heads": 4}
    model = crisp.sparsify(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), sparsity=0.5, **settings)
    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        with torch.no_grad(), crisp.monitor(model) as monitor:
            first = model(IDS, past_key_values=cache, use_cache=True)
            then = model(IDS[:, :1], past_key_values=first.past_key_values, use_cache=True)
        found.append((first.logits, then.logits, monitor.mean(training=False)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0][2] > 0.3


# Models that were saved sparse and only loaded


@pytest.fixture
def saved(tmp_path):
    """A small Llama that was saved with topk at 50%, and what its logits then were."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=4, **SMALL)).eval()
    crisp.sparsify(model, sparsity=0.5).save_pretrained(tmp_path)
    with torch.no_grad():
        return tmp_path, model(IDS).logits


@pytest.mark.parametrize("ran", [False, True], ids=["just loaded", "after a pass"])
@pytest.mark.parametrize("how", ["sparsify", "check"])
def test_a_verb_that_fails_leaves_a_loaded_model_as_it_was(saved, tmp_path, ran, how):
    folder, logits = saved
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    if ran:
        model(IDS)
    if how == "sparsify":
        with pytest.raises(crisp.ConfigurationError, match="would change earlier outputs"):
            crisp.sparsify(model, rule="percentile")
    else:
        with pytest.raises(IndexError):
            crisp.check(model, inputs={"input_ids": torch.full((2, 8), 10_000)})
    assert model.config._attn_implementation == "crisp"
    assert dict(model.config.crisp_attention)["rule"] == "topk"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits)
    model.save_pretrained(tmp_path / "again")
    again = crisp.load(LlamaForCausalLM, tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sparse_model_that_was_loaded_dense_on_purpose_stays_dense(saved, implementation):
    folder, logits = saved
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    for verb in (crisp.monitor, crisp.dense):
        with pytest.raises(crisp.ConfigurationError, match="loaded dense with attn_implementation"), verb(model):
            pass
    for call in (lambda: crisp.check(model), lambda: crisp.set_progress(model, 0.5)):
        with pytest.raises(crisp.ConfigurationError, match="loaded dense with attn_implementation"):
            call()
    assert model.config._attn_implementation == implementation
    crisp.sparsify(model, sparsity=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits)
    ran = LlamaForCausalLM.from_pretrained(folder).eval()
    ran(IDS)
    ran.set_attn_implementation(implementation)
    with pytest.raises(crisp.ConfigurationError, match="loaded dense with attn_implementation"):
        crisp.check(ran)
    # `load` is never dense in silence.
    assert crisp.check(crisp.load(LlamaForCausalLM, folder, attn_implementation=implementation)).ok


def test_layers_of_a_model_that_was_cut_shorter_are_not_dense_in_silence(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **{**SMALL, "num_hidden_layers": 3}))
    crisp.sparsify(model, sparsity=0.5, layers=[-1]).save_pretrained(tmp_path)
    shorter = LlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    with pytest.raises(crisp.ConfigurationError, match="saved with 3 attention layers; num_hidden_layers is 2 now"):
        shorter(IDS)


# Random masks


def test_copies_of_data_parallel_are_refused(bert):
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    replica = bert._replicate_for_data_parallel()  # what DataParallel makes of each of its modules
    with pytest.raises(crisp.ConfigurationError, match=r"cannot serve nn\.DataParallel"):
        replica.train()(IDS)


def test_a_counter_that_a_compiled_hook_advanced_is_another_step(bert):
    """Past Dynamo's limit of recompilations layers run uncompiled behind a hook that still is compiled."""
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    bert.train()(IDS)
    state = next(iter(bert.modules()))
    layer = bert.bert.encoder.layer[0].attention.self
    with pytest.raises(crisp.ConfigurationError, match="the same masks again"):
        layer(torch.randn(2, 12, 32))
    crisp.set_forward_index(bert, 7)
    layer(torch.randn(2, 12, 32))
    from crisp_attention.state import shared_states

    shared_states(state)[0].forward_index.add_(1)  # all that a compiled hook does
    layer(torch.randn(2, 12, 32))


def test_a_whole_that_is_refused_leaves_its_sparse_part_as_it_was():
    """CLIP's text is causal, its pictures are not."""
    torch.manual_seed(0)
    vision = SMALL | {"image_size": 16, "patch_size": 4}
    config = CLIPConfig(text_config=SMALL | {"vocab_size": 40}, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    crisp.sparsify(model.vision_model, sparsity=0.5)
    given = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        before = model(**given).logits_per_image
    with pytest.raises(crisp.ConfigurationError, match="would change earlier outputs"):
        crisp.sparsify(model, rule="percentile")
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits_per_image, before)
    assert model.text_model.config._attn_implementation != "crisp"
    with crisp.monitor(model.vision_model) as seen, torch.no_grad():
        model(**given)
    assert seen.mean(training=False) == pytest.approx(0.5, abs=0.05)
    model.vision_model.set_attn_implementation("sdpa")
    with pytest.raises(crisp.ConfigurationError, match="was switched"):
        model(**given)
