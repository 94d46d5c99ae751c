"""Every architecture has the outcome that `docs/compatibility.md` says, and none is wrong.

The quick tier audits one architecture of each kind; the slow tier all of them, each a test of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import crisp_attention as crisp
import zoo
import zoo_table
from fragments import words

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VERSION, RECORDED = zoo_table.read(PAGE.read_text(encoding="utf-8"))
QUICK = ["bert", "clip", "deberta-v2", "gemma2", "gpt_oss", "llama", "t5", "vit"]
TIERS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.MODEL_TYPES]


@pytest.fixture(autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("model_type", TIERS)
def test_has_the_recorded_outcome(model_type):
    row = zoo.row(model_type)
    assert "-" not in row.outcomes, row.reason
    assert zoo.BROKEN not in row.reason
    if transformers.__version__ != VERSION:
        pytest.skip(f"the page is of Transformers {VERSION}, {transformers.__version__} is installed")
    assert zoo_table.line(row) == RECORDED[model_type], "run: python tests/zoo.py --write docs/compatibility.md"


def test_the_page_counts_what_it_lists():
    """At least 150 architectures served, none with a failed check, every one accounted for."""
    served = [line for line in RECORDED.values() if "| served" in line]
    assert len(served) >= 150
    assert not any("✗" in line for line in RECORDED.values())
    if transformers.__version__ == VERSION:
        assert sorted(RECORDED) == zoo.MODEL_TYPES
    for line in RECORDED.values():
        # Whatever is not simply served says why.
        assert "| served |" in line or line.split("|")[-2].strip(), line


def breaks(monkeypatch, **changes):
    """Replace parts of the operator by broken ones."""
    from crisp_attention import state
    from crisp_attention.huggingface import interface

    for name, broken in changes.items():
        room = interface if hasattr(interface, name) else state
        monkeypatch.setattr(room, name, broken(getattr(room, name)))


def failed(model_type):
    report = crisp.audit(zoo.build(model_type))
    assert report.verdict == "refused"
    return {check.name for check in report.failed} or {"refused by sparsify"}


def test_an_operator_without_masks_is_found_out(monkeypatch):
    breaks(
        monkeypatch,
        _read_mask=lambda read: lambda mask, query, key, causal, **rest: read(None, query, key, False, **rest),
    )
    assert failed("bert")


def test_an_operator_that_drops_position_bias_is_found_out(monkeypatch):
    def broken(attend):
        return lambda *args, **kwargs: attend(*args, **{**kwargs, "bias": None})

    breaks(monkeypatch, attend=broken)
    assert failed("t5")


@pytest.mark.parametrize(("model_type", "argument"), [("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_an_operator_that_drops_an_argument_is_found_out(monkeypatch, model_type, argument):
    def broken(attend):
        return lambda *args, **kwargs: attend(*args, **{**kwargs, argument: None})

    breaks(monkeypatch, attend=broken)
    assert failed(model_type)


def test_an_operator_that_removes_nothing_is_found_out(monkeypatch):
    breaks(monkeypatch, attend=lambda attend: lambda *args, **kwargs: attend(*args, **{**kwargs, "config": None}))
    assert "realised sparsity" in failed("llama")


def test_a_rule_that_looks_ahead_is_found_out(monkeypatch):
    """A threshold over the whole matrix: right at sparsity 0, wrong with a cache and for earlier outputs."""
    from crisp_attention import operator

    stock = operator.select

    def across(config, pairs, **kwargs):
        return stock(config.replace(rule="percentile"), pairs, **kwargs)

    monkeypatch.setattr(operator, "select", across)
    assert {"no look ahead", "KV cache equals no cache"} <= failed("llama")


def test_a_rule_that_counts_padding_is_found_out(monkeypatch):
    from crisp_attention import operator

    stock = operator.select

    def naive(config, pairs, **kwargs):
        return stock(config.replace(rule="percentile", count_padding=True), pairs, **kwargs)

    monkeypatch.setattr(operator, "select", naive)
    assert "padding invariance" in failed("bert")


def test_an_audit_leaves_the_model_alone(bert):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    config, state = bert.config.to_dict(), torch.random.get_rng_state()
    crisp.sparsify(bert, sparsity=0.7)
    sparse = bert.config.to_dict()
    report = crisp.audit(bert)
    assert report.verdict == "served", str(report)
    assert report.served
    assert "ok     sparsity 0 equals stock" in str(report)
    shown = words(report._repr_html_())
    assert shown.startswith("served BertForSequenceClassification")
    assert all(f"{check.name} {check.outcome} {check.detail}" in shown for check in report.checks)
    assert bert.config.to_dict() == sparse
    crisp.densify(bert)
    assert bert.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())


def test_inputs_of_an_audit_can_be_given(bert):
    report = crisp.audit(bert, {"input_ids": torch.arange(5, 15).view(2, 5)})
    outcomes = {check.name: check for check in report.checks}
    assert outcomes["batch invariance"].outcome == "ok"
    assert outcomes["padding invariance"].outcome == "not applicable"
    assert outcomes["padding invariance"].detail == "the inputs have no padding mask."
