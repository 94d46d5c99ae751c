"""What people put around a model: half precision, LoRA, pipelines, generation."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import crisp_attention as crisp


def inputs():
    ids = torch.randint(5, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["percentile", "topk", "nm", "block_topk"])
def test_autocast_trains_and_removes_what_was_asked_for(bert, dtype, rule):
    crisp.sparsify(bert, sparsity=0.5, rule=rule, **({"key_block": 2} if rule == "block_topk" else {}))
    bert.train()
    with torch.autocast("cpu", dtype=dtype), crisp.monitor(bert) as monitor:
        loss = bert(**inputs(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in bert.parameters() if parameter.grad is not None)
    assert monitor.mean(training=True) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_select_as_their_own_scores_say(bert, dtype):
    crisp.sparsify(bert.to(dtype), sparsity=0.5, rule="percentile")
    with crisp.monitor(bert) as monitor:
        out = bert(**inputs()).logits
    assert out.dtype == dtype
    assert monitor.mean(training=False) == pytest.approx(0.5, abs=0.02)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))


def test_lora_on_top_of_a_sparse_model(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5)
    with torch.no_grad():
        sparse = bert(**inputs()).logits
    wrapped = lora(bert)
    assert crisp.check(wrapped).ok
    with torch.no_grad(), crisp.monitor(wrapped) as monitor:
        assert torch.equal(wrapped(**inputs()).logits, sparse)
    assert monitor.mean(training=False) == pytest.approx(0.5, abs=0.05)
    wrapped(**inputs(), labels=torch.tensor([0, 1])).loss.backward()
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
    assert all("lora" in name or "classifier" in name for name in trained)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs()).logits, sparse)
    merged.save_pretrained(tmp_path)
    assert crisp.load(type(bert), tmp_path).config.crisp_attention["sparsity"] == 0.5


def test_a_model_that_lora_wraps_already_is_sparsified_inside(bert):
    wrapped = lora(bert)
    assert crisp.sparsify(wrapped, sparsity=0.5) is wrapped
    with torch.no_grad(), crisp.monitor(wrapped) as monitor:
        sparse = wrapped(**inputs()).logits
    assert monitor.mean(training=False) == pytest.approx(0.5, abs=0.05)
    with crisp.dense(wrapped), torch.no_grad():
        dense = wrapped(**inputs()).logits
    assert not torch.equal(dense, sparse)
    assert crisp.densify(wrapped) is wrapped
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs()).logits, dense)


def test_a_compiled_wrapper_is_sparsified_inside(bert):
    compiled = torch.compile(bert, backend="eager")
    assert crisp.sparsify(compiled, sparsity=0.5) is compiled
    with torch.no_grad(), crisp.monitor(compiled) as monitor:
        compiled(**inputs())
    assert monitor.mean(training=False) == pytest.approx(0.5, abs=0.05)


def test_pipeline_runs_sparse(tiny_folders):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_folders["bert"]
    model = crisp.sparsify(AutoModelForSequenceClassification.from_pretrained(folder), sparsity=0.7)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    with crisp.monitor(model) as monitor:
        together = classify(["the film was good", "dull and very awful but not bad the plot was great"], batch_size=2)
    assert monitor.mean(training=False) > 0.5
    alone = classify("the film was good")
    assert together[0]["score"] == pytest.approx(alone[0]["score"], abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generation_is_the_same_with_and_without_a_cache(options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            vocab_size=50, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=1,
        )
    ).eval()  # fmt: skip
    crisp.sparsify(model, sparsity=0.5)
    prompt = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(prompt, **given, **options)
    plain = model.generate(
        prompt, **given, use_cache=False, **{k: v for k, v in options.items() if k != "cache_implementation"}
    )
    assert torch.equal(cached, plain)
