"""Traps that were seen in someone's code: each has a test, here or where it belongs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    T5Config,
    T5ForConditionalGeneration,
)

import crisp_attention as crisp

RULES = ["percentile", "topk", "random"]

# The trap, and the tests that would find us in it: file (from tests/; this one if not said) and function.
PITFALLS = {
    "padding in the percentile": ["test_padding_does_not_enter_the_percentile"],
    "causal leak": ["test_causal_leak", "test_causal_models_refuse_the_percentile", "test_kv_cache_equals_no_cache"],
    "rows with no survivor": [
        "test_rows_without_a_survivor",
        "test_operator_gradients.py::test_fully_masked_rows_give_zeros_and_finite_gradients",
    ],
    "k = 1 kills the gradient": ["test_one_survivor_has_no_gradient_and_min_keep_is_the_choice"],
    "ties": ["test_ties_all_survive_in_any_order", "test_selection_happens_in_fp32"],
    "torch.quantile": ["test_more_than_two_to_the_24_pairs_and_half_precision"],
    "the mask contract": [
        "test_both_registries_know_the_name_and_masks_arrive",
        "test_masks_in_every_form_mean_the_same",
        "test_a_mask_of_none_on_a_causal_model_is_causal",
    ],
    "silent no-op": [
        "huggingface/test_model.py::test_models_that_never_call_us_are_refused_and_left_alone",
        "huggingface/test_check.py::test_names_an_untouched_layer",
    ],
    "dropped arguments": [
        "test_position_bias_is_ranked_not_dropped",
        "huggingface/test_zoo.py::test_an_operator_that_drops_an_argument_is_found_out",
        "huggingface/test_model.py::test_arguments_that_would_be_dropped_are_refused",
    ],
    "save and load": [
        "huggingface/test_model.py::test_load_restores_the_settings",
        "huggingface/test_model.py::test_plain_from_pretrained_is_sparse_too",
        "huggingface/test_model.py::test_a_saved_model_is_not_silently_dense_without_the_package",
    ],
    "output_attentions": ["huggingface/test_model.py::test_output_attentions_returns_sparse_weights"],
    "global registry": ["huggingface/test_model.py::test_two_models_with_different_settings_live_side_by_side"],
    "dropout and eval": [
        "test_operator.py::test_dropout_comes_after_selection_and_only_in_training",
        "huggingface/test_model.py::test_apply_is_a_setting",
    ],
    "gradient checkpointing": [
        "huggingface/test_model.py::test_gradient_checkpointing_gives_the_same_gradients",
        "huggingface/test_progress.py::test_gradient_checkpointing_recomputes_at_the_same_sparsity",
        "test_several_forwards_before_a_backward_under_checkpointing_are_refused",
    ],
    "resume": ["huggingface/test_callback_resuming.py::test_a_resumed_training_is_the_uninterrupted_one"],
    "torch.compile": ["huggingface/test_compile.py::test_few_whole_graphs_serve_six_lengths_and_twenty_schedule_steps"],
    "GQA and windows": [
        "test_operator.py::test_grouped_query_attention_equals_repeated_heads",
        "test_survivors_stay_within_the_models_own_window",
        "test_positions_in_a_cache_that_forgets_are_refused",
    ],
    "packed batches": ["test_packed_sequences_do_not_see_each_other", "test_unpadded_batches_are_refused"],
    "DDP": [
        "huggingface/test_ddp.py::test_gradients_are_those_of_one_process",
        "huggingface/test_ddp.py::test_processes_do_not_share_their_random_masks",
    ],
    "statistics libraries": [
        "experiment/statistics/test_sign_flip.py::test_the_error_rate_at_ten_seeds_is_what_it_promises",
        "experiment/statistics/test_statistics.py::test_global_randomness_is_left_alone",
    ],
    "best epoch": ["experiment/conclusions/test_analysis.py::test_numbers_are_those_of_the_last_epoch"],
}


@pytest.mark.parametrize("trap", PITFALLS)
def test_every_pitfall_has_its_tests(trap):
    for place in PITFALLS[trap]:
        file, _, function = place.rpartition("::")
        path = Path(__file__).parent / (file or Path(__file__).name)
        names = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        assert function in names, f"{trap}: {place} is gone"


def llama(**changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 64,
    } | changes  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_padding_does_not_enter_the_percentile(model, rule):
    """Logits are the same with 0, 7 and 100 extra pads, alone and in any batch."""
    crisp.sparsify(model, sparsity=0.8, rule=rule)
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 20, (length,), generator=draw) for length in (3, 9, 14, 20)]

    def run(which, pads):
        length = max(len(rows[index]) for index in which) + pads
        ids = torch.full((len(which), length), model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(which):
            ids[place, : len(rows[index])] = rows[index]
            mask[place, : len(rows[index])] = 1
        return model(input_ids=ids, attention_mask=mask).logits

    alone = torch.cat([run([index], 0) for index in range(4)])
    for pads in (0, 7, 100):
        torch.testing.assert_close(run([0, 1, 2, 3], pads), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(run([3, 0], pads), alone[[3, 0]], atol=1e-5, rtol=0)
        torch.testing.assert_close(run([1], pads), alone[[1]], atol=1e-5, rtol=0)


def test_counting_padding_does_depend_on_padding(bert):
    """The naive variant is what it says: the control for the test above."""
    crisp.sparsify(bert, sparsity=0.8, rule="percentile", count_padding=True)
    ids = torch.randint(5, 20, (1, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 60))
    with torch.no_grad(), crisp.monitor(bert) as monitor:
        short = bert(input_ids=ids).logits
        sparse = monitor.mean(training=False)
        monitor.reset()
        long = bert(input_ids=padded, attention_mask=(padded > 0).long()).logits
        near_dense = monitor.mean(training=False)
    assert sparse > 0.75
    assert near_dense < 0.05
    assert not torch.allclose(short, long, atol=1e-4)


def test_causal_models_refuse_the_percentile():
    model = llama()
    with pytest.raises(crisp.ConfigurationError, match="Use rule='topk'"):
        crisp.sparsify(model, sparsity=0.5, rule="percentile")
    assert model.config._attn_implementation == "sdpa"
    decoder = BertLMHeadModel(
        BertConfig(
            is_decoder=True, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
            vocab_size=30,
        )
    )  # fmt: skip
    with pytest.raises(crisp.ConfigurationError, match="Use rule='topk'"):
        crisp.sparsify(decoder, sparsity=0.5, rule="percentile")


@pytest.mark.parametrize("rule", ["topk", "random"])
@torch.no_grad()
def test_causal_leak(rule):
    """Later tokens never change earlier outputs."""
    model = crisp.sparsify(llama(), sparsity=0.6, rule=rule)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 7) % 50
    torch.testing.assert_close(model(ids).logits[:, :10], model(changed).logits[:, :10], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["topk", "random"])
@torch.no_grad()
def test_kv_cache_equals_no_cache(rule):
    model = crisp.sparsify(llama(), sparsity=0.6, rule=rule)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    past, steps = None, []
    for position in range(12):
        out = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)


def test_rows_without_a_survivor():
    """A matrix threshold leaves some rows empty; each then keeps its best keys."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 12, 4, generator=draw) for _ in range(3))
    q[:, :, :3] *= 50  # three queries take all the high scores
    for min_keep in (1, 3):
        out = crisp.attention(q, k, v, sparsity=0.9, rule="percentile", min_keep=min_keep, return_details=True)
        per_row = out.keep.sum(-1)[0, 0]
        assert per_row.min() == min_keep
        assert per_row.max() > min_keep
        best = (q @ k.transpose(-1, -2)).topk(min_keep, dim=-1).indices
        assert out.keep.gather(-1, best).all()
        assert torch.isfinite(out.output).all()


def test_one_survivor_has_no_gradient_and_min_keep_is_the_choice():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=draw, requires_grad=True) for _ in range(3))
    for min_keep, has_gradient in ((1, False), (2, True)):
        q.grad = None
        crisp.attention(q, k, v, sparsity=0.99, rule="topk", min_keep=min_keep).square().sum().backward()
        assert bool(q.grad.abs().max() > 1e-6) is has_gradient


def test_ties_all_survive_in_any_order():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    q, v = torch.ones(1, 1, 1, 1), torch.arange(6.0).view(1, 1, 6, 1)
    for order in (torch.arange(6), torch.tensor([4, 0, 5, 2, 1, 3])):
        k = scores[order].view(1, 1, 6, 1)
        out = crisp.attention(q, k, v[:, :, order], sparsity=2 / 3, rule="topk", scale=1.0, return_details=True)
        kept = out.keep[0, 0, 0]
        assert torch.equal(kept, scores[order] >= 2.0)  # two wanted, four tie at the threshold
        assert out.counts.sparsity.item() == pytest.approx(1 - 4 / 6)


def test_selection_happens_in_fp32():
    """Scores that bf16 cannot tell apart are still ranked."""
    q = torch.full((1, 1, 1, 64), 1.0, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16)
    k[0, 0, :, 0] += torch.arange(8) / 64  # differences far below bf16's spacing at a score of 64
    out = crisp.attention(q, k, k, sparsity=0.5, rule="topk", scale=1.0, return_details=True)
    assert out.keep[0, 0, 0].tolist() == [False] * 4 + [True] * 4
    assert out.output.dtype == torch.bfloat16


def test_more_than_two_to_the_24_pairs_and_half_precision():
    """What torch.quantile refuses."""
    q, k, v = (torch.randn(1, 1, 4200, 4).to(torch.float16) for _ in range(3))
    out = crisp.attention(q, k, v, sparsity=0.9, rule="percentile", return_details=True)
    assert out.counts.valid.item() > 2**24
    assert out.counts.sparsity.item() == pytest.approx(0.9, abs=1e-3)


def test_both_registries_know_the_name_and_masks_arrive(bert):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    crisp.sparsify(bert, sparsity=0.5)
    assert "crisp" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert "crisp" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    assert crisp.check(bert).ok  # a padding mask that does not arrive is a problem


@pytest.mark.parametrize("form", ["2d", "4d bool", "4d float"])
@torch.no_grad()
def test_masks_in_every_form_mean_the_same(bert, form):
    crisp.sparsify(bert, sparsity=0.7, rule="percentile")
    ids = torch.randint(5, 20, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    expected = bert(input_ids=ids, attention_mask=mask).logits
    if form != "2d":
        mask = mask.bool()[:, None, None, :].expand(2, 1, 10, 10)
    if form == "4d float":
        mask = torch.zeros(2, 1, 10, 10).masked_fill(~mask, torch.finfo(torch.float32).min)
    torch.testing.assert_close(bert(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_mask_of_none_on_a_causal_model_is_causal():
    from crisp_attention.huggingface.interface import crisp_attention_forward

    model = crisp.sparsify(llama(), sparsity=0.5)
    module = model.model.layers[0].self_attn
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 6, 8, generator=draw)
    k, v = (torch.randn(1, 2, 6, 8, generator=draw) for _ in range(2))
    _, weights = crisp_attention_forward(module, q, k, v, None, output_attentions=True)
    assert (weights.triu(1) == 0).all()


@torch.no_grad()
def test_position_bias_is_ranked_not_dropped():
    """T5 hands its relative positions to the attention function."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=64, vocab_size=50)
    ).eval()  # fmt: skip
    inputs = {"input_ids": torch.arange(2, 14)[None], "decoder_input_ids": torch.arange(2, 8)[None]}
    stock = model(**inputs).logits
    if not model._can_set_attn_implementation():  # older Transformers: T5 computes its attention itself
        with pytest.raises(crisp.UnsupportedModelError, match="never calls"):
            crisp.sparsify(model, sparsity=0.0)
        return
    crisp.sparsify(model, sparsity=0.0)
    with crisp.monitor(model):
        torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-5, rtol=0)
    crisp.sparsify(model, sparsity=0.5)
    before = model(**inputs).logits
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    bias.weight += 3 * torch.randn(bias.weight.shape, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-4)


@torch.no_grad()
def test_left_padding():
    model = crisp.sparsify(llama(), sparsity=0.5)
    ids = torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    alone = model(ids).logits[:, -1]
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = (torch.arange(14) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)


def test_diverged_scores_show():
    """NaN spreads as in dense attention; it does not vanish into zeros."""
    q, k, v = (torch.randn(1, 1, 4, 4) for _ in range(3))
    q[0, 0, 1, 0] = torch.nan
    for rule in RULES:
        assert torch.isnan(crisp.attention(q, k, v, sparsity=0.5, rule=rule)[0, 0, 1]).all()


def test_from_config_models_are_served_too(tiny_folders):
    """A model that was never saved or loaded, as in training from scratch."""
    from transformers import AutoConfig

    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_folders["roberta"]))
    assert crisp.check(crisp.sparsify(model, sparsity=0.5)).ok


def test_several_forwards_before_a_backward_under_checkpointing_are_refused(bert):
    """The first one's random masks could not be drawn again."""
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bert.train()
    ids = torch.arange(5, 15)[None]
    bert(input_ids=ids).logits.sum().backward()  # one after the other is the usual way
    loss = bert(input_ids=ids).logits.sum() + bert(input_ids=ids).logits.sum()
    with pytest.raises(crisp.ConfigurationError, match="Call backward after each forward"):
        loss.backward()


def mistral(**changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 50, "sliding_window": 4,
    } | changes  # fmt: skip
    return MistralModel(MistralConfig(**settings)).eval()


@torch.no_grad()
def test_survivors_stay_within_the_models_own_window():
    model = crisp.sparsify(mistral(), sparsity=0.5)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    weights = model(ids, output_attentions=True).attentions[0]
    distance = torch.arange(12)[:, None] - torch.arange(12)
    assert (weights[..., (distance < 0) | (distance >= 4)] == 0).all()
    assert ((weights > 0).sum(-1)[..., 3:] == 2).all()


@torch.no_grad()
def test_positions_in_a_cache_that_forgets_are_refused():
    """A sliding-window cache drops its first keys, so that the rest no longer know their places."""
    model = crisp.sparsify(mistral(), sparsity=0.5, rule="nm", m=2)
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(crisp.ConfigurationError, match="use_cache=False"):
        model(ids[:, 8:9], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["topk", "top_p", "bottomk"])
def test_packed_sequences_do_not_see_each_other(rule):
    """Several texts in one row, told apart by positions that begin anew."""
    model = crisp.sparsify(llama(), rule=rule)
    ids = torch.randint(0, 50, (1, 14), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(6), torch.arange(8)))[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat((model(ids[:, :6]).logits, model(ids[:, 6:]).logits), dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_unpadded_batches_are_refused():
    """Lengths that only a fused kernel would read are not dropped."""
    model = crisp.sparsify(llama(), sparsity=0.5)
    lengths = torch.tensor([0, 6, 14], dtype=torch.int32)
    with pytest.raises(crisp.UnsupportedArgumentError, match="cu_seq_lens"):
        model(torch.zeros(1, 14, dtype=torch.long), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
